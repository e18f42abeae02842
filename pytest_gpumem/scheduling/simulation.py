"""What a run would do: the planner on simulated workers, which take the time and memory of tests.

A worker keeps its context once it used the card, a little cache, the wider fixtures of its last
test until it runs one of another module, those of the session until it is told to give them back.
It tells that before a test of another module takes memory, and when a test has ended. A test that
starts when the card has no room for it runs out of memory. A worker that is idle while nothing is
heard of the others is told to the planner as stalled, as the controller's clock does.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem.scheduling.commands import STALL, Fail, Flush, Reset, Run
from pytest_gpumem.scheduling.fixtures import WideFixture
from pytest_gpumem.scheduling.planner import Planner

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_gpumem.scheduling.commands import CardKey, Command
    from pytest_gpumem.scheduling.estimates import PlannedTest

CARD: CardKey = ("", "card")


class Actual(NamedTuple):
    """A test as it really is; seconds and bytes."""

    nodeid: str
    module: str
    gpu: bool
    duration: float
    peak: int
    """Beyond what its process keeps."""
    fixtures: int = 0
    """What its wider fixtures hold."""
    lasting: int = 0
    """The part of it that outlives the module."""

    @property
    def holds(self) -> dict[WideFixture, int]:
        """What its wider fixtures hold: those of the session, and those of the module, as one."""
        own = self.fixtures - self.lasting
        held = {
            WideFixture("", "session"): self.lasting,
            WideFixture(self.module, self.module): own,
        }
        return {fixture: size for fixture, size in held.items() if size}


class Machine(NamedTuple):
    """Where the tests run; bytes."""

    card: int
    context: int
    """What a process costs once it used the card."""
    workers: int
    headroom: int = 0
    """What the planner never gives out."""
    cache: int = 0
    """What a worker's allocator keeps of a test's memory, and no more: else it gives all back."""
    gap: float = 0.0
    """Seconds that pass between two tests of a worker."""
    oom_part: float = 0.0
    """Part of its duration after which a test without room fails."""


class Result(NamedTuple):
    """One run of the suite."""

    seconds: float
    ooms: int = 0
    """Tests that ran out of memory, those tried again included."""
    felled: tuple[int, ...] = ()
    """Those that failed by it."""
    refused: tuple[tuple[int, str], ...] = ()
    """Those that the planner never ran, and why."""
    setups: int = 0
    """Times that a worker went to another module."""
    ended: tuple[int, ...] = ()
    """Tests that had room, in the order in which they ended."""


class Host:
    """Simulated workers on one card; whoever schedules fills their queues."""

    def __init__(self, tests: Sequence[Actual], machine: Machine) -> None:
        workers = machine.workers
        self.tests = tests
        self.now = 0.0
        self.queues: list[deque[int]] = [deque() for _ in range(workers)]
        self.ends: list[tuple[float, int, int, int, bool]] = []
        """When, a number, worker, test, out of memory."""
        self.running = [False] * workers
        self.moved = [0.0] * workers
        """When something was heard of each of them last."""
        self.setups = self.ooms = 0
        self._machine = machine
        self._contexts = [False] * workers
        self._standing: list[dict[WideFixture, int]] = [{} for _ in range(workers)]
        """Bytes that wider fixtures hold."""
        self._used = [0] * workers
        self._cached = [0] * workers
        """Bytes that its allocator has for its own next test."""
        self._modules = [""] * workers
        self._number = 0

    def start(self, worker: int) -> None:
        """Begin the next test of an idle worker, if it has one."""
        if self.enter(worker):
            self.begin(worker)

    def enter(self, worker: int) -> bool:
        """Go to the module of the next test, if an idle worker has one; return whether it has."""
        if self.running[worker] or not self.queues[worker]:
            return False
        test = self.tests[self.queues[worker][0]]
        self.running[worker], self.moved[worker] = True, self.now
        if test.module != self._modules[worker]:
            self.setups += 1
            self._modules[worker] = test.module
            self._tear_down(worker)
        return True

    def _tear_down(self, worker: int) -> None:
        """Let fixtures go that do not outlive a module."""
        standing = self._standing[worker].items()
        self._standing[worker] = {each: size for each, size in standing if not each.node}

    def begin(self, worker: int) -> None:
        """Let the test that a worker has started take its memory."""
        index = self.queues[worker][0]
        test = self.tests[index]
        oom, card = False, self._machine.card
        if test.gpu:
            self._contexts[worker] = True
            before = self._standing[worker]
            lacks = {each: max(size, before.get(each, 0)) for each, size in test.holds.items()}
            self._standing[worker] = before | lacks
            # Before a test runs out of memory, its allocator gives its cache back.
            cached, self._cached[worker] = self._cached[worker], 0
            self._used[worker] = test.peak
            oom = self.taken > card
            if oom:
                self._used[worker] = 0
                if self.taken > card:  # its fixture ran out of memory
                    self._standing[worker] = before
            else:
                self._cached[worker] = max(0, min(cached - test.peak, card - self.taken))
        self.ooms += oom
        self._number += 1
        seconds = test.duration * (self._machine.oom_part if oom else 1)
        end = self.now + seconds + self._machine.gap
        heapq.heappush(self.ends, (end, self._number, worker, index, oom))

    def step(self) -> tuple[int, int, bool]:
        """Let the next test end; return its worker, itself, and whether it was out of memory."""
        self.now, _, worker, test, oom = heapq.heappop(self.ends)
        self.queues[worker].popleft()
        self.running[worker], self.moved[worker] = False, self.now
        cached = self._cached[worker] + self._used[worker]
        self._cached[worker] = cached if cached <= self._machine.cache else 0
        self._used[worker] = 0
        return worker, test, oom

    def flush(self, worker: int, *, all_of_them: bool) -> None:
        """Let a worker give its fixtures back: those of modules, or ``all_of_them``."""
        self._tear_down(worker)
        if all_of_them:
            self._standing[worker] = {}
        self._cached[worker] = 0
        self._modules[worker] = ""
        self.moved[worker] = self.now

    def stalled(self, idle: Sequence[int]) -> list[int]:
        """Return those ``idle`` workers that stall before the next test ends, at their time."""
        if not idle or not self.ends:
            return []
        silent = min(heard for heard, busy in zip(self.moved, self.running, strict=True) if busy)
        due = {worker: max(silent, self.moved[worker]) + STALL for worker in idle}
        first = min(due.values())
        if first >= self.ends[0][0]:
            return []
        self.now = max(self.now, first)
        return [worker for worker in idle if due[worker] <= self.now]

    def kept(self, worker: int) -> tuple[int, dict[str, int]]:
        """Return what a worker keeps, and the part of it that is its fixtures', by name."""
        standing = {fixture.name: size for fixture, size in self._standing[worker].items()}
        context = self._machine.context * self._contexts[worker]
        return context + sum(standing.values()) + self._cached[worker], standing

    @property
    def taken(self) -> int:
        """Bytes of the card that are in use."""
        contexts = self._machine.context * sum(self._contexts)
        standing = sum(sum(each.values()) for each in self._standing)
        return contexts + standing + sum(self._cached) + sum(self._used)


def simulate(
    planned: Sequence[PlannedTest],
    actual: Sequence[Actual],
    machine: Machine,
) -> Result:
    """Return the run of ``planned``, what the planner is told, as ``actual`` turns out.

    Raises:
        RuntimeError: when the planner has nothing to do and is not done.

    """
    host = Host(actual, machine)
    planner = Planner(
        [test._replace(wide=tuple(each.holds)) for test, each in zip(planned, actual, strict=True)],
        {CARD: machine.card},
        context=machine.context,
        headroom=machine.headroom,
    )
    felled: list[int] = []
    refused: list[tuple[int, str]] = []
    ended: list[int] = []
    told: set[int] = set()
    """Workers that stalled since anything was heard, to whom the planner had nothing to say."""
    names = [str(worker) for worker in range(machine.workers)]
    for name in names:
        planner.add_worker(name, [CARD])
    while not planner.done:
        commands = planner.commands()
        _obey(planner, host, commands)
        refused += [(each.test, each.why) for each in commands if isinstance(each, Fail)]
        for name in names:
            if host.enter(int(name)):
                _tell(planner, host, name)
                host.begin(int(name))
        if not host.ends:
            if not commands:
                raise RuntimeError("the planner is stuck")
            continue
        told = set() if commands else told
        if stalled := host.stalled([int(n) for n in planner.keeping() if int(n) not in told]):
            for worker in stalled:
                planner.stalled(names[worker])
            told.update(stalled)
            continue
        worker, test, oom = host.step()
        told.clear()
        again = oom and planner.retries(test)
        if not oom:
            ended.append(test)
        elif not again:
            felled.append(test)
        _tell(planner, host, names[worker])
        took = actual[test]
        planner.finished(
            names[worker],
            test,
            duration=took.duration * (machine.oom_part if oom else 1),
            peak=0 if oom else took.peak,
            fixtures=0 if oom else took.fixtures,
            oom=again,
            felled=oom and not again,
        )
    return Result(host.now, host.ooms, tuple(felled), tuple(refused), host.setups, tuple(ended))


def _obey(planner: Planner, host: Host, commands: Sequence[Command]) -> None:
    for command in commands:
        match command:
            case Run(name, test):
                host.queues[int(name)].append(test)
            case Flush(name) | Reset(name):
                host.flush(int(name), all_of_them=isinstance(command, Reset))
                _tell(planner, host, name)
                planner.flushed(name)


def _tell(planner: Planner, host: Host, name: str) -> None:
    kept, standing = host.kept(int(name))
    if kept:
        planner.resident(name, kept, fixtures=standing)

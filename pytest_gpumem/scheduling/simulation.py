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

    from pytest_gpumem.scheduling.commands import CardKey
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


class _Run:
    """The planner, and the simulated workers that obey it."""

    def __init__(
        self, planned: Sequence[PlannedTest], actual: Sequence[Actual], machine: Machine
    ) -> None:
        self.host = Host(actual, machine)
        self.planner = Planner(
            [
                test._replace(wide=tuple(each.holds))
                for test, each in zip(planned, actual, strict=True)
            ],
            {CARD: machine.card},
            context=machine.context,
            headroom=machine.headroom,
        )
        self._oom_part = machine.oom_part
        self._felled: list[int] = []
        self._refused: list[tuple[int, str]] = []
        self._ended: list[int] = []
        self._told: set[int] = set()
        """Workers that stalled since anything was heard, to whom the planner had nothing to say."""
        self._names = [str(worker) for worker in range(machine.workers)]
        for name in self._names:
            self.planner.add_worker(name, [CARD])

    def obey(self) -> bool:
        """Do what the planner wants, and begin tests; return whether it wanted anything."""
        commands = self.planner.commands()
        for command in commands:
            match command:
                case Run(name, test):
                    self.host.queues[int(name)].append(test)
                case Flush(name) | Reset(name):
                    self.host.flush(int(name), all_of_them=isinstance(command, Reset))
                    self._tell(name)
                    self.planner.flushed(name)
                case Fail(test, why):
                    self._refused.append((test, why))
        if commands:
            self._told.clear()
        for worker, name in enumerate(self._names):
            if self.host.enter(worker):
                self._tell(name)
                self.host.begin(worker)
        return bool(commands)

    def stall(self) -> bool:
        """Tell of workers that stall before the next test ends; return whether there are any."""
        idle = {int(name) for name in self.planner.keeping()} - self._told
        stalled = self.host.stalled(sorted(idle))
        for worker in stalled:
            self.planner.stalled(self._names[worker])
        self._told.update(stalled)
        return bool(stalled)

    def end_test(self) -> None:
        """Let the next test end."""
        worker, test, oom = self.host.step()
        self._told.clear()
        again = oom and self.planner.retries(test)
        if not oom:
            self._ended.append(test)
        elif not again:
            self._felled.append(test)
        self._tell(self._names[worker])
        took = self.host.tests[test]
        self.planner.finished(
            self._names[worker],
            test,
            duration=took.duration * (self._oom_part if oom else 1),
            peak=0 if oom else took.peak,
            fixtures=0 if oom else took.fixtures,
            oom=again,
            felled=oom and not again,
        )

    def _tell(self, name: str) -> None:
        kept, standing = self.host.kept(int(name))
        if kept:
            self.planner.resident(name, kept, fixtures=standing)

    @property
    def result(self) -> Result:
        """What became of it."""
        host, told = self.host, (tuple(self._felled), tuple(self._refused))
        return Result(host.now, host.ooms, *told, host.setups, tuple(self._ended))


def simulate(planned: Sequence[PlannedTest], actual: Sequence[Actual], machine: Machine) -> Result:
    """Return the run of ``planned``, what the planner is told, as ``actual`` turns out.

    Raises:
        RuntimeError: when the planner has nothing to do and is not done.

    """
    run = _Run(planned, actual, machine)
    while not run.planner.done:
        wanted = run.obey()
        if run.host.ends:
            if not run.stall():
                run.end_test()
        elif not wanted:
            raise RuntimeError("the planner is stuck")
    return run.result

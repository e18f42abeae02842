"""The scheduler that xdist asks: its callbacks in, the planner's commands out.

The planner decides which test runs where and when; this module only translates. What the planner
needs to know of the workers comes in their messages (see ``worker``): at collection the marks and
cards that node ids do not carry, after each test what the worker keeps. What a test took comes with
its reports.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpumem.plugin import attempts
from pytest_gpumem.plugin.xdist import lost_workers
from pytest_gpumem.plugin.xdist import worker as xdist_worker
from pytest_gpumem.plugin.xdist.messages import (
    NOTHING_TAKEN,
    cards_of,
    rooms_of,
    taken,
    tell_fixtures,
    tests_of,
)
from pytest_gpumem.plugin.xdist.nodes import LOOK_AGAIN, Node, StallClock, Worker
from pytest_gpumem.scheduling import commands
from pytest_gpumem.scheduling.estimates import planned_tests
from pytest_gpumem.scheduling.planner import Planner
from pytest_gpumem.tuples import NamedTuple

if TYPE_CHECKING:
    from pytest_gpumem.scheduling.history import Expectation


class SchedulerSettings(NamedTuple):
    """What the planner takes for granted; sizes in bytes."""

    context: int
    """What a process costs once it uses a card."""
    headroom: int
    """What is never given out."""
    skip_too_large: bool = False
    """Skip tests that can never run, instead of failing them."""


class GpumemScheduling:
    """An xdist scheduler that never hands out more VRAM than the cards have.

    Implements ``xdist.scheduler.Scheduling``.

    Args:
        config: pytest's configuration in the controller.
        expect: what is known of a test: its node id and its mark's bytes to an expectation.
        settings: what the planner takes for granted.
        expected_workers: how many will collect before anything is scheduled.

    """

    def __init__(
        self,
        config: pytest.Config,
        expect: Callable[[str, int | None], Expectation],
        settings: SchedulerSettings,
        *,
        expected_workers: int,
    ) -> None:
        self.config = config
        self._expect = expect
        self._settings = settings
        self._expected_workers = expected_workers
        self._workers: dict[Node, Worker] = {}
        self._collected = 0
        """Workers that have collected. One that then ended counts: with an argument that does not
        exist each collects nothing and ends, and the last would wait for the others."""
        self._collection: list[str] = []
        self._planner: Planner | None = None
        self._clock = StallClock()
        self._refused = 0
        """Tests that were reported because they can never run."""
        self._owed = attempts.Owed()
        self._again: set[int] = set()
        """Tests that ran out of memory and run once more."""
        self.tests_finished = False
        """Whether nothing is left to do for any worker: xdist asks at each message of any."""

    # What xdist asks

    @property
    def nodes(self) -> list[Node]:
        """Every worker that has not gone."""
        return list(self._workers)

    @property
    def collection_is_completed(self) -> bool:
        """Whether as many workers as there should be have collected."""
        return self._planner is not None or self._collected >= self._expected_workers

    @property
    def has_pending(self) -> bool:
        """Whether tests have been scheduled and not all are complete."""
        return self._planner is not None and not self._planner.done

    # What xdist tells

    def add_node(self, node: Node) -> None:
        """Take note of a worker that has started."""
        self._workers[node] = Worker(node)

    def add_node_collection(self, node: Node, collection: Sequence[str]) -> None:
        """Take note of what a worker collected.

        Raises:
            pytest.UsageError: when the worker did not introduce itself, as it does where it has
                this plugin: it could not run a sentinel.

        """
        worker = self._workers[node]
        if worker.hello is None:
            raise pytest.UsageError(
                f"worker {worker.name} runs without pytest-gpumem (or with another version); "
                "install it there as here, or switch the scheduler off"
            )
        # A replacement that collected other tests stays without any.
        if self._planner is None or list(collection) == self._collection:
            worker.collection = list(collection)
            self._collected += 1
        if self._planner is None:
            self.tests_finished = self.collection_is_completed

    def schedule(self) -> None:
        """Start the planner when all have collected, later let replacements join it."""
        ready = [worker for worker in self._workers.values() if worker.collection is not None]
        if self._planner is not None:
            for worker in ready:
                self._join(self._planner, worker)
            self._obey()
        elif collections_agree(self.config, ready) and ready[0].collection:
            self._collection = ready[0].collection
            self._plan(ready)
            self._obey()

    def mark_test_complete(self, node: Node, item_index: int, duration: float = 0) -> None:
        """Take note of a test, or of a sentinel that has been passed."""
        self._complete(self._workers[node], item_index, duration)
        if self._planner is not None and self._planner.asking:
            self._obey()

    def _complete(self, worker: Worker, index: int, duration: float) -> None:
        worker.moved = time.monotonic()
        worker.sent.remove(index)
        planner, place = self._planner, index - len(self._collection)
        if planner is None or place == xdist_worker.IDLE:
            return
        if place > xdist_worker.IDLE:
            planner.flushed(worker.name)
        elif index in worker.returned:
            worker.returned.remove(index)
        else:
            took = worker.taken
            planner.finished(
                worker.name,
                index,
                duration=duration,
                peak=took.peak,
                fixtures=took.fixtures,
                oom=worker.oom,
                felled=took.oom and not worker.oom,
                ram=took.ram,
            )
            worker.last, worker.taken, worker.oom = index, NOTHING_TAKEN, False

    def remove_pending_tests_from_node(self, node: Node, indices: Mapping[str, Any]) -> None:
        """Read a worker's message: xdist's answer to a "steal" is the one free channel."""
        if indices is LOOK_AGAIN:
            self._look_for_stalls()
            return
        worker = self._workers.get(node)
        if worker is None:
            return
        worker.hello = indices.get("hello", worker.hello)
        worker.left = indices.get("left", worker.left)
        planner = self._planner
        for uuid, (size, fixtures) in indices.get("holding", {}).items():
            worker.holding[uuid] = size, fixtures
            if planner is not None:
                planner.resident(worker.name, size, (worker.host, uuid), fixtures)
        if planner is not None and "ram" in indices:
            grown, worker.too_large = indices["ram"]
            planner.main_memory(worker.name, grown, too_large=bool(worker.too_large))
        if planner is not None:
            worker.returned.update(returned := indices.get("returned", ()))
            planner.returned(worker.name, returned)
            tell_fixtures(planner, worker.name, indices)
            for uuid, used in indices.get("used", {}).items():
                planner.used((worker.host, uuid), used)
            self._obey()

    def remove_node(self, node: Node) -> str | None:
        """Forget a worker that ended or crashed; return the test that crashed it, if one did.

        None did if the worker said that it would end, as it does when its CUDA context is broken.
        """
        worker, planner = self._workers.pop(node), self._planner
        if planner is None or worker.collection is None:
            return None
        crashed = None if worker.left is not None else worker.running(len(self._collection))
        if worker.left is not None:
            self._complete(worker, worker.left, 0.0)
        if worker.replaced:
            lost_workers.replace(self.config, worker, self._collection)
        given = planner.remove_worker(worker.name)
        if given is not None and given != crashed:
            planner.requeue(given)
        self._obey()
        return None if crashed is None else self._collection[crashed]

    def mark_test_pending(self, item: str) -> None:
        """Run a test again that crashed its worker, as a plugin may ask."""
        if self._planner is not None:
            self._planner.requeue(self._collection.index(item))
            self._obey()

    # What reports tell

    def take_report(self, report: pytest.TestReport) -> None:
        """Note what a test took; decide whether one that ran out of memory is tried again."""
        undecided = attempts.UNDECIDED in (told := vars(report))
        if undecided:
            report.outcome = "failed"
        if self._owed.failures:
            self._owed.settle(report)
        worker = self._workers.get(told["node"]) if "node" in told else None
        if worker is None:
            return
        worker.moved = time.monotonic()
        if report.when == "setup":
            waited = worker.moved - self._clock.gave_way
            worker.setup = max(worker.setup, min(report.duration, waited))
        if undecided:
            worker.oom = self._runs_again(report.item_index)
            if worker.oom:
                self._again.add(report.item_index)
                self._owed.promise(report)
        if report.when == "teardown":
            worker.taken = taken(report.user_properties)

    def _runs_again(self, test: int) -> bool:
        """Return whether a test that ran out of memory will be handed out again."""
        # Under -x, say, all workers were told to end: none is given anything more.
        if self._planner is None or all(node.shutting_down for node in self._workers):
            return False
        return self._planner.retries(test)

    def publish_owed(self) -> bool:
        """Report the failures of tests that were to run again and did not; return if any."""
        return self._owed.publish(self.config.hook)

    # What the planner says

    def _plan(self, ready: Sequence[Worker]) -> None:
        hellos = [worker.hello for worker in ready if worker.hello is not None]
        totals, used = cards_of(hellos)
        tests = tests_of(hellos[0])
        most = max(totals.values(), default=0) - self._settings.context - self._settings.headroom
        self._planner = Planner(
            planned_tests(
                self._collection,
                tests["needs"],
                self._expect,
                most=most,
                any_card=bool(totals),
                wide=tests["wide"],
                apart=tests["apart"],
                context=self._settings.context,
                rams=tests["rams"],
            ),
            totals,
            context=self._settings.context,
            headroom=self._settings.headroom,
            rooms=rooms_of(hellos),
            leasing=hellos[0].get("leasing", ()) if totals else (),
        )
        for worker in ready:
            self._join(self._planner, worker)
        for card, size in used.items():
            self._planner.used(card, size)

    def _join(self, planner: Planner, worker: Worker) -> None:
        planner.add_worker(worker.name, worker.cards, worker.host)
        for uuid, (size, fixtures) in worker.holding.items():
            planner.resident(worker.name, size, (worker.host, uuid), fixtures)

    def _obey(self) -> None:
        """Carry out what the planner wants now."""
        assert self._planner is not None  # noqa: S101  # callers have planned
        told = self._planner.commands()
        self.tests_finished = self._planner.done
        by_name = {worker.name: worker for worker in self._workers.values()} if told else {}
        queues: dict[str, list[int]] = {}
        grants: dict[str, dict[int, xdist_worker.Granted]] = {}
        end = len(self._collection)
        for command in told:
            if isinstance(command, commands.Fail):
                self._report_failure(command)
            elif isinstance(command, commands.Stop | commands.Replace):
                by_name[command.worker].replaced = isinstance(command, commands.Replace)
                by_name[command.worker].node.shutdown()
            elif isinstance(command, commands.Run):
                queues.setdefault(command.worker, []).append(command.test)
                if command.grant is not None:
                    # Plain, because execnet does not know its type.
                    size, cards, alone, ram = command.grant
                    grants.setdefault(command.worker, {})[command.test] = size, cards, alone, ram
            else:
                reset = isinstance(command, commands.Reset)
                sentinel = xdist_worker.RESET if reset else xdist_worker.FLUSH
                queues.setdefault(command.worker, []).append(end + sentinel)
        for name, indexes in queues.items():
            worker = by_name[name]
            if not worker.node.shutting_down:
                if name in grants:
                    again = self._again.intersection(grants[name])
                    xdist_worker.send_grants(worker.node, grants[name], sorted(again))
                indexes.append(end + xdist_worker.IDLE)
                worker.sent.extend(indexes)
                worker.node.send_runtest_some(indexes)
                worker.moved = time.monotonic()
        if keeping := self._planner.keeping():
            self._clock.start(next(iter(self._workers)), self._workers.values(), keeping)

    def _look_for_stalls(self) -> None:
        assert self._planner is not None  # noqa: S101  # it started the clock
        for idle in self._clock.strike(self._workers.values(), self._planner.keeping()):
            self._planner.stalled(idle)
        self._obey()

    def _report_failure(self, command: commands.Fail) -> None:
        """Report a test that can never run, as if a worker had."""
        nodeid = self._collection[command.test]
        skip = self._settings.skip_too_large
        most = 0 if skip else self.config.getoption("maxfail", 0)
        if most and self._refused >= most:
            return  # after those before, under -x say, nothing more is run
        self._refused += 1
        report_refusal(next(iter(self._workers)), nodeid, command.why, skip=skip)


def report_refusal(node: Node, nodeid: str, why: str, *, skip: bool) -> None:
    """Report a test that no worker runs, in the name of ``node``."""
    path = nodeid.split("::", maxsplit=1)[0]
    for when, outcome in (("setup", "skipped" if skip else "failed"), ("teardown", "passed")):
        longrepr = (path, 0, why) if skip else why
        report = pytest.TestReport(
            nodeid=nodeid,
            location=(path, None, nodeid),
            keywords={},
            outcome=outcome,  # type: ignore[arg-type]
            longrepr=None if outcome == "passed" else longrepr,
            when=when,  # type: ignore[arg-type]
        )
        node.notify_inproc("testreport", node=node, rep=report)


def collections_agree(config: pytest.Config, ready: Sequence[Worker]) -> bool:
    """Return whether all collected the same tests; if not, report the difference."""
    first = ready[0]
    agree = True
    for other in ready[1:]:
        difference = xdist_worker.difference(
            first.collection or [], other.collection or [], (first.name, other.name)
        )
        if difference:
            agree = False
            report = pytest.CollectReport(
                nodeid=other.name, outcome="failed", longrepr=difference, result=[]
            )
            config.hook.pytest_collectreport(report=report)
    return agree

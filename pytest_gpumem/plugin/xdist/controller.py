"""The controller's side of the scheduler: xdist's callbacks in, the planner's commands out.

The planner decides which test runs where and when; this module only translates. What the planner
needs to know of the workers comes in their messages (see ``xdist_private``): at collection the
marks and cards that node ids do not carry, after each test what the worker keeps. What a test took
comes with its reports.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import pytest

from pytest_gpumem.plugin import attempts
from pytest_gpumem.plugin.xdist import worker as xdist_worker
from pytest_gpumem.records import properties
from pytest_gpumem.scheduling import commands, workers
from pytest_gpumem.scheduling.estimates import PlannedTest
from pytest_gpumem.scheduling.fixtures import WideFixture
from pytest_gpumem.scheduling.planner import Planner

if TYPE_CHECKING:
    from pytest_gpumem.scheduling.history import Expectation


STALL = 0.25
"""Seconds after which a test of which nothing was heard may wait for what an idle worker keeps; or
as many as that worker's slowest set-up took, so that giving back at most doubles a wait..."""
LONGEST_STALL = 10.0
"""... but no more than these."""
LOOK_AGAIN: Mapping[str, Any] = {}
"""A message of nobody's: by it the clock's thread has the controller look for such tests."""


class SchedulerSettings(NamedTuple):
    """What the planner takes for granted; sizes in bytes."""

    context: int
    """What a process costs once it uses a card."""
    headroom: int
    """What is never given out."""
    optimistic: bool = False
    """Let tests of unknown peak share the card."""
    skip_too_large: bool = False
    """Skip tests that can never run, instead of failing them."""


class Node(Protocol):
    """What is used of xdist's ``WorkerController``."""

    gateway: Any
    workerinput: dict[str, Any]

    @property
    def shutting_down(self) -> bool: ...  # noqa: D102  # xdist's

    def send_runtest_some(self, indices: Sequence[int]) -> None: ...  # noqa: D102

    def shutdown(self) -> None: ...  # noqa: D102

    def notify_inproc(self, eventname: str, **kwargs: object) -> None: ...  # noqa: D102


class Taken(NamedTuple):
    """What a test took, on the card where that is most; bytes."""

    peak: int = 0
    """Beyond what its process kept before it."""
    fixtures: int = 0
    """What the wider fixtures that it uses hold."""


@dataclass
class _Worker:
    """What the scheduler knows of one worker."""

    node: Node
    hello: Mapping[str, Any] | None = None
    collection: list[str] | None = None
    sent: deque[int] = field(default_factory=deque)
    """Indexes sent and not complete, sentinels among them, in the order they run."""
    last: int | None = None
    """The test that it completed last."""
    left: int | None = None
    """The test after which it ended itself, with all of it reported."""
    holding: dict[str, tuple[int, int]] = field(default_factory=dict)
    """What it keeps, by card, and how much of that its wider fixtures hold."""
    taken: Taken = Taken()  # noqa: RUF009  # a named tuple
    """What the running test took."""
    returned: set[int] = field(default_factory=set)
    """Of those sent, the tests that it passes over."""
    oom: bool = False
    """Whether the running test shall be tried again because it shared the card."""
    moved: float = 0.0
    """When it was last heard or told to do something."""
    setup: float = 0.0
    """Seconds of its slowest set-up, without what it may have waited for an idle worker."""

    @property
    def name(self) -> str:
        gateway: str = self.node.gateway.id
        return gateway

    @property
    def host(self) -> str:
        return str(self.hello.get("host", "")) if self.hello else ""

    @property
    def cards(self) -> list[commands.CardKey]:
        """Those that it sees, in CUDA's order."""
        told = self.hello["cards"] if self.hello else ()
        return [(self.host, str(card[0])) for card in told]

    @property
    def busy(self) -> bool:
        """Whether it has more to do than to wait behind a sentinel."""
        return len(self.sent) > 1


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
        self._workers: dict[Node, _Worker] = {}
        self._collected = 0
        """Workers that have collected. One that then ended counts: with an argument that does not
        exist each collects nothing and ends, and the last would wait for the others."""
        self._collection: list[str] = []
        self._planner: Planner | None = None
        self._clock: threading.Timer | None = None
        """Runs while a test may wait for an idle worker."""
        self._gave_way = 0.0
        """When an idle worker was last told to give its fixtures back for such a test."""
        self._refused = 0
        """Tests that were reported because they can never run."""
        self._owed = attempts.Owed()

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

    @property
    def tests_finished(self) -> bool:
        """Whether nothing is left to do for any worker."""
        return self.collection_is_completed and not self.has_pending

    # What xdist tells

    def add_node(self, node: Node) -> None:
        """Take note of a worker that has started."""
        self._workers[node] = _Worker(node)

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

    def schedule(self) -> None:
        """Start the planner when all have collected, later let replacements join it."""
        ready = [worker for worker in self._workers.values() if worker.collection is not None]
        if self._planner is not None:
            for worker in ready:
                self._join(self._planner, worker)
            self._obey()
        elif self._collections_agree(ready) and ready[0].collection:
            self._collection = ready[0].collection
            self._plan(ready)
            self._obey()

    def mark_test_complete(self, node: Node, item_index: int, duration: float = 0) -> None:
        """Take note of a test, or of a sentinel that has been passed."""
        self._complete(self._workers[node], item_index, duration)
        if self._planner is not None:
            self._obey()

    def _complete(self, worker: _Worker, index: int, duration: float) -> None:
        worker.moved = time.monotonic()
        worker.sent.remove(index)
        planner, place = self._planner, index - len(self._collection)
        if planner is None or place == xdist_worker.IDLE:
            return
        if place > xdist_worker.IDLE:
            planner.flushed(worker.name)
        elif index in worker.returned:
            worker.returned.remove(index)
            planner.returned(worker.name, index)
        else:
            took = worker.taken
            planner.finished(
                worker.name,
                index,
                duration=duration,
                peak=took.peak,
                fixtures=took.fixtures,
                oom=worker.oom,
            )
            worker.last, worker.taken = index, Taken()
            worker.oom = False

    def remove_pending_tests_from_node(self, node: Node, indices: Mapping[str, Any]) -> None:
        """Read a worker's message: xdist's answer to a "steal" is the one free channel."""
        if indices is LOOK_AGAIN:
            self._look_for_stalls()
            return
        worker = self._workers.get(node)
        if worker is None:
            return
        worker.hello = indices.get("hello", worker.hello)
        worker.returned.update(indices.get("returned", ()))
        worker.left = indices.get("left", worker.left)
        planner = self._planner
        for uuid, (size, fixtures) in indices.get("holding", {}).items():
            worker.holding[uuid] = size, fixtures
            if planner is not None:
                planner.resident(worker.name, size, (worker.host, uuid), fixtures)
        for uuid, used in indices.get("used", {}).items():
            if planner is not None:
                planner.used((worker.host, uuid), used)
        if planner is not None:
            self._obey()

    def remove_node(self, node: Node) -> str | None:
        """Forget a worker that ended or crashed; return the test that crashed it, if one did.

        None did if the worker said that it would end, as it does when its CUDA context is broken.
        """
        worker, planner = self._workers.pop(node), self._planner
        if planner is None or worker.collection is None:
            return None
        if worker.left is not None:
            self._complete(worker, worker.left, 0.0)
            crashed = None
        else:
            crashed = self._running(worker)
        given = planner.remove_worker(worker.name)
        if given is not None and given != crashed:
            planner.requeue(given)
        self._obey()
        return None if crashed is None else self._collection[crashed]

    def _running(self, worker: _Worker) -> int | None:
        """Return the test that a worker runs, or whose late teardown it runs."""
        if not worker.sent or worker.sent[0] < len(self._collection):
            return worker.sent[0] if worker.sent else None
        released = len(worker.sent) > 1 or worker.node.shutting_down
        return worker.last if released else None

    def mark_test_pending(self, item: str) -> None:
        """Run a test again that crashed its worker, as a plugin may ask."""
        if self._planner is not None:
            self._planner.requeue(self._collection.index(item))
            self._obey()

    # What reports tell

    def take_report(self, report: pytest.TestReport) -> None:
        """Note what a test took; decide whether one that ran out of memory is tried again."""
        undecided = hasattr(report, attempts.UNDECIDED)
        if undecided:
            report.outcome = "failed"
        self._owed.settle(report)
        node: Any = getattr(report, "node", None)
        worker = self._workers.get(node)
        if worker is None:
            return
        worker.moved = time.monotonic()
        if report.when == "setup":
            worker.setup = max(worker.setup, min(report.duration, worker.moved - self._gave_way))
        if undecided:
            worker.oom = self._runs_again(report.item_index)
            if worker.oom:
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

    def _plan(self, ready: Sequence[_Worker]) -> None:
        hellos = [worker.hello for worker in ready if worker.hello is not None]
        totals, used = cards_of(hellos)
        kept = self._settings.context + self._settings.headroom
        most = max(totals.values(), default=0) - kept
        self._planner = Planner(
            planned_tests(
                self._collection,
                hellos[0]["needs"],
                self._expect,
                most=most,
                any_card=bool(totals),
                wide=hellos[0]["wide"],
            ),
            totals,
            context=self._settings.context,
            headroom=self._settings.headroom,
            optimistic=self._settings.optimistic,
        )
        for worker in ready:
            self._join(self._planner, worker)
        for card, size in used.items():
            self._planner.used(card, size)

    def _join(self, planner: Planner, worker: _Worker) -> None:
        planner.add_worker(worker.name, worker.cards)
        for uuid, (size, fixtures) in worker.holding.items():
            planner.resident(worker.name, size, (worker.host, uuid), fixtures)

    def _obey(self) -> None:
        """Carry out what the planner wants now."""
        assert self._planner is not None  # noqa: S101  # callers have planned
        by_name = {worker.name: worker for worker in self._workers.values()}
        queues: dict[str, list[int]] = {}
        grants: dict[str, dict[int, xdist_worker.Granted]] = {}
        end = len(self._collection)
        for command in self._planner.commands():
            if isinstance(command, commands.Fail):
                self._report_failure(command)
            elif isinstance(command, commands.Stop):
                by_name[command.worker].node.shutdown()
            elif isinstance(command, commands.Run):
                queues.setdefault(command.worker, []).append(command.test)
                if command.grant is not None:
                    size, cards, alone = command.grant
                    grants.setdefault(command.worker, {})[command.test] = size, cards, alone
            else:
                reset = isinstance(command, commands.Reset)
                sentinel = xdist_worker.RESET if reset else xdist_worker.FLUSH
                queues.setdefault(command.worker, []).append(end + sentinel)
        for name, indexes in queues.items():
            worker = by_name[name]
            if not worker.node.shutting_down:
                if name in grants:
                    xdist_worker.send_grants(worker.node, grants[name])
                indexes.append(end + xdist_worker.IDLE)
                worker.sent.extend(indexes)
                worker.node.send_runtest_some(indexes)
                worker.moved = time.monotonic()
        self._start_clock()

    # What nobody tells

    def _start_clock(self) -> None:
        """See to it that stalls are looked for, if only silence tells of them."""
        assert self._planner is not None  # noqa: S101  # callers have planned
        if self._clock is None and self._planner.keeping():
            node = next(iter(self._workers))
            self._clock = threading.Timer(
                STALL, node.notify_inproc, ("unscheduled",), {"node": node, "indices": LOOK_AGAIN}
            )
            self._clock.daemon = True
            self._clock.start()

    def _look_for_stalls(self) -> None:
        """Tell the planner of idle workers beside which a test has been silent for too long."""
        assert self._planner is not None  # noqa: S101  # it started the clock
        self._clock, now = None, time.monotonic()
        silent = min((each.moved for each in self._workers.values() if each.busy), default=now)
        keeping = self._planner.keeping()
        for worker in self._workers.values():
            waited = now - max(silent, worker.moved)
            if worker.name in keeping and waited >= min(LONGEST_STALL, max(STALL, worker.setup)):
                self._planner.stalled(worker.name)
                self._gave_way = now
        self._obey()

    def _report_failure(self, command: commands.Fail) -> None:
        """Report a test that can never run, as if a worker had."""
        nodeid = self._collection[command.test]
        path = nodeid.split("::")[0]
        skip = self._settings.skip_too_large
        most = 0 if skip else self.config.getoption("maxfail", 0)
        if most and self._refused >= most:
            return  # after those before, under -x say, nothing more is run
        self._refused += 1
        node = next(iter(self._workers))
        for when, outcome in (("setup", "skipped" if skip else "failed"), ("teardown", "passed")):
            longrepr = (path, 0, command.why) if skip else command.why
            report = pytest.TestReport(
                nodeid=nodeid,
                location=(path, None, nodeid),
                keywords={},
                outcome=outcome,  # type: ignore[arg-type]
                longrepr=None if outcome == "passed" else longrepr,
                when=when,  # type: ignore[arg-type]
            )
            node.notify_inproc("testreport", node=node, rep=report)

    def _collections_agree(self, ready: Sequence[_Worker]) -> bool:
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
                self.config.hook.pytest_collectreport(report=report)
        return agree


def planned_tests(
    collection: Sequence[str],
    needs: Iterable[tuple[int, int | None, int, bool]],
    expect: Callable[[str, int | None], Expectation],
    *,
    most: int,
    any_card: bool,
    wide: tuple[Sequence[xdist_worker.Told], Sequence[int]] = ((), ()),
) -> list[PlannedTest]:
    """Return the collected tests with what is expected of them.

    ``needs`` are the marked tests: index, bytes (None: not said), cards, exclusive. Without any
    card they are tests like others, which find out for themselves. ``most`` are the bytes that a
    test can have: only a mark may ask for more, an estimate with its margin may not. ``wide`` are
    the wide fixtures, as ``worker.wide_fixtures`` tells.
    """
    sets = [tuple(WideFixture(*each) for each in told) for told in wide[0]]
    wide_of = dict(enumerate(sets[place] for place in wide[1]))
    marked = {need[0]: need for need in needs}
    planned = []
    for index, nodeid in enumerate(collection):
        _, vram, cards, exclusive = marked.get(index, (index, None, 1, False))
        expected = expect(nodeid, vram)
        peak, held = expected.peak, expected.fixtures
        if peak is not None and expected.source != "mark":
            peak = min(peak, max(0, most))
            held = min(held, max(0, most - peak))
        planned.append(
            PlannedTest(
                nodeid=nodeid,
                gpu=any_card and (expected.gpu or index in marked),
                peak=peak,
                duration=expected.duration,
                group=nodeid.split("::")[0],
                cards=cards,
                exclusive=exclusive,
                seen=expected.source == "learned",
                fixtures=held,
                wide=wide_of.get(index, ()),
            )
        )
    return planned


def cards_of(
    hellos: Iterable[Mapping[str, Any]],
) -> tuple[dict[commands.CardKey, int], dict[commands.CardKey, int]]:
    """Return each card's total, and what anybody uses of it, in bytes.

    Each worker told of its host and cards: uuid, total, used.
    """
    totals: dict[commands.CardKey, int] = {}
    used: dict[commands.CardKey, int] = {}
    for hello in hellos:
        for uuid, total, by_all in hello["cards"]:
            card = hello.get("host", ""), uuid
            totals[card] = total
            used[card] = max(used.get(card, 0), by_all)
    return totals, used


def taken(told: Iterable[tuple[str, object]]) -> Taken:
    """Return what a test took, from its report."""
    cards = properties.read(told).cards
    return Taken(
        max((usage.extra for usage in cards), default=0),
        max((usage.fixture_bytes for usage in cards), default=0),
    )


class Controller:
    """The hooks that put the scheduler into an xdist run.

    Args:
        config: pytest's configuration in the controller.
        expect: as for ``GpumemScheduling``.
        settings: as for ``GpumemScheduling``.
        why_not: why another scheduler than ours shall decide; looked for if not given.

    """

    def __init__(
        self,
        config: pytest.Config,
        expect: Callable[[str, int | None], Expectation],
        settings: SchedulerSettings,
        why_not: str | None = None,
    ) -> None:
        self.config = config
        self._expect = expect
        self._settings = settings
        self._expected_workers = 0
        self._scheduler: GpumemScheduling | None = None
        self._why_not = why_not

    @property
    def why_not(self) -> str:
        """Why another scheduler than ours decides, "" when ours does."""
        if self._why_not is None:
            self._why_not = self._find_why_not()
        return self._why_not

    def _find_why_not(self) -> str:
        dist = self.config.getoption("dist")
        if dist != "load":
            return f"--dist {dist} has its own order"
        hook = self.config.hook.pytest_xdist_make_scheduler
        strangers = [
            each.plugin_name
            for each in hook.get_hookimpls()
            if each.plugin is not self and each.plugin_name != "dsession"
        ]
        if strangers:
            return f"{strangers[0]} brings its own scheduler"
        return xdist_worker.why_not()

    def pytest_xdist_setupnodes(self, specs: Sequence[Any]) -> None:
        """Tell the workers of each host of one another, so that they spread over its cards.

        In the gateway's environment, because the worker's conftests are loaded before it reads
        ``workerinput``; a replacement inherits its predecessor's.
        """
        self._expected_workers = len(specs)
        for spec, views in zip(specs, workers.views(specs), strict=True):
            spec.env.setdefault(workers.VIEWS, views)

    @pytest.hookimpl(tryfirst=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config) -> GpumemScheduling | None:
        """Take the place of ``--dist load``."""
        if self.why_not:
            return None
        self._scheduler = GpumemScheduling(
            config, self._expect, self._settings, expected_workers=self._expected_workers
        )
        return self._scheduler

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Read what a test took, and settle its outcome, before anybody else sees the report."""
        if self._scheduler is not None:
            self._scheduler.take_report(report)

    # First, so that everybody who writes results sees them.
    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Report failures that were called reruns although the run ended before these."""
        owed = self._scheduler is not None and self._scheduler.publish_owed()
        if owed and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

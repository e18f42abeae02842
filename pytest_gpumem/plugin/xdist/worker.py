"""The worker's side of the scheduler, and all that rests on xdist's and pytest's own affairs.

xdist starts a test only when it knows the next one, because fixtures are torn down with regard to
it. So that a worker can run exactly one test and then wait, each worker appends sentinel items to
its session, after it has reported what it collected: their indexes follow the last test's. A
sentinel runs nothing and reports nothing; it says how much the worker keeps set up meanwhile, and
tears the rest down when the next item is known.

What is used beyond the public interfaces, tried with pytest 8.4 and 9.2 and xdist 3.8:
``session.items`` is appended to, ``SetupState.teardown_exact`` is called, ``CaptureManager``
captures its output, ``WorkerInteractor.sendevent`` carries messages as answers to a "steal" that
nobody asked for, ``WorkerController.sendcommand`` and ``WorkerInteractor.handle_command`` carry
one command more, and ``WorkerInteractor.item_index`` says whose report it is. ``why_not`` tries
what can be tried before a run rests on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpumem.clock import clock
from pytest_gpumem.records.properties import BROKE

if TYPE_CHECKING:
    from pytest_gpumem.scheduling.workers import CardUse

SENTINELS = ("idle", "flush", "reset")
IDLE, FLUSH, RESET = range(3)
"""Offsets of the sentinels behind the last test: keep everything but the function's own fixtures,
keep session fixtures only, keep nothing."""

ASKED = "gpumem_sentinels"
"""Key in ``workerinput`` by which the controller asks for sentinels and messages."""

GRANTS = "gpumem_grants"
"""Command by which the controller tells what it has set aside for the tests it hands out."""

Granted = tuple[int | None, int, bool, int]
"""Bytes beyond what the process keeps (None: the whole card), cards, alone or not."""


def kept(chain: Sequence[Any], sentinel: int) -> Sequence[Any]:
    """Return those nodes of the previous test's ``chain`` that stay set up behind a sentinel."""
    return chain[: {IDLE: len(chain) - 1, FLUSH: 1, RESET: 0}[sentinel]]


class Sentinel(pytest.Item):
    """An item behind which a worker waits; it stands for the test that ran before it."""

    place: int
    stage: Stage

    @property
    def nodeid(self) -> str:
        """The previous test's: warnings of its late teardown are its own."""
        previous = self.stage.previous
        return super().nodeid if previous is None else previous.nodeid

    def listchain(self) -> list[Any]:
        """Return what ``teardown_exact`` leaves set up, and itself."""
        previous = self.stage.previous
        if previous is None or self.stage.spoiled:
            return [self]
        return [*kept(previous.listchain(), self.place), self]

    def iter_markers_with_node(self, name: str | None = None) -> Iterator[tuple[Any, pytest.Mark]]:
        """Return the previous test's marks: its warning filters hold for its late teardown."""
        previous = self.stage.previous
        return iter(()) if previous is None else previous.iter_markers_with_node(name)

    def runtest(self) -> None:
        """Do nothing."""


class Worker:
    """Says what this worker collected and brings the sentinels in, when the controller asked.

    Args:
        config: pytest's configuration in the worker.
        hello: returns what the controller must know before it schedules, from the items: plain
            builtin values.
        holding: returns by card (UUID) the bytes this process keeps on it, context included, and
            how many of them wider fixtures hold, by identity; nothing of cards that it has not
            used.
        used: looks at what anybody uses of the cards, now and then.
        release: gives cached VRAM back to the driver after fixtures were torn down on command.
        late: measures what is torn down, while the worker waits, after the test of this node id.

    """

    def __init__(
        self,
        config: pytest.Config,
        *,
        hello: Callable[[Sequence[pytest.Item]], Mapping[str, Any]],
        holding: Callable[[], Mapping[str, tuple[int, dict[str, int]]]],
        used: CardUse,
        release: Callable[[], None],
        late: Callable[[str], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._interactor = _interactor(config)
        self._hello = hello
        self.holding = holding
        self.used = used
        self.ram: Callable[[], tuple[int, int] | None] | None = None
        """Returns the bytes of main memory that this process keeps more than before its first test,
        and all that it has if that is too much, else 0; None when nothing is new. None where nobody
        asks."""
        self.release = release
        self.late = late
        self.spoiled = False
        """Whether the test that ends may run again, and its set-up failed, by which it would fail
        again: nothing stays set up behind it."""
        self.returned: set[int] = set()
        """Of what was handed out, the tests to pass over."""
        self._grants: dict[int, Granted] = {}
        self._again: set[int] = set()
        self._stage: Stage | None = None

    def return_queue(self) -> None:
        """Let the controller hand out anew what waits here: it may want a card after all."""
        with self._interactor.torun.lock() as queued:
            waiting = [self._interactor.nextitem_index, *queued]
        tests = range(self._sentinels)
        # What was handed out anew already may wait here twice, and is passed over once.
        if returned := [each for each in waiting if each in tests and each not in self.returned]:
            self.returned.update(returned)
            self.send(returned=returned)

    def granted(self) -> Granted | None:
        """Return what was set aside for the test that begins now, once; None if nothing."""
        return self._grants.pop(self._interactor.item_index, None) if self._grants else None

    @property
    def again(self) -> str:
        """The test that begins now, if it ran out of memory before; its nodeid, or ""."""
        index = self._interactor.item_index
        found: str = self._interactor.session.items[index].nodeid if index in self._again else ""
        return found

    def leave(self) -> None:
        """Tell that this process ends on purpose, with all of the running test reported."""
        self.send(left=self._interactor.item_index)

    def tell(self, **message: Any) -> None:
        """Tell what this process holds now, and what there is to say besides."""
        if self._stage is not None:
            self._stage.tell(**message)

    def test_ended(self) -> None:
        """Tell what this process holds now that a test has ended."""
        if self._stage is not None:
            self._stage.test_ended()

    def send(self, **message: Any) -> None:
        """Send builtin values to the controller's scheduler; works over any gateway."""
        self._interactor.sendevent("unscheduled", indices=message)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Introduce this worker; first, because xdist's own message starts the scheduling."""
        self.send(hello=dict(self._hello(session.items)), holding=dict(self.holding()))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        """Bring the sentinels in, now that the collection has been reported without them."""
        self._listen()
        self._sentinels = len(session.items)
        # Registered now, as the last of all: its hooks are called before any other plugin's.
        self._stage = Stage(self, self._interactor, session)
        session.config.pluginmanager.register(self._stage, "gpumem-stage")

    def _listen(self) -> None:
        """Take note of grants; xdist begins to listen in a moment."""
        others = self._interactor.handle_command

        def handle(command: Any) -> None:
            if isinstance(command, tuple) and command[0] == GRANTS:
                self._grants.update(command[1]["grants"])
                self._again.update(command[1]["again"])
                return
            others(command)

        self._interactor.handle_command = handle


class Stage:
    """Runs the sentinels of one worker, and tells what the worker keeps after each item."""

    def __init__(self, worker: Worker, interactor: Any, session: pytest.Session) -> None:
        self._worker = worker
        self._interactor = interactor
        self._session = session
        self.previous: pytest.Item | None = None
        """The test that ran last."""
        self._index = 0
        self._told: Mapping[str, tuple[int, dict[str, int]]] = {}
        for place, name in enumerate(SENTINELS):
            sentinel: Sentinel = Sentinel.from_parent(session, name=f"gpumem-{name}")
            sentinel.place, sentinel.stage = place, self
            session.items.append(sentinel)

    @property
    def spoiled(self) -> bool:
        """Whether nothing stays set up behind the test."""
        return self._worker.spoiled

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> bool | None:
        """Run a sentinel; note a test, which others run, unless it was returned.

        A sentinel follows those that were: it tears down what stands.
        """
        worker, index = self._worker, self._interactor.item_index
        if index in worker.returned:
            worker.returned.remove(index)
            return True
        if clock.monotonic() >= worker.used.look_at:
            self.tell()
        if not isinstance(item, Sentinel):
            self.previous, self._index, worker.spoiled = item, index, False
            return None
        with worker.late(item.nodeid):
            if item.place != IDLE:
                worker.release()
            if self.previous is not None:
                self._tear_down(self.previous, nextitem)
        self.test_ended()  # what is kept once processes that were ended have given theirs back
        return True

    def _tear_down(self, previous: pytest.Item, nextitem: pytest.Item | None) -> None:
        """Tear down what ``nextitem`` does not need; an error is the previous test's."""
        report = tear_down(previous, nextitem)
        if report is not None:
            # xdist checks that a report is of the item that it believes to be running.
            running, self._interactor.item_index = self._interactor.item_index, self._index
            previous.ihook.pytest_runtest_logreport(report=report)
            self._interactor.item_index = running

    def tell(self, **message: Any) -> None:
        """Tell what is kept, if that is new, and what else there is to say."""
        used, holding = self._worker.used(), self._worker.holding()
        if holding != self._told or used:
            self._told = holding
            message |= {"holding": dict(holding), "used": dict(used)}
        if message:
            self._worker.send(**message)

    def test_ended(self) -> None:
        """Tell what is kept when a test has ended, before xdist tells that it has."""
        self.tell()
        if self._worker.ram is not None and (ram := self._worker.ram()) is not None:
            self._worker.send(ram=ram)
            if ram[1]:  # what waits here of other modules is for whoever takes its place
                self._worker.return_queue()


def tear_down(item: pytest.Item, nextitem: pytest.Item | None) -> pytest.TestReport | None:
    """Tear down what ``nextitem`` does not need, after the teardown of ``item``.

    Returns the report of an error, which is the test's.
    """
    state = item.session._setupstate
    with _captured(item):
        call = pytest.CallInfo.from_call(
            lambda: state.teardown_exact(nextitem),
            when="teardown",
            reraise=(pytest.exit.Exception, KeyboardInterrupt),
        )
    if call.excinfo is None:
        return None
    report: pytest.TestReport = item.ihook.pytest_runtest_makereport(item=item, call=call)
    # The others were sent with the test's own teardown.
    report.user_properties = [each for each in report.user_properties if each[0] == BROKE]
    return report


def run_unreported(item: pytest.Item, nextitem: pytest.Item | None) -> list[pytest.TestReport]:
    """Run a test as pytest does, and tell nobody but the caller.

    By ``runtestprotocol``, which plugins that run tests again have called since pytest 3.
    """
    from _pytest.runner import runtestprotocol

    return runtestprotocol(item, log=False, nextitem=nextitem)


def why_not_unreported(item: pytest.Item) -> str:
    """Return why a test cannot run without being told of, "" if it can."""
    names = getattr(getattr(getattr(item, "obj", None), "__code__", None), "co_names", ())
    if "subtests" in getattr(item, "fixturenames", ()) or "subTest" in names:
        return "its subtests would be reported twice"  # which report by themselves
    return ""


def _interactor(config: pytest.Config) -> Any:
    """Return xdist's plugin that talks to the controller.

    It runs xdist's file as a module of another name, so its class is not the one to import.
    """
    for plugin in config.pluginmanager.get_plugins():
        if type(plugin).__name__ == "WorkerInteractor":
            return plugin
    raise LookupError("this process has no WorkerInteractor of xdist")


@contextlib.contextmanager
def _captured(item: pytest.Item) -> Iterator[None]:
    """Capture what is printed as the output of the item's teardown."""
    manager = item.config.pluginmanager.getplugin("capturemanager")
    shown = contextlib.ExitStack()
    # Where a test closed what pytest captures into, pytest says so in each of its own phases.
    closed = contextlib.suppress(ValueError)
    with closed:
        if manager is not None:
            shown.enter_context(manager.item_capture("teardown", item))
    try:
        yield
    finally:
        with closed:
            shown.close()


def send_grants(node: Any, grants: Mapping[int, Granted], again: Sequence[int] = ()) -> None:
    """Tell a worker what is set aside for tests that it will be handed next.

    ``again`` are those of them that ran out of memory before.
    """
    node.sendcommand(GRANTS, grants=dict(grants), again=list(again))


def difference(first: Sequence[str], other: Sequence[str], names: tuple[str, str]) -> str:
    """Return how two workers' collections differ, in xdist's words; "" when they are equal."""
    from xdist.report import report_collection_diff  # type: ignore[import-untyped]

    return report_collection_diff(first, other, *names) or ""


def why_not() -> str:
    """Return why sentinels cannot be used with the pytest and xdist that are here, "" if they can.

    Tried on stand-ins in well under a millisecond, so each run can afford it.
    """
    try:
        _try_teardown()
        _look_at_xdist()
    except Exception as error:
        versions = f"pytest {version('pytest')} and xdist {version('pytest-xdist')}"
        return f"{versions} are not as this scheduler knows them ({type(error).__name__}: {error})"
    return ""


class _Probe:
    """A node of a collection tree that notes its teardown."""

    def __init__(self, name: str, chain: Sequence[_Probe], gone: list[str]) -> None:
        self.chain = [*chain, self]
        self.teardown = lambda: gone.append(name)

    def listchain(self) -> list[_Probe]:
        return self.chain

    def setup(self) -> None:
        pass


def _try_teardown() -> None:
    """Check that each sentinel would leave set up what it should."""
    from _pytest.runner import SetupState

    gone: list[str] = []
    session = _Probe("session", (), gone)
    module = _Probe("module", session.chain, gone)
    test = _Probe("test", module.chain, gone)
    state: Any = SetupState()
    state.setup(test)
    for sentinel, expected in ((IDLE, "test"), (FLUSH, "module"), (RESET, "session")):
        state.teardown_exact(_Probe("sentinel", kept(test.chain, sentinel), gone))
        _expect(gone == [expected], f"teardown_exact tears {gone} down, not {expected}")
        gone.clear()


def _look_at_xdist() -> None:
    """Check that xdist's worker and controller have what messages and reports go through."""
    from _pytest.capture import CaptureManager
    from xdist.dsession import DSession  # type: ignore[import-untyped]  # xdist marks no types
    from xdist.remote import WorkerInteractor  # type: ignore[import-untyped]
    from xdist.workermanage import WorkerController  # type: ignore[import-untyped]

    for function, names in (
        (WorkerInteractor.run_one_test, {"item_index", "nextitem_index", "items", "sendevent"}),
        (WorkerInteractor.steal, {"torun", "lock"}),
        (WorkerInteractor.pytest_runtest_logreport, {"item_index"}),
        (WorkerInteractor.sendevent, {"channel", "send"}),
        (WorkerInteractor.pytest_runtestloop, {"handle_command", "setcallback"}),
        (WorkerController.sendcommand, {"channel", "send"}),
        (DSession.worker_unscheduled, {"remove_pending_tests_from_node"}),
        (DSession.worker_testreport, {"pytest_runtest_logreport"}),
        (CaptureManager.item_capture, set()),
    ):
        code: Any = getattr(function, "__wrapped__", function).__code__
        missing = names - set(code.co_names)
        _expect(not missing, f"{function.__qualname__} does not use {', '.join(sorted(missing))}")


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)

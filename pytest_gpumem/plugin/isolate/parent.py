"""Hands tests to fresh processes, and lets what these tell be the tests' own reports."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpumem.devices import family
from pytest_gpumem.plugin import attempts, retry
from pytest_gpumem.plugin.isolate.child import name_of
from pytest_gpumem.plugin.isolate.coverage_lines import covering
from pytest_gpumem.plugin.isolate.plain import read_warning
from pytest_gpumem.plugin.isolate.process import Blueprint, Process
from pytest_gpumem.plugin.ladder import Ladder
from pytest_gpumem.plugin.measure import Measuring
from pytest_gpumem.plugin.state import APART, GRANT, USAGE, State, is_isolated, marks_of, stashed
from pytest_gpumem.plugin.xdist.worker import Sentinel, tear_down
from pytest_gpumem.records import properties
from pytest_gpumem.tracking.accounts import Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_gpumem.plugin.isolate.process import Message
    from pytest_gpumem.records import CardUsage

_IN = {"setup": " in its set-up", "call": "", "teardown": " in its teardown"}


class Isolating:
    """Has tests run in processes of their own, one after another.

    Args:
        config: pytest's configuration.
        state: the plugin's.

    """

    NAME = "gpumem-isolating"

    def __init__(self, config: pytest.Config, state: State) -> None:
        plugins = config.pluginmanager
        self._config = config
        self._state = state
        self._how = state.settings.isolate
        self._ladder: Ladder | None = plugins.getplugin(Ladder.NAME)
        self._measuring: Measuring | None = plugins.getplugin(Measuring.NAME)
        # Now, before tests change them.
        if self._ladder is not None:
            self._ladder.watch_reports()
        self._environment = _environment()
        self._path = list(sys.path)
        self._input = _workerinput(config, state)
        self._covering = None if plugins.hasplugin("_cov") else covering()
        self._spare: Process | None = None
        """One that waits for its test."""
        self._cold: set[str] = set()
        """Files whose import uses a card: a process that waits has none."""
        self._count = 0
        self._ran: set[pytest.Item] = set()

    def pytest_runtestloop(self, session: pytest.Session) -> None:
        """Let a process get ready for the first of the tests that are to be isolated.

        Not in a worker of xdist, which does not know if it will be given one.
        """
        if not hasattr(session.config, "workerinput"):
            self._prepare(session.items)

    def pytest_sessionfinish(self) -> None:
        """End a process for which there was no test; take over what the others covered."""
        if self._spare is not None:
            self._leave(self._spare)
            self._spare = None
        if self._covering is not None:
            self._covering.gather()

    # Which tests, and in what order

    def _wants(self, item: pytest.Item) -> bool:
        if isinstance(item, Sentinel):
            return False
        ladder = self._ladder
        again = ladder is not None and (ladder.step == retry.FRESH or ladder.is_lost)
        return again or is_isolated(item, self._how)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> bool | None:
        """Run a test in a process of its own, if it is to be."""
        if not self._wants(item):
            return None
        hook, session = item.ihook, item.session
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        if self._may_begin(item):
            _cancel_timer(item)
            self._run(item)
        # What the test before has left set up for this one, and the next one does not need.
        with self._measured(item):
            stops = session.shouldfail or session.shouldstop
            report = tear_down(item, None if stops else nextitem)
        if report is not None:
            hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _measured(self, item: pytest.Item) -> Any:
        measuring = self._measuring
        return nullcontext() if measuring is None else measuring.late_teardowns(item.nodeid)

    def _may_begin(self, item: pytest.Item) -> bool:
        """Take the lease of a test, if there are leases; report a test that can have none."""
        ladder = self._ladder
        if ladder is None:
            return True
        call = pytest.CallInfo.from_call(
            lambda: ladder.begin(item, marks_of(item), apart=True),
            when="setup",
            reraise=(pytest.exit.Exception, KeyboardInterrupt),
        )
        if call.excinfo is None:
            return True
        hook = item.ihook
        end = pytest.CallInfo.from_call(lambda: None, when="teardown")
        for each in (call, end):
            report = hook.pytest_runtest_makereport(item=item, call=each)
            hook.pytest_runtest_logreport(report=report)
        return False

    # The processes

    def _run(self, item: pytest.Item) -> None:
        self._ran.add(item)
        step = "" if self._ladder is None else self._ladder.step
        following = Following(item, self._publish)
        try:
            process = self._process(item)
        except OSError as error:
            following.not_begun(str(error))
            return
        try:
            process.send("run", item.nodeid, name_of(item), str(item.path), step)
            if not step:
                self._prepare_next(item)
            following.follow(process)
        except BaseException:
            process.interrupt()
            raise
        finally:
            self._leave(process)
        if following.note:
            self._state.notes.append(following.note)
        following.stop_run()

    def _process(self, item: pytest.Item) -> Process:
        """Return a process for a test: the one that waits, or a new one."""
        spare, self._spare = self._spare, None
        if spare is not None and spare.said():
            # It has collected. Has its file used a card, it must not wait beside others.
            ready = spare.receive()
            if ready is not None and ready[0] == "ready" and not ready[1]:
                return spare
            if ready is not None:
                self._cold.add(spare.file)
        elif spare is not None:
            return spare
        if spare is not None:
            self._leave(spare)
        return self._start(str(item.path))

    def _prepare_next(self, item: pytest.Item) -> None:
        items = item.session.items
        at = items.index(item) + 1
        # A worker of xdist is given them in any order.
        earlier = items[:at] if hasattr(self._config, "workerinput") else ()
        self._prepare([*items[at:], *earlier])

    def _prepare(self, items: Sequence[pytest.Item]) -> None:
        """Let a process get ready for the first of ``items`` that is to be isolated, if any is."""
        waiting = (each for each in items if each not in self._ran and self._wants(each))
        item = next(waiting, None)
        if item is not None and self._spare is None and str(item.path) not in self._cold:
            with suppress(OSError):  # who needs it tries again, and says so
                self._spare = self._start(str(item.path))

    def _start(self, file: str) -> Process:
        """Return a new process.

        Raises:
            OSError: when the system starts none.

        """
        config = self._config
        factory: Any = getattr(config, "_tmp_path_factory", None)  # as xdist finds it
        self._count += 1
        arguments = [str(each) for each in config.invocation_params.args]
        if config.pluginmanager.hasplugin("_cov"):
            # Or each process, as it begins, would erase what those before it counted.
            arguments.append("--cov-append")
        blueprint = Blueprint(
            arguments,
            str(config.invocation_params.dir),
            self._environment,
            self._path,
            sys.argv,
            self._input,
            None if factory is None else str(factory.getbasetemp() / f"isolated-{self._count}"),
            config.getoption("capture", "fd") in ("no", "tee-sys"),
            None if self._covering is None else self._covering.wish(self._count),
        )
        process = Process(blueprint, file)
        self._apart(process.pid, begins=True)
        return process

    def _leave(self, process: Process) -> None:
        process.close()
        self._apart(process.pid, begins=False)

    def _apart(self, pid: int, *, begins: bool) -> None:
        """Let a process, which measures itself, not be taken for one that a test started."""
        measuring = self._measuring
        children = None if measuring is None else measuring.tracker.children
        if children is not None:
            (children.starters.apart.add if begins else children.starters.apart.discard)(pid)

    # What they tell

    def _publish(self, item: pytest.Item, report: Any) -> None:
        """Publish a report as one that this process made."""
        told = report.user_properties
        # What its process lost is no loss of this one.
        kept = [each for each in told if each[0] != properties.BROKE]
        report.user_properties = [*properties.of_attempt(item.user_properties), *kept]
        if report.when == "teardown" and report.nodeid == item.nodeid:
            told = properties.read(report.user_properties)
            usage = told._replace(
                cards=tuple(map(_ended_with, told.cards)),
                fixtures=tuple(each._replace(leaked=each.orphaned) for each in told.fixtures),
                scopes=(),
                lease=stashed(item, GRANT),
            )
            properties.tell_usage(report.user_properties, usage)
            item.stash[USAGE] = Usage(usage.cards)
        item.ihook.pytest_runtest_logreport(report=report)


class Following:
    """Follows one test through its process.

    Args:
        item: the test.
        publish: publishes a report.

    """

    def __init__(self, item: pytest.Item, publish: Callable[[pytest.Item, Any], None]) -> None:
        self._item = item
        self._publish = publish
        self._phase = ""
        """The one that the test is in."""
        self._reported: set[str] = set()
        """The phases of this attempt that were reported."""
        self._stop: Callable[[], None] = lambda: None
        self.note = ""
        """What is to be said of the process beyond its test."""

    def follow(self, process: Process) -> None:
        """Publish what the process tells, until it has told all or has ended."""
        while True:
            message = process.receive()
            if message is None:
                self._ended(process)
                return
            if message[0] in ("done", "exit", "interrupted", "lost", "failed"):
                getattr(self, f"_{message[0]}")(*message[1:])
                how = process.end()
                if how and not self.note:
                    over = "its process ended after it was over: "
                    self.note = f"{self._item.nodeid}: {over}{how}"
                return
            self._take(message)

    def not_begun(self, why: str) -> None:
        """Report that there is no process for the test."""
        self._fail(f"no process could be started for {self._item.nodeid}: {why}")

    def stop_run(self) -> None:
        """Do to the run what the test did to its own."""
        self._stop()

    def _take(self, message: Message) -> None:
        kind, *told = message
        hook = self._item.config.hook
        if kind == "phase":
            self._phase = told[0]
            if self._phase == "setup":  # perhaps another attempt
                self._reported.clear()
        elif kind == "report":
            report = hook.pytest_report_from_serializable(config=self._item.config, data=told[0])
            self._reported.add(report.when)
            self._publish(self._item, report)
        elif kind == "warning":
            warning, nodeid, location = told
            hook.pytest_warning_recorded.call_historic(
                kwargs={
                    "warning_message": read_warning(warning),
                    "when": "runtest",
                    "nodeid": nodeid,
                    "location": location,
                }
            )

    def _done(self, stop: bool | str) -> None:
        if stop:
            self._stop = lambda: setattr(self._item.session, "shouldstop", stop)

    def _exit(self, reason: str, status: int | None) -> None:
        self._stop = lambda: pytest.exit(reason, status)

    def _interrupted(self) -> None:
        def stop() -> None:
            raise KeyboardInterrupt

        self._stop = stop

    def _lost(self, why: str) -> None:
        self._phase = "setup"
        lines = f"{self._item.nodeid} was not found again by a fresh process"
        self._fail(f"{lines}:\n{why}" if why else lines)

    def _failed(self, why: str) -> None:
        self._fail(f"pytest failed in the process of {self._item.nodeid}:\n{why}")

    def _ended(self, process: Process) -> None:
        how, words = process.broke_off(), process.last_words()
        nodeid = self._item.nodeid
        if "teardown" in self._reported:
            self.note = f"{nodeid}: its process ended after it was over: {how}"
        elif not self._phase:
            self._fail(f"the process of {nodeid} ended before the test: {how}", words)
        else:
            self._fail(f"{nodeid} ended its process{_IN[self._phase]}: {how}", words, crashed=True)

    def _fail(self, why: str, words: str = "", *, crashed: bool = False) -> None:
        """Report a failure of the phase that the test is in, and that the test is over."""
        item, when = self._item, self._phase or "setup"
        for phase in dict.fromkeys((when, "teardown")):
            failed = phase == when
            report = pytest.TestReport(
                nodeid=item.nodeid,
                location=item.location,
                keywords=dict.fromkeys(item.keywords, 1),
                outcome="failed" if failed else "passed",
                longrepr=why if failed else None,
                when=phase,  # type: ignore[arg-type]
                sections=[("Captured stderr", words)] if words and failed else [],
            )
            if crashed:
                setattr(report, attempts.CRASHED, True)
            self._publish(item, report)


def _ended_with(card: CardUsage) -> CardUsage:
    """Return what a test did to a card, once its process is over: nothing of that is left.

    But what processes hold that it started, and that outlive it.
    """
    left = card.orphaned
    return card._replace(leftover=left, leaked=left, holders=(), own_left=0, note="")


def _environment() -> dict[str, str]:
    """Return the environment for fresh processes: they belong to the run, and to no test of it."""
    found = dict(os.environ)
    outer = found.pop(family.VARIABLE, "").split("\n")[:-1]
    if outer:
        found[family.VARIABLE] = "\n".join(outer)
    return found


def _workerinput(config: pytest.Config, state: State) -> dict[str, Any]:
    """Return what plugins know a worker by, as they would tell one of xdist."""
    given = getattr(config, "workerinput", None)
    if given is not None:  # this is one
        return {**given, APART: True}
    told: dict[str, Any] = {
        "workerid": "master",  # as xdist calls a process without workers
        "workercount": 1,
        "testrunuid": os.urandom(16).hex(),
        "mainargv": sys.argv,
        APART: True,
    }
    hook = getattr(config.hook, "pytest_configure_node", None)
    if hook is not None:
        gateway = SimpleNamespace(id="master", spec=SimpleNamespace(popen=True))
        try:
            hook(node=SimpleNamespace(config=config, workerinput=told, gateway=gateway))
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            state.notes.append(f"a plugin did not prepare processes of tests: {why}")
    # What pytest-cov and pytest-randomly tell workers where xdist is loaded only.
    if config.pluginmanager.hasplugin("_cov"):
        told.setdefault("cov_master_host", socket.gethostname())
        told.setdefault("cov_master_topdir", str(Path.cwd()))
        told.setdefault("cov_master_rsync_roots", [])
    if (seed := config.getoption("randomly_seed", None)) is not None:
        told.setdefault("randomly_seed", seed)
    return told


def _cancel_timer(item: pytest.Item) -> None:
    """Leave a limit of pytest-timeout to the fresh process, which has one, too."""
    hook = getattr(item.config.hook, "pytest_timeout_cancel_timer", None)
    if hook is not None:
        hook(item=item)

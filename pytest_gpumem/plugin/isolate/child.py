"""What runs in a fresh process: pytest with the run's arguments, as a worker of one test.

It collects the file of the test it will probably be given, waits to be told which, and runs that
one. It is no fork, has everything set up anew, and ends when its test is over.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpumem.plugin.isolate.plain import plain, told_warning

if TYPE_CHECKING:
    import warnings
    from collections.abc import Generator
    from types import FrameType

    from pytest_gpumem.plugin.isolate.process import Blueprint, Message

_PDEATHSIG = 1
"""``PR_SET_PDEATHSIG`` of prctl(2)."""
Name = tuple[str, ...]


def name_of(item: pytest.Item) -> Name:
    """Return by what a test is found again: not its node id, to which xdist may add a group."""
    return tuple(node.name for node in item.listchain()[1:])


def main(number: int) -> None:
    """Run one test for the process at the other end of the connection with this number."""
    connection = Connection(number)
    os.set_inheritable(number, False)
    blueprint, file, parent = connection.recv()
    _end_with(parent)
    sys.path[:], sys.argv[:] = blueprint.path, blueprint.argv
    serving = Serving(connection, blueprint, file)
    if blueprint.coverage is None:
        pytest.main(blueprint.arguments, plugins=[serving])
        return
    from pytest_gpumem.plugin.isolate import coverage_lines

    counting = coverage_lines.count(blueprint.coverage)
    pytest.main(blueprint.arguments, plugins=[serving])
    counting.stop()
    counting.save()


def _end_with(parent: int) -> None:
    """Let the kernel end this process when ``parent`` has ended, even by a kill.

    Where it cannot, on other systems than Linux, this process ends when it has something to say.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had ended before
        os._exit(1)


class Serving:
    """Collects, waits for the name of a test, runs it, and tells what comes of it.

    Args:
        connection: to the process that wants the test run.
        blueprint: see ``process.Blueprint``.
        file: what to collect first.

    """

    def __init__(self, connection: Connection, blueprint: Blueprint, file: str) -> None:
        self._connection = connection
        self._given = blueprint
        self._file = file
        self._pid = os.getpid()
        self._found: dict[Name, pytest.Item] = {}
        self._problems: list[str] = []
        """What could not be collected."""
        self._config: pytest.Config
        self._nodeid = ""
        """Of the test, in the process that wants it run."""
        self._item: pytest.Item | None = None

    def _say(self, *message: Any) -> None:
        if os.getpid() != self._pid:
            return  # a fork that came out of its test
        try:
            self._connection.send(message)
        except OSError:  # nobody listens any more
            os._exit(1)

    # Before the test

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_cmdline_main(self, config: pytest.Config) -> Generator[None, object, object]:
        """Be a worker: distribute nothing, report nothing, stop at nothing, write nothing."""
        self._config = config
        option = config.option
        # As xdist sets up its own, and what would leave the one test out, or end the run.
        for name, value in (
            *(("dist", "no"), ("tx", []), ("numprocesses", None), ("maxprocesses", None)),
            *(("distload", False), ("looponfail", False), ("usepdb", False), ("trace", False)),
            *(("lf", False), ("failedfirst", False), ("newfirst", False)),
            *(("stepwise", False), ("stepwise_skip", False), ("stepwise_reset", False)),
            *(("maxfail", 0), ("setupshow", False), ("log_file_mode", "a")),
            ("basetemp", self._given.basetemp),
        ):
            if hasattr(option, name):
                setattr(option, name, value)
        config.workerinput = self._given.workerinput  # type: ignore[attr-defined]
        config.workeroutput = {}  # type: ignore[attr-defined]
        return (yield)

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Let the terminal's reporter say nothing of itself, after who looks for it has found it.

        It is there for those that write by it, as pytest-timeout writes stacks.
        """
        # Public, as pytest.TerminalReporter, only in later versions than the oldest we work with.
        from _pytest.terminal import TerminalReporter

        plugins = config.pluginmanager
        reporter = plugins.getplugin("terminalreporter")
        if reporter is not None:
            plugins.unregister(reporter)
            hooks = [name for name in dir(TerminalReporter) if name.startswith("pytest_")]
            silent = type("Silent", (TerminalReporter,), dict.fromkeys(hooks))
            plugins.register(silent(config), "terminalreporter")

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Keep each test: a plugin that shards or shuffles may leave out the one that is asked for.

        Which was not left out where the whole suite was collected.
        """
        self._found.setdefault(name_of(item), item)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep why a file has no tests."""
        if report.failed:
            self._problems.append(report.longreprtext)

    def pytest_collection(self, session: pytest.Session) -> bool:
        """Collect the one file."""
        self._collect(session, [self._file])
        return True

    def _collect(self, session: pytest.Session, arguments: list[str] | None) -> None:
        # Pytest's own way to say that an argument leads nowhere.
        with suppress(pytest.UsageError):
            session.perform_collect(arguments)
        # Those that a plugin put in the place of others.
        self._found.update((name_of(item), item) for item in session.items)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Wait for the name of a test, and run it."""
        from pytest_gpumem.devices.allocator import allocators

        self._say("ready", any(each.active() for each in allocators()))
        try:
            message: Message = self._connection.recv()
        except (EOFError, OSError):  # nobody wants it
            return True
        _, self._nodeid, name, file, step = message
        item = self._look_for(session, name, file)
        if item is None:
            self._say("lost", "\n".join(self._problems))
            return True
        self._item = item
        session.items[:] = [item]
        session.testscollected = 1
        self._run(item, step)
        self._say("done", plain(session.shouldstop))
        return True

    def _look_for(self, session: pytest.Session, name: Name, file: str) -> pytest.Item | None:
        if name not in self._found and file != self._file:
            self._collect(session, [file])
        if name not in self._found:  # what a plugin finds by the run's own arguments only
            self._collect(session, None)
        return self._found.get(name)

    # The test

    def _run(self, item: pytest.Item, step: str) -> None:
        from pytest_gpumem.plugin import retry

        with ExitStack() as stack:
            if step == retry.CPU:
                from pytest_gpumem.routing.resource_manager import shared

                stack.enter_context(shared.ban("it ran out of memory on the card"))
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        """Say where the test is, in case that it ends the process there."""
        self._say("phase", "setup")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self) -> None:
        """Say where the test is."""
        self._say("phase", "call")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self) -> None:
        """Say where the test is."""
        self._say("phase", "teardown")

    @pytest.hookimpl(optionalhook=True, wrapper=True)
    def pytest_timeout_set_timer(self, settings: Any) -> Generator[None, object, object]:
        """Tell a limit of pytest-timeout: what hangs in C cannot be held to it from within."""
        result = yield
        handler = signal.getsignal(signal.SIGALRM)

        def heed(number: int, frame: FrameType | None) -> object:
            __tracebackhide__ = True
            self._say("limit", None)  # whoever cleans up now may take its time
            return handler(number, frame) if callable(handler) else None

        if settings.method == "signal" and callable(handler):
            signal.signal(signal.SIGALRM, heed)
        debugged = getattr(sys.modules.get("pytest_timeout"), "is_debugging", bool)()
        self._say("limit", None if debugged else float(settings.timeout))
        return result

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_timeout_cancel_timer(self) -> None:
        """Tell that the limit is over."""
        self._say("limit", None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Tell what a phase came to."""
        # As the terminal's reporter asks: pytest fails a test by this whose subtests failed.
        self._config.hook.pytest_report_teststatus(report=report, config=self._config)
        told = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        if self._item is not None and told.get("nodeid") == self._item.nodeid:
            told["nodeid"] = self._nodeid
        self._say("report", plain(told))

    def pytest_warning_recorded(
        self,
        warning_message: warnings.WarningMessage,
        when: str,
        nodeid: str,
        location: tuple[str, int, str] | None,
    ) -> None:
        """Tell a warning; the run had those of its configuration and its collection itself."""
        if when == "runtest":
            ours = self._item is not None and nodeid == self._item.nodeid
            told = self._nodeid if ours else nodeid
            self._say("warning", told_warning(warning_message), told, location)

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Tell that the test wants the run to end."""
        error = excinfo.value
        if isinstance(error, pytest.exit.Exception):
            self._say("exit", str(error.msg), error.returncode)
        else:
            self._say("interrupted")

    def pytest_internalerror(self, excrepr: object) -> None:
        """Tell what pytest, or a plugin, failed of."""
        self._say("failed", str(excrepr))

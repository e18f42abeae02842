"""The hooks that collect every test's record, in the process that reports."""

from __future__ import annotations

import os
import platform
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpumem import devices, records
from pytest_gpumem.plugin import attempts
from pytest_gpumem.plugin.commit import commit_of
from pytest_gpumem.plugin.state import (
    ALIVE,
    CARDS,
    HOST,
    LATE,
    NOTES,
    PID,
    RAM,
    USAGE_ERROR,
    State,
)
from pytest_gpumem.records import properties
from pytest_gpumem.units import format_mib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _pytest.terminal import TerminalReporter

    from pytest_gpumem.plugin.budget import Budgets
    from pytest_gpumem.reports import terminal


class _Phases:
    """What is known of a test whose teardown has not been reported yet."""

    __slots__ = ("again", "duration", "outcome", "start")

    def __init__(self, start: float) -> None:
        self.start = start
        self.duration = 0.0
        self.outcome = "passed"
        self.again = False
        """Whether the controller lets it run again, alone on its cards."""


class _Late:
    """What was torn down after a test was reported."""

    def __init__(self) -> None:
        self.fixtures: list[records.FixtureUsage] = []
        self.children: list[records.ChildUsage] = []
        self.scopes: list[records.ScopeUsage] = []
        self.reserved: dict[str, int] = {}
        """Bytes that were reserved then, by card."""
        self.alive: tuple[records.Alive, ...] = ()
        """What was alive when it ran once more."""

    def add(
        self,
        fixtures: Iterable[Any],
        children: Iterable[Any],
        scopes: Iterable[Any],
        reserved: dict[str, int],
    ) -> None:
        """Add what a worker told in plain values."""
        self.fixtures += [records.from_plain(records.FixtureUsage, each) for each in fixtures]
        self.children += [records.from_plain(records.ChildUsage, each) for each in children]
        self.scopes += [records.from_plain(records.ScopeUsage, each) for each in scopes]
        self.reserved.update(reserved)


class Reporting:
    """Collects every test's record in the process that reports, and shows them at the end."""

    NAME = "gpumem-reporting"

    def __init__(self, config: pytest.Config, state: State) -> None:
        self._config = config
        self._state = state
        self._cards = {("", card.uuid): card for card in state.found.cards}
        self.settling: Callable[[pytest.TestReport], None] | None = None
        """Called with each report before anybody else sees it: a hook more would cost each test."""
        self._reports: list[pytest.TestReport] = []
        """Those that were not looked at yet."""
        self._any_told = False
        self._running: dict[tuple[str, str], _Phases] = {}
        self._tests: list[records.RecordedTest] = []
        self._again: set[str] = set()
        """Tests whose next attempt will be alone on its cards."""
        self._workers: set[str] = set()
        """Those that have ended."""
        self._hosts: dict[str, str] = {}
        """By worker, where that is another machine."""
        self._pids: dict[tuple[str, int], str] = {}
        """The workers, by machine and number of process."""
        self._late: dict[tuple[str, str], _Late] = {}
        """By test and worker."""
        self._collected = 0
        self._notes: list[str] = []
        self._failures: list[str] = []
        self._usage_error = ""
        settings = state.settings
        self._files = bool(settings.json or settings.trace or settings.html)
        self._github = settings.github == "auto" and _in_github_actions()
        told = settings.json or settings.html or self._github
        self._commit = commit_of(config.rootpath) if told else ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the report of a phase until somebody asks, as the terminal does.

        Most suites end without anybody asking for tests that touched no card.
        """
        self._any_told |= bool(report.user_properties)
        if self.settling is not None:
            self.settling(report)
        self._reports.append(report)
        outcome: str = report.outcome
        if outcome == "rerun" and not self._config.pluginmanager.hasplugin(Reruns.NAME):
            self._config.pluginmanager.register(Reruns(), Reruns.NAME)

    def _recorded(self) -> list[records.RecordedTest]:
        """Return the tests that have ended."""
        reports, self._reports = self._reports, []
        for report in reports:
            self._take(report)
        return self._tests

    def _take(self, report: pytest.TestReport) -> None:
        """Put a test's phases together; its record is complete with its teardown."""
        told = vars(report)
        if "gpumem_replaced" in told:
            return
        if attempts.OWED in told:
            self._correct(report)
            return
        place = report.nodeid, told.get("worker_id", "")
        phases = self._running.get(place)
        if phases is None:
            phases = self._running[place] = _Phases(report.start)
        phases.duration += report.duration
        if report.outcome != "passed" or "wasxfail" in told:
            self._judge(report, phases)
        if report.when not in ("setup", "call"):
            del self._running[place]
            self._complete(_record(*place, report, phases), phases)

    def _judge(self, report: pytest.TestReport, phases: _Phases) -> None:
        """Take note of a phase that did not simply pass."""
        phases.outcome = _outcome(report, phases.outcome)
        phases.again |= phases.outcome == "rerun" and hasattr(report, attempts.UNDECIDED)

    def _complete(self, test: records.RecordedTest, phases: _Phases) -> None:
        if test.nodeid in self._again:
            self._again.remove(test.nodeid)
            test = test._replace(step=test.step or "alone")
        self._tests.append(test)
        if phases.again:
            self._again.add(test.nodeid)

    def _correct(self, report: pytest.TestReport) -> None:
        """Let an attempt that was called a rerun, and was the last, be the failure that it is."""
        for place in reversed(range(len(self._tests))) if report.failed else ():
            test = self._tests[place]
            if test.nodeid == report.nodeid:
                self._tests[place] = test._replace(outcome=_outcome(report, ""))
                return

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport) -> None:
        """Let a worker that ended itself after a test not count as a failure more of that test."""
        worker = vars(report)["node"].gateway.id
        tests = self._recorded()
        last = next((each for each in reversed(tests) if each.worker == worker), None)
        if last is None or last.nodeid != crashitem or not last.broke:
            return
        if last.outcome in ("failed", "error", "xfailed"):
            # As the phase of a test that passes nowhere counts, and is not shown.
            report.outcome, report.when = "passed", "setup"
            report.gpumem_replaced = True  # type: ignore[attr-defined]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take home what a worker leaves: the cards it saw, or why it refused to run."""
        output, worker = getattr(node, "workeroutput", {}), node.gateway.id
        self._workers.add(worker)  # also one that ran no test
        self._usage_error = output.get(USAGE_ERROR, self._usage_error)
        host = output.get(HOST, "")
        if host != platform.node():
            self._hosts[worker] = host
        if PID in output:  # not where the worker crashed
            self._pids[self._host(worker), output[PID]] = worker
        for plain in output.get(CARDS, ()):
            card = records.from_plain(records.Card, plain)._replace(host=self._host(worker))
            self._cards.setdefault((card.host, card.uuid), card)
        for nodeid, fixtures, children, scopes, reserved in output.get(LATE, ()):
            late = self._late.setdefault((nodeid, worker), _Late())
            late.add(fixtures, children, scopes, reserved)
        self._notes += [note for note in output.get(NOTES, ()) if note not in self._notes]
        self._state.worker_ram = max(self._state.worker_ram, output.get(RAM, 0))
        for nodeid, alive in output.get(ALIVE, ()):
            self.note_alive(nodeid, worker, alive)

    def note_alive(self, nodeid: str, worker: str, plain: Iterable[Any]) -> None:
        """Take note of what was alive in a test that ran once more for that."""
        alive = tuple(records.from_plain(records.Alive, each) for each in plain)
        self._late.setdefault((nodeid, worker), _Late()).alive = alive

    def _host(self, worker: str) -> str:
        return self._hosts.get(worker, "")

    def run_record(self) -> records.RunRecord:
        """Return what is known of the run; its tests only if one told something, or for a file."""
        state, settings = self._state, self._state.settings
        late = self._late or self._pids
        asked = self._any_told or state.worker_ram or self._late or self._files
        tests = self._recorded() if asked or self._tests else []
        run = records.RunRecord(
            schema=records.SCHEMA,
            mode=settings.mode,
            cards=tuple(self._cards.values()) or devices.find_cards().cards,
            simulated=settings.simulated,
            workers=len((self._workers | {test.worker for test in tests}) - {""}),
            tests=tuple(self._whole(tests) if late else tests),
            notes=tuple(dict.fromkeys([*devices.notes(), *state.notes, *self._notes])),
            context=settings.context_cost if settings.mode == "on" else 0,
            command=shlex.join(["pytest", *self._config.invocation_params.args]),
            commit=self._commit,
            worker_ram=state.worker_ram,
            lost=tuple(state.lost),
            collected=self._collected,
        )
        budgets = self._budgets()
        return run if budgets is None else budgets.compared(run)

    def _budgets(self) -> Budgets | None:
        if self._state.settings.budget is None:
            return None
        from pytest_gpumem.plugin import budget

        return budget.of(self._config)

    def _whole(self, tests: list[records.RecordedTest]) -> list[records.RecordedTest]:
        """Return the tests' records with what became known after their reports.

        Of a test that ran again, the last one has it.
        """
        late = dict(self._late)
        last_first = [
            self._completed(test, late.pop((test.nodeid, test.worker), None))
            for test in reversed(tests)
        ]
        return last_first[::-1]

    def _completed(self, test: records.RecordedTest, late: _Late | None) -> records.RecordedTest:
        host = self._host(test.worker)
        if late is not None:
            cards = [
                card._replace(reserved=late.reserved.get(card.card, card.reserved))
                for card in test.cards
            ]
            test = test._replace(
                fixtures=(*test.fixtures, *late.fixtures),
                children=_once((*test.children, *late.children)),
                scopes=(*test.scopes, *late.scopes),
                alive=late.alive or test.alive,
                cards=tuple(cards),
            )
        if test.beside:
            beside = (
                each._replace(worker=self._pids.get((host, each.pid), "")) for each in test.beside
            )
            test = test._replace(beside=tuple(beside))
        return test._replace(host=host) if host else test

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the files, whatever becomes of the terminal."""
        self._collected = session.testscollected
        if self._usage_error:
            raise pytest.UsageError(self._usage_error)
        settings, budgets = self._state.settings, self._budgets()
        if budgets is not None and settings.budget is not None:
            self._write(
                "--gpumem-budget", settings.budget, lambda _: budgets.update(self.run_record())
            )
        run = self.run_record()
        if settings.json is not None:
            self._write("--gpumem-json", settings.json, lambda path: records.save(run, path))
        if settings.trace is not None:
            from pytest_gpumem.reports import trace

            self._write("--gpumem-trace", settings.trace, lambda path: trace.save(run, path))
        if settings.html is not None:
            self._write("--gpumem-html", settings.html, lambda path: self._save_page(run, path))
        if self._github and (path := os.environ.get("GITHUB_STEP_SUMMARY")):
            self._add_to_summary(Path(path), run)
        if settings.mode == "on":
            self._learn(run)
        if self._failures and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.USAGE_ERROR

    def _save_page(self, run: records.RunRecord, path: Path) -> None:
        from pytest_gpumem.forensics import analysis
        from pytest_gpumem.reports import page

        linked = self._state.settings.html_library == "linked"
        page.save(run, analysis.of_record(run), path, linked=linked)

    def _write(self, option: str, path: Path, save: Callable[[Path], None]) -> None:
        try:
            save(path)
        except OSError as error:
            self._failures.append(f"{option}: cannot write {str(path)!r}: {error.strerror}")
        except ValueError as error:  # what stands there is not to be replaced
            self._failures.append(f"{option}: {error}")

    def _add_to_summary(self, path: Path, run: records.RunRecord) -> None:
        from pytest_gpumem.plugin import github

        settings = self._state.settings
        try:
            problem = github.add_to_summary(path, run, settings.base, settings.top)
        except OSError as error:
            problem = f"the job summary cannot be written: {error.strerror}: {str(path)!r}"
        if problem:
            self._state.notes.append(problem)

    def _learn(self, run: records.RunRecord) -> None:
        from pytest_gpumem.plugin import learned

        if self._state.settings.oom_at is not None:
            return  # tests that were made to fail teach nothing
        try:
            learned.save_history(self._config, self._state, run)
        except OSError as error:
            sentence = f"what was learned is lost: {error.strerror}: {error.filename!r}"
            self._state.notes.append(sentence)

    def pytest_terminal_summary(self, terminalreporter: TerminalReporter) -> None:
        """Show the GPU memory section, if any test touched a card."""
        run = self.run_record()
        if not (run.tests or run.notes or run.lost or self._failures):
            return
        lines = _section(run, self._state.settings.top, terminalreporter)
        if lines:
            terminalreporter.write_sep("=", "GPU memory")  # which ends pytest's last line
        for line in lines:
            terminalreporter.write_line(line.text, **({line.colour: True} if line.colour else {}))
        for failure in self._failures:
            terminalreporter.write_line(failure, red=True)
        if self._github:
            for command in self._annotations(run):
                terminalreporter.write_line(command)

    def _annotations(self, run: records.RunRecord) -> Iterator[str]:
        from pytest_gpumem.plugin import github
        from pytest_gpumem.reports.annotations import of_run

        return github.commands(of_run(run), self._config.rootpath)

    @pytest.hookimpl(optionalhook=True)
    def pytest_html_results_table_header(self, cells: list[str]) -> None:
        """Add the column to pytest-html's table."""
        cells.insert(2, "<th>VRAM peak (MiB)</th>")

    @pytest.hookimpl(optionalhook=True)
    def pytest_html_results_table_row(self, report: pytest.TestReport, cells: list[str]) -> None:
        """Fill the column."""
        peak = dict(report.user_properties).get(properties.PEAK)
        cells.insert(2, f"<td>{format_mib(peak) if isinstance(peak, int) else ''}</td>")


class Reruns:
    """Shows attempts that are made again; only in a run that has any."""

    NAME = "gpumem-reruns"

    def pytest_report_teststatus(
        self, report: pytest.TestReport | pytest.CollectReport
    ) -> tuple[str, str, tuple[str, dict[str, bool]]] | None:
        """Show such an attempt as rerunfailures does."""
        outcome: str = report.outcome
        return ("rerun", "R", ("RERUN", {"yellow": True})) if outcome == "rerun" else None


def _once(children: Iterable[records.ChildUsage]) -> tuple[records.ChildUsage, ...]:
    """Return each process once, as it was told of last."""
    return tuple({(each.pid, each.start, each.card): each for each in children}.values())


def _section(run: records.RunRecord, top: int, reporter: TerminalReporter) -> list[terminal.Line]:
    """Return the lines of the section; those of a file are wrapped by what shows it."""
    from pytest_gpumem.reports import terminal

    width = reporter.config.get_terminal_writer().fullwidth if reporter.isatty else 0
    return list(terminal.lines(run, top, reporter.config.get_verbosity(), width))


def _in_github_actions() -> bool:
    """Return whether this is a job of GitHub Actions, and no run within one of its tests."""
    return os.environ.get("GITHUB_ACTIONS") == "true" and "PYTEST_CURRENT_TEST" not in os.environ


def _outcome(report: pytest.TestReport, before: str) -> str:
    """Return the outcome of a test after one more of its phases."""
    if report.when not in ("setup", "call", "teardown") or hasattr(report, attempts.CRASHED):
        return "crashed"
    if hasattr(report, "wasxfail"):
        return "xpassed" if report.passed else "xfailed"
    if report.failed and report.when != "call":
        return "failed" if before == "failed" else "error"
    return before if report.passed else report.outcome


def _record(
    nodeid: str, worker: str, report: pytest.TestReport, phases: _Phases
) -> records.RecordedTest:
    file, line, _ = report.location
    own = records.RecordedTest(
        nodeid,
        phases.outcome,
        phases.duration,
        worker,
        start=phases.start,
        place=vars(report).get("item_index", -1),  # which xdist adds
        file=file,
        line=0 if line is None else line + 1,
    )
    if not report.user_properties:
        return own
    return own._replace(**properties.read(report.user_properties)._asdict())

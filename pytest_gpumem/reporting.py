"""The hooks that collect every test's record, in the process that reports."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from pytest_gpumem import devices, records
from pytest_gpumem.reports import terminal
from pytest_gpumem.state import CARDS, USAGE_ERROR, State
from pytest_gpumem.units import format_mib


@dataclass
class _Phases:
    """What is known of a test whose teardown has not been reported yet."""

    outcome: str = "passed"
    duration: float = 0.0


class Reporting:
    """Collects every test's record in the process that reports, and shows them at the end."""

    NAME = "gpumem-reporting"

    def __init__(self, state: State) -> None:
        self._state = state
        self._cards = {card.uuid: card for card in state.found.cards}
        self._running: dict[tuple[str, str], _Phases] = {}
        self._tests: list[records.RecordedTest] = []
        self._workers: set[str] = set()
        self._failure = ""
        self._usage_error = ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Put a test's phases together; its record is complete with its teardown."""
        worker = getattr(report, "worker_id", "")
        self._workers.add(worker)
        phases = self._running.setdefault((report.nodeid, worker), _Phases())
        phases.duration += report.duration
        phases.outcome = _outcome(report, phases.outcome)
        if report.when not in ("setup", "call"):
            del self._running[report.nodeid, worker]
            self._tests.append(_record(report, worker, phases))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take home what a worker leaves: the cards it saw, or why it refused to run."""
        output = getattr(node, "workeroutput", {})
        self._usage_error = output.get(USAGE_ERROR, self._usage_error)
        for plain in output.get(CARDS, ()):
            card = records.from_plain(records.Card, plain)
            self._cards.setdefault(card.uuid, card)

    def run_record(self) -> records.RunRecord:
        """Return what is known of the run."""
        settings = self._state.settings
        notes = [self._state.simulation.NOT_SIMULATED] if self._state.simulation else []
        return records.RunRecord(
            schema=records.SCHEMA,
            mode=settings.mode,
            cards=tuple(self._cards.values()) or devices.find_cards().cards,
            simulated=settings.simulated,
            workers=len(self._workers - {""}),
            tests=tuple(self._tests),
            notes=(*notes, *devices.notes()),
        )

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the JSON file, whatever becomes of the terminal."""
        if self._usage_error:
            raise pytest.UsageError(self._usage_error)
        path = self._state.settings.json
        if path is None:
            return
        try:
            records.save(self.run_record(), path)
        except OSError as error:
            self._failure = f"--gpumem-json: cannot write {str(path)!r}: {error.strerror}"
            if session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.USAGE_ERROR

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Show the GPU memory section, if any test touched a card."""
        verbosity = terminalreporter.config.get_verbosity()
        lines = list(terminal.lines(self.run_record(), self._state.settings.top, verbosity))
        if lines:
            terminalreporter.section("GPU memory")
        for line in lines:
            terminalreporter.write_line(line)
        if self._failure:
            terminalreporter.write_line(self._failure, red=True)

    @pytest.hookimpl(optionalhook=True)
    def pytest_html_results_table_header(self, cells: list[str]) -> None:
        """Add the column to pytest-html's table."""
        cells.insert(2, "<th>VRAM peak (MiB)</th>")

    @pytest.hookimpl(optionalhook=True)
    def pytest_html_results_table_row(self, report: pytest.TestReport, cells: list[str]) -> None:
        """Fill the column."""
        peak = dict(report.user_properties).get("gpumem_peak")
        cells.insert(2, f"<td>{format_mib(peak) if isinstance(peak, int) else ''}</td>")


def _outcome(report: pytest.TestReport, before: str) -> str:
    """Return the outcome of a test after one more of its phases."""
    if report.when not in ("setup", "call", "teardown"):
        return "crashed"
    if hasattr(report, "wasxfail"):
        return "xpassed" if report.passed else "xfailed"
    if report.failed and report.when != "call":
        return "failed" if before == "failed" else "error"
    return before if report.passed else report.outcome


def _record(report: pytest.TestReport, worker: str, phases: _Phases) -> records.RecordedTest:
    own = records.RecordedTest(report.nodeid, phases.outcome, phases.duration, worker)
    text = dict(report.user_properties).get("gpumem_record")
    if not isinstance(text, str):
        return own
    usage = json.loads(text)
    return own._replace(
        cards=tuple(records.from_plain(records.CardUsage, card) for card in usage["cards"]),
        fixtures=tuple(
            records.from_plain(records.FixtureUsage, each) for each in usage["fixtures"]
        ),
        oom=usage["oom"],
    )

"""Has what was alive at the peak of some tests recorded: those that are named, or that offend.

Named tests are recorded as they run. Which are the largest, and which are above what they are
allowed, shows only when they have ended: these run once more when all others have, in the process
that ran them and alone on the card. Nothing of that is reported but what was alive.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

import pytest

from pytest_gpumem.plugin import budget
from pytest_gpumem.plugin.ladder import Ladder
from pytest_gpumem.plugin.report import Reporting
from pytest_gpumem.plugin.state import ALIVE, USAGE, State, marks_of, stashed
from pytest_gpumem.plugin.xdist.worker import run_unreported, why_not_unreported
from pytest_gpumem.records import properties, to_plain
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from pytest_gpumem.tracking.tracker import Tracker


_SAME = 0.02
"""By how much of it a peak may differ from run to run and still be the same."""


class _Ran(NamedTuple):
    """A test that used a card."""

    item: pytest.Item
    own: int
    """Its own peak, in bytes."""
    offends: bool
    """Whether it took more than it may, or ran out of memory."""
    failed: bool
    """Whether its set-up or call did."""


class Peaks:
    """Records the tests that are asked for; only in a run that asks for some."""

    NAME = "gpumem-peaks"

    def __init__(self, config: pytest.Config, state: State, tracker: Tracker) -> None:
        assert state.settings.peaks is not None  # noqa: S101  # or nobody would register it
        self._which = state.settings.peaks
        self._config = config
        self._state = state
        self._recordings = tracker.recordings
        self._debugging = bool(config.getoption("usepdb", False))
        self._failed = False
        """Whether the set-up or the call of the running test did."""
        self._ran: dict[str, _Ran] = {}
        """By nodeid, those whose peak may be asked for when all have run."""
        self._told: list[tuple[str, list[object]]] = []
        """Of those that ran once more, what was alive."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Have a test recorded that was named."""
        self._failed = False
        if self._which.names(item.nodeid):
            self._recordings.record_next(item.nodeid)

    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> None:
        """Take note that the set-up or the call failed."""
        self._failed |= call.excinfo is not None and call.when != "teardown"

    # After the measuring, and after what judges its numbers, which stand within.
    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        """Take note of a test that may be asked for."""
        try:
            return (yield)
        finally:
            usage = stashed(item, USAGE)
            if self._which.later and usage is not None and not marks_of(item).off:
                self._note(item)

    def _note(self, item: pytest.Item) -> None:
        told = properties.read(item.user_properties)
        if any(each.recorded for each in told.alive):
            self._ran.pop(item.nodeid, None)  # by a further attempt after it ran out of memory
            return
        own = max((card.own for card in told.cards), default=0)
        if own or told.oom:
            offends = bool(told.oom) or self._is_above(item, told)
            self._ran[item.nodeid] = _Ran(item, own, offends, self._failed)

    def _is_above(self, item: pytest.Item, told: properties.OwnProperties) -> bool:
        """Return whether a test took more than its budget or its limit."""
        marked = marks_of(item).vram_limit
        limit = self._state.settings.vram_limit if marked is None else marked
        took = max((card.peak - card.baseline for card in told.cards), default=0)
        budgets = budget.of(self._config)
        above = budgets is not None and bool(budgets.why_failed(item))
        return above or (limit is not None and took > limit)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        """Run once more, when all have run, those of which it shows only then."""
        try:
            result = yield
        except session.Failed:  # -x
            self._run_again()
            raise
        self._run_again()
        return result

    def _run_again(self) -> None:
        chosen = list(self._chosen())
        why_not = "it would stop in the debugger again" if self._debugging else ""
        for ran, following in zip_longest(chosen, chosen[1:]):
            item = ran.item
            why = why_not or why_not_unreported(item)
            if why:
                self._state.notes.append(f"{item.nodeid} is not run again for its peak: {why}")
                continue
            self._recordings.record_next(item.nodeid)
            item.user_properties.clear()  # the reports have theirs
            ladder: Ladder | None = self._config.pluginmanager.getplugin(Ladder.NAME)
            with nullcontext() if ladder is None else ladder.alone():
                reports = run_unreported(item, following.item if following else None)
            self._tell(ran, reports)

    def _chosen(self) -> Iterator[_Ran]:
        """Yield those that run once more, in the order in which they ran."""
        largest = sorted(self._ran.values(), key=lambda ran: -ran.own)[: self._which.largest]
        for ran in self._ran.values():
            if ran in largest or (self._which.offenders and ran.offends):
                yield ran

    def _tell(self, ran: _Ran, reports: Sequence[pytest.TestReport]) -> None:
        """Keep what was alive in a further run; say where that was another one than the first."""
        told = properties.read(ran.item.user_properties)
        own = max((card.own for card in told.cards), default=0)
        failed = any(each.failed for each in reports if each.when != "teardown")
        note = ""
        if failed != ran.failed:
            note = f"the test {'failed' if failed else 'passed'}"
        elif abs(own - ran.own) > _SAME * ran.own:
            note = f"its own peak was {format_bytes(own)}, not {format_bytes(ran.own)}"
        if not told.alive:
            why = note or "nothing was allocated"
            self._state.notes.append(
                f"{ran.item.nodeid} was run again for its peak, in which {why}"
            )
            return
        note = f"told of a further run, in which {note}" if note else ""
        alive = [
            each._replace(note="; ".join(filter(None, (each.note, note)))) for each in told.alive
        ]
        self._told.append((ran.item.nodeid, [to_plain(each) for each in alive]))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Tell whoever reports."""
        output = getattr(session.config, "workeroutput", None)
        reporting: Reporting | None = self._config.pluginmanager.getplugin(Reporting.NAME)
        if output is not None:
            output[ALIVE] = self._told
        elif reporting is not None:
            for nodeid, plain in self._told:
                reporting.note_alive(nodeid, "", plain)

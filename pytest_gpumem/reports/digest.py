"""A run as sections: what a job's summary or a comment in a pull request tells of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gpumem.forensics import analysis
from pytest_gpumem.forensics.compare import Limits, compare
from pytest_gpumem.records import short
from pytest_gpumem.reports import alive, budgets, forensics, ram, timeline
from pytest_gpumem.reports.counts import (
    PEAK_COLUMNS,
    Leak,
    by_kind,
    count_up,
    left_by_scopes,
    likewise_leaks,
    peaks,
    place,
    plural,
)
from pytest_gpumem.reports.sections import Section
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pytest_gpumem.records import RunRecord


_ALIVE_SHOWN = 3
"""Lines of each test."""


def sections(run: RunRecord, top: int, base: RunRecord | None = None) -> Iterator[Section]:
    """Return the sections: own peaks, changes, leaks, and what ran out of memory, by cause.

    Args:
        run: what happened.
        top: how many rows each table has, all of them where it is 0.
        base: an earlier run to set it against.

    """
    counted, shown = count_up(run), top or len(run.tests)
    yield Section("GPU memory", (counted.headline, *_facts(run)))
    found = analysis.of_record(run)
    if found.events:
        yield from forensics.ranked(found)
    yield from _leaks(counted.leaks, shown)
    yield from _left_by_module(run, shown)
    known = {test.nodeid for test, each in alive.told(run) if each.recorded}
    if told := tuple(line[2:] for line in budgets.lines(run.budgets, shown, known)):
        yield Section("Budgets", told)
    alive_rows = alive.table(run, _ALIVE_SHOWN)
    yield from _table(
        "What filled the card", (">bytes", "line", "kind", "of", "test"), alive_rows, shown
    )
    if base is not None and base.tests and run.tests:
        before = analysis.of_record(base, _name(base))
        yield from _against(
            _name(base), *forensics.compared(compare(before, found, Limits()), shown)
        )
    yield from _own_peaks(run, shown)
    yield from _main_memory(run, shown)


def _leaks(leaks: Iterable[Leak], shown: int) -> Iterator[Section]:
    rows = [
        (
            format_bytes(first.size),
            first.by,
            "; ".join([*(each.where for each in first.holders[:1]), *first.orphans]),
            likewise_leaks(others),
        )
        for first, *others in by_kind(leaks)
    ]
    return _table("Leaks", (">size", "leaked by", "held by", ">likewise"), rows, shown)


def _left_by_module(run: RunRecord, shown: int) -> Iterator[Section]:
    rows = [(format_bytes(each.size), each.name, each.where) for each in left_by_scopes(run)]
    return _table("Left by module", (">left", "by", "held by"), rows, shown)


def _own_peaks(run: RunRecord, shown: int) -> Iterator[Section]:
    several = len(run.cards) > 1
    titles = (*(f">{column.title}" for column in PEAK_COLUMNS), *["card"][:several], "test")
    rows = [
        (
            *(column.cell(row) for column in PEAK_COLUMNS),
            *[short(row.usage.card)][:several],
            place(row.test),
        )
        for row in peaks(run)
    ]
    return _table("Own peaks", titles, rows, shown)


def _main_memory(run: RunRecord, shown: int) -> Iterator[Section]:
    rows = [
        (format_bytes(usage.own_peak), format_bytes(usage.kept), place(test))
        for usage, test in ram.most(run.tests)
    ]
    return _table("Main memory", (">own peak", ">kept", "test"), rows, shown)


def _against(name: str, counts: Section, *changes: Section) -> Iterator[Section]:
    """Return the sections of a comparison, of its counts those that differ."""
    leaks = tuple(each for each in counts.sentences if each.startswith("leaks: "))
    rows = tuple(row for row in counts.rows if row[1] != row[2])
    yield counts._replace(title=f"Against {name}", sentences=leaks, rows=rows)
    for change in changes:
        own = change.title == "Own peaks"  # which is a section of the run itself, too
        yield change._replace(title="Own peaks that changed") if own else change


def _facts(run: RunRecord) -> Iterator[str]:
    begin, end = timeline.window(run.tests)
    took = f" in {end - begin:.1f} s" if end > begin else ""
    workers = plural(run.workers, "worker") if run.workers else "one process"
    for card in run.cards:
        yield f"{card.called(run.cards)}, {format_bytes(card.total)}; {workers}{took}"
    if run.command:
        yield run.command + (f" at commit {run.commit}" if run.commit else "")


def _name(run: RunRecord) -> str:
    return f"commit {run.commit}" if run.commit else "the base run"


def _table(
    title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], shown: int
) -> Iterator[Section]:
    """Yield a table cut to its first rows, none where there is nothing in it."""
    if rows:
        more = (f"{shown:,} of {len(rows):,}",) if len(rows) > shown else ()
        yield Section(title, more, columns, tuple(rows[:shown]))

"""What forensics found, and how two runs compare, as the sections of a report."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pytest_gpumem.records.findings import CAUSES
from pytest_gpumem.reports.sections import Section, table
from pytest_gpumem.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_gpumem.forensics.compare import Change, Comparison
    from pytest_gpumem.forensics.peak_lines import LineChange
    from pytest_gpumem.records.findings import Death, Findings, OomEvent, Place


def sections(found: Findings, top: int | None = None) -> Iterator[Section]:
    """Return the report: what a maintainer needs first, and with ``top`` the tables behind it.

    Each table has at most ``top`` rows and says how many it leaves out.
    """
    yield Section("GPU memory forensics", (*_totals(found), *_read(found)))
    if found.events:
        yield from ranked(found)
        yield from _fixtures(found.events)
    if found.deaths:
        yield _died(found.deaths)
    if found.notes:
        yield Section("Not read", _some(found.notes, top or _FEW))
    if top is None:
        if hidden := _hidden(found):
            yield Section("More", (f"--top 20 shows {hidden}; --format json has everything",))
        return
    if found.events:
        yield from _first(found)
        yield table(
            "Out of memory",
            ("test", "worker", ">place", ">cause", ">tried", ">line"),
            [_event_row(event) for event in found.events],
            top,
        )
    if found.signatures:
        yield table(
            "Other errors",
            (">times", "error", "in"),
            [
                (
                    str(each.times),
                    each.signature,
                    _subjects(each.subjects) or ("log" if each.where == "log" else ""),
                )
                for each in found.signatures
            ],
            top,
        )
    for title, places in (("Files", found.by_file), ("Directories", found.by_directory)):
        shown = [each for each in places if each.oom or each.failed or each.errors]
        if shown:
            yield table(title, _PLACE_COLUMNS, [_place_row(each) for each in shown], top)


def ranked(found: Findings) -> Iterator[Section]:
    """Return the causes by the tests that they felled, and where most of these are."""
    yield from _causes(found.events)
    yield from _worst(found)


_FEW = 5
"""Rows of what the first screen lists."""


def _hidden(found: Findings) -> str:
    """Return what the first screen leaves out, in words."""
    parts = {
        "each test that ran out of memory": len(found.events) > 1,
        "other errors": bool(found.signatures),
        "files and directories": len(found.by_file) > _FEW,
    }
    return ", ".join(name for name, there in parts.items() if there)


def _some(lines: Sequence[str], top: int) -> tuple[str, ...]:
    more = (f"and {len(lines) - top:,} more",) if len(lines) > top else ()
    return (*lines[:top], *more)


_PLACE_COLUMNS = ("path", ">tests", ">passed", ">failed", ">errors", ">OOM", ">seconds")


def _totals(found: Findings) -> Iterator[str]:
    totals = found.totals
    names = ("passed", "failed", "errors", "skipped", "xfailed", "xpassed")
    counts = ", ".join(
        "1 error" if (name, count) == ("errors", 1) else f"{count:,} {name}"
        for name in names
        if (count := getattr(totals, name))
    )
    if totals.tests:
        rate = f", pass rate {totals.pass_rate:.1f} %" if totals.pass_rate is not None else ""
        took = f", {format_seconds(totals.duration)}" if totals.duration else ""
        runs = _count(totals.runs, "run")
        yield f"{_count(totals.tests, 'test')} in {runs}: {counts}{rate}{took}"
    elif totals.runs:
        yield f"no test in {_count(totals.runs, 'run')}"
    again = len(found.recovered)
    passed = f"; {again:,} more did and passed when run again" if again else ""
    sure = sum(event.felled for event in found.events if event.confirmed)
    probably = f", {totals.oom - sure:,} of them probably" if sure < totals.oom else ""
    outside = any(event.nodeid is None for event in found.events)
    noun = ("test or process", "tests or processes") if outside else ("test", "tests")
    yield f"{_count(totals.oom, *noun)} ran out of memory{probably}{passed}"


def _read(found: Findings) -> Iterator[str]:
    """Tell what was read, and how much of it there was."""
    sources = found.sources or ()
    for source in sources[:_FEW]:
        state = source.note or ("whole" if source.tests else "no test")
        lacks = "" if source.complete else "INCOMPLETE: "
        yield f"read: {source.path} ({source.kind}): {lacks}{state}"
    if len(sources) > _FEW:
        cut = sum(not source.complete for source in sources)
        more = f"; {cut:,} of all are incomplete" if cut else ""
        yield f"and {len(sources) - _FEW:,} more{more}"


def _count(number: int, noun: str, plural: str = "") -> str:
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def _first(found: Findings) -> Iterator[Section]:
    """Tell the first event in full: what came after is often its consequence."""
    event = found.events[0]
    told = [f"{event.nodeid or 'outside of tests'}{_where(event)}"]
    if event.felled > 1:
        told.append(f"it felled {event.felled} tests")
    again = sum(each.cascade_of == 0 for each in found.events)
    if again:
        told.append(f"{_count(again, 'later test')} met the very same state")
    told.append(f"cause: {_cause(event)}")
    told += [f"  {each}" for each in event.evidence]
    if figures := _figures(event):
        told.append(figures)
    if event.before:
        told.append(f"ran before it: {', '.join(event.before)}")
    yield Section("First out of memory", tuple(told), code=event.advice)


def _where(event: OomEvent) -> str:
    parts = [
        event.worker or "",
        f"test {event.position} of its worker" if event.position else "",
        event.phase if event.phase != "call" else "",
        f"{event.file}:{event.line}" if event.file and event.line else event.file,
    ]
    return f" ({', '.join(filter(None, parts))})"


def _figures(event: OomEvent) -> str:
    names = ("tried", "total", "free", "allocated", "reserved_unallocated", "allowed")
    told = []
    other = max((each for each in event.processes if not each.own), default=None,
                key=lambda each: each.bytes)  # fmt: skip
    for name in names:
        size = getattr(event, f"{name}_bytes")
        if size is not None:
            printed = event.printed.get(name) or format_bytes(size)
            told.append(f"{name.replace('_', ' but ')} {printed}")
    if event.non_torch_bytes:
        told.append(f"{format_bytes(event.non_torch_bytes)} of its process not PyTorch's")
    if other is not None and other.pid is not None:
        told.append(f"largest other process {other.pid} with {format_bytes(other.bytes)}")
    device = f"{event.backend} {event.device}: " if event.device is not None else ""
    return f"{device}{', '.join(told)}" if told else ""


def _cause(event: OomEvent) -> str:
    sure = event.confirmed and not event.inferred
    return f"{'' if sure else 'probably '}{CAUSES[event.cause]}"


def _causes(events: Sequence[OomEvent]) -> Iterator[Section]:
    """Rank the causes by the tests that they felled, each with what to do and its first test."""
    felled: Counter[str] = Counter()
    by_cause: dict[str, list[OomEvent]] = {}
    for event in events:
        felled[event.cause] += event.felled
        by_cause.setdefault(event.cause, []).append(event)
    for cause, count in felled.most_common():
        first = by_cause[cause][0]
        probably = sum(event.inferred or not event.confirmed for event in by_cause[cause])
        doubt = "probably " if probably * 2 > len(by_cause[cause]) else ""
        told = [f"first: {first.nodeid or 'outside of tests'}{_where(first)}"]
        told += first.evidence[:2]
        if figures := _figures(first):
            told.append(figures)
        again = sum(each.cascade_of is not None for each in by_cause[cause])
        if again:
            told.append(f"{_count(again, 'test')} met the very state of an earlier one again")
        title = f"{_count(count, 'test')}: {doubt}{CAUSES[cause]} ({cause})"
        yield Section(title, tuple(told), code=first.advice[:1])


def _worst(found: Findings) -> Iterator[Section]:
    for title, places in (("files", found.by_file), ("directories", found.by_directory)):
        hit = [each for each in places if each.oom]
        # One test each is no file to begin with.
        if len(hit) > 1 and hit[0].oom > 1:
            lines = [
                f"{each.oom:,} of {_count(each.tests, 'test')}  {each.path}"
                if each.tests
                else f"{each.oom:,}  {each.path}"
                for each in hit
            ]
            yield Section(f"Worst {title}", _some(lines, _FEW))
            return


def _fixtures(events: Sequence[OomEvent]) -> Iterator[Section]:
    """Tell what the set-ups of fixtures felled."""
    shared = sorted((each for each in events if each.felled > 1), key=lambda each: -each.felled)
    if shared:
        total = sum(each.felled for each in shared)
        lines = [f"{each.felled:,} by the failure of {each.nodeid}" for each in shared]
        title = f"{_count(total, 'test')} felled by {_count(len(shared), 'shared failure')}"
        yield Section(f"{title}; --felled lists them", _some(lines, _FEW))


def _died(deaths: Sequence[Death]) -> Section:
    """Tell of workers that died, and that nothing says it was memory."""
    lines = [
        f"{each.worker or 'a worker'} in {each.nodeid or 'no test'} ({each.file}:{each.line}): "
        + (each.why or "the log does not tell why; dmesg or exit codes may")
        for each in deaths
    ]
    return Section(f"{_count(len(deaths), 'worker')} died", _some(lines, _FEW))


def _event_row(event: OomEvent) -> tuple[str, ...]:
    felled = f" (+{event.felled - 1})" if event.felled > 1 else ""
    return (
        f"{event.nodeid or '-'}{felled}",
        event.worker or "",
        str(event.position or ""),
        event.cause if event.confirmed and not event.inferred else f"{event.cause}?",
        "" if event.tried_bytes is None else format_bytes(event.tried_bytes),
        str(event.line or ""),
    )


def _subjects(names: Sequence[str]) -> str:
    if not names:
        return ""
    more = " ..." if len(names) > 4 else ""
    return f"{_count(len(names), 'class', 'classes')}: {', '.join(names[:4])}{more}"


def _place_row(place: Place) -> tuple[str, ...]:
    numbers = (place.tests, place.passed, place.failed, place.errors, place.oom)
    return (place.path, *map(str, numbers), f"{place.duration:.1f}")


def compared(told: Comparison, top: int) -> Iterator[Section]:
    """Return a comparison: the verdict, the counts, and what changed how."""
    names = ("tests", "passed", "failed", "errors", "skipped", "oom")
    rows: list[tuple[str, ...]] = [
        (name, str(one), str(two), f"{two - one:+d}")
        for name in names
        for one, two in [(getattr(told.before, name), getattr(told.after, name))]
    ]
    rates = [
        "" if totals.pass_rate is None else f"{totals.pass_rate:.2f} %"
        for totals in (told.before, told.after)
    ]
    rows += [
        ("pass rate", *rates, ""),
        ("seconds", f"{told.before.duration:.1f}", f"{told.after.duration:.1f}", ""),
    ]
    took = [f"time: {told.time.before} -> {told.time.after}"] if told.time else []
    leaks = [f"leaks: {each.name} {each.before} -> {each.after}" for each in told.leaks[:_FEW]]
    more = [f"and {len(told.leaks) - _FEW:,} more"] if len(told.leaks) > _FEW else []
    lines = [
        told.verdict,
        *(f"missed: {each}" for each in told.missed),
        *(f"INCOMPLETE: {each}" for each in told.incomplete),
        *took,
        *leaks,
        *more,
    ]
    yield Section("Comparison", tuple(lines), ("", ">before", ">after", ">change"), tuple(rows))
    groups: tuple[tuple[str, tuple[Change, ...]], ...] = (
        ("Worse", told.worse),
        ("Better", told.better),
        ("New", told.new),
        ("Missing", told.missing),
        ("Skipped now", told.skipped),
        ("Gone", told.gone),
        ("Own peaks", told.peaks),
    )
    for title, changes in groups:
        if changes:
            yield table(title, ("what", "before", "after"), [tuple(each) for each in changes], top)
    if told.lines:
        columns = ("line", ">change", ">before", ">after", "test")
        yield table("Lines at the peak", columns, [_line_row(each) for each in told.lines], top)


def _line_row(each: LineChange) -> tuple[str, ...]:
    grown = each.after - each.before
    change = f"{'+' if grown > 0 else '-'}{format_bytes(abs(grown))}"
    return each.where, change, format_bytes(each.before), format_bytes(each.after), each.test

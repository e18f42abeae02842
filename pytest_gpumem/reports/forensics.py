"""What forensics found, as lines for a terminal, as Markdown and as a page."""

from __future__ import annotations

import html as markup
import io
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem.records.findings import CAUSES
from pytest_gpumem.units import format_bytes, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import Console

    from pytest_gpumem.forensics.compare import Change, Comparison
    from pytest_gpumem.records.findings import Death, Findings, OomEvent, Place


class Section(NamedTuple):
    """A title, sentences, and a table, each of which may be missing."""

    title: str
    sentences: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    """Those that begin with ``>`` hold numbers."""
    rows: tuple[tuple[str, ...], ...] = ()
    code: tuple[str, ...] = ()


def sections(found: Findings, top: int | None = None) -> Iterator[Section]:
    """Return the report: what a maintainer needs first, and with ``top`` the tables behind it.

    Each table has at most ``top`` rows and says how many it leaves out.
    """
    yield Section("GPU memory forensics", (*_totals(found), *_read(found)))
    if found.events:
        yield from _causes(found.events)
        yield from _worst(found)
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
        yield _table(
            "Out of memory",
            ("test", "worker", ">place", ">cause", ">tried", ">line"),
            [_event_row(event) for event in found.events],
            top,
        )
    if found.signatures:
        yield _table(
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
            yield _table(title, _PLACE_COLUMNS, [_place_row(each) for each in shown], top)


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
    counts = ", ".join(f"{count:,} {name}" for name in names if (count := getattr(totals, name)))
    if totals.tests:
        rate = f", pass rate {totals.pass_rate:.1f} %" if totals.pass_rate is not None else ""
        took = f", {_duration(totals.duration)}" if totals.duration else ""
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
        yield f"and {len(sources) - _FEW:,} more files{more}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {rest} s"
        if minutes
        else (f"{seconds:.2f} s")
    )


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
        f"{event.file}:{event.line}" if event.line else event.file,
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


def _table(
    title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], top: int
) -> Section:
    more = len(rows) - top
    note = (f"{more:,} more; --top {len(rows)} shows all",) if more > 0 else ()
    return Section(title, note, columns, tuple(rows[:top]))


def show(found: Findings, top: int | None = None) -> None:
    """Print the report to the terminal, in colour where that is one."""
    from rich.console import Console

    _print(Console(soft_wrap=False, highlight=False), sections(found, top))


def text(found: Findings, top: int | None = None) -> Iterator[str]:
    """Return the lines that ``show`` prints, without colour, 120 columns wide."""
    return _plain(sections(found, top))


def _plain(told: Iterable[Section]) -> Iterator[str]:
    from rich.console import Console

    output = io.StringIO()
    _print(Console(file=output, width=120, highlight=False), told)
    return map(str.rstrip, output.getvalue().splitlines())


def _print(console: Console, told: Iterable[Section]) -> None:
    from rich.table import Table
    from rich.text import Text

    for section in told:
        console.print()
        console.print(Text(printable(section.title), style="bold"))
        for sentence in section.sentences:
            style = "red" if sentence.startswith("cause:") or "INCOMPLETE" in sentence else ""
            console.print(Text(f"  {printable(sentence)}", style=style), soft_wrap=True)
        if section.rows:
            table = Table(box=None, pad_edge=True, header_style="dim")
            for column in section.columns:
                number = column.startswith(">")
                table.add_column(
                    column.lstrip(">"),
                    justify="right" if number else "left",
                    no_wrap=number,
                    overflow="fold",
                )
            for row in section.rows:
                table.add_row(*(Text(printable(cell)) for cell in row))
            console.print(table)
        for line in section.code:
            console.print(Text(f"    {printable(line)}", style="green"), soft_wrap=True)


def markdown(found: Findings, top: int | None = None) -> Iterator[str]:
    """Return the report as Markdown."""
    yield from _markdown(sections(found, top))


def _markdown(told: Iterable[Section]) -> Iterator[str]:
    for number, section in enumerate(told):
        yield f"{'#' if number == 0 else '##'} {section.title}"
        yield ""
        for sentence in section.sentences:
            indent = "  " if sentence.startswith("  ") else ""
            yield f"{indent}- {_cell(sentence.strip())}"
        if section.sentences:
            yield ""
        if section.rows:
            yield f"| {' | '.join(column.lstrip('>') for column in section.columns)} |"
            rules = ("--:" if column.startswith(">") else ":--" for column in section.columns)
            yield f"| {' | '.join(rules)} |"
            for row in section.rows:
                yield f"| {' | '.join(map(_cell, row))} |"
            yield ""
        if section.code:
            yield "```"
            yield from section.code
            yield "```"
            yield ""


def _cell(text: str) -> str:
    """Escape what Markdown would take for its own."""
    for special in "\\`*_[]<>|":
        text = text.replace(special, f"\\{special}")
    return text.replace("\n", " ")


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem;
  color: #1c2024; background: #fff }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% } td, th { padding: .25rem .6rem; text-align: left;
  border-bottom: 1px solid #e4e6ea; vertical-align: top; overflow-wrap: anywhere }
th { color: #666; font-weight: 500 } .n { text-align: right; white-space: nowrap }
pre { background: #f4f6f8; padding: .7rem; overflow-x: auto } p { margin: .2rem 0 }
.cause { color: #b3261e; font-weight: 600 }
@media (prefers-color-scheme: dark) { body { color: #e4e6ea; background: #14171a }
  td, th { border-color: #333 } pre { background: #1f2428 } .cause { color: #ff897d } }
"""


def html(found: Findings, top: int | None = None) -> Iterator[str]:
    """Return the report as one page that needs nothing else."""
    escape = markup.escape
    yield "<!DOCTYPE html>"
    yield '<html lang="en"><head><meta charset="utf-8"><title>GPU memory forensics</title>'
    yield '<meta name="viewport" content="width=device-width">'
    yield f"<style>{_STYLE}</style></head><body>"
    for number, section in enumerate(sections(found, top)):
        level = "h1" if number == 0 else "h2"
        yield f"<{level}>{escape(section.title)}</{level}>"
        for sentence in section.sentences:
            kind = ' class="cause"' if sentence.startswith("cause:") else ""
            yield f"<p{kind}>{escape(sentence)}</p>"
        if section.rows:
            numbers = [' class="n"' if column[:1] == ">" else "" for column in section.columns]
            heads = (
                f"<th{kind}>{escape(column.lstrip('>'))}</th>"
                for kind, column in zip(numbers, section.columns, strict=True)
            )
            yield f"<table><thead><tr>{''.join(heads)}</tr></thead><tbody>"
            for row in section.rows:
                cells = (
                    f"<td{kind}>{escape(cell)}</td>"
                    for kind, cell in zip(numbers, row, strict=True)
                )
                yield f"<tr>{''.join(cells)}</tr>"
            yield "</tbody></table>"
        if section.code:
            yield f"<pre>{escape(chr(10).join(section.code))}</pre>"
    yield "</body></html>"


def comparison(told: Comparison, *, markdown: bool = False, top: int = 20) -> Iterator[str]:
    """Return a comparison as lines."""
    parts = list(_compared(told, top))
    return _markdown(parts) if markdown else _plain(parts)


def _compared(told: Comparison, top: int) -> Iterator[Section]:
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
    leaks = [f"leaks: {each.name} {each.before} -> {each.after}" for each in told.leaks[:_FEW]]
    more = [f"and {len(told.leaks) - _FEW:,} more leaks"] if len(told.leaks) > _FEW else []
    lines = [
        told.verdict,
        *(f"missed: {each}" for each in told.missed),
        *(f"INCOMPLETE: {each}" for each in told.incomplete),
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
            yield _table(title, ("what", "before", "after"), [tuple(each) for each in changes], top)

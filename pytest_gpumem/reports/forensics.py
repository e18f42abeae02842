"""What forensics found, as lines for a terminal, as Markdown and as a page."""

from __future__ import annotations

import html as markup
import io
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem.forensics.records import CAUSES
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import Console

    from pytest_gpumem.forensics.compare import Change, Comparison
    from pytest_gpumem.forensics.records import Findings, OomEvent, Place, Totals


class Section(NamedTuple):
    """A title, sentences, and a table, each of which may be missing."""

    title: str
    sentences: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    """Those that begin with ``>`` hold numbers."""
    rows: tuple[tuple[str, ...], ...] = ()
    code: tuple[str, ...] = ()


def sections(found: Findings, top: int) -> Iterator[Section]:
    """Return the report; each table has at most ``top`` rows and says how many it leaves out."""
    yield Section("GPU memory forensics", tuple(_totals(found.totals)) + _read(found))
    if found.events:
        yield from _first(found)
        yield _causes(found.events)
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
    if found.notes:
        yield Section("Not read", found.notes)


_PLACE_COLUMNS = ("path", ">tests", ">passed", ">failed", ">errors", ">OOM", ">seconds")


def _totals(totals: Totals) -> Iterator[str]:
    names = ("passed", "failed", "errors", "skipped", "xfailed", "xpassed")
    counts = ", ".join(f"{count:,} {name}" for name in names if (count := getattr(totals, name)))
    if totals.tests:
        rate = f", pass rate {totals.pass_rate:.1f} %" if totals.pass_rate is not None else ""
        took = f", {_duration(totals.duration)}" if totals.duration else ""
        runs = _count(totals.runs, "run")
        yield f"{_count(totals.tests, 'test')} in {runs}: {counts}{rate}{took}"
    yield f"{_count(totals.oom, 'test or process', 'tests or processes')} ran out of memory"


def _read(found: Findings) -> tuple[str, ...]:
    names = ", ".join(found.files[:3])
    more = f" and {len(found.files) - 3} more" if len(found.files) > 3 else ""
    return (f"read: {names}{more}",)


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
    for name in names:
        size = getattr(event, f"{name}_bytes")
        if size is not None:
            printed = event.printed.get(name) or format_bytes(size)
            told.append(f"{name.replace('_', ' but ')} {printed}")
    device = f"{event.backend} {event.device}: " if event.device is not None else ""
    return f"{device}{', '.join(told)}" if told else ""


def _cause(event: OomEvent) -> str:
    return f"{'' if event.confirmed else 'probably '}{CAUSES[event.cause]}"


def _causes(events: Sequence[OomEvent]) -> Section:
    counts: Counter[str] = Counter()
    for event in events:
        counts[event.cause] += event.felled
    advice = {event.cause: event.advice for event in reversed(events)}
    first = events[0].cause
    code = [line for cause, _ in counts.most_common() if cause != first for line in advice[cause]]
    return Section(
        "Causes",
        columns=(">tests", "cause"),
        rows=tuple((str(count), CAUSES[cause]) for cause, count in counts.most_common()),
        code=tuple(dict.fromkeys(code)),
    )


def _event_row(event: OomEvent) -> tuple[str, ...]:
    felled = f" (+{event.felled - 1})" if event.felled > 1 else ""
    return (
        f"{event.nodeid or '-'}{felled}",
        event.worker or "",
        str(event.position or ""),
        event.cause if event.confirmed else f"{event.cause}?",
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


def show(found: Findings, top: int) -> None:
    """Print the report to the terminal, in colour where that is one."""
    from rich.console import Console

    _print(Console(soft_wrap=False, highlight=False), sections(found, top))


def text(found: Findings, top: int) -> Iterator[str]:
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
        console.print(Text(section.title, style="bold"))
        for sentence in section.sentences:
            style = "red" if sentence.startswith("cause:") else ""
            console.print(Text(f"  {sentence}", style=style))
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
                table.add_row(*map(Text, row))
            console.print(table)
        for line in section.code:
            console.print(Text(f"    {line}", style="green"), soft_wrap=True)


def markdown(found: Findings, top: int) -> Iterator[str]:
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


def html(found: Findings, top: int) -> Iterator[str]:
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
    verdict = [f"missed: {each}" for each in told.missed] or ["no threshold is missed"]
    yield Section("Comparison", tuple(verdict), ("", ">before", ">after", ">change"), tuple(rows))
    groups: tuple[tuple[str, tuple[Change, ...]], ...] = (
        ("Better", told.better),
        ("Worse", told.worse),
        ("New", told.new),
        ("Gone", told.gone),
        ("Peaks", told.peaks),
    )
    for title, changes in groups:
        if changes:
            yield _table(title, ("what", "before", "after"), [tuple(each) for each in changes], top)

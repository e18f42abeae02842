"""A report in sections, as lines for a terminal, as Markdown and as a page."""

from __future__ import annotations

import html as markup
import io
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem.units import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import Console


class Section(NamedTuple):
    """A title, sentences, and a table, each of which may be missing."""

    title: str
    sentences: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    """Those that begin with ``>`` hold numbers."""
    rows: tuple[tuple[str, ...], ...] = ()
    code: tuple[str, ...] = ()


def table(
    title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], top: int
) -> Section:
    """Return a table cut to ``top`` rows, which says how many it leaves out."""
    more = len(rows) - top
    note = (f"{more:,} more; --top {len(rows)} shows all",) if more > 0 else ()
    return Section(title, note, columns, tuple(rows[:top]))


def show(sections: Iterable[Section]) -> None:
    """Print them to the terminal, in colour where that is one."""
    from rich.console import Console

    _print(Console(soft_wrap=False, highlight=False), sections)


def text(sections: Iterable[Section]) -> Iterator[str]:
    """Return the lines that ``show`` prints, without colour, 120 columns wide."""
    from rich.console import Console

    output = io.StringIO()
    _print(Console(file=output, width=120, highlight=False), sections)
    return map(str.rstrip, output.getvalue().splitlines())


def _print(console: Console, sections: Iterable[Section]) -> None:
    from rich.table import Table
    from rich.text import Text

    for section in sections:
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


def markdown(sections: Iterable[Section]) -> Iterator[str]:
    """Return them as Markdown, the first as the title."""
    for number, section in enumerate(sections):
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


def html(sections: Iterable[Section], title: str) -> Iterator[str]:
    """Return them as one page that needs nothing else."""
    escape = markup.escape
    yield "<!DOCTYPE html>"
    yield f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
    yield '<meta name="viewport" content="width=device-width">'
    yield f"<style>{_STYLE}</style></head><body>"
    for number, section in enumerate(sections):
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

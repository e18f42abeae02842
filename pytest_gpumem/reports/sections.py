"""A report in sections, as lines for a terminal, as Markdown and as a page."""

from __future__ import annotations

import io
import re
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
        yield f"{'#' if number == 0 else '##'} {_line(section.title)}"
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
            yield from map(_line, section.code)
            yield "```"
            yield ""


def _line(text: str) -> str:
    """Return a text as one line that a terminal can show."""
    return printable(text).replace("\n", " ")


def _cell(text: str) -> str:
    """Escape what Markdown takes for its own, or GitHub for a person, an issue or a formula."""
    text = _line(text)
    for special in "\\`*_~#&[]<>|":
        text = text.replace(special, f"\\{special}")
    text = re.sub(r"(?<=[@#])(?=\w)", "<!-- -->", text)
    return text.replace("$", "<span>$</span>")  # as GitHub documents; a backslash does not do

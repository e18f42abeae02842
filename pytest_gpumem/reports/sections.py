"""A report in sections, as lines for a terminal, as Markdown and as a page."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem.reports.fold import fold
from pytest_gpumem.units import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import Console

_NAME = 4
"""By how much a name is indented that does not fit into the line of its row."""


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
    """Return the lines that ``show`` prints, without colour, however wide."""
    from rich.console import Console

    output = io.StringIO()
    _print(Console(file=output, highlight=False), sections)
    return map(str.rstrip, output.getvalue().splitlines())


def _print(console: Console, sections: Iterable[Section]) -> None:
    from rich.text import Text

    width = console.width if console.is_terminal else 0
    for section in sections:
        console.print()
        console.print(Text(printable(section.title), style="bold"))
        for sentence in section.sentences:
            style = "red" if sentence.startswith("cause:") or "INCOMPLETE" in sentence else ""
            for line in fold(f"  {printable(sentence)}", width):
                console.print(Text(line, style=style), soft_wrap=True)
        if section.rows:
            header, *rows = _aligned(section.columns, section.rows, width)
            for line, style in ((header, "dim"), *((row, "") for row in rows)):
                for part in fold(line, width, _NAME):
                    console.print(Text(part, style=style), soft_wrap=True)
        for line in section.code:
            console.print(Text(f"    {printable(line)}", style="green"), soft_wrap=True)


def _aligned(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    """Return the header and the rows as lines; where these are too wide, the longest cells last.

    There a line can be broken, and a name, whole, has the next one to itself.
    """
    table = [[column.lstrip(">") for column in columns], *(list(map(_line, row)) for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    order = list(range(len(columns)))
    if width and sum(widths) + 2 * len(widths) > width:
        order.append(order.pop(widths.index(max(widths))))
    for row in table:
        cells = (
            row[at].rjust(widths[at]) if columns[at].startswith(">") else row[at].ljust(widths[at])
            for at in order
        )
        yield f" {'  '.join(cells)}".rstrip()


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
                cells = (
                    _whole(_cell(cell)) if column.startswith(">") else _cell(cell)
                    for column, cell in zip(section.columns, row, strict=True)
                )
                yield f"| {' | '.join(cells)} |"
            yield ""
        if section.code:
            yield "```"
            yield from map(_line, section.code)
            yield "```"
            yield ""


def _line(text: str) -> str:
    """Return a text as one line that a terminal can show."""
    return printable(text).replace("\n", " ")


def _whole(number: str) -> str:
    """Return a number that is not torn from its unit where a table is narrow."""
    return number.replace(" ", "\N{NO-BREAK SPACE}")


def _cell(text: str) -> str:
    """Escape what Markdown takes for its own, or GitHub for a person, an issue or a formula."""
    text = _line(text)
    for special in "\\`*_~#&[]<>|":
        text = text.replace(special, f"\\{special}")
    text = re.sub(r"(?<=[@#])(?=\w)", "<!-- -->", text)
    return text.replace("$", "<span>$</span>")  # as GitHub documents; a backslash does not do

"""What all pages have in common: their head, their style, and sections as markup."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pytest_gpumem.reports.sections import Section

STYLE = """
:root { color-scheme: light dark; --text: #1c2024; --back: #fff; --faint: #656c76; --line: #dfe3e8;
  --code: #f4f6f8; --bad: #b3261e; --badge: #fbe9e7 }
@media (prefers-color-scheme: dark) { :root { --text: #e4e6ea; --back: #14171a; --faint: #9aa3ad;
  --line: #353b42; --code: #1f2428; --bad: #ff897d; --badge: #4a2320 } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 80rem;
  padding: 0 1rem; color: var(--text); background: var(--back) }
h1 { font-size: 1.5rem; margin: 0 0 .8rem } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
h3 { font-size: 1rem; margin: 1.1rem 0 .3rem }
a { color: inherit } p { margin: .25rem 0 } ul { margin: .3rem 0 } small { color: var(--faint) }
table { border-collapse: collapse; width: 100%; font-size: .92em }
td, th { padding: .2rem .55rem; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere }
th { color: var(--faint); font-weight: 500; background: var(--back) }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
pre { background: var(--code); padding: .6rem; overflow-x: auto } code { overflow-wrap: anywhere }
.cause { color: var(--bad) } p.cause { font-weight: 600 }
"""


def page(sections: Iterable[Section], title: str) -> Iterator[str]:
    """Return sections as one page that needs nothing else."""
    yield from head(title)
    for number, section in enumerate(sections):
        yield from markup(section, "h1" if number == 0 else "h2")
    yield "</body></html>"


def head(title: str, style: str = "") -> Iterator[str]:
    """Return a page up to the beginning of its body; ``style`` comes after what all have."""
    yield "<!DOCTYPE html>"
    yield f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
    yield '<meta name="viewport" content="width=device-width">'
    yield '<link rel="icon" href="data:,">'
    yield f"<style>{STYLE}{style}</style></head><body>"


def markup(section: Section, level: str) -> Iterator[str]:
    """Return a section below a heading of this ``level``: ``h2``."""
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
                f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(numbers, row, strict=True)
            )
            yield f"<tr>{''.join(cells)}</tr>"
        yield "</tbody></table>"
    if section.code:
        yield f"<pre>{escape(chr(10).join(section.code))}</pre>"

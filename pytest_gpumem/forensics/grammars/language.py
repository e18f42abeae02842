"""What a grammar is, and how its patterns are written."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import NamedTuple

# No more digits than a size can have: whoever prints 3,000 of them does not tell a size.
_DIGITS = r"\d[\d,]{0,24}"
_UNIT = re.compile(r"([\d,.]+?)\.?\s*(?:[Bb]ytes|([KMGTPEk])(?:i?[Bb]|io)?|B)?")
_SHIFTS = {"": 0, "k": 10, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}


def _figure(match: re.Match[str]) -> str:
    """Return the expression for ``<name>``, a size with its unit, or ``<name#>``, bare bytes."""
    name, bare = match.groups()
    # What follows an x is a number of another kind: 0x8007000E.
    if bare:
        return rf"(?<![xX\d])(?P<{name}>{_DIGITS})(?!\d)"
    unit = "(?:[Bb]ytes|[KMGTPE](?:i?[Bb]|io)?|k[Bb]|B)"
    return rf"(?<![xX\d])(?P<{name}>{_DIGITS}(?:\.\d{{0,6}})?\s?{unit}\b)"


def compile_figures(pattern: str) -> re.Pattern[str]:
    """Return the expression of a pattern with ``<name>`` and ``<name#>`` in it."""
    return re.compile(re.sub(r"(?<!\?P)<([a-z_]+)(#?)>", _figure, pattern))


class Grammar(NamedTuple):
    """One way to say it."""

    backend: str
    needles: tuple[str, ...]
    """Texts of which each message has one: what a log is searched for."""
    head: re.Pattern[str]
    """Matches where the message begins."""
    figures: tuple[re.Pattern[str], ...] = ()
    """Each searched for on its own, so that a message cut anywhere gives what is left of it."""
    distinct: bool = False
    """Whether nobody but the framework writes these words, so that they need no context."""
    kind: str = "error"
    """``error``; ``kill``: the host's word for a killed process; ``weak``: needs more evidence."""
    limit: bool = False
    """Whether the message itself says that a limit below the card's size was hit."""
    words: str = ""
    """The literal beginning of the message, by which one cut short is known."""


def grammar(
    backend: str,
    needles: str,
    head: str,
    *figures: str,
    distinct: bool = False,
    kind: str = "error",
    limit: bool = False,
    words: str = "",
) -> Grammar:
    """Return a grammar; ``|`` separates its needles, which are its head where that is empty."""
    literal = tuple(needles.split("|"))
    pattern = compile_figures(head or "|".join(map(re.escape, literal)))
    each = tuple(map(compile_figures, figures))
    return Grammar(backend, literal, pattern, each, distinct, kind, limit, words)


def size(text: str) -> int | None:
    """Return the bytes that a printed size names, None when it is none."""
    match = _UNIT.fullmatch(text.strip())
    if match is None:
        return None
    number = match[1].replace(",", "")
    if not re.fullmatch(r"\d{1,26}(?:\.\d+)?", number):
        return None
    return int(Decimal(number) * 2 ** _SHIFTS[match[2] or ""])

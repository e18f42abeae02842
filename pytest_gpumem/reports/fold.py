"""Lines that are wider than the terminal, broken so that no name is."""

from __future__ import annotations

import re
import shutil
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_WORD = re.compile(r"(?=\S)(?:\[[^\[\]]*\]|\S| (?=\[))+")
"""What is never broken: of a nodeid neither its parameters, which may hold spaces, nor its
worker."""

_SIZED = re.compile(r" *\d\S* [KMGT]?i?B\b")

_SIZE = len("1023.99 MiB")


def fold(text: str, width: int, indent: int | None = None) -> Iterator[str]:
    """Yield ``text`` in lines of at most ``width`` characters where its words allow it.

    Args:
        text: a line.
        width: of the terminal, 0 where nothing is to be broken.
        indent: of the further lines, where they have the room; by default four more than of the
            first.

    """
    command = text.lstrip().startswith("pytest ")  # broken, its first line would run by itself
    if not width or len(text) <= width or command:
        yield text
        return
    if indent is None:
        indent = _edge(text) + 4
    line, end = "", 0
    for word in _WORD.finditer(text):
        piece = text[end : word.end()]
        end = word.end()
        if line and len(line) + len(piece) > width:
            yield line
            line, piece = " " * min(indent, max(0, width - len(word[0]))), word[0]
        line += piece
    yield line


def columns() -> int:
    """Return how wide the terminal is that reads standard output, 0 where none does."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 0


def _edge(text: str) -> int:
    """Return where a line begins: one that begins with a size, where the column of sizes does."""
    size = _SIZED.match(text)
    return max(0, size.end() - _SIZE) if size else len(text) - len(text.lstrip())

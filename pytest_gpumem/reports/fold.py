"""Lines that are wider than the terminal, broken so that no name is."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_WORD = re.compile(r"(?=\S)(?:\[[^\[\]]*\]|\S| (?=\[))+")
"""What is never broken: of a nodeid neither its parameters, which may hold spaces, nor its
worker."""

_EDGE = re.compile(r" *(?:\d\S* [KMGT]?i?B\b)?")
"""What a line begins with: the column of a size, or its indent."""

_SIZE = len("1023.99 MiB")


def fold(text: str, width: int) -> Iterator[str]:
    """Yield ``text`` in lines of at most ``width`` characters where its words allow it.

    Args:
        text: a line, whose further lines are indented by four more.
        width: of the terminal, 0 where nothing is to be broken.

    """
    command = text.lstrip().startswith("pytest ")  # broken, its first line would run by itself
    if not width or len(text) <= width or command:
        yield text
        return
    edge = _EDGE.match(text)
    begin = edge.end() if edge else 0
    indent = " " * ((max(0, begin - _SIZE) if edge and edge[0].strip() else begin) + 4)
    line, end = "", 0
    for word in _WORD.finditer(text):
        piece = text[end : word.end()]
        end = word.end()
        if line and len(line) + len(piece) > width:
            yield line
            line, piece = indent, word[0]
        line += piece
    yield line

"""What a run asks of the grammars: whether an error says that memory ran out, and whose."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.forensics.messages import Message

_HINT = re.compile(
    r"(?i)memory|alloc|vram|\boom|exhausted|NVML_SUCCESS|NOT_INITIALIZED|pool size|KV cache"
    r"|cache blocks|INSUFFICIENT.RESOURCES|OUT_OF_RESOURCES|That was not possible"
    r"|mem-fraction-static|8007000e|cl(?:Create|Enqueue)|out of gpu resources|paging file"
)
"""Lines without any of these say nothing of memory; grammars are loaded only for one that has."""
_LINES = 100
"""Lines with a hint that are looked at: an error may carry a whole log."""
_LENGTH = 2_000
"""Characters of a line that are looked at."""

_LEADS = re.compile(
    r"\x1b\[[\d;]*m|[:;,.|>\])=]\s+|\s-+\s+|\((?:['\"])?"
    r"|\b(?i:errors?|exception|with|due to|because of|caused by|reason)\s+"
)
"""What may stand between somebody's own words and the framework's; of quotation marks only those
of an exception's ``repr``, for a text in others is data."""
_SURE = re.compile(r"(?<!['\"`])\b\w+ out of memory\. Tried to allocate \d")
"""With its figures it is an error wherever it stands."""
_DATA = re.compile(r"\bassert\b|AssertionError|\bFailed: |Regex pattern|DID NOT RAISE")
_CLASS = re.compile(r"(?:\w+\.)*OutOfMemoryError\b")
"""A name alone says nothing: Ray's is about the host, a database's about neither."""
_OF_HOST = re.compile(r"OUT_OF_HOST_MEMORY|device:CPU:|by allocator (?:mkl)?cpu\b")


class Said(NamedTuple):
    """What an error says of memory that ran out."""

    text: str
    """The framework's own words, one line."""
    host: bool = False
    """Whether it was the machine's memory and not the card's."""
    weak: bool = False
    """Whether it means that only on a card that was nearly full."""
    tried: int = 0
    """Bytes of the allocation that failed, 0 where it does not tell."""
    allowed: str = ""
    """The limit below the card's size that was hit, as printed; empty where there was none."""
    limit: int | None = None
    """The same in bytes."""


def classify(text: str, *, logged: bool = False) -> Said | None:
    """Return what the text of an exception says of memory that ran out, None if nothing.

    The words may stand anywhere in it. What only may mean it (``weak``) is returned where nothing
    better is found.

    Args:
        text: the exception's words.
        logged: whether they are what a program printed, which may tell of an error that it
            survived.

    """
    lines = _hinted(text)
    found = [said for line in lines if (said := _line(line, raised=not logged)) is not None]
    return min(found, key=lambda said: said.weak, default=None)


def _hinted(text: str) -> list[str]:
    if _HINT.search(text) is None:
        return []
    return [line[:_LENGTH] for line in text.splitlines() if _HINT.search(line)][:_LINES]


def _line(line: str, *, raised: bool) -> Said | None:
    from pytest_gpumem.forensics import messages

    # What stands before a logged message may say that it was survived.
    starts = sorted(set(_starts(line))) if raised else [0]
    for start in starts:
        if _DATA.search(line, 0, start) or _DATA.match(line, start):
            return None
        rest = line[start:]
        message = None if _CLASS.match(rest) else messages.parse(rest, raised=raised)
        if message is not None and not _quoted(message):
            if _DATA.search(message.text, 0, message.start):
                return None
            return Said(
                message.text[message.start :],
                host=message.backend in ("cpu", "host") or _OF_HOST.search(line) is not None,
                # ONNX Runtime's arena may be the host's; nobody vouches for unforeseen words.
                weak=message.kind == "weak"
                or not message.foreseen
                or message.backend == "onnxruntime",
                tried=message.sizes.get("tried", 0),
                allowed=message.printed.get("allowed", ""),
                limit=message.sizes.get("allowed"),
            )
    return None


def _quoted(message: Message) -> bool:
    """Tell whether somebody's own words speak of a message, rather than report it."""
    text = message.text
    if not message.start:
        return False
    named = message.named or text[: message.start].lstrip().startswith("what():")
    return not named or text[message.start - 1] in "'\"`"


def _starts(line: str) -> Iterator[int]:
    """Yield where the framework's words may begin."""
    yield len(line) - len(line.lstrip())
    for pattern, end in ((_LEADS, True), (_SURE, False)):
        yield from (match.end() if end else match.start() for match in pattern.finditer(line))

"""What the lines around one add to it: a message that was wrapped, a traceback above."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pytest_gpumem.forensics import grammars, lines, messages, prose, spoken, unforeseen
from pytest_gpumem.forensics.cursor import FILE
from pytest_gpumem.forensics.grammars.cuda import STICKY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.forensics.cursor import Cursor
    from pytest_gpumem.forensics.lines import Line, Text
    from pytest_gpumem.forensics.messages import Message

_SAID = 80
"""How far into a line a program says what it does next; further on are advice and paths."""
_SIZE = re.compile(r"\d\.? ?(?:[KMG]i?B|bytes)\b")
_PROGRAM = re.compile(
    rf"{_SIZE.pattern}|(?:Error|Exception|Exhausted|\b(?i:error|fatal|panic|failed|exhausted)"
    r"(?:\(\d{1,5}\))?|\.\w{1,4}:\d+) ?: |\bsignal \d|\bat line \d"
)
"""What a page's title has if it is what a program said."""
_SHOWN = re.compile(
    r"[A-Za-z] ?[:\uff1a] ?`([^`]*)`$"
    r"|\b(?i:errors?|exception|message|following|output|log|says|this) ?[:\uff1a] ?[\"']?"
    r"([\w.]*(?:Error|Exception): .*)$"
)
_BOLD = re.compile(r"\*\*([^*]+)\*\*")
"""A line that is set in bold as a whole."""
ERROR_LINE = re.compile(r"E {2,}(.*)")
# An error whose words are on the next line, or were cut by a width.
_UNENDED = re.compile(
    r"(?:[A-Za-z_][\w.]{0,200}(?:Error|Exception|Exhausted)\w*: (?!.{0,2000}emory).*"
    r"|.{0,400}(?:(?:Error|Exception|failure|what\(\)|exhausted|EXHAUSTED)[^:]{0,80}|\(\d+\)): ?"
    r"|.{0,400}\b(?:Out|of|memory|CUDA|RESOURCE_EXHAUSTED:|exhausted:)) *$"
)
_NARROW = 55
"""Characters: who wraps lines leaves none much shorter than a narrow terminal's."""
_ABOVE, _BELOW = 20, 4
"""Lines that are searched for whose memory ran out, where the message does not say it."""
_FRAME = re.compile(r"(?: {2,}|\s*\t)\s*\S|Traceback \(most")
# Where a new thing begins, a message that was wrapped has ended.
_NEW = re.compile(
    rf"(?:[=_-]{{3,}}|{FILE}:[\d:]|FAILED |ERROR |PASSED |SKIPPED |\[gw\d|Traceback |File |"
    r"frame #|>|.{0,80}\bout of memory\b|During handling|The above exception|\d+ passed|\d+ failed)"
)

_FOUND = re.compile(r"\S+\.\w{1,4}[:-]\d+[:-]")
"""How a line begins that a search has found in a file."""


def soon(at: Cursor, line: Line) -> str:
    """Return the two lines that follow, where a program says that it tries again."""
    said = (text.body[:_SAID] for text in following(line, 2, at.carrier))
    return "\n".join(text for text in said if not spoken.ADVICE.match(text))


def traced(at: Cursor, line: Line) -> bool:
    """Tell whether the line above is a frame of a traceback."""
    above = next(preceding(line, 1, at.carrier), None)
    return above is not None and _FRAME.match(above.body) is not None


def read_message(at: Cursor, line: Line, body: str, *, raised: bool) -> Message | None:
    """Parse a message, with the lines that it was wrapped onto; others may say whose it is."""
    found = _read(at, line, body.strip(), raised=raised)
    if found is None or found.foreseen:
        return found
    above = tuple(preceding(line, _ABOVE, at.carrier))
    said = unforeseen.ERRNO.search(found.text) is not None
    if not said and any(STICKY.search(text.body) for text in above):
        # A card that is broken refuses whatever it is asked for.
        return None
    if found.kind != "unsaid":
        return found
    around = (*above, *following(line, _BELOW, at.carrier))
    card = not said and any(unforeseen.whose(text.body) == "card" for text in around)
    return found._replace(backend="unknown" if card else "host")


def pasted(at: Cursor, line: Line, body: str) -> str:
    """Return a line without what somebody has put around a program's words that he shows.

    A page's heading, which unlike a comment has a blank line below it; what is set apart as code
    from a colon to the end of a line; and a whole line in bold.
    """
    if not body.startswith("# "):
        shown = _BOLD.fullmatch(body.strip()) or _SHOWN.search(body)
        if shown is None or prose.supposes(body[: shown.start()]):
            return body
        said = next(filter(None, shown.groups()))
        return said if _PROGRAM.search(said) else body
    below = next(following(line, 1, at.carrier), None)
    if below is None or below.body.strip():
        return body
    told = len(_SIZE.findall(body)) >= spoken.TELLING
    told = told or (line.number == 1 and _PROGRAM.search(body) is not None)
    return body[2:] if told else body


def _read(at: Cursor, line: Line, body: str, *, raised: bool) -> Message | None:
    if spoken.LITERAL.match(body):
        return None
    found = messages.parse(body, raised=raised)
    if found is None and messages.worded(body):
        # It only speaks of a message, unless that began above; no line below it changes that.
        return _begun_above(at, line, body, raised=raised) or _escaped(body, raised=raised)
    if found is None or not found.figures:
        found = _begun_above(at, line, body, raised=raised) or found
    cut = found is not None and not found.figures and len(body) >= _NARROW
    broken = cut or (found is None and _goes_on(line, body))
    if not broken and (
        found is None or found.complete or body.endswith(("...", "\N{HORIZONTAL ELLIPSIS}"))
    ):
        return found or _escaped(body, raised=raised)
    for text in _joined(line, body, at.carrier):
        other = messages.parse(text, raised=raised or found is not None)
        if other is not None and _knows_more(other, found):
            found = other
    return found


def _knows_more(other: Message, found: Message | None) -> bool:
    """Tell whether the whole says more than its first line: a figure, or whose memory it was."""
    if found is None or found.foreseen != other.foreseen:
        return found is None or other.foreseen
    if other.figures != found.figures:
        return other.figures > found.figures
    return other.backend != found.backend and not (found.figures and found.whole)


def _begun_above(at: Cursor, line: Line, body: str, *, raised: bool) -> Message | None:
    """Parse a message of which the line has the end only, where its figures stand above."""
    above = next(preceding(line, 1, at.carrier), None)
    if above is None or not (above.body.endswith(":") or len(above.body) >= _NARROW):
        return None
    whole = messages.parse(f"{above.body} {body}", raised=raised)
    if whole is None or not whole.figures or whole.start >= len(above.body):
        return None
    # What the line above says alone is a message of its own.
    alone = messages.parse(above.body, raised=raised)
    return None if alone is not None and alone.figures == whole.figures else whole


def _goes_on(line: Line, body: str) -> bool:
    """Tell whether a line that says nothing alone may be the first of a message that was cut."""
    if line.reach > line.end or _UNENDED.match(body):
        return True
    return len(line.raw) >= _NARROW and bool(grammars.speaking(body))


def _escaped(body: str, *, raised: bool) -> Message | None:
    """Parse the lines of a text that a record has in one, with its newlines escaped."""
    if "\\n" not in body:
        return None
    parts = re.split(r"\\+n", body)
    found = (messages.parse(part.strip(), raised=raised) for part in parts)
    return next((each for each in found if each is not None and each.named), None)


def preceding(line: Line, limit: int, carrier: re.Pattern[str] | None) -> Iterator[Text]:
    """Return the ``limit`` lines above, the nearest first."""
    end = line.end - len(line.raw)
    low = max(0, end - (1 << 14))
    for _ in range(limit):
        end = line.buffer.rfind(b"\n", low, end)
        if end < 0:
            return
        start = max(line.buffer.rfind(b"\n", low, end) + 1, end - 4096, low)
        yield lines.read(line.buffer[start:end].rstrip(b"\r"), carrier)


def following(line: Line, limit: int, carrier: re.Pattern[str] | None) -> Iterator[Text]:
    """Return the next ``limit`` lines, one by one: most who ask need the first only."""
    at = line.end
    for _ in range(limit):
        start = line.buffer.find(b"\n", at, line.window) + 1
        if not start:
            # Carriage returns alone, or the end.
            start = line.buffer.find(b"\r", at, line.window) + 1
            if not start:
                return
        end = line.buffer.find(b"\n", start, line.window)
        at = end if end >= 0 else line.window
        yield lines.read(line.buffer[start : min(at, start + 4096)].rstrip(b"\r"), carrier)


def _joined(line: Line, body: str, carrier: re.Pattern[str] | None) -> tuple[str, ...]:
    """Return ``body`` with the lines that go on with it, joined in each way they may have been cut.

    At a width, where spaces may have gone at the end of a line; at spaces; anywhere.
    """
    parts = [body]
    widths = [len(lines.read(line.raw, carrier).whole)]
    for text in following(line, 10, carrier):
        part = text.body
        if match := ERROR_LINE.match(part):
            part = match[1]
        # What a first line lacks altogether may be all that the second has.
        new = _NEW.match(part) or _NEW.match(text.body)
        if not part.strip() or _FOUND.match(part) or (new and ("emory" in body or len(parts) > 1)):
            break
        parts.append(part)
        widths.append(len(text.whole))
        if spoken.ENDS.search(" ".join(parts)):
            break
    if len(parts) == 1:
        return ()
    width = max(widths[:-1])
    padded = "".join(
        part + " " * (width - own) for part, own in zip(parts, [*widths[:-1], width], strict=True)
    )
    cut = (padded,) if min(widths[:-1]) >= width - 2 else ()
    return *cut, " ".join(each.strip() for each in parts), "".join(parts)

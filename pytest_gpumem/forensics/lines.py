"""Finds the few lines of a log that matter, at the speed of one pass over its bytes.

A log may have gigabytes and say something in a thousand lines. One regular expression of RE2,
which is linear in the text whatever the text is, finds the anchors: words without which no line
can matter. Only the lines around them are decoded and read.
"""

from __future__ import annotations

import functools
import html
import itertools
import json
import os
import re
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpumem.forensics import grammars, unforeseen

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from concurrent.futures import Future

WINDOW = 1 << 16
"""Bytes on either side of an anchor that can be read as its context."""
_REGION = 1 << 20
"""Bytes that are searched at a time: few enough to stay near the processor."""
_ANCHOR = 1 << 13
"""No anchor is longer: what stands so far behind a region need not be searched with it."""
_THREADS = 4
_WIDE = 1 << 14
_NEWLINE = ord("\n")
_LONG = 1 << 14
"""Longer lines are read in part, from a little before the anchor."""

# Also as JSON and other loggers escape it.
_ANSI = rb"(?:(?:\x1b|\\u001[bB]|\\x1[bB]|\\033|\\e)?\[[\d;]*m)*"
# A blank, one that does not break, a colour, the sides of a box between two of its lines.
_BLANK = rb"(?:\s|\xc2\xa0|\xe2\x94[\x82\x83]|(?:\x1b|\\u001[bB])?\[[\d;]*m)"
_SPACE = _BLANK + b"+"
_STRUCTURE = rb"|".join(
    part.replace(b"ANSI", _ANSI)
    for part in (
        # The host.
        rb"[Kk]illedANSI(?:\s|$)|(?:[Cc]ode|status|exited?|value|Error)ANSI[ :=\"'(]+ANSI137",
        # The same behind the word of another language.
        rb"[\x80-\xff][ :=\"']*137\b",
        rb"SIGKILL|9/KILL|[Ss]ignal:? (?:9\b|killed)|[Cc]ode[ :=]+-9\b",
        # pytest's lines.
        rb"\.(?:py|md|rst|txt|ya?ml|json|ipynb)ANSI::|\.pyANSI:\d+: ",
        rb"\[gw\d+\]|'gw\d+'|bringing up nodes|\d workers? \[\d+ items?\]",
        rb" _+[ \r]*ANSI[ \r]*$",
        # The same within JSON.
        rb" _+ *ANSI(?:\\[rn])*\"|[Kk]illed(?:\\[rn])*\"",
        rb"={2,}ANSI \S",
        rb"-ANSI Captured ",
        rb"\d%\]|\[ *\d+/\d+\]",
        rb"\.py\", line \d+, in [Tt]est|^rootdir: |what\(\): ",
        rb"collected \d+ item|(?:PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)ANSI[ \r]*$",
        rb"(?:ed|errors?|warnings?|rerun|ran)ANSI in \d",
        rb"testMethod=|python3? \S+\.py [\w.]+ANSI\s",
        rb"EANSI {2,}ANSI(?:MemoryError|\| )",
        rb"EANSI {2,}ANSI[\w.]+(?:Error|Exception|Exit|Failed|Warning|Timeout)\w*:",
        rb"EANSI {2,}ANSI(?:assert |Failed: )",
        rb"(?:ERROR|FAIL): \w+ \(|Ran \d+ tests? in ",
        rb"ERROR|CRITICAL|FAILED|SUBFAIL",
        rb"object has no attribute '",
        rb"Fatal Python error|terminate called|Segmentation fault|\+{3} Timeout \+{3}",
    )
)


@functools.lru_cache(2)
def _anchors(needles: tuple[str, ...]) -> Any:
    """Return the compiled anchors; compiled late, for their engine is slow to import."""
    import re2

    memory = (
        _SPACE.join(re.escape(part).encode() for part in needle.split()) for needle in needles
    )
    # Loggers and shells write the commonest words in many ways.
    gap = b"(?:_|" + _BLANK + b")*"
    words = (b"(?i:out" + gap + b"of" + gap + b"memory)", *memory, unforeseen.ANCHORS)
    options = re2.Options()
    options.max_mem = 256 << 20
    # Bytes as they are: nothing here asks for characters beyond ASCII, and their ranges cost time.
    options.encoding = re2.Options.Encoding.LATIN1
    return re2.compile(b"(?m)" + b"|".join((*words, _STRUCTURE)), options)


class Line(NamedTuple):
    """A line that holds an anchor."""

    number: int
    raw: bytes
    buffer: bytes
    """The line's surroundings; what follows the line stands in it from ``end`` to ``window``."""
    end: int
    window: int
    reach: int
    """Where the anchor ends, which may be on a later line."""


def scan(chunks: Iterable[bytes]) -> Iterator[Line]:
    """Return the lines that hold an anchor, the same ones however ``chunks`` are cut.

    An empty chunk says that more is not there yet: the lines so far are returned. Memory stays
    that of a few regions and their windows.
    """
    number, position = 1, 0
    for region, found in _searched(_regions(chunks)):
        buffer, begin, limit, base = region
        # A region may begin within a line too long for the last one, of which a part was told.
        again = found and found[0].at < position - base
        hits = _hits(region._replace(begin=position - base)) if again else found
        counted = begin
        for start, end, at, reach in hits:
            number += _newlines(buffer, counted, start)
            counted = max(start, counted)
            raw = buffer[max(start, position - base) : end]
            yield Line(number, raw, buffer, end, at + WINDOW, reach)
            position = base + max(end, at + 1)
        number += _newlines(buffer, counted, limit)


def _newlines(buffer: bytes, start: int, end: int) -> int:
    """Count the ends of lines; NumPy does it several times as fast once there is much to count."""
    if end - start < _WIDE:
        return buffer.count(b"\n", start, end)
    import numpy as np

    return int(np.count_nonzero(np.frombuffer(buffer, np.uint8, end - start, start) == _NEWLINE))


class _Hit(NamedTuple):
    """Where a line with an anchor starts and ends, and where its anchor does."""

    start: int
    end: int
    at: int
    reach: int


class _Region(NamedTuple):
    """A part of the log, with a window of context on either side."""

    buffer: bytes
    begin: int
    limit: int
    base: int
    """Where the buffer begins in the log."""


def _searched(regions: Iterable[_Region | None]) -> Iterator[tuple[_Region, list[_Hit]]]:
    """Return each region with its anchors, while threads search those that follow.

    RE2 lets others run meanwhile.
    """
    from concurrent.futures import ThreadPoolExecutor

    ahead = min(_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(ahead) as threads:
        begun: deque[tuple[_Region, Future[list[_Hit]]]] = deque()
        for region in itertools.chain(regions, [None]):
            if region is not None:
                begun.append((region, threads.submit(_hits, region)))
            while len(begun) > (ahead if region is not None else 0):
                first, found = begun.popleft()
                yield first, found.result()


def _regions(chunks: Iterable[bytes]) -> Iterator[_Region | None]:
    """Return the log in regions that begin where a line begins, unless lines are too long.

    None says that more is not there yet.
    """
    buffer, begin, base = b"", 0, 0
    for more, window in _gather(chunks):
        buffer += more
        limit = len(buffer)
        if window is not None:
            limit -= window
            whole = buffer.rfind(b"\n", begin, max(limit, begin)) + 1
            limit = whole or (limit if window else begin)
        if limit > begin:
            yield _Region(buffer, begin, limit, base)
            cut = max(0, limit - WINDOW)
            buffer, begin, base = buffer[cut:], limit - cut, base + cut
        if window == 0:
            yield None


def _hits(region: _Region) -> list[_Hit]:
    """Return the lines with an anchor that begins in the region, in order."""
    search = _anchors(grammars.needles()).search
    buffer, position, limit, _ = region
    hits = []
    while position < limit:
        match = search(buffer, position, limit + _ANCHOR)
        if match is None or match.start() >= limit:
            break
        at = match.start()
        start, end = _line(buffer, at)
        hits.append(_Hit(start, end, at, match.end()))
        position = max(end, at + 1)
    return hits


def _gather(chunks: Iterable[bytes]) -> Iterator[tuple[bytes, int | None]]:
    """Return larger pieces, without the NULs of text in UTF-16.

    With each comes how much of its end awaits context: a window, nothing where more is not there
    yet, None at the end.
    """
    held: list[bytes] = []
    size = 0
    for chunk in chunks:
        held.append(chunk.replace(b"\0", b"") if b"\0" in chunk else chunk)
        size += len(chunk)
        if size >= _REGION or not chunk:
            yield b"".join(held), WINDOW if chunk else 0
            held, size = [], 0
    yield b"".join(held), None


def _line(buffer: bytes, at: int) -> tuple[int, int]:
    """Return where the line around ``at`` starts and ends; carriage returns end lines too."""
    low, high = max(0, at - WINDOW), min(len(buffer), at + WINDOW)
    start = max(buffer.rfind(b"\n", low, at), low - 1) + 1
    start = max(buffer.rfind(b"\r", start, at), start - 1) + 1
    end = buffer.find(b"\n", at, high)
    end = high if end < 0 else end
    stop = buffer.find(b"\r", at, end)
    end = end if stop < 0 else stop
    if end - start > _LONG:
        start = max(start, at - 2048)
        end = min(end, start + _LONG)
    return start, end


_ESCAPES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|_[^\x07\x1b]*\x07|[@-Z\\-_])"
    # Colours whose escape character was lost on the way, or spelled out.
    r"|(?:\\(?:033|e|x1[bB]|u001[bB]))?\[(?:\d{1,3}(?:;\d{1,3})*)m"
)
_ENTITIES = re.compile(r"&(?:quot|apos|amp|lt|gt|nbsp|#\d{2,4}|#x[\da-fA-F]{2,4});")
_GUTTER = re.compile(r"[\s\u2502\u2503]+$")
"""The right side of a box."""
_LEVELS = r"(?P<level>TRACE|DEBUG|INFO|NOTICE|WARNING|WARN|ERROR|CRITICAL|FATAL)"
_PREFIXES = tuple(
    map(
        re.compile,
        (
            r"\ufeff|`{3}(?=\S+ \S)",
            r"[^\t]{1,120}\t[^\t]{1,120}\t\ufeff?(?=\d{4}-)",
            r"\[?\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,:]\d+)?(?:Z| ?[+-]\d\d:?\d\d)?\]?:? ?",
            r"std(?:err|out) [FP] (?=\S)",
            # GitLab's stream and its number.
            r"\d\d[OE][+ ]? ?(?=\S)",
            r"\[?\d\d:\d\d:\d\d(?:[.,]\d+)?\]?:? ?",
            r"\[?[A-Z][a-z]{2} (?:[A-Z][a-z]{2} )?[ \d]\d \d\d:\d\d:\d\d(?:\.\d+)?(?: \d{4})?\]? ",
            r"[\w.-]+ (?:kernel|[\w.-]+\[\d+\]): ",
            r"\[ *\d+\.\d{3,}\] ?(?:\[ *[TC]\d+\] )?",
            r"\[(?P<rank>rank\d+)\]:? ?",
            r"\[(?:default)?(?P<local>\d+)\]: ?",
            r"(?P<task>\d{1,4}): (?= ?\S)",
            # MPI's launcher: job and rank.
            r"\[\d+,(?P<task>\d{1,4})\]<std(?:err|out)>: ?",
            r"\((?:\w+ )?\w+ (?:pid|ip|rank)=[^)]{1,80}\)(?: \[repeated[^\]]*\])? ",
            r"\([A-Z]\w+_?\w*(?: pid=\d+)?\) ",
            rf"{_LEVELS} +\| (?:\S+:\S+:\d+ - )?",
            r"[\w.-]{1,60}(?:-\d+)? +\| ",
            # What was wrapped may go on with a blank.
            r"> (?= ?\S)",
            r"\| (?=\S)|[\u2502\u2503] (?= ?\S)|INTERNALERROR> ",
            # The gutter of an exception group.
            r" {2,}\| (?=[A-Za-z_][\w.]{0,80}(?:Error|Exception): )",
            r"##\[\w+\] ?|::\w+(?: [^:]*)?::",
            r"<\d{1,3}>",
            rf"{_LEVELS} +\S+:\S+\.py:\d+ ",
            rf"{_LEVELS}(?: \d\d-\d\d \d\d:\d\d:\d\d)? \[[^\]\s]+:\d+\] ",
            rf"\[{_LEVELS}\] ?(?:\[[^\]]*\] ?)?",
            rf"{_LEVELS}:[\w.]+:",
            rf"(?:- )?(?:[\w.]+ - )?{_LEVELS} +- (?:[\w.]+ - )?",
            r"(?P<low>WARNING|INFO|DEBUG): ",
            r"\[?(?:(?P<info>I)|W|(?P<fault>[EF]))\d{4} \d\d:\d\d:\d\d\.\d+ +\d* ?[\w./-]+:\d+\] ",
            r"(?:: )?(?:(?P<info>I)|W|(?P<fault>[EF])) (?:external/)?[\w./-]+:\d+\] ",
            r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d ",
            r'\{"(?:log|message|msg)": ?"',
        ),
    )
)
_ANY_PREFIX = re.compile("|".join(re.sub(r"\?P<\w+>", "?:", each.pattern) for each in _PREFIXES))


class Text(NamedTuple):
    """A line as its program wrote it."""

    body: str
    """Without escapes and without what the carrier put before it; indentation stays."""
    level: str
    """Of a log record, else empty."""
    rank: str
    """``rank1`` where the carrier names it, else empty."""
    whole: str
    """Without escapes only."""


def carrier(text: str) -> re.Pattern[str] | None:
    """Return what a carrier that nobody foresaw puts before each line, as a pytest banner shows it.

    Numbers in it may differ from line to line, and with them the space before them.
    """
    match = _BANNER.match(text) if len(text) < 1000 else None
    if match is None or _QUOTED.match(match[1]):
        return None
    known = match[1].lstrip()
    parts = (r"\d+" if part.isdecimal() else re.escape(part) for part in re.split(r"(\d+)", known))
    return re.compile(r"\s*" + "".join(parts) if known else re.escape(match[1]))


_BANNER = re.compile(
    r"([^=]{1,200}?)(?:={3,} (?:test session starts|FAILURES|ERRORS|short test summary info) ={3,}"
    r"|(?<=[^\w.])[.FEsxX]{5,} *\[ *\d+%\]"
    r"|(?<=[^\w./:])[^\s:=]\S*\.py::\S.* (?:PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS) *\[ *\d+%\])$"
)
_QUOTED = re.compile(r"\s*(?:E |[>|]|#(?!\d))")


_TOLD = ("log", "message", "msg", "textPayload", "MESSAGE", "event", "text", "line")
_WHY = (
    *(
        "error",
        "err",
        "exception",
        "exc_info",
        "traceback",
        "stack_trace",
        "stack",
        "reason",
        "cause",
    ),
    *("detail", "details", "stderr", "error_message", "errorMessage", "exception.message"),
    "exception.stacktrace",
)
_EXIT = ("exitCode", "exit_code", "exitcode", "exitStatus", "exit_status")
_WITHIN = ("fields", "jsonPayload", "data", "record")


def _of_json(text: str) -> tuple[list[str], str]:
    """Return the lines that a record of a JSON log wraps, and its level."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return [text], ""
    for key in _WITHIN:
        within = record.get(key)
        record = {**record, **within} if isinstance(within, dict) else record
    told = next((record[key] for key in _TOLD if isinstance(record.get(key), str)), None)
    if told is None:
        return [text], ""
    why = [text for key in _WHY for text in _texts(record.get(key))]
    why += [f"{key}: {record[key]}" for key in _EXIT if isinstance(record.get(key), (int, str))]
    level = next((str(record[key]) for key in ("level", "severity", "levelname", "lvl")
                  if isinstance(record.get(key), str)), "")  # fmt: skip
    told_lines = [told.strip("\r\n"), *why]
    return [line for part in told_lines for line in part.split("\n")], level.upper()


def _texts(value: object) -> list[str]:
    """Return what a field says why something failed: a text, or an error with fields of its own."""
    if isinstance(value, dict):
        return [
            value[key] for key in ("message", "msg", "stack") if isinstance(value.get(key), str)
        ]
    return [value] if isinstance(value, str) else []


def read_all(raw: bytes, learned: re.Pattern[str] | None = None) -> list[Text]:
    """Return the texts of one line: one, unless it is a record that wraps several."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = raw.decode("cp1252", errors="replace")
    bare = text.strip()
    wrapped, level = _of_json(bare) if bare[:2] == '{"' and bare[-1:] == "}" else ([text], "")
    texts = (_read(_plain(line), learned) for line in wrapped)
    return [text._replace(level=text.level or level) for text in texts]


def read(raw: bytes, learned: re.Pattern[str] | None = None) -> Text:
    """Return the text of one line, whatever its encoding, without what was learned of a carrier."""
    return read_all(raw, learned)[0]


def _plain(text: str) -> str:
    """Return a line without what terminals, browsers and boxes need to show it."""
    text = _ESCAPES.sub("", text)
    if "&" in text and _ENTITIES.search(text):
        text = html.unescape(text)
    return _GUTTER.sub("", text.replace("\u00a0", " "))


def _read(whole: str, learned: re.Pattern[str] | None) -> Text:
    body, level, rank = whole, "", ""
    if learned is not None and (match := learned.match(body)):
        body = body[match.end() :]
    for _ in range(8):
        if not _ANY_PREFIX.match(body):
            break
        for prefix in _PREFIXES:
            match = prefix.match(body)
            if match is not None and match.end():
                break
        else:
            break
        found = match.groupdict()
        if found.get("info") or found.get("fault"):
            # A record of errors may be within one of another program, which says no more of it.
            level = "INFO" if found.get("info") else ""
        level = found.get("level") or found.get("low") or level
        number = found.get("local") or found.get("task")
        rank = found.get("rank") or (f"rank{number}" if number else rank)
        body = body[match.end() :]
    return Text(body, level, rank, whole)

"""Lines that tell that memory ran out, or that a process ended."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

from pytest_gpumem.forensics import lines, spoken
from pytest_gpumem.forensics.continuation import (
    ERROR_LINE,
    following,
    pasted,
    preceding,
    read_message,
    soon,
    traced,
)
from pytest_gpumem.forensics.cursor import BEGUN
from pytest_gpumem.forensics.grammars.host import KILL_ONCE, PROBABLE_KILL, SHELL_KILL
from pytest_gpumem.forensics.quotation import (
    advised,
    coded,
    commented,
    enumerated,
    listed,
    shown,
    wrapped,
)
from pytest_gpumem.forensics.runs import Kill, Seen
from pytest_gpumem.forensics.signatures import signature, subject

if TYPE_CHECKING:
    from pytest_gpumem.forensics.cursor import Cursor
    from pytest_gpumem.forensics.lines import Line, Text

_LOGGED_KEPT = 1000
_SURVIVED = {"TRACE", "DEBUG", "INFO", "NOTICE", "WARNING", "WARN"}
"""Levels of log records: who logs a failure as less than an error goes on."""
_FATAL_LEVELS = {"ERROR", "CRITICAL", "FATAL"}
_CRASH = re.compile(r"(?:worker|Slave|slave) '(gw\d+)' crashed while running '(.+?)'?$")
_DOWN = re.compile(r"\[(gw\d+)\] node down: ")
WHAT = re.compile(
    r"(?:(.*?)\s*terminate called after throwing an instance of '?(?P<kind>.*?)'?"
    r"(?:\s+what\(\): +(?P<said>.*))?"
    r"|\s*what\(\): +(?P<what>.*))$"
)
"""An exception that nobody caught, by C++'s own word, with what stood before it."""
_EXCEPTION = re.compile(
    r"(?:[A-Za-z_]\w{0,80}\.){0,12}\w{0,80}"
    r"(?:Error|Exception|Exit|Failed|Warning|Timeout)\w{0,80}: "
)
# Only a traceback names the exception's module.
_QUALIFIED = re.compile(r"(?:[A-Za-z_]\w{0,80}\.){1,12}\w{0,80}(?:Error|Exception)\w{0,80}: ")
_STATE = 8
_NOT_MEMORY = re.compile(
    r"\bOOMKilled\W{1,4}(?i:false)\b|\bDUE TO (?:TIME LIMIT|PREEMPTION|NODE FAILURE)\b"
    r"|(?:^|[$#;&] ?)(?:sudo )?p?kill(?:all)? -(?:9|(?:SIG)?KILL)\b"
    r"|\bWORKER TIMEOUT\b|(?i:timeout: sending signal|\btimed out after \d"
    r"|\bexceeded the (?:maximum |allowed )?(?:execution |job |run )?time"
    r"|\btime(?:d )?[ -]?out\b.{0,40}\bkill|\bkill\w*\b.{0,60}\btime(?:d )?[ -]?out\b)"
)
_FAILED = re.compile(r"(?i:error|exception)\b")
"""How a record of the lowest levels begins that tells of a failure nevertheless."""
_TEXT = re.compile(r"[-+]?\s*\"[^\"]*\",?|\s*\"[^\"]* [^\"]*\"\s*:.*")
"""A text that stands alone, or that something else is given for."""
_PID = re.compile(r"\bpid[ :=]{1,2}(\d{1,10})\b")
_UNMARKED = re.compile(r"^[\"'`*]+(?=\w)|[\"'`*]+$")
"""The marks that a line is pasted in."""
_KILLED = re.compile(r"KILL|[Kk]illed\b|SIGKILL|137|-9\b|\b9\b")
_FAULT = re.compile(
    r"Fatal Python error: (?P<fatal>Segmentation fault|Illegal instruction|Bus error"
    r"|Floating.point exception|Cannot recover from stack overflow)"
    r"|\+{3,} (?P<timeout>Timeout) \+{3,}|^(?P<shell>Segmentation fault|Bus error)\b"
)
"""What ends a process in its own words, which are not memory's."""


def read_memory(at: Cursor, line: Line, text: Text) -> bool:
    """Read a line that may tell that memory ran out."""
    if at.section == "other":
        return True
    body = pasted(at, line, text.body)
    failure = at.failure
    if (match := ERROR_LINE.match(body)) and not at.captured:
        return note_raised(at, line, match[1].removeprefix("| "))
    if (match := WHAT.match(body)) and not spoken.COMMENT.match(match[1] or ""):
        # An abort: "what()" tells why, and nobody catches it.
        if match[1] and (begun := BEGUN.match(match[1])):
            at.resume()
            at.run.current = at.run.test(begun[1])
        # What "what()" says is more than the exception's name, where it says anything.
        said = (
            match["what"]
            or match["said"]
            or ("" if _what_follows(at, line) else match["kind"])
            or ""
        )
        return note_loose(at, line, said, rank=text.rank, raised=True)
    if not at.captured and (
        at.section == "failures" or (failure is not None and at.section == "errors")
    ):
        # Source lines are indented; --tb=native prints the error at the margin.
        found = None if body[:1].isspace() else read_message(at, line, body, raised=True)
        if found and found.named and found.kind != "kill":
            failure = failure or at.fail(line, "")
            failure.note(Seen(line.number, found))
            failure.error = body
            return True
        return note_kill(at, line, body)
    if commented(at, line, body):
        return True
    return note_loose(at, line, body, text.level, text.rank) or note_kill(at, line, body)


def _what_follows(at: Cursor, line: Line) -> bool:
    """Tell whether one of the next two lines is C++'s word for what was thrown."""
    found = (WHAT.match(text.body) for text in following(line, 2, at.carrier))
    return any(match is not None and match["what"] for match in found)


def note_raised(at: Cursor, line: Line, message: str) -> bool:
    """Take the error of the failing test from a line that shows it."""
    failure = at.failure
    if failure is None and at.section == "failures":
        failure = at.fail(line, "")
    stripped = message.strip()
    if failure is not None and (failure.compares or spoken.QUOTING.search(stripped)):
        failure.error = failure.error if failure.compares else stripped
        failure.compares = True
        return True
    found = read_message(at, line, stripped, raised=True)
    if found and found.kind != "kill" and (found.named or found.sizes or stripped != message):
        failure = failure or at.fail(line, "")
        failure.note(Seen(line.number, found))
        failure.error = stripped
        return True
    if failure is not None and (_EXCEPTION.match(stripped) or stripped.startswith("assert ")):
        failure.error = stripped
        return True
    return False


def note_loose(
    at: Cursor, line: Line, body: str, level: str = "", rank: str = "", *, raised: bool = False
) -> bool:
    """Keep a message outside of failures; how the test ends decides what it meant."""
    found = read_message(at, line, body, raised=raised)
    if found is None and not raised and traced(at, line):
        found = read_message(at, line, body, raised=True)
        level = ""
    if found is None or listed(at, line, body) or coded(at, line, body, found.text[: found.start]):
        return False
    sentence = not raised and wrapped(at, line, body)
    if found.figures < spoken.TELLING and (sentence or advised(at, line)):
        return True
    if shown(at, line) or enumerated(at, line, body):
        return True
    if found.kind == "kill":
        at.run.kills.append(Kill(line.number, found, found.pid, _once(body)))
        return True
    if level in _SURVIVED and (_QUALIFIED.match(body) or traced(at, line)):
        # The last line of a traceback is an error, at whatever level a carrier logs it.
        level = ""
    if level not in {"WARNING", "WARN"} and _FAILED.match(body):
        level = ""
    if level in _SURVIVED or (not raised and spoken.HANDLED.search(soon(at, line))):
        return True
    seen = Seen(line.number, found, rank or None)
    if at.failure is not None and at.captured:
        if found.named or raised:
            at.failure.aside = at.failure.aside or seen
    elif found.named or raised or found.sizes or level in _FATAL_LEVELS:
        at.run.loose.append((seen, at.run.current))
    return True


def note_kill(at: Cursor, line: Line, body: str) -> bool:
    """Keep a line that tells of a killed process."""
    if at.captured:
        return False
    match = SHELL_KILL.search(body) or PROBABLE_KILL.fullmatch(_UNMARKED.sub("", body))
    if match is None or _TEXT.fullmatch(body) or advised(at, line) or wrapped(at, line, body):
        return False
    at_word = next(_KILLED.finditer(body), match).start()
    if not spoken.reports(body, (at_word, at_word), "kill", 1):
        return False
    if listed(at, line, body) or coded(at, line, body, body[:at_word]):
        return False
    if _of_another(at, line):
        return False
    found = _PID.search(body)
    pid = match.groupdict().get("pid") or (found[1] if found else None)
    at.run.kills.append(Kill(line.number, None, int(pid) if pid else None, _once(body)))
    return True


def _once(body: str) -> str:
    return body.strip() if KILL_ONCE.search(body) else ""


def _of_another(at: Cursor, line: Line) -> bool:
    """Tell whether a container's state, or a scheduler, says that memory was not the reason."""
    above, below = preceding(line, _STATE, at.carrier), following(line, _STATE, at.carrier)
    own = lines.read_all(line.raw, at.carrier)
    return any(_NOT_MEMORY.search(text.body) for text in itertools.chain(own, above, below))


def read_death(at: Cursor, line: Line, text: Text) -> bool:
    """Read a line that tells of the end of a worker or of a process."""
    run = at.run
    if match := _CRASH.search(text.body):
        worker, nodeid = match[1], match[2].rstrip("'")
        if nodeid in run.crashed:
            return True
        run.crashed.add(nodeid)
        failure = at.failure
        if failure is None or at.section != "failures":
            failure = at.fail(line, nodeid)
        failure.name = failure.nodeid = nodeid
        failure.worker, failure.died = worker, True
        return True
    if match := _DOWN.match(text.body):
        run.down.setdefault(match[1], line.number)
        run.faults.setdefault(match[1], at.fault)
        run.pytest, at.fault = True, ""
        return True
    if match := _FAULT.search(text.body):
        at.fault = match["fatal"] or match["timeout"] or match["shell"]
        run.faults[None] = at.fault
        return "Fatal" in text.body
    return False


def read_logged(at: Cursor, line: Line, text: Text) -> bool:
    """Count the errors in lines of logs."""
    del line
    body = text.body
    what = subject(body)
    if text.level not in {"ERROR", "CRITICAL", "FATAL"} and what is None:
        return False
    if body and not body.startswith(("E ", ">", "FAILED", "ERROR ")):
        run = at.run
        name = signature(body[:400])
        if name in run.logged or len(run.logged) < _LOGGED_KEPT:
            run.logged[name] += 1
            run.subjects[name] |= {what} if what else set()
    return True

"""Lines of pytest around the tests: banners, headers of failures, the short summary."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pytest_gpumem.forensics import messages
from pytest_gpumem.forensics.cursor import FILE
from pytest_gpumem.forensics.memory import note_raised
from pytest_gpumem.forensics.runs import FAILING, SUBTESTS, Run, Summary

if TYPE_CHECKING:
    from pytest_gpumem.forensics.cursor import Cursor
    from pytest_gpumem.forensics.lines import Line, Text

_BANNER = re.compile(r"={2,} (.+?) ={2,}$|=+ (.*\bin \d.*?) =+$")
_TITLE = re.compile(
    r"test session starts|FAILURES$|ERRORS$|short test summary info$|PASSES$|X(?:FAILURES|PASSES)$"
    r"|warnings summary|slowest |rerun test summary|no tests (?:ran|collected)|GPU memory$"
    r"|(?:tests )?coverage"
)
_RULE = re.compile(r"_+ (.+?) _+$")
_CAPTURED = re.compile(r"-+ ?Captured (?:std\w+|log)\b")
_WORKER_LINE = re.compile(r"\[(gw\d+)\] \w+ -- Python ")
_SUMMARY = re.compile(
    r"(FAILED|ERROR|SUBFAILED|SUBFAIL|XFAIL|XPASS|PASSED|RERUN|SKIPPED)"
    r"(?: ?\[[\d.]+s\]|(?:\[[^\]]*\])? ?(?:\([^)]*\))?)? "
    rf"({FILE}(?:::\S(?:[^\[]*?\[.*?\](?=$| [A-Z-]|\[)|[^\[]*?))?)(?: - (.*))?$"
)
_CUT_SUMMARY = re.compile(rf"(FAILED|ERROR) ({FILE}::\S+?)(?:\.\.\.)?()$")
_BEHIND = re.compile(rf"(?<![\w./-])(FAILED|ERROR) ({FILE}::\S.{{0,400}}?) - (\S.*)$")
_TALLY = re.compile(
    r"\b(\d{1,9}) (passed|failed|skipped|deselected|xfailed|xpassed|errors?|warnings?|rerun)\b"
)
_TOOK = re.compile(r"\bin (\d{1,9}(?:\.\d+)?)s\b")
_NO_TESTS = re.compile(r"no tests (?:ran|collected)")
_LOCATION = re.compile(rf"({FILE}):(\d+):(?: (\S.*))?$")
# --tb=native, and groups of exceptions in any style: the frame that bears the test's name.
_NATIVE = re.compile(r'[ |]*File "([^"]+\.py)", line \d+, in (\w+)$')
_ROOT = re.compile(r"rootdir: ([^,]+)")
_COLLECTED = re.compile(
    r"collected (\d{1,9}) items?(?: / (?:\d+ errors? / )?(\d{1,9}) deselected)?"
)
_WORKERS = re.compile(r"\d+ workers? \[(\d{1,9}) items?\]|gw0 \[(\d{1,9})\]|bringing up nodes")
_SELF = re.compile(r"self = <([\w.]+)\.(\w+) testMethod=(\w+)>")
_UNITTEST = re.compile(r"(?:ERROR|FAIL): (\w+) \(([\w.]+)\)")
_UNITTEST_TOTAL = re.compile(r"Ran (\d{1,9}) tests? in (\d{1,9}(?:\.\d+)?)s")
_REPEAT = re.compile(r"(?:\w+=\S+ )*python3? (\S+\.py) (?:\w+\.)?(\w+)$")
_PHASE = re.compile(r"ERROR (?:at (setup|teardown) of|(collecting)) (.+)")
_NAME = re.compile(r"[\w.:<>/\\ ()-]+(?:\[.*)?")


def read_banner(at: Cursor, line: Line, text: Text) -> bool:
    """Read a line that begins or ends a section or a run."""
    body = text.body
    if (at.section == "progress" or not at.run.pytest) and _prologue(at, body):
        return True
    if not body.startswith("="):
        # -q prints the last line bare.
        last = _TOOK.search(body) and (_TALLY.match(body) or _NO_TESTS.match(body))
        if last:
            _end(at, line, body)
        return last is not None
    match = _BANNER.match(body)
    if match is None:
        return False
    title = match[1] or match[2]
    if not _of_pytest(at, body, title):
        return False
    at.failure, at.captured = None, False
    if title.startswith("test session starts"):
        if at.run.pytest or at.run.loose or at.run.kills:
            at.runs.append(Run())
        at.run.pytest = True
        at.section = "progress"
    elif _TOOK.search(title) and (_TALLY.search(title) or _NO_TESTS.search(title)):
        _end(at, line, title)
    elif title in {"FAILURES", "ERRORS", "short test summary info"}:
        at.resume()
        at.section = title.split()[0].lower()
    else:
        # PASSES, XFAILURES, warnings, slowest durations, our own section ...
        at.section = "other"
    return True


def _of_pytest(at: Cursor, body: str, title: str) -> bool:
    """Tell whether a banner is pytest's: tests and programs print some, too, of other widths."""
    if _TITLE.match(title) or (_TOOK.search(title) and _TALLY.search(title)):
        at.width = len(body)
        return True
    return at.run.pytest and not at.run.ended and at.width in {0, len(body)}


def _prologue(at: Cursor, body: str) -> bool:
    """Read what pytest says before the first test."""
    run = at.run
    if match := _ROOT.match(body):
        run.root = match[1].strip()
    elif match := _COLLECTED.match(body):
        run.collected = int(match[1]) - int(match[2] or 0)
    elif match := _WORKERS.match(body):
        run.workers = True
        run.collected = int(match[1] or match[2] or 0) or run.collected
    else:
        return False
    return True


def _end(at: Cursor, line: Line, text: str) -> None:
    run = at.run
    for number, word in _TALLY.findall(text):
        run.tally["error" if word == "errors" else word] += int(number)
    took = _TOOK.search(text)
    run.duration += float(took[1]) if took else 0.0
    run.ended = run.pytest = True
    run.end_line = line.number
    run.current = None
    at.section, at.failure = "", None


def read_summary(at: Cursor, line: Line, text: Text) -> bool:
    """Read a line of the short test summary, wherever it stands."""
    body = text.body
    match = body[:1].isupper() and (_SUMMARY.match(body) or _CUT_SUMMARY.match(body))
    if not match:
        # Behind a head that nobody knows, what it says of memory shows that it is one.
        match = not at.captured and _BEHIND.search(body)
        if not match or messages.parse(match[3], raised=True) is None:
            return False
    kind = SUBTESTS.get(match[1], match[1])
    if kind in FAILING:
        at.run.pytest = True
        subtest = match[1] in SUBTESTS
        at.run.summary.append(Summary(kind, match[2], match[3] or "", line.number, subtest))
        if at.section not in {"failures", "errors"}:
            at.failure = None
    return True


def read_header(at: Cursor, line: Line, text: Text) -> bool:
    """Read the line that names the test of a section."""
    match = text.body.startswith("_") and _RULE.match(text.body)
    if not match or not match[1].strip("_ "):
        return False
    if at.section in {"other", "short"}:
        return True
    name, phase = match[1], "call"
    kind = "ERROR" if at.section == "errors" else "FAILED"
    if where := _PHASE.match(name):
        kind, phase, name = "ERROR", where[1] or "collect", where[3]
    if at.section not in {"failures", "errors"}:
        # The log begins within a section, or it is no header at all.
        if not _NAME.fullmatch(name):
            return True
        at.section = "errors" if where else "failures"
    at.fail(line, name, kind, phase)
    return True


def read_detail(at: Cursor, line: Line, text: Text) -> bool:
    """Read what a failing test's section says about the test itself."""
    body = text.body
    if match := _UNITTEST.match(body):
        # Python 3.11 on: "test_step (mod.Class.test_step)".
        owner = match[2].removesuffix(f".{match[1]}")
        at.section = "failures"
        at.fail(line, f"{owner}.{match[1]}")
        return True
    if match := _UNITTEST_TOTAL.match(body):
        at.run.tally["tests"] += int(match[1])
        at.run.duration += float(match[2])
        at.failure, at.section = None, ""
        return True
    failure = at.failure
    if failure is not None and (match := _NATIVE.match(text.whole)):
        base = failure.name.partition("[")[0].rpartition(".")[2]
        if match[2] == base and not at.captured:
            failure.file = match[1].removeprefix(f"{at.run.root}/")
        return True
    location = _LOCATION.match(body) if not at.captured else None
    if location and at.section == "failures" and not (failure and failure.name):
        # --tb=line has no headers: a line with the place ends each failure.
        if location[3] and not location[3].startswith("in "):
            failure = failure or at.fail(line, "")
            failure.file = location[1].replace("\\", "/")
            note_raised(at, line, location[3])
            at.failure = None
        return True
    if failure is None:
        return False
    if match := _WORKER_LINE.match(body):
        failure.worker = match[1]
    elif _CAPTURED.match(body):
        at.captured = True
    elif match := _REPEAT.match(body.lstrip()):
        failure.file = match[1]
    elif at.captured:
        return False
    elif match := _SELF.search(body):
        failure.name = failure.name or f"{match[2]}.{match[3]}"
        failure.file = failure.file or f"{match[1].replace('.', '/')}.py"
    elif location:
        failure.compares = False
        if failure.file is None and "site-packages" not in location[1]:
            failure.file = location[1].replace("\\", "/")
    else:
        return False
    return True

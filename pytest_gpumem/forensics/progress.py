"""Lines that tell that a test began or ended."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pytest_gpumem.forensics.continuation import following
from pytest_gpumem.forensics.cursor import BEGUN, FILE
from pytest_gpumem.forensics.memory import WHAT, note_kill, note_loose
from pytest_gpumem.forensics.runs import FAILING, SUBTESTS

if TYPE_CHECKING:
    from pytest_gpumem.forensics.cursor import Cursor
    from pytest_gpumem.forensics.lines import Line, Text
    from pytest_gpumem.forensics.runs import Test

_WORDS = r"PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS|RERUN|SUBPASSED|SUBPASS|SUBFAILED|SUBFAIL"
_PROGRESS = r"\[ *(?:\d+%|\d+/\d+)\]"
_XDIST = re.compile(rf"\[(gw\d+)\] (?:{_PROGRESS} )?({_WORDS}) ({FILE}(?:::.*)?)$")
_OUTCOME = re.compile(
    rf"(?:^|(?<=[^\w.])|(?<=\w))({_WORDS})(?: \([^()]{{0,200}}\))? *({_PROGRESS})?(?: [\d.]+s)?$"
)
_DOTS = re.compile(rf"(?:({FILE}) )?([.FEsxXRrpuPf,-]+) *({_PROGRESS})?$")
_DURATION = re.compile(rf"(\d{{1,9}}(?:\.\d+)?)s (?:setup|call|teardown) +({FILE}::.*)$")
_LONE_OUTCOME = re.compile(r"(.*?)(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)$")


def read_progress(at: Cursor, line: Line, text: Text) -> bool:
    """Read a line that tells that a test began or ended."""
    body = text.body
    if "::" not in body and "]" not in body and at.run.current is None:
        return _dots(at, body)
    if match := _XDIST.match(body):
        at.resume()
        at.section = "progress"
        if "::" in match[3]:
            _outcome(at.run.test(match[3], match[1]), match[2])
        return True
    if match := _DURATION.match(body.lstrip()):
        if test := at.run.find(match[2]):
            test.duration += float(match[1])
        return True
    if at.section in {"failures", "errors", "short", "other"}:
        return False
    # With -s a test's output stands between its name and its outcome.
    ended = _OUTCOME.search(body, max(0, len(body) - 300))
    begun = BEGUN.match(body[: ended.start()].rstrip() if ended else body)
    if ended and begun:
        at.resume()
        at.section = "progress"
        _outcome(at.run.test(begun[1]), ended[1])
        at.run.current = None
        return True
    if at.run.current is not None and (word := _lone(at, line, body, ended)):
        _outcome(at.run.current, word)
        at.run.current = None
        # What the test printed before it on the same line was survived, or is its failure's.
        return True
    return _dots(at, body) or (begun is not None and _begin(at, line, begun))


def _lone(at: Cursor, line: Line, body: str, ended: re.Match[str] | None) -> str | None:
    """Return the outcome that -s leaves at the end of what a test printed."""
    if ended and ended[2]:
        return ended[1]
    match = _LONE_OUTCOME.match(body)
    if match is None:
        return None
    # A program may print such a word itself: then its test has not ended.
    after = next((text.body for text in following(line, 1, at.carrier)), "")
    alone = not match[1] or not after.strip() or BEGUN.match(after) or after.startswith("=")
    return match[2] if alone else None


def _begin(at: Cursor, line: Line, begun: re.Match[str]) -> bool:
    """Enter a test whose nodeid stands alone, or before what it prints."""
    if at.section != "progress":
        return False
    if not at.run.distributed:
        at.run.current = at.run.test(begun[1])
        if begun[2] and not WHAT.match(begun[2]):
            _ = note_loose(at, line, begun[2]) or note_kill(at, line, begun[2])
    return True


def _outcome(test: Test, word: str) -> None:
    # A teardown may fail after the test passed; nothing that comes later makes it pass.
    word = SUBTESTS.get(word, word)
    test.torn = test.torn or (test.outcome == "PASSED" and word == "ERROR")
    if test.outcome not in FAILING or word == "FAILED":
        test.outcome = word


def _dots(at: Cursor, body: str) -> bool:
    if at.section not in {"", "progress"}:
        return False
    match = _DOTS.match(body)
    if match is None or not (match[1] or match[3]):
        return False
    at.resume()
    run = at.run
    file = match[1] or next(reversed(run.letters), ("", ""))[0]
    for number, letter in enumerate(match[2], run.letters.total() + 1):
        run.letters[file, letter] += 1
        if letter in run.marked:
            run.marked[letter].append((number, file))
    return True

"""Gives failures their tests: sections name them shortly, the summary and the progress in full."""

from __future__ import annotations

import re
from collections import defaultdict, deque
from itertools import islice
from typing import TYPE_CHECKING

from pytest_gpumem.forensics import messages
from pytest_gpumem.forensics.runs import FAILING, Failure, Run, Seen, Summary

if TYPE_CHECKING:
    from collections.abc import Iterable

_SUBTEST = re.compile(r"(\S+?(?:\[.*?\])?) (?:\[.*\]|\(.*\)|\[.*\] \(.*\))$")
_CRASHED = re.compile(r"worker '(gw\d+)' crashed while running '(.+?)(?:'|\.\.\.)?$")

_NEARBY = 1000
"""How many of the waiting are searched for an error: sections stand in the summary's order."""

Waiting = dict[tuple[str, str], list[Summary]]
"""By kind and short name: tests that failed and whose section has not been met."""


def resolve(run: Run) -> None:
    """Give the failures of a run their nodeids, and join what tells of the same failure."""
    waiting: Waiting = defaultdict(list)
    listed = set()
    for entry in run.summary:
        waiting[entry.kind, _short(entry.nodeid)].append(entry)
        listed.add((entry.kind, entry.nodeid))
    for test in run.order:
        if test.outcome in FAILING and (test.outcome, test.nodeid) not in listed:
            entry = Summary(test.outcome, test.nodeid, "", 0)
            waiting[test.outcome, _short(test.nodeid)].append(entry)
    _in_order(run, waiting)
    marked = _marked(run)
    for failure, (_, file) in marked:
        # A section may end in the file that raised; the letters stand beside the test's own.
        failure.file = file or failure.file
    shorts = {_short(test.nodeid): test.nodeid for test in run.order}
    for failure in run.failures:
        _name(failure, run, waiting, shorts)
    for entry in [each for entries in waiting.values() for each in entries if each.line]:
        run.failures.append(_from_summary(entry, run))
    _positions(run)
    _deaths(run)


def _in_order(run: Run, waiting: Waiting) -> None:
    """Name the failures of --tb=line, which stand in the order of the summary."""
    nameless = [each for each in run.failures if not each.name and each.kind == "FAILED"]
    listed = [each for each in run.summary if each.kind == "FAILED"]
    if nameless and len(nameless) == len(listed):
        for failure, entry in zip(nameless, listed, strict=True):
            failure.name, failure.nodeid = _short(entry.nodeid), entry.nodeid
            waiting[entry.kind, failure.name].remove(entry)
            _adopt(failure, entry)


def _short(nodeid: str) -> str:
    """Return a nodeid as pytest writes it in a section's header: ``TestX.test_y[param]``."""
    name, bracket, parameter = nodeid.partition("[")
    path, _, rest = name.partition("::")
    return (rest.replace("::", ".") or path) + bracket + parameter


def _name(failure: Failure, run: Run, waiting: Waiting, shorts: dict[str, str]) -> None:
    if failure.nodeid is not None:
        _strike(failure.nodeid, waiting)
        return
    name = failure.name.removeprefix("[doctest] ") or _by_error(failure, waiting)
    subtest = _SUBTEST.match(name)
    for key in (name, subtest[1] if subtest else name):
        entries = waiting.get((failure.kind, key), [])
        if entries:
            # Sections stand in the order of the summary; the file decides where it is known.
            chosen = next(
                (each for each in entries if _same(failure.file, each.nodeid)), entries[0]
            )
            entries.remove(chosen)
            if not entries:
                del waiting[failure.kind, key]
            failure.nodeid = chosen.nodeid
            _adopt(failure, chosen)
            break
    else:
        failure.nodeid = shorts.get(name) or _guess(failure, name)
    if failure.worker is None and (test := run.find(failure.nodeid)):
        failure.worker = test.worker


def _strike(nodeid: str, waiting: Waiting) -> None:
    """Take a test that died from those waiting: the summary may list it by its file alone."""
    for kind in FAILING:
        for key in (_short(nodeid), nodeid.partition("::")[0]):
            entries = waiting.get((kind, key), [])
            entries[:] = [
                each
                for each in entries
                if each.nodeid != nodeid and "crashed while" not in each.message
            ]


def _by_error(failure: Failure, waiting: Waiting) -> str:
    """Return the name of the test that the summary lists with a nameless failure's error."""
    for (kind, key), entries in islice(waiting.items(), _NEARBY):
        for entry in entries[:_NEARBY] if kind == failure.kind else ():
            start = entry.message.removesuffix("...")
            if failure.error.startswith(start) if start else _same(failure.file, entry.nodeid):
                return key
    return ""


def _same(file: str | None, nodeid: str) -> bool:
    path = nodeid.partition("::")[0]
    return file is not None and (
        file == path or file.endswith(f"/{path}") or path.endswith(f"/{file}")
    )


def _guess(failure: Failure, name: str) -> str | None:
    """Return the nodeid of a test that no other line of the log names."""
    if "::" in name or not name or failure.phase == "collect":
        return name or None
    base, bracket, parameter = name.partition("[")
    parts = base.split(".")
    if failure.file and (len(parts) < 3 or parts[-2][:1].isupper()):
        # unittest puts the module first.
        classes = [part for part in parts[:-1] if part[:1].isupper() or len(parts) < 3]
        return "::".join([failure.file, *classes, parts[-1]]) + bracket + parameter
    if len(parts) > 2:
        return f"{'/'.join(parts[:-2])}.py::{parts[-2]}::{parts[-1]}"
    return name


def _adopt(failure: Failure, entry: Summary) -> None:
    """Take the summary's word where the section has none."""
    failure.subtest = entry.subtest
    message = entry.message
    found = messages.parse(message, raised=True) if message else None
    if found is not None and found.named and failure.seen is None and not failure.died:
        failure.seen = Seen(failure.line, found)
    if message and (not failure.error or not message.endswith("...")):
        failure.error = failure.error or message if failure.seen else message


def _from_summary(entry: Summary, run: Run) -> Failure:
    phase = "call"
    if entry.kind == "ERROR":
        test = run.find(entry.nodeid)
        torn = test is not None and test.torn
        phase = "collect" if "::" not in entry.nodeid else "teardown" if torn else "setup"
    failure = Failure(entry.line, _short(entry.nodeid), entry.kind, phase)
    failure.nodeid = entry.nodeid
    if match := _CRASHED.match(entry.message):
        failure.worker, failure.died = match[1], True
        failure.nodeid = entry.nodeid if "::" in entry.nodeid else match[2]
    _adopt(failure, entry)
    return failure


def _marked(run: Run) -> list[tuple[Failure, tuple[int, str]]]:
    """Find each failure's letter without -v: the k-th F is the k-th section of FAILURES."""
    found = []
    for kind, letter in (("FAILED", "F"), ("ERROR", "E")):
        # Subtests have sections, but no letters.
        told = [each for each in run.failures if each.kind == kind and not each.subtest]
        marked = run.marked[letter]
        if len(told) == len(marked) and not run.distributed and not run.order:
            found += list(zip(told, marked, strict=True))
    return found


def _positions(run: Run) -> None:
    """Enter the failures of a run without -v at the places of their letters."""
    found = _marked(run) if not any(each.worker for each in run.failures) else []
    late = 0
    for failure, (position, _) in sorted(found, key=lambda pair: pair[1][0]):
        # A teardown's E is a second letter of the test before it.
        late += failure.phase == "teardown"
        run.place(failure.nodeid, None, position - late, failure.kind)


def _deaths(run: Run) -> None:
    """Give a worker's death the message that its process printed before it ended."""
    outside = deque(seen for seen, test in run.loose if test is None)
    taken = set()
    for failure in _dead(run.failures):
        end = max(run.down.get(failure.worker or "", 0), failure.line)
        if outside and outside[0].line <= end:
            failure.seen = outside.popleft()
            taken.add(id(failure.seen))
    run.loose = [each for each in run.loose if id(each[0]) not in taken]


def _dead(failures: Iterable[Failure]) -> list[Failure]:
    return [each for each in failures if each.died and each.seen is None]

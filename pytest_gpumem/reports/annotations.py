"""Remarks at lines of tests, as services that show changes to code take them."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem.reports.counts import by_cause, by_kind, count_up, place, plural
from pytest_gpumem.units import format_bytes, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pytest_gpumem.records import RecordedTest, RunRecord

LEVELS = ("error", "warning", "notice")
_SHOWN = 10
"""Of each level: GitHub shows no more of one step (docs.github.com, "Workflow commands for GitHub
Actions", and github.com/orgs/community/discussions/26680)."""


class Annotation(NamedTuple):
    """A remark at a line of a file."""

    level: str
    """One of ``LEVELS``."""
    file: str
    """From the root of the repository; empty where there is no place for it."""
    line: int
    """Counted from 1; 0 for the file as a whole."""
    title: str
    message: str


def of_run(run: RunRecord, *, every: bool = False) -> Iterator[Annotation]:
    """Return a remark for each kind of leak, each cause of failures, each budget that was missed.

    Their files are named from pytest's rootdir. The largest of a kind has it, and counts the
    others: ten places are all that GitHub shows. With ``every``, each leak and test has its own.
    """
    counted = count_up(run)
    causes, kinds = by_cause(counted), by_kind(counted.leaks)
    if every:
        causes = [(culprits, [test]) for culprits, tests in causes for test in tests]
        kinds = [[leak] for leak in counted.leaks]
    for culprits, (first, *others) in causes:
        told = [first.oom, *(f"beside it: {each.text}" for each in first.beside), *culprits]
        told += _likewise("test", [place(test) for test in others])
        yield _at(first, "error", "out of memory", told)
    tests = {test.nodeid: test for test in run.tests}
    for each in run.budgets:
        if each.verdict == "above" and each.nodeid in tests:
            allowed = "" if each.budget is None else f", its budget is {format_bytes(each.budget)}"
            told = [f"took {format_bytes(each.own)} on {each.card}{allowed}"]
            yield _at(tests[each.nodeid], "error", "above its budget", told)
    for largest, *rest in kinds:
        told = [f"{format_bytes(largest.size)} leaked by {largest.by}"]
        told += [f"held by {holder.where}" for holder in largest.holders[:_NAMED]]
        told += largest.orphans[:_NAMED]
        told += _likewise("leak", [f"{format_bytes(each.size)} by {each.by}" for each in rest])
        yield _at(largest.test, "warning", "GPU memory leak", told)


_NAMED = 3


def _likewise(noun: str, others: list[str]) -> list[str]:
    if not others:
        return []
    more = f", and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
    return [f"likewise {plural(len(others), noun)}: {', '.join(others[:_NAMED])}{more}"]


def _at(test: RecordedTest, level: str, title: str, told: list[str]) -> Annotation:
    return Annotation(level, test.file, test.line, f"{title}: {test.nodeid}", "\n".join(told))


def github(annotations: Iterable[Annotation]) -> Iterator[str]:
    """Return them as workflow commands, as many as GitHub shows.

    Where there are more, the last one of a level says how many.
    """
    found = list(annotations)
    for level in LEVELS:
        some = [each for each in found if each.level == level]
        if len(some) > _SHOWN:
            more = len(some) - _SHOWN + 1
            text = f"{more} more like these are in the log and in the job's summary"
            some[_SHOWN - 1 :] = [Annotation(level, "", 0, "GPU memory", text)]
        yield from map(_command, some)


def _command(each: Annotation) -> str:
    places = {"file": each.file, "line": str(each.line or ""), "title": each.title}
    properties = ",".join(f"{name}={_property(text)}" for name, text in places.items() if text)
    return f"::{each.level} {properties}::{_data(each.message)}"


# As actions/toolkit escapes them (packages/core/src/command.ts).


def _data(text: str) -> str:
    clean = "\n".join(map(printable, text.split("\n")))
    return clean.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


_SEVERITIES = {"error": "critical", "warning": "major", "notice": "info"}


def gitlab(annotations: Iterable[Annotation]) -> str:
    """Return them as JSON for GitLab's report "Code Quality", all of them.

    GitLab compares the fingerprints of two branches, so one holds whatever sizes a message tells.
    """
    plain = [
        {
            "description": f"{each.title}: {each.message}".replace("\n", "; "),
            "check_name": "pytest-gpumem",
            "fingerprint": hashlib.sha256(f"{each.file}\n{each.title}".encode()).hexdigest(),
            "severity": _SEVERITIES[each.level],
            "location": {"path": each.file, "lines": {"begin": max(1, each.line)}},
        }
        for each in annotations
    ]
    return json.dumps(plain, indent=1)

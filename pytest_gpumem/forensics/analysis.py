"""Reads logs and puts together what they tell: events, totals, signatures."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from pytest_gpumem.forensics import events, readers
from pytest_gpumem.forensics.records import (
    SCHEMA,
    Findings,
    OomSequence,
    Place,
    SequenceTest,
    Signature,
    Totals,
)
from pytest_gpumem.forensics.signatures import signature, subject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from pytest_gpumem.forensics.records import OomEvent
    from pytest_gpumem.forensics.runs import Run
    from pytest_gpumem.records import RunRecord

_SIGNATURES_KEPT = 200
_EXAMPLES = 5
_WORDS = {
    "PASSED": "passed",
    "FAILED": "failed",
    "ERROR": "error",
    "SKIPPED": "skipped",
    "XFAIL": "xfailed",
    "XPASS": "xpassed",
}
_LETTERS = {".": "PASSED", "F": "FAILED", "E": "ERROR", "s": "SKIPPED", "x": "XFAIL", "X": "XPASS"}


def analyse(paths: Iterable[str]) -> Findings:
    """Return what the files tell; ``-`` is standard input, directories are walked.

    Raises:
        OSError: when a file that was named cannot be read.
        ValueError: in one sentence, when it is of no use.

    """
    logs, notes = [], []
    given = list(paths)
    for path in readers.paths(given):
        try:
            logs.append((path, readers.read(path)))
        except ValueError as error:
            if path in given:
                raise ValueError(f"{path!r} {error}") from None
            notes.append(f"{path!r} {error}")
    return findings(logs, notes)


def analyze_oom_sequence(log: str | Path) -> OomSequence:
    """Return the tests of a log in the order in which they ran, and its out-of-memory events.

    Raises:
        OSError: when the file cannot be read.
        ValueError: in one sentence, when it is of no use.

    """
    runs = readers.read(str(log))
    tests = (test for run in runs for test in run.order)
    return OomSequence(
        findings([(str(log), runs)]).events,
        tuple(
            SequenceTest(test.nodeid, test.position, test.worker, test.outcome) for test in tests
        ),
    )


def of_record(run: RunRecord, name: str = "") -> Findings:
    """Return what the records of a run tell; ``name`` stands where a file's would."""
    return findings([(name, [readers.of_record(run)])])


def findings(logs: Sequence[tuple[str, list[Run]]], notes: Sequence[str] = ()) -> Findings:
    """Return what the runs of the files tell together."""
    drafts: list[events.Draft] = []
    kills: list[events.Draft] = []
    number = 1
    for path, runs in logs:
        told, killed = events.draft(path, runs, number)
        number += sum(run.pytest for run in runs)
        drafts += told
        kills += killed
    events.explain_deaths(drafts, kills)
    drafts += kills
    order = {path: at for at, (path, _) in enumerate(logs)}
    drafts.sort(key=lambda each: (order[each.file], each.number, events.when(each)))
    every = [run for _, runs in logs for run in runs]
    told_events = events.finish(drafts)
    return Findings(
        schema=SCHEMA,
        files=tuple(path for path, _ in logs),
        events=told_events,
        totals=_totals(every, told_events),
        signatures=_signatures(every),
        by_file=_places(every, told_events, lambda path: path),
        by_directory=_places(every, told_events, lambda path: path.rpartition("/")[0] or "."),
        peaks={name: peak for run in every for name, peak in run.peaks.items()},
        outcomes=_outcomes(every),
        notes=tuple(notes),
    )


def _counts(run: Run) -> Counter[str]:
    """Return how many tests passed, failed and so on: by pytest's own word if it had the last."""
    if run.tally["tests"]:
        failed = sum(bool(failure.nodeid) for failure in run.failures)
        return Counter(passed=run.tally["tests"] - failed, failed=failed)
    if run.tally:
        return run.tally
    counts = Counter(_WORDS[test.outcome] for test in run.order if test.outcome in _WORDS)
    for (_, letter), number in run.letters.items() if not counts else ():
        counts[_WORDS.get(_LETTERS.get(letter, ""), "")] += number
    for failure in run.failures if not counts else ():
        counts[_WORDS[failure.kind]] += bool(failure.nodeid)
    return counts


def _totals(runs: Sequence[Run], told: Sequence[OomEvent]) -> Totals:
    counts: Counter[str] = Counter()
    for run in runs:
        counts += _counts(run)
    judged = counts["passed"] + counts["failed"] + counts["error"]
    return Totals(
        runs=sum(run.pytest for run in runs),
        tests=sum(counts[name] for name in _WORDS.values()),
        passed=counts["passed"],
        failed=counts["failed"],
        errors=counts["error"],
        skipped=counts["skipped"],
        xfailed=counts["xfailed"],
        xpassed=counts["xpassed"],
        oom=sum(event.felled for event in told),
        pass_rate=100.0 * counts["passed"] / judged if judged else None,
        duration=sum(run.duration or sum(test.duration for test in run.order) for run in runs),
    )


def _signatures(runs: Sequence[Run]) -> tuple[Signature, ...]:
    """Return the errors that are no out-of-memory events, the most frequent first."""
    tests: defaultdict[str, list[str]] = defaultdict(list)
    counts: Counter[tuple[str, str]] = Counter()
    subjects: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for run in runs:
        for failure in run.failures:
            if failure.seen or failure.died or failure.aside or not failure.error:
                continue
            name = signature(failure.error)
            counts["test", name] += 1
            tests[name].append(failure.nodeid or failure.name)
            if what := subject(failure.error):
                subjects["test", name].add(what)
        for name, number in run.logged.items():
            counts["log", name] += number
            subjects["log", name] |= run.subjects.get(name, set())
    return tuple(
        Signature(
            name,
            number,
            where,
            tuple(sorted(subjects[where, name])),
            tuple(tests[name][:_EXAMPLES]) if where == "test" else (),
        )
        for (where, name), number in counts.most_common(_SIGNATURES_KEPT)
    )


def _outcomes(runs: Sequence[Run]) -> dict[str, str]:
    """Return how each test ended that the logs name, by the last run's word."""
    told: dict[str, str] = {}
    for run in runs:
        told |= {test.nodeid: test.outcome for test in run.order if test.outcome}
        # A subtest, or a teardown, may fail within a test that passed.
        told |= {failure.nodeid: failure.kind for failure in run.failures if failure.nodeid}
    return told


def _places(
    runs: Sequence[Run], told: Sequence[OomEvent], key: Callable[[str], str]
) -> tuple[Place, ...]:
    rows: defaultdict[str, Counter[str]] = defaultdict(Counter)
    durations: defaultdict[str, float] = defaultdict(float)
    for run in runs:
        for path, word, number, duration in _by_path(run):
            rows[key(path)][word] += number
            rows[key(path)]["tests"] += number
            durations[key(path)] += duration
    for event in told:
        if event.nodeid:
            rows[key(event.nodeid.partition("::")[0])]["oom"] += event.felled
    places = (
        Place(
            path,
            row["tests"],
            row["PASSED"],
            row["FAILED"],
            row["ERROR"],
            row["oom"],
            durations[path],
        )
        for path, row in rows.items()
    )
    return tuple(
        sorted(places, key=lambda each: (-each.oom, -each.failed - each.errors, each.path))
    )


def _by_path(run: Run) -> Iterator[tuple[str, str, int, float]]:
    """Return path, outcome, number of tests and seconds of what a run shows."""
    for test in run.order:
        yield test.nodeid.partition("::")[0], test.outcome or "", 1, test.duration
    if run.order:
        return
    for (path, letter), number in run.letters.items():
        if path:
            yield path, _LETTERS.get(letter, ""), number, 0.0
    for failure in run.failures if not any(path for path, _ in run.letters) else ():
        if failure.nodeid:
            yield failure.nodeid.partition("::")[0], failure.kind, 1, 0.0

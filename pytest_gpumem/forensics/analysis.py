"""Reads logs and puts together what they tell: events, totals, signatures."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem.forensics import events, readers
from pytest_gpumem.forensics.readers import own_runs
from pytest_gpumem.forensics.runs import LETTERS, WORDS
from pytest_gpumem.forensics.signatures import signature, subject
from pytest_gpumem.records.findings import (
    SCHEMA,
    Death,
    Findings,
    OomSequence,
    Place,
    SequenceTest,
    Signature,
    Source,
    Totals,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from pytest_gpumem.forensics.readers import Progress, Reading, Watch
    from pytest_gpumem.forensics.runs import Run
    from pytest_gpumem.records import RunRecord
    from pytest_gpumem.records.findings import OomEvent

_SIGNATURES_KEPT = 200
_EXAMPLES = 5
_TOLD = ("passed", "failed", "error", "skipped")
_NEAR = 0.01
"""Share by which two reports of one run may differ in its duration."""


def analyse(
    paths: Iterable[str], watch: Watch | None = None, progress: Progress | None = None
) -> Findings:
    """Return what the files tell; ``-`` is standard input, directories and archives are walked.

    Args:
        paths: of the files.
        watch: told of each message of a standard input that has not ended, when it comes.
        progress: told what is read of files: their names, with the bytes of each part.

    Raises:
        OSError: when a file that was named cannot be read.
        ValueError: in one sentence, when it is of no use.

    """
    inputs = readers.gather(paths, watch, progress)
    return _findings(inputs.readings, inputs.notes)


def analyze_oom_sequence(log: str | Path) -> OomSequence:
    """Return the tests of a log in the order in which they ran, and its out-of-memory events.

    Raises:
        OSError: when the file cannot be read.
        ValueError: in one sentence, when it is of no use.

    """
    inputs = readers.gather([str(log)])
    tests = (test for each in inputs.readings for run in each.runs for test in run.order)
    return OomSequence(
        _findings(inputs.readings, inputs.notes).events,
        tuple(
            SequenceTest(test.nodeid, test.position, test.worker, test.outcome) for test in tests
        ),
    )


def of_record(run: RunRecord, name: str = "") -> Findings:
    """Return what the records of a run tell; ``name`` stands where a file's would."""
    return findings([(name, [own_runs.of_record(run)])])


def findings(logs: Sequence[tuple[str, list[Run]]], notes: Sequence[str] = ()) -> Findings:
    """Return what the runs of the files tell together."""
    readings = [readers.Reading(path, "log", 0, runs) for path, runs in logs]
    return _findings(readings, notes)


def _findings(readings: Sequence[Reading], notes: Sequence[str]) -> Findings:
    told, sources = _once(readings)
    drafts: list[events.Draft] = []
    kills: list[events.Draft] = []
    deaths: list[events.Draft] = []
    number = 1
    for path, runs in told:
        found = events.draft(path, runs, number)
        number += sum(run.pytest for run in runs)
        drafts += found.drafts
        kills += found.kills
        deaths += found.deaths
    drafts += events.explain_deaths(deaths, kills)
    drafts += kills
    order = {path: at for at, (path, _) in enumerate(told)}
    drafts.sort(key=lambda each: (order[each.file], each.number, events.when(each)))
    every = [run for _, runs in told for run in runs]
    told_events = events.finish(drafts)
    return Findings(
        schema=SCHEMA,
        files=tuple(each.path for each in readings),
        events=told_events,
        totals=_totals(every, told_events),
        signatures=_signatures(every),
        by_file=_places(every, told_events, lambda path: path),
        by_directory=_places(every, told_events, lambda path: path.rpartition("/")[0] or "."),
        peaks={name: peak for run in every for name, peak in run.peaks.items()},
        outcomes=_outcomes(every),
        notes=tuple(notes),
        sources=sources,
        complete=all(source.complete for source in sources),
        deaths=_deaths(told, {each.nodeid for each in drafts}),
        own_peaks={name: peak for run in every for name, peak in run.own_peaks.items()},
        lines={name: lines for run in every for name, lines in run.lines.items()},
        kept={name: size for run in every for name, size in run.kept.items()},
        leaks={name: size for run in every for name, size in run.leaks.items()},
        recovered=tuple(name for run in every for name in run.recovered),
    )


def _once(
    readings: Sequence[Reading],
) -> tuple[list[tuple[str, list[Run]]], tuple[Source, ...]]:
    """Return the runs of each input without those that another input tells better."""
    kept: list[_Twin] = []
    notes: dict[int, str] = {}
    dropped: set[int] = set()
    for reading in readings:
        mine = []
        for run in reading.runs if len(readings) > 1 else ():
            new = _Twin(run, reading.path, run.counts, _failed(run)) if run.pytest else None
            at = next((at for at, each in enumerate(kept) if new and _same(each, new)), None)
            if new is None or at is None:
                mine += [new] if new else []
                continue
            worse, better = sorted([kept[at], new], key=lambda each: _worth(each.run))
            dropped.add(id(worse.run))
            notes[id(worse.run)] = f"the same run as {better.path}"
            kept[at] = better
        kept += mine
    told = [(each.path, [run for run in each.runs if id(run) not in dropped]) for each in readings]
    return told, tuple(_source(each, notes) for each in readings)


def _source(reading: Reading, twins: dict[int, str]) -> Source:
    runs = [run for run in reading.runs if run.pytest]
    same = [twins[id(run)] for run in runs if id(run) in twins]
    lacks = [run.missing for run in runs if run.missing and id(run) not in twins]
    note = "; ".join(dict.fromkeys([*lacks, *same, *([reading.cut] if not lacks else [])]))
    return Source(
        reading.path,
        reading.kind,
        reading.size,
        sum(run.tests for run in runs),
        not lacks and not reading.cut,
        note.strip("; "),
    )


def _worth(run: Run) -> tuple[bool, bool, int, int]:
    """Return what ranks two tellings of one run: whole, in order, with figures, by name."""
    figures = sum(bool(each.seen and each.seen.message.figures) for each in run.failures)
    return (run.ended, run.ordered and bool(run.order or run.letters), figures, len(run.order))


class _Twin(NamedTuple):
    """A run, and what tells whether another is the same."""

    run: Run
    path: str
    counts: Counter[str]
    failed: dict[str, dict[str, str]]


def _same(one: _Twin, two: _Twin) -> bool:
    """Tell whether two inputs tell of the same run, such as a log and its JUnit report."""
    ended = one.run.ended and two.run.ended
    if ended and any(one.counts[name] != two.counts[name] for name in _TOLD):
        return False
    mine, other = one.failed, two.failed
    common = mine.keys() & other.keys()
    if not all(_agree(mine[name], other[name]) for name in common):
        return False
    if not ended:
        part, whole = (two, one) if one.run.ended else (one, two)
        return bool(common) and _part_of(part.run, whole.run)
    lasted = one.run.duration, two.run.duration
    if len(common) != len(mine) or len(common) != len(other):
        return False
    if all(lasted) and abs(lasted[0] - lasted[1]) > max(lasted) * _NEAR:
        return False
    return bool(mine) or lasted[0] == lasted[1]


def _part_of(part: Run, whole: Run) -> bool:
    """Tell whether what a cut run tells stands in a whole one, and is more than a coincidence."""
    ended = {test.nodeid: test.outcome for test in whole.order}
    known = [test for test in part.order if test.outcome]
    return len(known) > 1 and all(ended.get(test.nodeid) == test.outcome for test in known)


def _failed(run: Run) -> dict[str, dict[str, str]]:
    """Return the figures of each failing test, as they were printed."""
    return {
        each.nodeid: each.seen.message.printed if each.seen else {}
        for each in run.failures
        if each.nodeid
    }


def _agree(one: dict[str, str], two: dict[str, str]) -> bool:
    return all(one[name] == two[name] for name in one.keys() & two.keys())


def _deaths(told: Sequence[tuple[str, list[Run]]], of_memory: set[str | None]) -> tuple[Death, ...]:
    """Return the workers that died and did not run out of memory, as far as the log tells."""
    return tuple(
        Death(each.nodeid, each.worker, run.faults.get(each.worker, ""), path, each.line)
        for path, runs in told
        for run in runs
        for each in run.failures
        if each.died and each.nodeid not in of_memory
    )


def _totals(runs: Sequence[Run], told: Sequence[OomEvent]) -> Totals:
    counts: Counter[str] = Counter()
    for run in runs:
        counts += run.counts
    judged = counts["passed"] + counts["failed"] + counts["error"]
    return Totals(
        runs=sum(run.pytest for run in runs),
        tests=sum(counts[name] for name in WORDS.values()),
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
            yield path, LETTERS.get(letter, ""), number, 0.0
    for failure in run.failures if not any(path for path, _ in run.letters) else ():
        if failure.nodeid:
            yield failure.nodeid.partition("::")[0], failure.kind, 1, 0.0

"""Sets two runs side by side: what got better, worse, new and gone."""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem.forensics.peak_lines import LineChange, changed
from pytest_gpumem.records.budget import Own, Tolerance, judge
from pytest_gpumem.units import format_bytes, format_seconds, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_gpumem.records.findings import Findings, Totals

_FAILING = {"FAILED", "ERROR"}


class Growth(NamedTuple):
    """How much a test's peak may grow: by a share of what it was, or by bytes."""

    percent: float | None
    size: int | None

    def allows(self, before: int, after: int) -> bool:
        """Tell whether a peak of ``after`` bytes is within the limit."""
        if self.percent is not None:
            return after <= before * (1 + self.percent / 100)
        return after - before <= (self.size or 0)

    def __str__(self) -> str:
        """Return it as it is given on the command line."""
        return f"{self.percent:g}%" if self.percent is not None else format_bytes(self.size or 0)


class Limits(NamedTuple):
    """What the later run must keep; None: whatever."""

    max_oom: int | None = None
    max_errors: int | None = None
    min_pass_rate: float | None = None
    max_peak_growth: Growth | None = None
    max_leaks: int | None = None

    @property
    def given(self) -> int:
        """How many there are."""
        return sum(limit is not None for limit in self)


class Change(NamedTuple):
    """One thing that differs: a test or a signature."""

    name: str
    before: str
    after: str


class Comparison(NamedTuple):
    """Two runs side by side."""

    schema: int
    verdict: str
    before: Totals
    after: Totals
    better: tuple[Change, ...]
    """Tests that failed and pass now, and kinds of error that became rarer."""
    worse: tuple[Change, ...]
    new: tuple[Change, ...]
    """Tests and kinds of error that only the later run has."""
    gone: tuple[Change, ...]
    """Kinds of error that only the earlier run has."""
    missing: tuple[Change, ...]
    """Tests that only the earlier run has."""
    skipped: tuple[Change, ...]
    """Tests that the later run skips and the earlier did not."""
    peaks: tuple[Change, ...]
    """Tests whose own peak differs, the most grown first."""
    leaks: tuple[Change, ...]
    """Tests that leave another amount behind than before, the most grown first."""
    lines: tuple[LineChange, ...]
    """Lines of which other bytes were alive at a test's peak, the most grown first."""
    missed: tuple[str, ...]
    """Each threshold that the later run misses, in a sentence."""
    time: Change | None = None
    """How long the runs took, where that differs by more than noise."""
    incomplete: tuple[str, ...] = ()
    """What either side lacks of its runs, in a sentence each."""


SCHEMA = 2
"""Version of the JSON form of a ``Comparison``."""


def percent(text: str) -> float:
    """Return a percentage given with or without its sign, for argparse."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage; allowed is 0 to 100")
    return value


def growth(text: str) -> Growth:
    """Return a limit like ``10%`` or ``64MiB``, for argparse."""
    share = re.fullmatch(r"(\d+(?:\.\d+)?)%", text)
    if share is not None:
        return Growth(float(share[1]), None)
    try:
        return Growth(None, parse_bytes(text))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a growth; allowed is a percentage like 10% or a size like 64MiB"
        ) from None


def check(before: Findings, after: Findings, limits: Limits, *, incomplete: bool) -> None:
    """Refuse a comparison that would tell of tests that nobody ran or nobody wrote down.

    Args:
        before: the earlier side.
        after: the later side.
        limits: what the later side must keep.
        incomplete: whether thresholds count though a side is known to be incomplete.

    Raises:
        ValueError: in one sentence.

    """
    sides = {"BEFORE": before, "AFTER": after}
    for name, side in sides.items():
        if not side.totals.tests:
            raise ValueError(f"{name} ({_files(side)}) has no tests: there is nothing to compare")
    lacks = _incomplete(before, after)
    if limits.given and lacks and not incomplete:
        raise ValueError(
            f"{lacks[0]}: no threshold can be judged by it; --allow-incomplete insists"
        )
    for name, side in sides.items():
        if limits.max_peak_growth is not None and not side.peaks:
            raise ValueError(
                f"--max-peak-growth: {name} ({_files(side)}) has no peaks; --gpumem-json has them"
            )
    if limits.max_leaks is not None and not after.peaks:
        raise ValueError(
            f"--max-leaks: AFTER ({_files(after)}) does not tell of leaks; --gpumem-json does"
        )


def _files(side: Findings) -> str:
    more = f" and {len(side.files) - 1} more" if len(side.files) > 1 else ""
    return f"{side.files[0]}{more}" if side.files else "no file"


def _incomplete(before: Findings, after: Findings) -> tuple[str, ...]:
    return tuple(
        f"{name} ({source.path}) is incomplete: {source.note}"
        for name, side in (("BEFORE", before), ("AFTER", after))
        for source in side.sources
        if not source.complete
    )


def compare(before: Findings, after: Findings, limits: Limits) -> Comparison:
    """Return what changed from ``before`` to ``after``, and which limits ``after`` misses."""
    names = _paired(before, after)
    changes: dict[str, list[Change]] = defaultdict(list)
    for kind, change in (*_tests(before, after, names), *_signatures(before, after)):
        changes[kind].append(change)
    grown = _sizes(before.own_peaks, after.own_peaks, names, differs=_of_own(before, after))
    leaks = _sizes(before.leaks, after.leaks, names, absent=0)
    missed = tuple(_missed(after, limits, grown))
    time = _time(before, after)
    return Comparison(
        SCHEMA,
        _verdict(changes, limits, missed, time),
        before.totals,
        after.totals,
        **{kind: tuple(changes[kind]) for kind in _KINDS},
        peaks=_shown(grown),
        leaks=_shown(leaks),
        lines=changed(before.lines, after.lines, names),
        missed=missed,
        time=time,
        incomplete=_incomplete(before, after),
    )


_KINDS = ("better", "worse", "new", "gone", "missing", "skipped")


def _shown(rows: list[tuple[str, int, int]]) -> tuple[Change, ...]:
    return tuple(Change(name, format_bytes(one), format_bytes(two)) for name, one, two in rows)


def _time(before: Findings, after: Findings) -> Change | None:
    """Return how long both runs took, where they can be compared and differ by more than noise.

    A log and a JUnit report have a run's time by the clock, a run.json the sum of its tests.
    """
    if _incomplete(before, after) or _kinds(before) != _kinds(after):
        return None
    one, two = before.totals.duration, after.totals.duration
    short, long = sorted((one, two))
    if not short or long <= short * _LONGER or long - short <= _BY:
        return None
    return Change("time", format_seconds(one), format_seconds(two))


def _kinds(side: Findings) -> set[str]:
    return {source.kind for source in side.sources}


_LONGER, _BY = 1.5, 10.0
"""How many times as long, and by how many seconds longer, a run takes by chance at most."""


def _verdict(
    changes: dict[str, list[Change]], limits: Limits, missed: tuple[str, ...], time: Change | None
) -> str:
    counts = ", ".join(f"{len(changes[kind]):,} {kind}" for kind in _KINDS if changes[kind])
    nothing = "nothing changed but the time" if time else "nothing changed"
    if not limits.given:
        judged = "no threshold given"
    elif missed:
        judged = "a threshold is missed"
    else:
        judged = "the threshold is kept" if limits.given == 1 else "all thresholds are kept"
    return f"{judged}; {counts or nothing}"


def _paired(before: Findings, after: Findings) -> dict[str, str]:
    """Return what each test of ``before`` is called in ``after``.

    Where one parametrisation of a test went and one came, it is the same, renamed.
    """
    names = {name: name for name in before.outcomes if name in after.outcomes}
    left: dict[str, list[str]] = defaultdict(list)
    came: dict[str, list[str]] = defaultdict(list)
    for side, other, found in ((before, after, left), (after, before, came)):
        for name in side.outcomes:
            if name not in other.outcomes and "[" in name:
                found[name.partition("[")[0]].append(name)
    for base, olds in left.items():
        if len(olds) == len(came[base]) == 1:
            names[olds[0]] = came[base][0]
    return names


def _of_own(before: Findings, after: Findings) -> Callable[[str, str], bool]:
    """Return what tells whether a test's own peak differs by more than by what it left behind.

    What a process keeps, such as a model that is loaded once, is taken by the first test that needs
    it: another one in each run. It is judged as a budget is.
    """

    def differs(old: str, new: str) -> bool:
        one = Own(before.own_peaks[old], before.kept.get(old, 0))
        two = Own(after.own_peaks[new], after.kept.get(new, 0))
        return "above" in {judge(one, two, Tolerance()), judge(two, one, Tolerance())}

    return differs


def _sizes(
    before: dict[str, int],
    after: dict[str, int],
    names: dict[str, str],
    *,
    absent: int | None = None,
    differs: Callable[[str, str], bool] = lambda *_: True,
) -> list[tuple[str, int, int]]:
    """Return the tests whose size differs, the most grown first."""
    pairs = {old: new for old, new in names.items() if old in before or new in after}
    if absent is not None:
        pairs |= {name: name for name in (*before, *after) if name not in names.values()}
    rows = []
    for old, new in pairs.items():
        one, two = before.get(old, absent), after.get(new, absent)
        if one is not None and two is not None and one != two and differs(old, new):
            rows.append((_renamed(old, new), one, two))
    return sorted(rows, key=lambda row: row[1] - row[2])


def _renamed(old: str, new: str) -> str:
    return old if old == new else f"{old} -> [{new.partition('[')[2]}"


def _tests(
    before: Findings, after: Findings, names: dict[str, str]
) -> Iterator[tuple[str, Change]]:
    ooms = [
        {name for event in findings.events for name in (event.nodeid, *event.felled_tests) if name}
        for findings in (before, after)
    ]
    renamed = set(names.values())
    pairs = [(name, names.get(name, name)) for name in before.outcomes]
    pairs += [(name, name) for name in after.outcomes if name not in renamed]
    room = _room(before, after), _room(after, before)
    for old, new in sorted(dict.fromkeys(pairs)):
        one, two = before.outcomes.get(old), after.outcomes.get(new)
        one = one or ("PASSED" if room[0] and two in _FAILING else None)
        two = two or ("PASSED" if room[1] and one in _FAILING else None)
        change = Change(_renamed(old, new), _word(one, old in ooms[0]), _word(two, new in ooms[1]))
        kind = _kind(one, two, change)
        hidden = (one is None and _unnamed(before)) or (two is None and _unnamed(after))
        if kind is not None and not hidden:
            yield kind, change


def _unnamed(side: Findings) -> bool:
    return side.totals.tests > len(side.outcomes)


def _room(side: Findings, other: Findings) -> bool:
    """Tell whether the tests that failed on the other side alone have passed on this one.

    A log without -v names only the tests that failed; its totals tell how many others there were.
    One that ends before its summary names none of them.
    """
    named = sum(outcome in _FAILING for outcome in side.outcomes.values())
    if side.totals.failed > named:
        return False
    failed = sum(
        outcome in _FAILING and name not in side.outcomes
        for name, outcome in other.outcomes.items()
    )
    return side.totals.tests - len(side.outcomes) >= failed > 0


def _kind(one: str | None, two: str | None, change: Change) -> str | None:
    """Return what became of a test."""
    if one is None:
        return "new"
    if two is None:
        return "missing"
    if two == "SKIPPED":
        return "skipped" if one != "SKIPPED" else None
    if change.before == change.after:
        return None
    if two in _FAILING:
        return "better" if change.before == _OOM and change.after != _OOM else "worse"
    return "better" if one in _FAILING else None


_OOM = "out of memory"


def _word(outcome: str | None, oom: bool) -> str:
    if oom and outcome in _FAILING:
        return _OOM
    return outcome.lower() if outcome else "-"


def _signatures(before: Findings, after: Findings) -> Iterator[tuple[str, Change]]:
    counts = [
        {each.signature: each.times for each in findings.signatures} for findings in (before, after)
    ]
    for name in sorted(set(counts[0]) | set(counts[1])):
        one, two = (count.get(name, 0) for count in counts)
        if one != two:
            kind = "new" if not one else "gone" if not two else "better" if two < one else "worse"
            yield kind, Change(name, f"{one} x", f"{two} x")


def _missed(after: Findings, limits: Limits, grown: list[tuple[str, int, int]]) -> Iterator[str]:
    totals = after.totals
    if limits.max_oom is not None and totals.oom > limits.max_oom:
        noun = "test" if totals.oom == 1 else "tests"
        yield f"{totals.oom} {noun} out of memory, allowed are {limits.max_oom}"
    if limits.max_errors is not None and totals.errors > limits.max_errors:
        noun = "error" if totals.errors == 1 else "errors"
        yield f"{totals.errors} {noun}, allowed are {limits.max_errors}"
    rate = limits.min_pass_rate
    if rate is not None and (totals.pass_rate is None or totals.pass_rate < rate):
        told = "unknown" if totals.pass_rate is None else f"{totals.pass_rate:.2f} %"
        yield f"the pass rate is {told}, at least {rate:g} % is asked for"
    if limits.max_leaks is not None and len(after.leaks) > limits.max_leaks:
        size = format_bytes(sum(after.leaks.values()))
        noun = "test leaves" if len(after.leaks) == 1 else "tests leave"
        yield f"{len(after.leaks)} {noun} {size} behind, allowed are {limits.max_leaks}"
    if limits.max_peak_growth is not None:
        for name, one, two in grown:
            if not limits.max_peak_growth.allows(one, two):
                yield (
                    f"{name} grew from {format_bytes(one)} to {format_bytes(two)}, "
                    f"allowed is {limits.max_peak_growth}"
                )

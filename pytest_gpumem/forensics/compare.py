"""Sets two runs side by side: what got better, worse, new and gone."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.forensics.records import Findings, Totals

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


class Change(NamedTuple):
    """One thing that differs: a test or a signature."""

    name: str
    before: str
    after: str


class Comparison(NamedTuple):
    """Two runs side by side."""

    schema: int
    before: Totals
    after: Totals
    better: tuple[Change, ...]
    """Tests that failed and pass now, and kinds of error that became rarer."""
    worse: tuple[Change, ...]
    new: tuple[Change, ...]
    """Tests and kinds of error that only the later run has."""
    gone: tuple[Change, ...]
    peaks: tuple[Change, ...]
    """Tests whose peak differs, the most grown first."""
    missed: tuple[str, ...]
    """Each threshold that the later run misses, in a sentence."""


def percent(text: str) -> float:
    """Return a percentage given with or without its sign, for argparse."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no percentage; allowed is 0 to 100")
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
            f"{text!r} is no growth; allowed is a percentage like 10% or a size like 64MiB"
        ) from None


def compare(before: Findings, after: Findings, limits: Limits) -> Comparison:
    """Return what changed from ``before`` to ``after``, and which limits ``after`` misses."""
    tests = list(_tests(before, after))
    errors = list(_signatures(before, after))
    grown = sorted(
        (
            (name, before.peaks[name], peak)
            for name, peak in after.peaks.items()
            if name in before.peaks and before.peaks[name] != peak
        ),
        key=lambda row: row[1] - row[2],
    )
    return Comparison(
        schema=1,
        before=before.totals,
        after=after.totals,
        better=tuple(change for kind, change in tests + errors if kind == "better"),
        worse=tuple(change for kind, change in tests + errors if kind == "worse"),
        new=tuple(change for kind, change in tests + errors if kind == "new"),
        gone=tuple(change for kind, change in tests + errors if kind == "gone"),
        peaks=tuple(Change(name, format_bytes(one), format_bytes(two)) for name, one, two in grown),
        missed=tuple(_missed(after.totals, limits, grown)),
    )


def _tests(before: Findings, after: Findings) -> Iterator[tuple[str, Change]]:
    ooms = [
        {event.nodeid for event in findings.events if event.nodeid} for findings in (before, after)
    ]
    for name in sorted(set(before.outcomes) | set(after.outcomes)):
        words = [
            _word(findings.outcomes.get(name), name in oom)
            for findings, oom in zip((before, after), ooms, strict=True)
        ]
        one, two = words
        if one == two:
            continue
        bad = [findings.outcomes.get(name) in _FAILING for findings in (before, after)]
        change = Change(name, one, two)
        if one == "-" or two == "-":
            # A log without -v names only the tests that failed: the others may have run too.
            if before.totals.tests > len(before.outcomes) or after.totals.tests > len(
                after.outcomes
            ):
                yield ("worse" if bad[1] else "better"), change
            else:
                yield ("new" if one == "-" else "gone"), change
        elif bad[0] and not bad[1]:
            yield "better", change
        elif bad[1]:
            yield ("better" if two == "failed" and one == "out of memory" else "worse"), change


def _word(outcome: str | None, oom: bool) -> str:
    if oom:
        return "out of memory"
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


def _missed(totals: Totals, limits: Limits, grown: list[tuple[str, int, int]]) -> Iterator[str]:
    if limits.max_oom is not None and totals.oom > limits.max_oom:
        yield f"{totals.oom} tests out of memory, allowed are {limits.max_oom}"
    if limits.max_errors is not None and totals.errors > limits.max_errors:
        yield f"{totals.errors} errors, allowed are {limits.max_errors}"
    rate = limits.min_pass_rate
    if rate is not None and (totals.pass_rate is None or totals.pass_rate < rate):
        told = "unknown" if totals.pass_rate is None else f"{totals.pass_rate:.2f} %"
        yield f"the pass rate is {told}, at least {rate:g} % is asked for"
    if limits.max_peak_growth is not None:
        for name, one, two in grown:
            if not limits.max_peak_growth.allows(one, two):
                yield (
                    f"{name} grew from {format_bytes(one)} to {format_bytes(two)}, "
                    f"allowed is {limits.max_peak_growth}"
                )

"""The processes that tests started, in lines for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from pytest_gpumem.records import ChildUsage, RecordedTest

_SHOWN = 3
Ends = dict[tuple[str, int, float], float]
"""When each process was seen to have ended, 0 for never: by host, number and beginning."""


def largest(test: RecordedTest, card: str) -> Iterator[str]:
    """Show the processes that a test started on a card, the largest first."""
    mine = [each for each in test.children if each.started_by == test.nodeid and each.card == card]
    for child in sorted(mine, key=lambda each: -_peak(each))[:_SHOWN]:
        besides = f", {format_bytes(child.other)} besides torch" if child.other else ""
        source = " by the driver" if child.peak is None else besides
        yield f"{format_bytes(_peak(child)):>11}  {_process(child)}{source}"
    if len(mine) > _SHOWN:
        yield f"{'':>11}  ... {len(mine) - _SHOWN} more"


def ends(tests: Iterable[RecordedTest]) -> Ends:
    """Return what is known last of each process, which may stand with a later test."""
    return {
        (test.host, child.pid, child.start): child.end for test in tests for child in test.children
    }


def orphans(
    test: RecordedTest, card: str, owner: str, ended: Mapping[tuple[str, int, float], float]
) -> tuple[str, ...]:
    """Return a sentence for each process that ``owner`` left, and that held some of a card."""
    return tuple(
        f"{_process(child)} held {format_bytes(child.leaked)}, "
        + ("ended later" if ended[test.host, child.pid, child.start] else "still runs")
        for child in test.children
        if child.leaked and child.card == card and child.started_by == owner
    )


def _peak(child: ChildUsage) -> int:
    """Return what counts of a process: what torch allocated, or else what the driver saw."""
    return child.used_peak or 0 if child.peak is None else child.peak


def _process(child: ChildUsage) -> str:
    command = f" ({child.command})" if child.command else ""
    return f"process {child.pid or '?'}{command}"

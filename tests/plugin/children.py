"""What is expected of the suite of children, by its tests' names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness import Run

    from pytest_gpumem.records import RecordedTest

MIB = 2**20
CONTEXT = 64 * MIB


def problems(run: Run) -> list[str]:
    """Return a sentence for each test whose children are told otherwise than they were."""
    return [sentence for test in run.record.tests for sentence in _problems(test)]


def _problems(test: RecordedTest) -> list[str]:
    name = test.nodeid.partition("::")[2]
    own = [each for each in test.children if each.started_by == test.nodeid]
    peak = sum(card.children_peak for card in test.cards)
    leaked = sum(card.leaked for card in test.cards)
    found = []

    def expect(what: str, seen: object, right: object) -> None:
        if seen != right:
            found.append(f"{name}: {what} is {seen}, not {right}")

    if test.outcome == "skipped":  # this machine has not what it needs
        return []
    expect("outcome", test.outcome, "passed")
    if match := re.fullmatch(r"test_torch\[.*-(\d+)\]", name):
        size = int(match[1]) * MIB
        expect("peak", peak, size)
        expect("largest process", max((each.peak or 0 for each in own), default=0), size)
        expect("leaked", leaked, 0)
    elif name.startswith("test_driver"):
        right = 77 * MIB + CONTEXT
        expect("peak within 5 %", abs(peak - right) <= 0.05 * right, True)
    elif name == "test_two_at_once":
        expect("peak", peak, 70 * MIB)
        expect("processes", sorted(each.peak for each in own), [30 * MIB, 40 * MIB, 50 * MIB])
        expect("leaked", leaked, 0)
    elif name == "test_orphan":
        expect("leaked", leaked, 34 * MIB + CONTEXT)
        expect("orphans", [each.leaked for each in own], [34 * MIB + CONTEXT])
    elif name.startswith("test_engine"):
        expect("peak", peak, 0)
        expect("fixture_bytes", [card.fixture_bytes for card in test.cards], [120 * MIB + CONTEXT])
    elif name in ("test_no_child", "test_after_the_orphan"):
        expect("peak", peak, 0)
        expect("children of its own", own, [])
    return found

"""The summary of a job at GitHub, which refuses one that is too large whole."""

from __future__ import annotations

import pytest

from pytest_gpumem import records
from pytest_gpumem.plugin import github
from pytest_gpumem.records import Card, CardUsage, RecordedTest, RunRecord

MIB = 2**20


def run(tests: int, name: int) -> RunRecord:
    """Return a run of tests that leaked, each with a name of so many bytes."""
    used = (CardUsage("GPU-1", 0, MIB, MIB, 0, 0, 0, 0, None, MIB, ()),)
    told = tuple(
        RecordedTest(f"t.py::{n}".ljust(name, "x"), "passed", 0.5, "", used) for n in range(tests)
    )
    return RunRecord(records.SCHEMA, "on", (Card("GPU-1", "A card", 8 * MIB),), False, 0, told)


@pytest.mark.parametrize(
    ("tests", "name", "before", "shown"),
    [
        (3, 50, 0, ["Leaks", "Own peaks"]),
        (12_000, 50, 0, ["Leaks", "Own peaks", "10 of 12,000"]),
        (12_000, 50, 900_000, ["Leaks", "Own peaks", "10 of 12,000"]),
        (12, 60_000, 0, ["Leaks", "More"]),
        (12, 60_000, MIB - 1000, ["More"]),
        (12, 60_000, MIB - 10, []),
        (3, 50, 2 * MIB, []),
    ],
)
def test_it_is_never_larger_than_what_is_taken(tmp_path, tests, name, before, shown):
    path = tmp_path / "summary.md"
    path.write_bytes(b"-" * before)
    assert github.add_to_summary(path, run(tests, name), None, 0) == ""

    text = path.read_text()
    assert len(text) <= max(before, MIB)
    assert bool(shown) == ("# GPU memory\n" in text)
    assert [title in text for title in shown] == [True] * len(shown)
    assert ("does not fit" in text) == ("More" in shown)

"""A run as a trace, and what was on its cards at each moment."""

from __future__ import annotations

import json

import pytest

from pytest_gpumem import records
from pytest_gpumem.records import Card, CardUsage, LeaseUsage, RecordedTest, RunRecord
from pytest_gpumem.reports import timeline, trace
from pytest_gpumem.reports.timeline import Level

MIB = 2**20


def ran(name, start, reserved=0, kept=0, worker="gw0", **fields):
    usage = CardUsage("GPU-1", 0, reserved, 0, kept, reserved, 0, 0, None)
    return RecordedTest(
        name, "passed", 2.0, worker, (usage,) if reserved else (), start=start, **fields
    )


A = ran("a.py::test_a", 10.0, 8 * MIB, 2 * MIB)
B = ran("a.py::test_b", 11.0, 4 * MIB, worker="gw1",
         lease=LeaseUsage(("GPU-1",), 5 * MIB, alone=True, waited=0.5))  # fmt: skip
C = ran("a.py::test_c", 13.0, oom="CUDA out of memory")
CARDS = (Card("GPU-1", "A card", 64 * MIB), Card("GPU-2", "Unused", 64 * MIB))


def run(*tests):
    return RunRecord(records.SCHEMA, "on", CARDS, False, 2, tests, (), MIB)


def test_a_card_holds_what_each_process_has_most_of_during_a_test_and_keeps_after():
    assert timeline.levels(run(A, B, C)) == {
        ("", "GPU-1"): [
            Level(10.0, 9 * MIB), Level(11.0, 14 * MIB), Level(12.0, 8 * MIB), Level(13.0, 4 * MIB),
        ],
    }  # fmt: skip
    assert timeline.levels(run()) == {}


def test_a_card_never_holds_more_than_it_has():
    """Two tests need not be at their most at one moment, and those of a card together are not."""
    large = ran("a.py::test_large", 10.0, 60 * MIB), ran("b.py::test_l", 11.0, 50 * MIB, 0, "gw1")
    assert max(level.size for level in timeline.levels(run(*large))["", "GPU-1"]) == 64 * MIB


@pytest.mark.parametrize(
    ("tests", "window"),
    [((), (0.0, 0.0)), ((A,), (10.0, 12.0)), ((A, B, C), (10.0, 15.0)),
     ((B,), (10.5, 13.0)), ((RecordedTest("t", "passed", 1.0, ""),), (0.0, 0.0))],
)  # fmt: skip
def test_the_window_begins_with_the_first_wait_and_ends_with_the_last_test(tests, window):
    assert timeline.window(tests) == window


def test_the_trace_has_a_lane_for_each_worker_and_a_counter_for_each_used_card(tmp_path):
    trace.save(run(A, B, C), tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    named = {each["args"]["name"] for each in events if each["ph"] == "M"}
    stretches = {each["name"]: each for each in events if each["ph"] == "X"}
    counters = [each for each in events if each["ph"] == "C"]

    assert named == {"cards", "workers", "gw0", "gw1"}
    assert stretches["wait for a lease"]["ts"] == 500_000
    assert stretches["wait for a lease"]["dur"] == 500_000
    assert stretches["a.py::test_a"]["ts"] == 0
    assert stretches["a.py::test_a"]["dur"] == 2_000_000
    assert stretches["a.py::test_a"]["tid"] != stretches["a.py::test_b"]["tid"]
    assert stretches["a.py::test_b"]["args"] == {
        "outcome": "passed", "peak": 4 * MIB, "leaked": 0, "lease": 5 * MIB, "alone": True,
    }  # fmt: skip
    assert stretches["a.py::test_c"]["args"]["out of memory"] == "CUDA out of memory"
    assert {each["name"] for each in counters} == {"A card GPU-1, MiB"}
    assert [each["args"]["used"] for each in counters] == [9.0, 14.0, 8.0, 4.0]


def test_hosts_and_cards_of_other_machines_are_named():
    there = A._replace(host="far", worker="")
    events = list(trace.events(run(there)))

    assert "workers on far" in {each["args"]["name"] for each in events if each["ph"] == "M"}
    assert "pytest" in {each["args"]["name"] for each in events if each["ph"] == "M"}
    assert [each["name"] for each in events if each["ph"] == "C"] == ["card GPU-1 on far, MiB"] * 2

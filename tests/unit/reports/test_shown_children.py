"""A run with everything that tests start and share: in the terminal, on the page, in the trace."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("plotly")

from pytest_gpumem import records
from pytest_gpumem.forensics import analysis
from pytest_gpumem.records import (
    Card,
    CardUsage,
    ChildUsage,
    FixtureUsage,
    LeaseUsage,
    Left,
    RecordedTest,
    Route,
    RunRecord,
)
from pytest_gpumem.reports import page, terminal, timeline, trace

MIB = 2**20
OOM = "CUDA out of memory. Tried to allocate 1.00 GiB"
SERVED = "a.py::test_served"
CHILDREN = (
    ChildUsage(71, "vllm serve", "GPU-1", SERVED, 300 * MIB, 320 * MIB, 400 * MIB, 400 * MIB,
               leaked=300 * MIB, start=10.5),
    ChildUsage(72, "", "GPU-1", SERVED, used_peak=80 * MIB, start=10.5, end=11.0),
    ChildUsage(73, "a", "GPU-1", SERVED, 20 * MIB, start=10.5, end=11.0),
    ChildUsage(0, "b", "GPU-1", SERVED, 10 * MIB, leaked=10 * MIB, start=10.5, end=13.0),
)  # fmt: skip


def usage(peak, **more):
    return CardUsage("GPU-1", 0, peak, 0, 0, peak, 0, 0, None)._replace(**more)


def ran(name, start, *cards, worker="gw0", **more):
    made = RecordedTest(f"a.py::{name}", "passed", 1.0, worker, cards, start=start)
    return made._replace(**more)


TESTS = (
    ran("test_served", 10.0, usage(400 * MIB, children_peak=380 * MIB, leaked=310 * MIB,
                                   orphaned=310 * MIB), children=CHILDREN),
    *(ran(f"test_{n}", 12.0 + n, usage(MIB), outcome="rerun", oom=OOM, worker="gw1")
      for n in range(5)),
    *(ran(f"test_{n}", 20.0 + n, usage(MIB), step="alone", worker="gw1",
          lease=LeaseUsage(("GPU-1",), MIB, alone=True, waited=0.5)) for n in range(5)),
    ran("test_fell_back", 30.0, step="cpu", broke="CUDA error: an illegal memory access",
        routes=(Route("tensor", MIB, "cuda", "fits"),
                Route("model", MIB, "cpu", "82 % of 3.81 GiB is used"),
                Route("model", MIB, "cpu", "85 % of 3.81 GiB is used"))),
    ran("test_sets", 31.0, left=tuple(Left(f"what{n}", "", "1") for n in range(30))),
    ran("test_torn_down", 32.0, usage(MIB, note="library workspace"), fixtures=(
        FixtureUsage("engine", "module", "GPU-1", MIB, MIB, released=MIB),
        FixtureUsage("narrow", "function", "GPU-1", MIB, MIB),
    )),
)  # fmt: skip
RUN = RunRecord(
    records.SCHEMA, "on", (Card("GPU-1", "A card", 1000 * MIB),), False, 3, TESTS, (), MIB
)


@pytest.mark.parametrize(
    ("verbosity", "told"),
    [
        (0, "  2 of 3 workers ran tests, idle for"),
        (0, "  5 leases, 5 of them waited for"),
        (0, "      2.5 s in all, longest 0.5 s: a.py::test_0 [gw1]"),
        (0, "  5 tests ran out of memory beside others and ran again with no other test"),
        (0, " more; -v shows all"),
        (0, "  3 tasks: 1 to the card, 2 to the CPU"),
        (0, "      2 x N % of N is used"),
        (0, "  5 attempts with no other test on the card, 5 passed"),
        (0, "  1 attempt on the CPU, 1 passed"),
        (0, "  gw0 after a.py::test_fell_back: CUDA error: an illegal memory access"),
        (0, "process 71 (vllm serve) held 300.00 MiB, still runs"),
        (0, "process ? (b) held 10.00 MiB, ended later"),
        (0, "engine (module"),
        (1, "  a.py::test_torn_down [gw0]: library workspace"),
        (1, " 300.00 MiB  process 71 (vllm serve), 80.00 MiB besides torch"),
        (1, "  80.00 MiB  process 72 by the driver"),
        (1, "... 1 more"),
    ],
)
def test_the_section_shows(verbosity, told):
    text = "\n".join(line.text for line in terminal.lines(RUN, 10, verbosity))
    assert told in text, text


def test_the_details_of_a_failure_have_the_children():
    shown = list(terminal.usage_lines(TESTS[0].cards[0], "A card"))
    assert "children  380.00 MiB at their peak, 310.00 MiB left" in shown


def test_the_page_has_a_row_for_each_child():
    text = "\n".join(page.lines(RUN, analysis.of_record(RUN)))
    table = text.partition('<table id="children">')[2].partition("</table>")[0]
    assert table.count("<tr><td>") == 4
    assert "<td>71 <small>vllm serve</small></td>" in table
    assert table.count("still runs") == 1


def test_what_children_hold_is_on_the_card_until_they_end():
    levels = dict(timeline.levels(RUN)["", "GPU-1"])
    assert levels[10.5] - levels[10.0] == (400 + 80 + 1 + 1) * MIB  # of two, the context at least


def test_the_trace_has_a_lane_for_each_child(tmp_path):
    trace.save(RUN, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    lanes = {each["name"]: each for each in events if each.get("cat") == "child"}
    assert set(lanes) == {"vllm serve", "process 72", "a", "b"}
    assert lanes["vllm serve"]["args"]["started by"] == SERVED

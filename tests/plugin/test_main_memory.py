"""Main memory: what tests took and kept of it, and what workers of a run share."""

from __future__ import annotations

import json
import re
import sys

import pytest
from harness import MODES, run_pytest, write_suite

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

MIB = 2**20
ON = ("-p", "gpumem", "--gpumem-ram")
TESTS = """
import subprocess, sys
import pytest

KEPT = []
CHILD = "b = bytearray(40 << 20); import time; time.sleep(0.3)"

@pytest.fixture(scope="module")
def table():
    yield bytearray(24 << 20)

def test_takes_nothing():
    pass

def test_peaks(record_property):
    bytearray(32 << 20)

def test_keeps():
    KEPT.append(bytearray(16 << 20))

def test_uses(table):
    pass

def test_starts():
    subprocess.run([sys.executable, "-c", CHILD], check=True)

@pytest.mark.gpumem_off
def test_off():
    KEPT.append(bytearray(8 << 20))
"""


def about(mib):
    return pytest.approx(mib * MIB, abs=5 * MIB)


CARD = ("--gpumem-simulate", "256MiB", "--gpumem-simulate-context", "16MiB")


@pytest.mark.parametrize(
    ("mode", "card"), [*((mode, ()) for mode in MODES), ("plain", CARD), ("n2", CARD)]
)
def test_every_test_has_what_it_took_and_kept(tmp_path, mode, card):
    write_suite(tmp_path, test_it=TESTS)
    history = tmp_path / "history.json"
    files = ("--gpumem-json", "run.json", "--gpumem-history", str(history))
    run = run_pytest(tmp_path, *ON, *card, *MODES[mode], *files)

    assert run.outcomes == {"passed": 6}, run.output
    told = {test.nodeid.partition("::")[2]: test.ram for test in run.record.tests}
    assert told["test_off"] is None
    first = told["test_takes_nothing"]  # modules may be imported as the first test begins
    assert first is None or first.own_peak < 8 * MIB
    assert (told["test_peaks"].own_peak, told["test_peaks"].kept) == (about(32), about(0))
    assert (told["test_keeps"].own_peak, told["test_keeps"].kept) == (about(16), about(16))
    assert told["test_uses"].own_peak == about(24)
    assert 30 * MIB < told["test_starts"].children_peak < 80 * MIB
    assert 16 * MIB < run.record.worker_ram < 200 * MIB

    lines = run.section.splitlines()
    table = lines[lines.index("main memory") + 1 :]
    assert table[0].split() == ["own", "peak", "children", "kept", "test"]
    assert "test_starts" in table[1]
    assert "test_peaks" in table[2]
    assert "at most, without the files that it maps" in run.section

    learned = json.loads(history.read_text())
    assert learned["worker_ram"] == [run.record.worker_ram]
    assert learned["tests"]["test_it.py::test_peaks"]["ram"] == [told["test_peaks"].own_peak]
    assert learned["tests"]["test_it.py::test_takes_nothing"]["ram"] == [
        0 if first is None else first.own_peak
    ]


def test_a_run_that_does_not_ask_tells_nothing(tmp_path):
    write_suite(tmp_path, test_it=TESTS)
    history = tmp_path / "history.json"
    run = run_pytest(
        tmp_path, "-p", "gpumem", "--gpumem-json", "run.json", "--gpumem-history", str(history)
    )

    assert "main memory" not in run.output
    assert {test.ram for test in run.record.tests} == {None}
    assert run.record.worker_ram == 0
    assert not history.exists()


def test_auto_starts_as_many_workers_as_there_is_main_memory_for(tmp_path):
    write_suite(tmp_path, test_it="def test_it():\n    pass\n")
    history = tmp_path / "history.json"
    entry = {"peaks": [], "fixtures": 0, "duration": 1.0, "runs": 1, "gpu": False}
    # No machine has room for a second worker of so much.
    tests = {"test_it.py::test_it": entry | {"ram": [2**50]}}
    history.write_text(json.dumps({"schema": 1, "worker_ram": [2**50], "tests": tests}))
    auto = ("-n", "auto", "--gpumem-history", str(history))
    bounded = run_pytest(tmp_path, *ON, *auto)
    unasked = run_pytest(tmp_path, "-p", "gpumem", *auto, "--maxprocesses=2")

    assert re.search(
        r"^gpumem: 1 worker: [\d.]+ GiB of main memory left, of which a worker keeps "
        r"1126399.99 GiB and the largest test takes 1126399.99 GiB$",
        bounded.output,
        re.MULTILINE,
    ), bounded.output
    assert bounded.outcomes == unasked.outcomes == {"passed": 1}
    assert "main memory" not in unasked.output

"""Main memory: what tests took and kept of it, and what workers of a run share."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from harness import MODES, run_pytest, write_suite

from pytest_gpumem.devices.host import MACHINE, Killed, pools
from pytest_gpumem.leases.request import Want
from pytest_gpumem.leases.store import LeaseStore
from pytest_gpumem.plugin.xdist.lost_workers import LostWorkers, _why

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
    ("mode", "card"), [("plain", CARD), ("n0", ()), ("n2", CARD), ("no-xdist", ())]
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
    unasked = run_pytest(tmp_path, "-p", "gpumem", *auto, "--maxprocesses=1")

    assert re.search(
        r"^gpumem: 1 worker: [\d.]+ GiB of main memory left, of which a worker keeps "
        r"1153433.60 GiB and the largest test takes 1153433.60 GiB$",
        bounded.output,
        re.MULTILINE,
    ), bounded.output
    assert bounded.outcomes == unasked.outcomes == {"passed": 1}
    assert "main memory" not in unasked.output


GROWING = """
import pytest

KEPT = []

@pytest.fixture(scope="module", autouse=True)
def around(request):
    yield
    with open(request.config.rootpath / "log", "a") as log:
        log.write(f"{request.module.__name__}\\n")

@pytest.mark.parametrize("number", range(2))
def test_keeps(number):
    KEPT.append(bytearray(60 << 20))
"""


@pytest.mark.parametrize(
    "card", [(), pytest.param(CARD, marks=pytest.mark.slow)], ids=["no-card", "card"]
)
def test_a_worker_that_has_grown_is_replaced_between_modules(tmp_path, card):
    modules = {f"test_{letter}": GROWING for letter in "abc"}
    write_suite(tmp_path, **modules)
    options = (*card, "--gpumem-worker-ram", "140MiB", "--gpumem-json", "run.json")
    # One that crashes would end the run: these do not count.
    run = run_pytest(tmp_path, *ON, *options, "-n", "1", "--max-worker-restart=0")

    assert run.outcomes == {"passed": 6}, run.output
    assert "crashed" not in run.output
    record = run.record
    assert [each.worker for each in record.lost] == ["gw0", "gw1"]
    # Each module ran in one worker, and its fixtures were torn down once.
    found = {(test.worker, test.nodeid.partition("::")[0]) for test in record.tests}
    assert len(found) == 3
    assert sorted((tmp_path / "log").read_text().split()) == sorted(modules)
    assert re.search(
        r"^  gw0 at test_\w.py::test_keeps\[\d\]: it had grown to 1\d\d.\d\d MiB of main "
        r"memory, and was replaced\n +6\d.\d\d MiB kept by test_\w.py::test_keeps\[\d\]\n",
        run.section,
        re.MULTILINE,
    ), run.section


def test_a_bound_that_no_worker_keeps_to_replaces_none_and_says_so(tmp_path):
    write_suite(tmp_path, test_a=GROWING, test_b=GROWING)
    run = run_pytest(tmp_path, *ON, "--gpumem-worker-ram", "1MiB", "-n", "1")
    plain = run_pytest(tmp_path, *ON, "--gpumem-worker-ram", "1MiB")

    assert run.outcomes == plain.outcomes == {"passed": 4}
    assert "more than 1.00 MiB: none is replaced" in run.section
    assert "replaced workers" not in run.section
    assert "--gpumem-worker-ram does nothing" in plain.section


GROUPS = Path("/sys/fs/cgroup/memory")
HEAVY = """
import time
import pytest

KEPT = []

def test_keeps():
    KEPT.append(bytearray(40 << 20))

@pytest.mark.ram("110MiB")
@pytest.mark.parametrize("number", range(4))
def test_peaks(number):
    taken = bytearray(100 << 20)
    time.sleep(0.4)
"""
IN_GROUP = """
import os, sys
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
os.execv(sys.executable, [sys.executable, "-m", "pytest", *sys.argv[2:]])
"""


@pytest.fixture
def group(tmp_path):
    """Make a control group with a limit of main memory; return a program that runs pytest in it."""
    made = GROUPS / f"gpumem-test-{os.getpid()}"
    try:
        made.mkdir()
        (made / "memory.limit_in_bytes").write_text(str(320 * MIB))
    except OSError as error:
        pytest.skip(f"no control group of version 1 can be made here: {error.strerror}")
    script = tmp_path / "in_group.py"
    script.write_text(IN_GROUP)
    yield made
    made.rmdir()


def test_a_suite_that_is_killed_without_us_comes_to_its_end(tmp_path, group):
    write_suite(tmp_path, test_it=HEAVY)
    script = tmp_path / "in_group.py"
    three = (*ON, "-n", "3", "--gpumem-json", "run.json")
    unpacked = run_pytest(tmp_path, *three, "--gpumem=track", within=[script, group])
    lost = unpacked.record.lost
    packed = run_pytest(tmp_path, *three, within=[script, group])

    assert unpacked.outcomes["failed"] == len(lost) > 0, unpacked.output
    assert sum(unpacked.outcomes.values()) == 5
    for each in lost:
        assert each.nodeid.startswith("test_it.py::test_peaks[")
        assert "SIGKILL ended it, and because main memory of 320.00 MiB ran out" in each.why
        assert each.why in unpacked.output
    assert "replaced workers" in unpacked.section
    assert packed.outcomes == {"passed": 5}, packed.output


KILLED = """
import os, signal
import pytest

KEPT = []

def test_before():
    KEPT.append(bytearray(20 << 20))

def test_dies():
    os.kill(os.getpid(), signal.%s)

def test_after():
    pass
"""


@pytest.mark.parametrize(
    ("name", "options"), [("SIGKILL", ON), ("SIGKILL", ON[:2]), ("SIGTERM", ON[:2])]
)
def test_who_was_killed_for_another_reason_is_not_said_to_have_had_too_much(
    tmp_path, name, options
):
    write_suite(tmp_path, test_it=KILLED % name)
    run = run_pytest(tmp_path, *options, "-n", "1")

    assert run.outcomes == {"passed": 2, "failed": 1}, run.output
    told = "SIGKILL ended it; nothing says that main memory ran out" in run.output
    assert told == (name == "SIGKILL")
    assert "because main memory" not in run.output
    kept = {ON: r"20.\d\d MiB kept by .*::test_before", ON[:2]: "--gpumem-ram tells which tests"}
    if told:
        line = rf"gw0 at .*::test_dies: SIGKILL.*\n +{kept[options]}"
        assert re.search(line, run.section), run.output
    else:
        assert not run.section


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ((0, 0), (0, 0), "nothing says that main memory ran out"),
        ((3, 5), (3, 5), "nothing says that main memory ran out"),
        ((0, 7), (1, 8), "1 process of its control group meanwhile: this one"),
        ((1, 7), (3, 9), "2 processes of its control group meanwhile: probably this one"),
        ((1, 7), (1, 8), "1 process of the machine meanwhile: probably this one"),
        ((5, 5), (0, 0), "nothing says that main memory ran out"),
    ],
)
def test_what_is_said_of_a_killed_worker_follows_from_what_was_counted(before, now, said):
    assert _why(Killed(*before), Killed(*now)).endswith(said)


def test_two_workers_that_are_killed_at_once_are_both_explained(monkeypatch):
    counts = iter([Killed(0, 0), Killed(2, 2), Killed(2, 2), Killed(2, 2)])
    monkeypatch.setattr("pytest_gpumem.devices.host.killed", lambda: next(counts))
    monkeypatch.setattr("pytest_gpumem.plugin.xdist.nodes.ended_well", lambda _: False)
    monkeypatch.setattr("pytest_gpumem.plugin.xdist.nodes.exit_status", lambda _: -9)
    lost = LostWorkers(None)
    for name in ("gw0", "gw1", "gw2"):
        lost.pytest_testnodedown(SimpleNamespace(gateway=SimpleNamespace(id=name)))

    assert lost._why["gw0"].endswith(
        "2 processes of its control group meanwhile: probably this one"
    )
    assert lost._why["gw1"].endswith("1 process of its control group meanwhile: probably this one")
    assert lost._why["gw2"].endswith("nothing says that main memory ran out")


def test_private_surface_of_xdist_and_execnet_is_there():
    """Tried with xdist 3.8 and execnet 2.1; without it grown workers stay, and nothing is told."""
    from execnet.gateway_io import Popen2IOMaster
    from xdist.dsession import DSession
    from xdist.workermanage import WorkerController

    assert {"setup_node", "_active_nodes"} <= set(DSession._clone_node.__code__.co_names)
    assert "remove_node" in DSession.worker_workerfinished.__code__.co_names
    assert "workeroutput" in WorkerController.process_from_remote.__code__.co_names
    assert "popen" in Popen2IOMaster.__init__.__code__.co_names


LEASED = """
import pytest

@pytest.mark.ram("200MiB")
def test_large():
    pass

@pytest.mark.ram("20MiB")
def test_small():
    pass

def test_plain():
    pass

def test_learned():
    pass

@pytest.mark.gpu(vram="20MiB", ram="200MiB")
def test_both():
    pass
"""


@pytest.fixture
def all_but(tmp_path, monkeypatch):
    """Lease all main memory but some, as a stranger; return where that stands."""
    monkeypatch.setattr("pytest_gpumem.leases.family.lineage", lambda _: ())
    leases = LeaseStore(tmp_path / "run" / f"gpumem-{os.getuid()}")
    total = pools()[0].total

    def all_but(size):
        leases.acquire({MACHINE: Want(total - size)}, {MACHINE: total}, "somebody", 0)
        return {"GPUMEM_RUN_DIR": str(tmp_path / "run")}

    yield all_but
    leases.close()


@pytest.mark.parametrize(("mode", "card"), [("no-xdist", ()), ("n0", CARD), ("n2", CARD)])
def test_a_test_waits_for_main_memory_that_somebody_else_leased(tmp_path, all_but, mode, card):
    write_suite(tmp_path, test_it=LEASED)
    entry = {"peaks": [], "fixtures": 0, "duration": 1.0, "runs": 1, "gpu": False}
    took = {"test_learned": 200 * MIB, "test_plain": 0}
    tests = {f"test_it.py::{name}": entry | {"ram": [size]} for name, size in took.items()}
    history = tmp_path / "history.json"
    history.write_text(json.dumps({"schema": 1, "tests": tests}))
    arguments = (*card, *MODES[mode], "--gpumem-history", str(history))
    beside = all_but(150 * MIB)
    run = run_pytest(tmp_path, *ON, *arguments, "--gpumem-lease-timeout=0.3", env=beside)

    assert run.outcomes == {"passed": 2, "error": 3}, run.output
    for name in ("large", "both", "learned"):
        assert re.search(
            rf"(?m)^ERROR test_it.py::test_{name} - Failed: no lease within 0.3 s: .*"
            r"2\d\d.\d\d MiB of main memory: .* held by pid \d+ \(somebody\)",
            run.output,
        ), run.output

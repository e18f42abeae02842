"""The processes that tests start: whose they are, what they took, what they left."""

from __future__ import annotations

import shutil

import pytest
from children import CONTEXT, MIB, problems
from harness import MODES, SUITES, run_pytest, write_suite

CARD = ("-p", "gpumem", "--gpumem-simulate", "2GiB", "--gpumem-simulate-context", "64MiB")


@pytest.mark.parametrize("mode", ["plain", pytest.param("n2", marks=pytest.mark.slow)])
def test_every_child_belongs_to_who_started_it(tmp_path, mode):
    write_suite(tmp_path)
    shutil.copy(SUITES / "children.py", tmp_path / "test_children.py")
    run = run_pytest(tmp_path, *CARD, *MODES[mode], "--gpumem-json", "run.json", "-v")
    assert run.status == 0, run.output
    assert problems(run) == []
    assert "still runs" in run.section or "ended later" in run.section
    assert "by test_children.py::test_orphan" in run.section


SMALL = """
import os, subprocess, sys, time
import pytest

CHILD = '''
import sys, time
import torch
kept = torch.zeros(int(sys.argv[1]) * 2**20, dtype=torch.uint8, device="cuda")
print("there", flush=True)
time.sleep(60)
'''
KEPT = []

def start(mib):
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(mib)], stdout=subprocess.PIPE)
    child.stdout.readline()
    KEPT.append(child)
    return child
"""


STARTS_AT_ONCE = """
import subprocess, sys

COUNT = "import pynvml; pynvml.nvmlInit(); print(pynvml.nvmlDeviceGetCount())"
COUNTED = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True).stdout

def pytest_report_header():
    return f"cards of what the conftest started: {COUNTED}"
"""


@pytest.mark.parametrize("mode", [pytest.param("n0", marks=pytest.mark.slow), "no-xdist"])
def test_an_orphan_fails_a_test_with_a_limit_and_a_run_without_children_tells_none(tmp_path, mode):
    write_suite(
        tmp_path,
        conftest=STARTS_AT_ONCE,
        test_limits=SMALL
        + """
@pytest.mark.vram_leak_limit("1MiB")
def test_leaves():
    start(20)

def test_next():
    for each in KEPT:
        each.kill()
        each.wait()
""",
    )
    run = run_pytest(tmp_path, *CARD, *MODES[mode], "--gpumem-json", "run.json")
    assert run.outcomes == {"passed": 2, "error": 1}
    assert "allowed to leak 1.00 MiB, leaked 84.00 MiB" in run.output
    assert "cards of what the conftest started: 1" in run.output
    off = run_pytest(tmp_path, *CARD, *MODES[mode], "--gpumem-children", "off", "-s")
    assert "Torch not compiled with CUDA enabled" in off.output
    assert off.outcomes == {"passed": 2}


def test_tests_do_not_wait_for_the_engine_of_their_fixture(tmp_path):
    write_suite(
        tmp_path,
        test_engine=SMALL
        + """
@pytest.fixture(scope="module")
def engine():
    child = start(500)
    yield child
    child.kill()

@pytest.mark.gpu(vram="600MiB")
@pytest.mark.parametrize("number", range(4))
def test_served(engine, number):
    pass
""",
    )
    small = ("-p", "gpumem", "--gpumem-simulate", "1GiB", "--gpumem-simulate-context", "64MiB")
    run = run_pytest(tmp_path, *small, "--gpumem-json", "run.json")
    assert run.outcomes == {"passed": 4}
    later = run.record.tests[1:]
    assert [test.lease.waited for test in later] == [0, 0, 0]
    assert {test.lease.size for test in later} == {100 * MIB}
    assert {card.fixture_bytes for test in later for card in test.cards} == {500 * MIB + CONTEXT}


@pytest.mark.slow  # several processes with torch
def test_a_test_whose_child_ran_out_of_memory_beside_others_runs_again(tmp_path):
    write_suite(
        tmp_path,
        conftest="import torch\n",
        test_holds=SMALL
        + """
from pathlib import Path
HERE = Path(__file__).parent

def test_holds():
    child = start(1300)
    (HERE / "held").touch()
    until = time.monotonic() + 60
    while not (HERE / "tried").exists() and time.monotonic() < until:
        time.sleep(0.05)
    child.kill()
    child.wait()
    child.stdout.close()
""",
        test_needs=SMALL
        + """
from pathlib import Path
HERE = Path(__file__).parent

def test_needs():
    while not (HERE / "held").exists():
        time.sleep(0.05)
    code = CHILD.replace("time.sleep(60)", "")
    done = subprocess.run([sys.executable, "-c", code, "1000"])
    (HERE / "tried").touch()
    assert done.returncode == 0
""",
    )
    options = ("-n", "2", "--dist", "loadfile", "--gpumem-json", "run.json")
    run = run_pytest(tmp_path, *CARD, *options)
    assert run.outcomes == {"passed": 2, "rerun": 1}, run.output
    (first, *_) = [test for test in run.record.tests if test.outcome == "rerun"]
    assert "out of memory in process" in first.oom


SENT = """
import torch
import torch.multiprocessing


def receives(queue, answers):
    tensor, event = queue.get()
    event.wait()
    tensor += 1
    answers.put((tensor.is_cuda, torch.cuda.memory_allocated()))


def test_sends():
    context = torch.multiprocessing.get_context("spawn")
    queue, answers = context.Queue(), context.Queue()
    child = context.Process(target=receives, args=(queue, answers))
    child.start()
    tensor, event = torch.zeros(2**20, device="cuda"), torch.cuda.Event(interprocess=True)
    event.record()
    queue.put((tensor, event))
    assert answers.get(timeout=120) == (True, 0)
    assert tensor.sum() == 2**20
    child.join()
    assert child.exitcode == 0
"""


@pytest.mark.parametrize("card", [(), ("--gpumem-simulate-compiled",)], ids=["python", "compiled"])
def test_a_child_is_sent_a_tensor_of_the_card(tmp_path, card):
    write_suite(tmp_path, test_it=SENT)
    run = run_pytest(tmp_path, *CARD, *card, "--gpumem-json=run.json", "-p", "no:xdist")
    assert run.outcomes == {"passed": 1}, run.output
    assert run.card("test_sends").leaked == 0

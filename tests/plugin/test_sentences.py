"""What the report says is what was found out: who left what, who ran out, who was there."""

from __future__ import annotations

import re

import pytest
from harness import SIMULATE, TAKE, run_pytest, write_suite

TEXTS = {
    "cublas": "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "jax": "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 73300 bytes.",
    "worker": "Worker failed: CUDA out of memory",
    "nccl": "unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
}

TRACKED = f"""
import subprocess, sys

TEXTS = {TEXTS}

@pytest.fixture(scope="session", autouse=True)
def meant_to_last():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

@pytest.fixture(scope="module", autouse=True)
def of_the_module():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)

@pytest.mark.parametrize("name", TEXTS)
def test_says(name): raise ValueError(TEXTS[name])
def test_chain():
    raise KeyError("x") from RuntimeError(TEXTS["cublas"])
def test_host(): raise MemoryError("Unable to allocate 535. MiB for an array with shape (7,)")
def test_weak(): raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED")
@pytest.mark.gpumem_off
def test_left_alone(): raise ValueError(TEXTS["jax"])
@pytest.mark.gpumem_off
def test_left_alone_as_well(): pass
def test_prints(capsys): print(TEXTS["worker"])
def test_quotes(): assert TEXTS["worker"] == ""

def test_limits():
    torch.cuda.set_per_process_memory_fraction(0.25)
def test_polite(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    torch.set_grad_enabled(False)
    torch.set_grad_enabled(True)
def test_innocent(): take(1200 * 1024)
def test_rude():
    torch.cuda.set_per_process_memory_fraction(1.0)
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    torch.set_grad_enabled(False)
def test_starts_a_child():
    KEPT.append(subprocess.Popen(
        [sys.executable, "engine.py", os.environ["GPUMEM_SIMULATE_CARD"]],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ))
    assert KEPT[-1].stdout.readline()
def test_beside_it(): take(2 * 1024 * 1024)
def test_ends_it():
    KEPT.pop().communicate()
"""

ENGINE = """
import sys
from pytest_gpumem.simulator import Simulation
Simulation.attach(sys.argv[1]).install()
import torch
kept = torch.empty(2, 2**30, dtype=torch.uint8, device="cuda")
print("up", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    from harness import SIMULATE, TAKE, run_pytest, write_suite

    directory = tmp_path_factory.mktemp("tracked")
    write_suite(directory, test_it=TAKE + TRACKED, engine=ENGINE)
    return run_pytest(
        directory,
        *SIMULATE,
        "--gpumem=track",
        "--gpumem-too-large=skip",
        "--gpumem-json=run.json",
        env={"GPUMEM_OOM": "fail"},
    )


def test_what_ran_out_is_known_by_any_frameworks_words(tracked):
    ooms = {each.nodeid.split("::")[1] for each in tracked.record.tests if each.oom}
    expected = {f"test_says[{name}]" for name in TEXTS}
    assert ooms == expected | {"test_chain", "test_innocent", "test_beside_it"}, tracked.output
    assert f"{len(ooms)} failures out of memory" in tracked.section


def test_what_a_test_leaves_is_named_and_what_is_meant_to_last_is_not(tracked):
    left = {
        each.nodeid.split("::")[1]: [tuple(one) for one in each.left]
        for each in tracked.record.tests
        if each.left
    }
    assert left == {
        "test_limits": [("memory fraction of cuda:0", "1", "0.25", False)],
        "test_rude": [
            ("CUDA_VISIBLE_DEVICES", "unset", "0", False),
            ("gradients", "True", "False", False),
            ("memory fraction of cuda:0", "0.25", "1", False),
        ],
    }
    assert "test_it.py::test_rude: gradients is False, was True\n" in tracked.section


def test_an_innocent_test_is_told_whose_limit_it_met(tracked):
    told = tracked.section.partition("test_it.py::test_innocent\n")[2].splitlines()
    assert re.fullmatch(
        r"      CUDA out of memory\. Tried to allocate 1\.17 GiB \(975\.\d+ MiB allowed\)", told[0]
    ), told
    assert told[1] == "      memory fraction of cuda:0 is 0.25: test_it.py::test_limits left it so"


def test_who_else_was_on_the_card_is_named(tracked):
    (other,) = tracked.test("test_beside_it").beside
    assert "engine.py" in other.command
    assert other.size > 2**31
    assert f"      beside it: process {other.pid} (" in tracked.section


def test_an_option_without_effect_in_this_mode_is_said_to_be_so(tracked):
    for place in ("--gpumem-too-large", "GPUMEM_OOM in the environment"):
        sentence = f"{place} does nothing with --gpumem=track: it needs --gpumem=on"
        assert tracked.section.count(sentence) == 1


def test_notes_are_told_where_no_test_used_a_card(tmp_path):
    write_suite(tmp_path, test_it="def test_a(): pass")
    option = "--gpumem-too-large=skip"
    told = run_pytest(tmp_path, "-p", "gpumem", "--gpumem=track", option)
    assert told.section.strip().startswith("notes\n"), told.output
    assert told.section.count(f"{option.partition('=')[0]} does nothing") == 1
    quiet = run_pytest(tmp_path, "-p", "gpumem", "--gpumem=track", option, "-q")
    assert "GPU memory" not in quiet.output


def test_tests_that_took_nothing_are_not_said_to_have_used_the_card(tracked):
    tests = tracked.record.tests
    used = [test for test in tests if any(card.peak > card.baseline for card in test.cards)]
    assert f"{len(used)} of {len(tests)} tests used VRAM" in tracked.section


def test_asked_for_it_sets_a_limit_back_and_sees_a_card_full_when_it_was(run):
    source = """
@pytest.fixture(scope="session", params=[1024, 2048, 3072])
def model(request): return take(request.param)

@pytest.fixture(scope="module", autouse=True)
def limit():
    torch.cuda.set_per_process_memory_fraction(0.95)

def test_limits(): torch.cuda.set_per_process_memory_fraction(0.25)
def test_innocent():
    assert torch.cuda.get_per_process_memory_fraction() == 0.95
    take(1200 * 1024)
def test_model(model): pass
def test_no_room_to_start():
    kept = take(3300 * 1024)
    raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED")
def test_lifts(): torch.cuda.set_per_process_memory_fraction(1.0)
def test_lifted(): assert torch.cuda.get_per_process_memory_fraction() == 1.0
"""
    finished = run(source)

    assert finished.outcomes == {"passed": 7, "failed": 1}, finished.output
    assert finished.test("test_no_room_to_start").oom == "CUBLAS_STATUS_NOT_INITIALIZED"
    assert "memory fraction of cuda:0 is 0.25, was 0.95; set back\n" in finished.section
    assert "memory fraction of cuda:0 is 1, was 0.95\n" in finished.section
    (fixture,) = [line for line in finished.section.splitlines() if " model (" in line]
    assert re.split(r"  +", fixture.strip()) == (
        ["3.00 MiB", "3.00 MiB", "3.00 MiB", "model (session, largest of 3)"]
    )
    leases = [each.lease for each in finished.record.tests if each.lease is not None]
    assert leases
    assert {each.waited for each in leases} == {0}


ON_A_TERMINAL = """
import os, pty, sys
sys.exit(os.waitstatus_to_exitcode(pty.spawn([sys.executable, "-m", "pytest", *sys.argv[1:]])))
"""


def test_a_terminal_gets_names_in_one_piece_and_a_file_lines_in_one(tmp_path):
    suite = write_suite(tmp_path, test_it=TAKE + "\ndef test_with_quite_a_name(): take()\n")
    (tmp_path / "on_a_terminal.py").write_text(ON_A_TERMINAL)
    narrow = {"env": {"COLUMNS": "60"}, "beside": ()}
    row = ["64.00 KiB", "<1%", "64.00 KiB", "0 B"]

    file = run_pytest(suite, *SIMULATE, **narrow)
    terminal = run_pytest(suite, *SIMULATE, **narrow, within=[tmp_path / "on_a_terminal.py"])

    (line,) = [line for line in file.section.splitlines() if "::" in line]
    assert re.split(r"  +", line.strip()) == [*row, "test_it.py::test_with_quite_a_name"]
    lines = terminal.output.replace("\r", "").splitlines()
    at = lines.index("    test_it.py::test_with_quite_a_name")
    assert re.split(r"  +", lines[at - 1].strip()) == row

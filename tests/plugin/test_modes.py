"""What is on when: installed only, asked for, switched off; and what never happens."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from harness import SIMULATE, TAKE_WITHOUT_TORCH, WITHOUT_TORCH, run_pytest, write_suite

SUITE = """
import sys

def test_a():
    assert "torch" not in sys.modules
    assert "pynvml" not in sys.modules
    assert "cryptography" not in sys.modules

def test_pytest_does_not_read_the_sources_of_the_plugin():
    from pytest_gpumem.plugin import hooks
    assert "pytest" not in type(hooks.__loader__).__module__
"""


LOOKS_AROUND = """
import os
BEFORE = dict(os.environ)
def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        new = {name for name in os.environ if name not in BEFORE and name.startswith("GPUMEM")}
        assert not new, new
"""


def header(finished):
    return [line for line in finished.output.splitlines() if line.startswith("gpumem: ")]


@pytest.mark.parametrize(
    ("arguments", "mode"),
    [
        ((), "track"),  # these two find the plugin as any other that is installed
        (("--gpumem=on",), "on"),
        (("-p", "gpumem"), "on"),
        (("-p", "gpumem", "--gpumem=track"), "track"),
        (("-p", "gpumem", "-n", "2"), "on"),
    ],
)
def test_without_a_card_there_is_one_header_line_and_nothing_else(tmp_path, arguments, mode):
    finished = run_pytest(write_suite(tmp_path, test_it=SUITE), *arguments)

    assert finished.status == 0, finished.output
    (line,) = header(finished)
    assert line.startswith(f"gpumem: {mode}, no card: there is no NVIDIA driver library")
    assert ("; --gpumem-simulate 4GiB gives the suite one" in line) is (mode == "on")
    assert "GPU memory" not in finished.output


def test_switched_off_it_only_says_so(tmp_path):
    write_suite(
        tmp_path,
        test_it=SUITE + "\nimport pytest\n@pytest.mark.vram_limit('what')\ndef test_b(): pass",
    )
    finished = run_pytest(tmp_path, "--gpumem=off")

    assert finished.status == 0
    assert header(finished) == ["gpumem: off"]


@pytest.fixture(scope="module")
def from_ini(tmp_path_factory):
    """Run a suite whose ini file asks for everything."""
    directory = write_suite(
        tmp_path_factory.mktemp("ini"),
        test_it="import torch\ndef test_a(): torch.zeros(4, device='cuda')",
        conftest=LOOKS_AROUND,
    )
    ini = directory / "pytest.ini"
    ini.write_text(
        ini.read_text() + "gpumem = on\ngpumem_simulate = 1GiB\ngpumem_json = run.json\n"
    )
    return run_pytest(directory)


def test_the_ini_file_can_ask_for_everything(from_ini):
    finished = from_ini

    assert finished.status == 0, finished.output
    assert finished.record.mode == "on"
    assert finished.card("test_a").peak == 512
    assert "gpumem: on, Simulated CUDA card of 1.00 GiB" in header(finished)
    assert len(header(finished)) == 1  # what is not simulated is told to those who ask with -v


def test_a_suite_that_loads_the_plugin_in_its_conftest_is_measured(tmp_path):
    write_suite(
        tmp_path,
        test_it=TAKE_WITHOUT_TORCH + "def test_a(): take(512)",
        conftest="pytest_plugins = ['pytest_gpumem.plugin']",
    )
    shutil.copy(WITHOUT_TORCH, tmp_path)
    finished = run_pytest(
        tmp_path,
        "-p",
        "no:gpumem",
        env={"GPUMEM_SIMULATE": "1GiB", "GPUMEM_JSON": "run.json"},
    )

    assert finished.card("test_a").peak == 512 * 1024


def test_it_leaves_nothing_behind_in_the_working_directory_or_the_environment(tmp_path, from_ini):
    write_suite(tmp_path, test_it="def test_a(): pass", conftest=LOOKS_AROUND)
    before = {path.name for path in tmp_path.iterdir()}
    finished = run_pytest(tmp_path, *SIMULATE, "-n", "2")

    assert finished.status == from_ini.status == 0, finished.output
    assert {path.name for path in tmp_path.iterdir()} - before <= {"__pycache__"}
    after = {path.name for path in from_ini.directory.iterdir()}
    assert after - before <= {"__pycache__", "run.json"}


def test_tracking_only_never_empties_the_cache_and_changes_no_device(tmp_path):
    suite = """
import torch

def test_a():
    torch.zeros(2**30, dtype=torch.uint8, device="cuda")

def test_b():
    assert torch.cuda.memory_reserved() == 2**30
    assert torch.get_default_device().type == "cpu"
"""
    write_suite(tmp_path, test_it=suite)

    finished = run_pytest(tmp_path, *SIMULATE, "--gpumem=track", "--gpumem-simulate=1.5GiB")
    assert finished.outcomes == {"passed": 2}


def test_asked_for_it_gives_a_large_unused_cache_back(tmp_path):
    suite = """
import torch

def test_a():
    torch.zeros(2**30, dtype=torch.uint8, device="cuda")

def test_b():
    assert torch.cuda.memory_reserved() == 0
"""
    write_suite(tmp_path, test_it=suite)

    finished = run_pytest(tmp_path, "-p", "gpumem", "--gpumem-simulate=1.5GiB")
    assert finished.outcomes == {"passed": 2}


def test_a_run_can_use_the_card_that_another_run_made(tmp_path):
    outer = """
import os, subprocess, sys
from without_torch import ALLOCATOR

def test_outer():
    ALLOCATOR.take(2**30)
    card = os.environ["GPUMEM_SIMULATE_CARD"]
    inner = subprocess.run(
        [sys.executable, "-m", "pytest", "inner", "-p", "gpumem", "--gpumem-simulate-card", card],
        capture_output=True, text=True,
    )
    assert "1 failed" in inner.stdout, inner.stdout
    assert f"Process {os.getpid()} has" in inner.stdout, inner.stdout
"""
    write_suite(tmp_path, test_outer=outer)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "test_inner.py").write_text(
        "import torch\ndef test_a(): torch.zeros(2**30, dtype=torch.uint8, device='cuda')"
    )
    shutil.copy(WITHOUT_TORCH, tmp_path)
    finished = run_pytest(tmp_path, "test_outer.py", "-p", "gpumem", "--gpumem-simulate=2GiB")

    assert finished.outcomes == {"passed": 1}, finished.output


def test_marks_and_options_explain_themselves(tmp_path):
    marks = run_pytest(tmp_path, "-p", "gpumem", "--markers").output
    options = run_pytest(tmp_path, "-p", "gpumem", "--help").output

    assert (
        "@pytest.mark.gpu(vram=None, count=1, exclusive=False, fallback=None, isolated=False, "
        "ram=None): Say how" in marks
    )
    assert "--gpumem-simulate=SIZE" in options
    assert "GPU memory: measuring and limits" in options


def test_the_fixture_reads_zero_where_there_is_no_card(tmp_path):
    suite = (
        "def test_a(gpumem): assert (gpumem.allocated, gpumem.peak, gpumem.usage()) == (0, 0, ())"
    )
    assert run_pytest(write_suite(tmp_path, test_it=suite), "-p", "gpumem").status == 0


def test_a_cpu_only_suite_with_torch_is_left_alone(tmp_path):
    suite = "import torch\ndef test_a(): assert not torch.cuda.is_available()"
    finished = run_pytest(write_suite(tmp_path, test_it=suite), "-p", "gpumem")

    assert finished.status == 0
    assert "GPU memory" not in finished.output


def test_the_report_command_shows_the_same_section(from_ini):
    record = from_ini.directory / "run.json"
    shown = subprocess.run(
        [sys.executable, "-m", "pytest_gpumem.cli.main", "report", str(record)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout

    assert shown.strip() == from_ini.section.strip()
    assert json.loads(record.read_text())["schema"] == 1


def test_another_makers_card_is_measured_once_the_suite_has_loaded_torch(tmp_path):
    torch = """
from types import SimpleNamespace

figures = {"current": 0, "peak": 0}

def take(size):
    figures["current"] += size
    figures["peak"] = max(figures["peak"], figures["current"])

def reset(_index): figures["peak"] = figures["current"]

def stats(_index):
    kinds = ("allocated_bytes", "reserved_bytes")
    return {f"{kind}.all.{name}": size for kind in kinds for name, size in figures.items()}

xpu = SimpleNamespace(
    is_initialized=lambda: True,
    get_device_properties=lambda _: SimpleNamespace(name="Arc", total_memory=2**33, uuid=b"\\1"),
)
accelerator = SimpleNamespace(
    current_accelerator=lambda: SimpleNamespace(type="xpu"),
    device_count=lambda: 1,
    memory_stats=stats,
    reset_peak_memory_stats=reset,
    empty_cache=lambda: None,
)
"""
    suite = "import torch\ndef test_a():\n    torch.take(2**20)\n    torch.take(-2**20)\n"
    write_suite(tmp_path, torch=torch, test_it=suite)
    finished = run_pytest(tmp_path, "-p", "gpumem", "--gpumem-json=run.json")

    assert finished.card("test_a").peak == 2**20, finished.output
    assert [(card.name, card.kind) for card in finished.record.cards] == [("Arc", "xpu")]

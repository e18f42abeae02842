"""Where tests run: the device they are told, and what is tried after running out of memory."""

from __future__ import annotations

import re

import pytest
from harness import MODES, ON_WORKERS

HELP = """
import asyncio, time, unittest
from pathlib import Path
from pytest_gpumem import HybridResourceManager

GIB = 2**30
SET_UP = []

def fill(device, gib=5):
    # On the CPU nothing is taken: this machine need not have as much.
    where = "cuda" if device == "cuda" else "meta"
    return torch.empty(int(gib * GIB), dtype=torch.uint8, device=where)

def routed():
    return HybridResourceManager().allocate_task("tensor", 10)
"""

LADDER = (
    HELP
    + """
pytestmark = pytest.mark.gpu(fallback="cpu")

def test_asks_the_fixture(gpu_device):
    fill(gpu_device)

def test_asks_a_manager():
    fill(routed())

@pytest.fixture
def narrow(gpu_device):
    return fill(gpu_device)

def test_in_a_fixture(narrow):
    assert narrow.device.type == "meta"

@pytest.fixture(scope="module")
def wide():
    SET_UP.append("module")
    return fill(routed())

def test_in_a_module_fixture(wide):
    assert SET_UP == ["module"] * 2

def test_after_the_module_fixture(wide):
    assert wide.device.type == "meta"

@pytest.fixture(scope="module")
def late():
    return fill(routed())

def test_asks_for_a_module_fixture_as_late_as_it_runs(request):
    assert request.getfixturevalue("late").device.type == "meta"

@pytest.fixture(scope="session")
def widest():
    return fill(routed())

def test_in_a_session_fixture(widest):
    assert widest.device.type == "meta"

@pytest.mark.asyncio
async def test_async(gpu_device):
    await asyncio.sleep(0)
    fill(gpu_device)

class TestOfUnittest(unittest.TestCase):
    def setUp(self):
        self.x = fill(routed())

    def test_in_its_set_up(self):
        assert self.x.device.type == "meta"

@pytest.mark.xfail(strict=True, raises=AssertionError)
def test_is_expected_to_fail(gpu_device):
    fill(gpu_device)
    assert gpu_device != "cpu"

def test_is_skipped_on_the_cpu(gpu_device):
    fill(gpu_device)
    pytest.skip(f"on the {gpu_device}")
"""
)

FAULTS = """
@pytest.mark.gpu(fallback="cpu")
def test_takes_the_card_whatever_it_is_told(gpu_device):
    take(5 * 2**20)

def test_asks_nobody():
    take(5 * 2**20)

@pytest.mark.gpu
def test_needs_the_card(gpu_device):
    assert gpu_device == "cuda"
    take(5 * 2**20)
"""


def attempts(done):
    """Return the outcomes and steps of each test's attempts, by name."""
    made: dict[str, list[tuple[str, str]]] = {}
    for test in done.record.tests:
        made.setdefault(test.nodeid.rpartition("::")[2], []).append((test.outcome, test.step))
    return made


@pytest.mark.parametrize("mode", ON_WORKERS)
def test_what_runs_out_of_memory_takes_the_cpu_if_it_asked_where_to_work(run, mode):
    done = run(LADDER, "-x", *MODES[mode], beside=["xdist", "asyncio"])

    made = attempts(done)
    assert {name: tried[-1] for name, tried in made.items()} == {
        **dict.fromkeys(made, ("passed", "cpu")),
        "test_after_the_module_fixture": ("passed", made["test_after_the_module_fixture"][-1][1]),
        "test_is_expected_to_fail": ("xfailed", "cpu"),
        "test_is_skipped_on_the_cpu": ("skipped", "cpu"),
    }, done.output
    assert done.status == 0
    assert len(made) == 11
    assert all({outcome for outcome, _ in tried[:-1]} <= {"rerun"} for tried in made.values())
    assert "ran out of memory on the card" in done.section


def test_a_test_that_ran_out_everywhere_fails_with_the_figures(run_without_torch):
    done = run_without_torch(FAULTS, "--junitxml=junit.xml", "-v")

    assert attempts(done) == {
        "test_takes_the_card_whatever_it_is_told": [("rerun", ""), ("failed", "cpu")],
        "test_asks_nobody": [("failed", "")],
        "test_needs_the_card": [("failed", "")],
    }
    assert all(test.oom for test in done.record.tests)
    assert "::test_takes_the_card_whatever_it_is_told RERUN" in done.output
    assert done.outcomes == {"failed": 3, "rerun": 1}
    junit = (done.directory / "junit.xml").read_text()
    tried = re.findall(r'<testcase [^>]*name="test_takes.*?</testcase>', junit, re.DOTALL)
    assert ["<failure" in each for each in tried] == [False, True]
    assert ['name="gpumem_step" value="cpu"' in each for each in tried] == [False, True]


def test_whoever_routes_first_goes_by_the_options(run_without_torch):
    done = run_without_torch(
        """
def test_imports_it_last_of_all():
    from pytest_gpumem import HybridResourceManager
    assert HybridResourceManager().thresholds == (0.01, 0.7, 5 * 2**20, 0.5)
""",
        *("--gpumem-route-full=1%", "--gpumem-route-large=5MiB", "--gpumem-route-transformers=50%"),
    )

    assert done.outcomes == {"passed": 1}, done.output


@pytest.mark.parametrize("answer", ["fail", "retry"])
def test_the_answer_says_how_far_to_go(run_without_torch, answer):
    done = run_without_torch(FAULTS, f"--gpumem-oom={answer}", "-k", "takes_the_card")

    assert {tried[-1] for tried in attempts(done).values()} == {("failed", "")}
    assert done.outcomes == {"failed": 1, "deselected": 2}


def test_memory_of_models_is_released_before_the_cpu_is_tried(run, tmp_path, monkeypatch):
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    done = run(
        HELP
        + """
@pytest.fixture(scope="session")
def model(model_pool):
    return lambda: model_pool.get("one", lambda: torch.nn.Linear(4096, 4096, bias=False))

def test_uses_the_model(model):
    assert model().weight.device.type == "cuda"

@pytest.mark.gpu(fallback="cpu")
def test_needs_its_room(gpu_device):
    torch.empty(600 * 2**20, dtype=torch.uint8, device=gpu_device)

@pytest.mark.gpu(fallback="cpu")
def test_needs_more_than_is_left(gpu_device, model):
    assert model().weight.sum() is not None
    fill(gpu_device, 0.9)

@pytest.mark.gpu(fallback="cpu")
def test_needs_more_than_there_is(gpu_device, model):
    assert model().weight.sum() is not None
    fill(gpu_device)
""",
        "--gpumem-simulate=1GiB",
    )

    assert attempts(done) == {
        "test_uses_the_model": [("passed", "")],
        "test_needs_its_room": [("rerun", ""), ("passed", "released")],
        "test_needs_more_than_is_left": [("rerun", ""), ("rerun", "released"), ("passed", "cpu")],
        "test_needs_more_than_there_is": [("rerun", ""), ("passed", "cpu")],
    }, done.output


@pytest.mark.parametrize("known", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_idle_process_gives_its_models_up_for_a_test_that_waits_elsewhere(
    run, tmp_path, monkeypatch, known
):
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    keeps = """
from test_it import *

@pytest.fixture
def model(model_pool):
    return model_pool.get("one", lambda: torch.nn.Linear(6400, 6400, bias=False).cuda())

@pytest.mark.gpu(vram="200MiB")
def test_loads_it(model):
    Path("loaded").touch()

@pytest.mark.gpu(vram=0)
@pytest.mark.parametrize("number", range(100))
def test_has_no_use_for_it(number):
    if not Path("done").exists():
        time.sleep(0.1)

def test_uses_it_again(model):
    assert model.weight.device.type == "cuda"
"""
    wants = f"""
from test_it import *

def test_begins_when_it_is_loaded():
    while not Path("loaded").exists():
        time.sleep(0.01)

{'@pytest.mark.gpu(vram="300MiB")' if known else ""}
def test_wants_its_room():
    x = torch.empty(300 * 2**20, dtype=torch.uint8, device="cuda")
    Path("done").touch()
"""
    done = run(
        HELP,
        *("-n", "2", "--dist", "loadfile"),
        *("--gpumem-simulate=400MiB", "--gpumem-simulate-context=1MiB"),
        test_keeps=keeps,
        test_wants=wants,
    )

    expected = [("passed", "")] if known else [("rerun", ""), ("passed", "alone")]
    assert attempts(done)["test_wants_its_room"] == expected, done.output
    assert "failed" not in done.outcomes, done.output


def test_rerunfailures_reruns_as_without_the_plugin_and_the_ladder_takes_what_is_left(run):
    done = run(
        HELP
        + """
TRIES = []

@pytest.mark.gpu(fallback="cpu")
def test_fails_once_on_the_cpu(gpu_device):
    fill(gpu_device)
    TRIES.append(gpu_device)
    assert len(TRIES) > 1

def test_has_no_room():
    fill("cuda")
""",
        "--reruns=1",
        beside=["rerunfailures"],
    )

    assert attempts(done) == {
        "test_fails_once_on_the_cpu": [("rerun", "")] * 2 + [("rerun", "cpu"), ("passed", "cpu")],
        "test_has_no_room": [("rerun", ""), ("failed", "")],
    }
    assert "alone" not in done.section

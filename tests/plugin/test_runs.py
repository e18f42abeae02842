"""Runs that end early, crash, or run beside other plugins, on the simulated card."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from harness import MODES, SIMULATE, TAKE, run_pytest, write_suite


def outcomes(finished):
    return {each.nodeid.split("::")[-1]: each.outcome for each in finished.record.tests}


@pytest.mark.parametrize("mode", ["plain", "n2"])
def test_stopping_at_the_first_failure_keeps_what_was_measured(run_without_torch, mode):
    source = """
def test_a(): take()
def test_b():
    x = take()
    assert 0
def test_c(): take()
"""
    finished = run_without_torch(source, "-x", *MODES[mode])

    assert finished.status in (1, 2)
    assert outcomes(finished)["test_b"] == "failed"
    assert finished.card("test_b").leftover == 0
    assert "GPU memory" in finished.output


def test_maxfail_and_last_failed_work_as_without_the_plugin(run_without_torch):
    source = """
def test_a(): take(); assert 0
def test_b(): take(); assert 0
def test_c(): take()
"""
    first = run_without_torch(source, "--maxfail=1")
    second = run_without_torch(source, "--lf")

    assert outcomes(first) == {"test_a": "failed"}
    assert outcomes(second) == {"test_a": "failed"}


def test_a_crashed_worker_loses_only_the_test_it_was_running(run_without_torch):
    source = """
@pytest.mark.parametrize("i", range(6))
def test_good(i): take()

def test_crash():
    x = take()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    finished = run_without_torch(source, "-n", "2")

    assert finished.outcomes == {"passed": 6, "failed": 1}
    assert outcomes(finished)["test_crash"] == "crashed"
    assert sum(bool(each.cards) for each in finished.record.tests) == 6
    assert finished.section.count("GPU memory") == 0
    assert finished.output.count("= GPU memory =") == 1


def test_workers_share_one_card_and_each_others_memory_is_named(run):
    source = """
import time

@pytest.mark.parametrize("i", range(2))
def test_both_at_once(i, tmp_path_factory):
    try:
        mine = torch.zeros(2 * 2**30, dtype=torch.uint8, device="cuda")
    finally:
        (tmp_path_factory.getbasetemp().parent / f"there{i}").touch()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if (tmp_path_factory.getbasetemp().parent / f"there{1 - i}").exists():
            break
        time.sleep(0.01)
"""
    finished = run(source, "-n", "2", "--gpumem=track")

    assert sorted(outcomes(finished).values()) == ["failed", "passed"], finished.output
    assert re.search(r"Process \d+ has 2\.38 GiB memory in use", finished.output)
    (oom,) = [each for each in finished.record.tests if each.oom]
    assert oom.oom == "CUDA out of memory. Tried to allocate 2.00 GiB"
    assert oom.cards[0].ooms == 1


def test_the_card_of_a_killed_worker_is_free_for_the_next_test(run_without_torch):
    source = """
def test_1_crash():
    x = take(3 * 2**20)
    os.kill(os.getpid(), signal.SIGKILL)

def test_2_takes_it_all():
    take(3 * 2**20)
"""
    finished = run_without_torch(source, "-n", "1")

    assert outcomes(finished) == {"test_1_crash": "crashed", "test_2_takes_it_all": "passed"}


def test_workers_are_told_of_one_another_and_their_last_teardowns_once(run_without_torch):
    source = """
import pathlib, time

@pytest.fixture(scope="session")
def model(): return [take()]

@pytest.mark.gpu(vram="1MiB")
@pytest.mark.parametrize("i", range(2))
def test_oom(model, i):
    pathlib.Path(f"here-{i}").touch()
    ends = time.monotonic() + 30
    while not pathlib.Path(f"here-{1 - i}").exists() and time.monotonic() < ends: time.sleep(0.01)
    take(4 * 2**20)
"""
    arguments = "-n2", "--reruns=1", "--gpumem-oom=fail"
    finished = run_without_torch(source, *arguments, beside=("xdist", "rerunfailures"))

    tests = finished.record.tests
    assert [test.outcome for test in tests].count("rerun") == 2, finished.output
    last = [test for test in tests if test.outcome == "failed"]
    assert len({test.worker for test in last}) == 2
    torn_down = [
        (test.outcome, test.worker)
        for test in tests
        for each in test.fixtures
        if each.scope == "session" and each.released is not None
    ]
    assert sorted(torn_down) == sorted((test.outcome, test.worker) for test in last)
    assert any(test.beside for test in tests)
    assert all(each.worker not in ("", test.worker) for test in tests for each in test.beside), (
        finished.output
    )


def test_reruns_are_recorded_one_by_one(run_without_torch):
    source = """
TRIES = []

@pytest.mark.flaky(reruns=2)
def test_a():
    TRIES.append(1)
    x = take(64 * len(TRIES))
    assert len(TRIES) == 3
"""
    finished = run_without_torch(source, beside=["rerunfailures"])
    peaks = [each.cards[0].peak for each in finished.record.tests]

    assert [each.outcome for each in finished.record.tests] == ["rerun", "rerun", "passed"]
    assert peaks == [65536, 2 * 65536, 3 * 65536]
    assert all(each.cards[0].leftover == 0 for each in finished.record.tests)


def test_under_pdb_the_variables_of_a_failed_test_are_kept(run_without_torch):
    files = {
        "conftest": """
import pytest

class Debugger:
    quitting = False
    def reset(self): pass
    def interaction(self, frame, traceback):
        while traceback.tb_next: traceback = traceback.tb_next
        print("LOCALS", sorted(traceback.tb_frame.f_locals))
    def __init__(self, *args, **kwargs): pass
"""
    }
    source = """
def test_a():
    x = take()
    assert 0
"""
    finished = run_without_torch(source, "--pdb", "--pdbcls=conftest:Debugger", "-s", **files)

    assert re.search(r"LOCALS \[.*'x'", finished.output)
    assert finished.card("test_a").leaked == 0


def test_pytest_html_gets_a_column(run_without_torch):
    page = ("-Wdefault", "--html=report.html", "--self-contained-html")
    source = "def test_a(): take(2048)"
    finished = run_without_torch(source, *page, beside=["metadata", "html"])
    html = (finished.directory / "report.html").read_text()

    assert "VRAM peak (MiB)" in html
    assert "2.0" in html


def test_allocation_stacks_name_the_line(run):
    finished = run("def test_a():\n    KEPT.append(take())\n", "--gpumem-stacks")
    (holder,) = finished.card("test_a").holders

    assert [re.sub(r":\d+", "", frame) for frame in holder.stack] == [
        "test_it.py take",
        "test_it.py test_a",
    ]
    assert "allocated at test_it.py:" in finished.section


STORIES = {
    "test_0_peak": """
def test_resets_the_peak():
    take(512)
    torch.cuda.reset_peak_memory_stats()
    take(64)
""",
    "test_1_keeps": """
@pytest.fixture(scope="module")
def model():
    KEPT.append(take(2048))
    yield take(1024)

def test_keeps(model): pass
""",
    "test_2_import": """
KEPT.append(take())
def test_takes(): take()
def test_leaks(): KEPT.append(take())
""",
    "test_3_cycle": """
class Model:
    def __init__(self):
        self.weights, self.self = take(2048), self

@pytest.fixture(scope="session")
def model(): return Model()

def test_cycle(model): KEPT.append(take(2048))
""",
}


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """Run suites that do not mind one another in one process: torch takes seconds to start."""
    directory = tmp_path_factory.mktemp("stories")
    write_suite(directory, **{name: TAKE + source for name, source in STORIES.items()})
    return run_pytest(directory, *SIMULATE, "--gpumem-json=run.json")


def torn_down(finished, scope):
    (fixture,) = [
        each
        for test in finished.record.tests
        for each in test.fixtures
        if each.scope == scope and each.released is not None
    ]
    return fixture


def test_a_fixture_that_keeps_memory_is_named(stories):
    fixture = torn_down(stories, "module")

    assert (fixture.allocated, fixture.released, fixture.leaked) == (3 * 2**20, 2**20, 2**21)
    assert fixture.holders[0].where == "test_1_keeps.py: module global KEPT[0]"
    told = "by fixture model (module), torn down after test_1_keeps.py::test_keeps"
    assert told in stories.section


def test_a_session_fixture_with_a_cycle_is_no_leak(stories):
    fixture = torn_down(stories, "session")

    assert (fixture.released, fixture.leaked) == (2**21, 0)


def test_what_the_last_test_keeps_is_not_laid_at_a_cycle_that_is_collected_with_it(stories):
    card = stories.card("test_cycle")

    assert (card.leftover, card.leaked) == (2**21, 2**21)


def test_the_first_test_may_reset_the_peak_itself(stories):
    card = stories.card("test_resets_the_peak")
    assert card.peak - card.baseline == 512 * 1024


def test_memory_taken_at_import_is_nobodys_leak(stories):
    assert stories.card("test_takes").leaked == 0
    assert stories.card("test_leaks").leaked == 64 * 1024
    assert len(stories.card("test_leaks").holders) == 1


def test_quiet_is_one_line_and_loud_is_every_test(run_without_torch):
    source = """
@pytest.mark.parametrize("i", range(12))
def test_a(i): take()
"""
    assert len(run_without_torch(source, "-q").section.strip().splitlines()) == 1
    assert run_without_torch(source).section.count("test_it.py::test_a") == 10
    assert run_without_torch(source, "-vv").section.count("test_it.py::test_a") == 12
    assert run_without_torch(source, "--gpumem-top=3").section.count("test_it.py::test_a") == 3


def test_the_section_begins_as_pytests_own_do(run_without_torch):
    lines = run_without_torch("def test_a(): take()").output.splitlines()
    (title,) = (number for number, line in enumerate(lines) if " GPU memory " in line)

    assert lines[title - 1] == ""
    assert lines[title + 1].startswith("1 of 1 test used VRAM")


def test_a_run_that_touched_no_card_shows_no_section(run_without_torch):
    finished = run_without_torch("def test_a(): pass")

    assert "GPU memory =" not in finished.output
    assert outcomes(finished) == {"test_a": "passed"}


HOG = """
import sys
from pytest_gpumem.simulator import Simulation
card = Simulation.start([2 * 2**30], 2**20)
card.install()
import torch
kept = torch.empty(1500, 2**20, dtype=torch.uint8, device="cuda")
print(card.path, flush=True)
sys.stdin.read()
card.close()
"""


@pytest.mark.slow
def test_what_another_program_keeps_for_good_is_not_waited_for_without_end(tmp_path):
    hog = subprocess.Popen(
        [sys.executable, "-c", HOG], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    card = hog.stdout.readline().strip()
    source = """
import pytest, torch

@pytest.mark.gpu(vram="1GiB")  # more than is left; it takes less
@pytest.mark.parametrize("i", range(2))
def test_it(i):
    torch.ones(100, 2**20, dtype=torch.uint8, device="cuda")
"""
    write_suite(tmp_path, test_it=source)
    arguments = ["--gpumem-simulate-card", card, "--gpumem-json=run.json"]
    finished = run_pytest(tmp_path, "-p", "gpumem", "-n2", *arguments)
    hog.communicate()

    assert finished.outcomes == {"passed": 2}, finished.output
    assert finished.record.context == 2**20  # the card's own


INSIDE = """
import pytest, torch

def take():
    return torch.ones(100, 2**20, dtype=torch.uint8, device="cuda")

INNER = '''
import pytest, torch
@pytest.mark.gpu(vram="1GiB")
def test_inner():
    torch.ones(100, 2**20, dtype=torch.uint8, device="cuda")
'''

@pytest.mark.gpu(vram="1GiB")
@pytest.mark.parametrize("plugin", ["gpumem", "no:gpumem"])
def test_outer(pytester, plugin):
    kept = take()
    pytester.makepyfile(INNER)
    pytester.runpytest_inprocess("-p", plugin).assert_outcomes(passed=1)
    assert torch.cuda.memory_allocated() == kept.nbytes

def test_after():
    take()
"""


def test_a_run_within_a_test_has_the_simulated_card_of_the_run_around_it(tmp_path):
    write_suite(tmp_path, conftest='pytest_plugins = "pytester"', test_it=INSIDE)
    finished = run_pytest(tmp_path, *SIMULATE)

    assert finished.outcomes["passed"] == 3, finished.output
    assert finished.status == 0


def test_a_second_simulated_run_in_one_process_is_refused_in_a_sentence(tmp_path):
    write_suite(tmp_path, test_it="import torch\ndef test_it(): torch.ones(1, device='cuda')")
    twice = f"import pytest\nfor _ in '12': print(pytest.main({list(SIMULATE)}))"
    done = subprocess.run(
        [sys.executable, "-c", twice],
        cwd=tmp_path,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=True,
    )

    assert "1 passed" in done.stdout
    assert "an earlier run in this process simulated a card" in done.stderr
    assert "real card" not in done.stderr


MISTAKES = """
import pytest
import torch

def index(there): torch.ones(3)[torch.tensor([0], device=there)]
def mixed(there): torch.ones(3) + torch.ones(3, device=there)
def ordinal(there): torch.ones(3, device="cuda:4")
def full(there): torch.empty(2**40, device=there)
def numpy(there): torch.ones(3, device=there).numpy()
def shapes(there): torch.ones(3, device=there) @ torch.ones(4, device=there)
def graph(there): torch.cuda.CUDAGraph()
def generator(there): torch.randn(3, device=there, generator=torch.Generator())
def event(there): torch.cuda.Event(enable_timing=True).elapsed_time(torch.cuda.Event())
def pinned(there): torch.ones(3, device=there).pin_memory()
def moved(there): torch.nn.Linear(2, 2).to("cuda:3")

@pytest.mark.parametrize("mistake", [
    index, mixed, ordinal, full, numpy, shapes, graph, generator, event, pinned, moved
])
def test_it(mistake): mistake("cuda")
"""


def test_a_traceback_ends_in_the_line_of_the_suite(tmp_path):
    (tmp_path / "test_mistakes.py").write_text(MISTAKES)
    finished = run_pytest(tmp_path, "-p", "gpumem", *SIMULATE)

    assert finished.outcomes == {"failed": 11}
    shown, _, _ = finished.output.partition(" GPU memory ")
    assert re.findall(r".*pytest_gpumem.*", shown) == []

"""What was alive at the peak: of offenders in every mode, of named tests, of two runs."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import pytest
from harness import COMPILED, MODES, SIMULATE, TAKE, run_pytest, write_suite

from pytest_gpumem.tracking.alive import NO_FRAME, UNKNOWN

KIB = 2**10
SUITE = """
import pathlib

GROWN = int(os.environ.get("GROWN", "20"))

@pytest.fixture(autouse=True)
def note(request):
    with open(os.environ["RAN"], "a") as file:
        file.write(request.node.name + "\\n")

@pytest.fixture(scope="module")
def model():
    return torch.nn.Linear(256, 128, bias=False).cuda()

def test_leaks():
    KEPT.append(take(3))

def test_within(model):
    take(4)

def test_grown(model):
    rows = take(GROWN)
    model(torch.zeros(64, 256, device="cuda")).sum().backward()
    model.zero_grad()

@pytest.mark.vram_limit("30KiB")
def test_above_its_limit(model):
    parts = [take(10) for _ in range(4)]

@pytest.fixture
def once():
    open("once", "x").close()

@pytest.mark.vram_limit("1KiB")
def test_runs_once(once):
    take(2)

def test_is_too_large():
    held = take(400)
    torch.zeros(2**33, dtype=torch.uint8, device="cuda")
"""
FILE = TAKE + SUITE
BUDGET = '[peaks]\n"test_it.py::test_grown" = {"Simulated CUDA card" = "30KiB"}\n'


def line_of(text: str) -> int:
    return next(n for n, line in enumerate(FILE.splitlines(), 1) if text in line)


TAKEN = f"test_it.py:{line_of('return torch.zeros')} take"
LAYER = f"test_it.py:{line_of('torch.nn.Linear')} model"
# Autograd's own thread, in which the compiled card's gradients are made, runs no Python.
BACKWARD = (
    (NO_FRAME, "this test", UNKNOWN)
    if COMPILED
    else (f"test_it.py:{line_of('backward()')} test_grown", "this test", "gradient")
)


@pytest.fixture
def run(tmp_path):
    def run(*arguments: str, grown: str = "20"):
        write_suite(tmp_path, test_it=FILE)
        (tmp_path / "budgets.toml").write_text(BUDGET)
        environment = {"RAN": str(tmp_path / "ran"), "GROWN": grown}
        more = (*SIMULATE, "--gpumem-json=run.json", *arguments)
        return run_pytest(tmp_path, *more, env=environment)

    return run


def lines(test):
    """Return the bytes of a test's only card by line, owner and kind."""
    (alive,) = test.alive
    assert sum(group.size for group in alive.groups) == alive.size
    return {(each.where, each.owner, each.kind): each.size for each in alive.groups}


@pytest.mark.parametrize(
    ("mode", "tests"),
    [
        ("plain", "3"),
        ("n2", "offenders"),
        pytest.param("n0", "offenders", marks=pytest.mark.slow),
        pytest.param("no-xdist", "3", marks=pytest.mark.slow),
    ],
)
def test_offenders_run_once_more_and_nothing_but_their_lines_is_told(run, mode, tests):
    finished = run(
        f"--gpumem-peaks={tests}",
        "--gpumem-budget=budgets.toml",
        "--gpumem-snapshots=snapshots",
        "--junit-xml=junit.xml",
        *MODES[mode],
    )
    ran = Counter((finished.directory / "ran").read_text().split())
    offenders = {"test_grown", "test_above_its_limit", "test_is_too_large"}
    again = offenders | ({"test_runs_once"} if tests == "offenders" else set())
    told = {test.nodeid.partition("::")[2]: test for test in finished.record.tests}

    assert finished.outcomes == {"passed": 3, "failed": 3, "error": 1}, finished.output
    assert (finished.directory / "junit.xml").read_text().count("<testcase") == 6
    assert ran == {name: 1 + (name in again) for name in told}
    recorded = {name for name, test in told.items() if any(a.recorded for a in test.alive)}
    assert recorded - {"test_runs_once"} == offenders
    assert ("in which its own peak was 0 B, not 2.00 KiB" in finished.section) == (
        tests == "offenders"
    )

    by_line = lines(told["test_grown"])
    assert by_line[TAKEN, "this test", "unknown"] == 20 * KIB
    assert by_line[LAYER, "fixture 'model' (module)", "parameter"] == 128 * KIB
    assert by_line[BACKWARD] >= 128 * KIB
    own = sum(size for (_, owner, _), size in by_line.items() if owner == "this test")
    assert own == told["test_grown"].cards[0].own
    leaked = {size for (_, owner, _), size in by_line.items() if owner.startswith("left by ")}
    assert leaked == ({3 * KIB} if mode != "n2" else leaked & {3 * KIB})

    (full,) = told["test_is_too_large"].alive
    assert (full.moment, full.refused) == ("out of memory", 2**33)
    assert full.refused_at == f"test_it.py:{line_of('2**33')} test_is_too_large"
    assert any(group.where == TAKEN and group.size == 400 * KIB for group in full.groups)
    assert "test_it.py::test_grown: " in finished.section
    assert f"128.00 KiB  {LAYER}, parameter, fixture 'model' (module)" in finished.section

    for name in offenders:
        (alive,) = told[name].alive
        snapshot = pickle.loads(Path(alive.snapshot).read_bytes())  # noqa: S301  # ours
        assert Path(alive.snapshot).parent == finished.directory / "snapshots"
        assert snapshot["gpumem"]["nodeid"] == f"test_it.py::{name}"
        assert snapshot["device_traces"][0]


def test_named_tests_are_recorded_as_they_run(run):
    finished = run("--gpumem-peaks=*::test_*", "--gpumem-stacks", "--gpumem-html=page.html")

    assert set(Counter((finished.directory / "ran").read_text().split()).values()) == {1}
    for test in finished.record.tests:
        (alive,) = test.alive
        own = sum(group.size for group in alive.groups if group.owner == "this test")
        assert own == test.cards[0].own, test.nodeid
    (holder,) = finished.card("test_leaks").holders
    assert any(frame.endswith("test_leaks") for frame in holder.stack)
    assert "What filled the card" in (finished.directory / "page.html").read_text()


LIARS = """
import time

def wait_for(name):
    deadline = time.monotonic() + 30
    while not os.path.exists(name) and time.monotonic() < deadline:
        time.sleep(0.01)

def fill():
    return torch.empty(600 * 2**20, dtype=torch.uint8, device="cuda")

@pytest.mark.gpu(vram="50MiB")
def test_first():
    x = fill()
    open("taken", "w").close()
    wait_for("failed")
    time.sleep(0.2)
"""
SECOND = """
import pytest
from test_it import fill, wait_for

@pytest.mark.gpu(vram="50MiB")
def test_second():
    wait_for("taken")
    try:
        x = fill()
    except RuntimeError:
        open("failed", "w").close()
        raise
"""


@pytest.mark.slow  # two workers with torch, for one line of what they are told
def test_a_test_that_runs_again_after_an_oom_is_recorded_then(tmp_path):
    write_suite(tmp_path, test_it=TAKE + LIARS, test_other=SECOND)
    card = ("-p", "gpumem", "--gpumem-simulate=1GiB", "--gpumem-simulate-context=32MiB")
    finished = run_pytest(tmp_path, *card, "--gpumem-json=run.json", "-n", "2")
    tests = [each for each in finished.record.tests if each.nodeid.endswith("second")]

    assert [each.outcome for each in tests] == ["rerun", "passed"], finished.output
    (told,) = tests[1].alive
    assert told.recorded
    (group,) = told.groups
    assert (group.size, group.where.partition(":")[0]) == (600 * 2**20, "test_it.py")
    assert not any(each.alive for each in finished.record.tests if each.nodeid.endswith("first"))

"""What a module, and the run, leave when their own fixtures are gone; suites stay as they are."""

from __future__ import annotations

import pytest
from harness import SIMULATE, TAKE, run_pytest, write_suite

KEEPS = (
    TAKE
    + """
@pytest.fixture(scope="module")
def log():
    yield []

@pytest.fixture(scope="session")
def shared():
    yield [take(512)]

@pytest.fixture(scope="module")
def looped():
    model = [take(2048)]
    model.append(model)  # comes back when garbage is collected
    yield model

def test_logs(log, shared, looped):
    log.append(take(1024))
    KEPT.append(log)

@pytest.mark.parametrize("n", range(2))
def test_uses(log, n):
    assert len(log) == 1
    if n:
        held = take(256)
        pytest.fail("its traceback holds more, which is no leak")
"""
)
CLEAN = """
import unittest
import torch

class Case(unittest.TestCase):
    def test_method(self):
        self.model = torch.ones(1000, device="cuda")
"""
DOCTEST = """
>>> import torch
>>> int(torch.ones(2, device="cuda").sum())
2
"""
LEFT_ALONE = """
import pytest
@pytest.fixture(scope="module")
def gpumem_module(): ...
"""
OUTSIDE = """
import pytest

class Lines(pytest.File):
    def collect(self):
        yield pytest.Function.from_parent(self, name="test_outside", callobj=lambda: None)

def pytest_collect_file(file_path, parent):
    if file_path.suffix == ".lines":
        return Lines.from_parent(parent, path=file_path)
"""


@pytest.fixture
def suite(tmp_path):
    write_suite(tmp_path, conftest=OUTSIDE, test_keeps=KEEPS, test_clean=CLEAN)
    (tmp_path / "some.lines").touch()
    (tmp_path / "test_doc.txt").write_text(DOCTEST)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "conftest.py").write_text(LEFT_ALONE)
    (tmp_path / "alone" / "test_alone.py").write_text(
        TAKE + "def test_keeps():\n    KEPT.append(take(128))\n"
    )
    return tmp_path


def left(run):
    found = [each for test in run.record.tests for each in test.scopes]
    return sorted((each.scope, each.name, each.left // 1024) for each in found)


@pytest.mark.parametrize(
    "mode", [pytest.param((), marks=pytest.mark.slow), ("-n", "2", "--dist", "loadfile")]
)
def test_a_module_and_the_run_are_judged_when_their_fixtures_are_gone(suite, mode):
    run = run_pytest(
        suite, *SIMULATE, *mode, "--gpumem-module-leak-limit=512KiB",
        "--gpumem-json=run.json",
    )  # fmt: skip
    whole = [each for each in left(run) if each[0] == "session"]

    assert run.outcomes == {"failed": 1, "passed": 6, "error": 1}, run.output
    assert [each for each in left(run) if each[0] == "module"] == [
        ("module", "test_keeps.py", 1024)
    ]
    assert sum(size for *_, size in whole) == 1024 + 128
    assert "ERROR at teardown of test_uses[1]" in run.output
    assert (
        "module test_keeps.py is allowed to leave 512.00 KiB, left 1.00 MiB, held by "
        "test_keeps.py: module global KEPT[0][0]"
    ) in run.output
    assert "   1.00 MiB  test_keeps.py, held by module global" in run.section
    assert "   1.12 MiB  the whole run" in run.section
    assert "leaked by" not in run.section


NAMES = """
import pytest

NAMED = []

@pytest.fixture(autouse=True)
def note(request):
    NAMED.append([name for name in request.node.fixturenames if name.startswith("gpumem")])

def test_first(): pass
@pytest.mark.parametrize("n", range(3))
def test_more(n): pass
@pytest.mark.gpumem_off
def test_off(): pass

def test_last():
    first, *others = NAMED
    assert "gpumem_module" in first
    assert others == [[]] * 5
"""


def test_only_the_first_test_of_a_module_asks_for_the_fixtures(tmp_path):
    write_suite(tmp_path, test_one=NAMES, test_two=NAMES)
    run = run_pytest(tmp_path, *SIMULATE)

    assert run.outcomes == {"passed": 12}, run.output


def test_plans_are_those_of_the_suite_and_the_fixtures_are_explained(tmp_path):
    suite = write_suite(tmp_path, test_keeps=KEEPS.replace("import pytest, torch", "import pytest"))
    asked = ("--setup-plan", "-q")
    plan, bare = run_pytest(suite, *SIMULATE, *asked), run_pytest(suite, "-p", "no:gpumem", *asked)
    fixtures = run_pytest(suite, *SIMULATE, "--fixtures").output

    def plan_of(run):
        return [line for line in run.output.splitlines() if "SETUP" in line or "::" in line]

    assert plan_of(plan) == plan_of(bare) != []
    for name in ("gpumem_module [module scope]", "gpumem_session [session scope]"):
        assert name in fixtures


POOL = """
import pytest

class Pool:
    pass

@pytest.fixture(scope="session")
def pool():
    return Pool()
"""
TAKEN_OVER = (
    TAKE
    + """
def test_loads(pool):
    pool.models = {"a": take(1024), "b": take(512)}

def test_takes_over(pool):
    KEPT.append(pool.models.pop("a"))
"""
)


def test_what_a_wider_fixture_held_and_does_not_any_more_is_left_by_the_module(tmp_path):
    write_suite(tmp_path, conftest=POOL, test_it=TAKEN_OVER)
    run = run_pytest(tmp_path, *SIMULATE, "--gpumem-json=run.json")

    assert left(run) == [("module", "test_it.py", 1024), ("session", "", 1024)]
    assert "   1.00 MiB  test_it.py, held by module global KEPT[0]" in run.section

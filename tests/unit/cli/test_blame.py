"""``gpumem blame``: the search in a model of runs, its sentences, and real suites."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem import records
from pytest_gpumem.cli import blame, subset
from pytest_gpumem.cli import main as cli
from pytest_gpumem.cli.culprits import culprits


@st.composite
def suites(draw):
    """Return the number of tests before one, and which of them make it fail together."""
    count = draw(st.integers(1, 300))
    some = st.sets(st.integers(0, count - 1), min_size=1, max_size=min(4, count))
    return count, draw(some)


@given(suites(), st.sets(st.integers(0, 299)))
def test_those_that_matter_are_found_in_few_runs(suite, suspected):
    count, needed = suite
    suspects = {str(number) for number in suspected if number < count}
    asked = []

    def fails(before):
        asked.append(tuple(before))
        return needed <= {int(each) for each in before}

    found = culprits(fails, [str(number) for number in range(count)], suspects)

    assert [int(each) for each in found] == sorted(needed)
    assert len(asked) == len(set(asked)), "the same run twice"
    assert () not in asked
    # Halving and one to see it alone, for each; of several, one without each.
    steps = math.ceil(math.log2(count)) + 1 + 2 * bool(suspects)
    assert len(asked) <= steps * len(needed) + (len(needed) if len(needed) > 1 else 0)


@pytest.mark.parametrize("place", [0, 1, 700, 998, 999])
@pytest.mark.parametrize(("suspects", "runs"), [(1, 3), (4, 6)])
def test_one_that_was_seen_to_leave_something_is_found_at_once(place, suspects, runs):
    """Halving alone would take 10 runs, and one to see it alone."""
    asked = []

    def fails(before):
        asked.append(before)
        return str(place) in before

    some = {str((place + 271 * number) % 1000) for number in range(suspects)}
    assert culprits(fails, [str(number) for number in range(1000)], some) == [str(place)]
    assert len(asked) <= runs


@given(st.data())
def test_whatever_tests_do_to_one_another_what_is_found_makes_it_fail(data):
    """Some pollute, some clean up what others did, some only together: the state decides."""
    kinds = data.draw(st.lists(st.sampled_from("abABx."), min_size=1, max_size=60))
    before = [f"{place}{kind}" for place, kind in enumerate(kinds)]

    def fails(some):
        a = b = 0
        for each in some:
            kind = each[-1]
            a = 1 if kind == "a" else 0 if kind == "A" else a
            b = 1 if kind == "b" else 0 if kind == "B" else b
            if kind == "x" and a:
                a = b = 1
        return bool(a and b)

    if not fails(before):
        return
    found = culprits(fails, before)
    assert fails(found)
    # In the order of the suite, and each is needed.
    assert found == [each for each in before if each in found]
    assert not any(fails([one for one in found if one != each]) for each in found)


class Suite:
    """A model of a suite: what ``subset`` would tell of it."""

    def __init__(self, monkeypatch, tests, outcome):
        self.tests, self.outcome, self.runs = tests, outcome, []
        monkeypatch.setattr(subset, "collect", lambda *_: self._ended([], [], []))
        monkeypatch.setattr(subset, "run", self._run)

    def _run(self, arguments, directory, log, *, wanted, imported=(), fresh=False):
        self.runs.append(tuple(wanted))
        outcome = self.outcome(list(wanted), list(imported), self.runs.count(tuple(wanted)))
        log.write("ERROR t.py - the reason\nthe last line\n")
        *before, last = wanted
        ended = {"passed": [], "failed": [], "skipped": []}
        for each in before if outcome != "ends" else before[:1]:
            ended["passed"].append(each)
        if outcome in ended:
            ended[outcome].append(last)
        return self._ended(*ended.values())

    def _ended(self, passed, failed, skipped):
        return subset.Ended(
            -9, tuple(self.tests), ("t.py::gone",), dict.fromkeys(failed, "why"),
            frozenset(passed), frozenset(skipped), str(Path.cwd()), (), False, False, False,
        )  # fmt: skip


def said(capsys, *words):
    status = cli.main(["blame", *words])
    return status, capsys.readouterr()


@pytest.mark.parametrize(
    ("outcome", "status", "sentence"),
    [
        (lambda *_: "failed", 1, "t.py::t fails alone: no test before it is to blame (why)"),
        (lambda *_: "passed", 1, "t.py::t passes alone and after the 5 tests before it; --record"),
        (lambda *_: "skipped", 1, "t.py::t is skipped, or expected to fail, alone"),
        (lambda *_: "none", 1, "t.py::t does not run alone: ERROR t.py - the reason"),
        (
            lambda wanted, *_: "ends" if len(wanted) > 1 else "passed",
            1,
            "t.py::t is not reached: the run ended with status -9 in t.py::0",
        ),
        (
            lambda wanted, _, times: "failed" if len(wanted) > 1 and times == 1 else "passed",
            1,
            "t.py::t is flaky: it failed after t.py::4 and passed alone, and then passed after t",
        ),
        (
            lambda wanted, _, times: "failed" if len(wanted) > 1 or times > 1 else "passed",
            1,
            "t.py::t is flaky: it failed after t.py::4 and passed alone, and then failed alone",
        ),
        (
            lambda wanted, *_: "failed" if "t.py::2" in wanted else "passed",
            0,
            """t.py::2 makes t.py::t fail
  it passes alone and fails after that one, each seen twice: why
  7 runs for the 5 tests before it; to see it again:
  pytest t.py::2 t.py::t
""",
        ),
        (
            lambda wanted, *_: "failed" if {"t.py::1", "t.py::3"} <= {*wanted} else "passed",
            0,
            "t.py::1 and t.py::3 make t.py::t fail together; without any one of them it passes\n",
        ),
    ],
)
def test_what_the_runs_came_to_is_said(monkeypatch, capsys, outcome, status, sentence):
    suite = Suite(monkeypatch, [*(f"t.py::{n}" for n in range(5)), "t.py::t", "t.py::z"], outcome)
    found, shown = said(capsys, "t.py::t")
    assert found == status
    assert shown.out.startswith(sentence)
    assert shown.err.count("gpumem blame: run ") == len(suite.runs) or found
    assert all("t.py::z" not in run for run in suite.runs)


@pytest.mark.parametrize("by_import", [False, True])
def test_with_the_file_imported_it_passes_as_alone_or_that_is_enough(
    monkeypatch, capsys, by_import
):
    suite = Suite(
        monkeypatch,
        ["a.py::a", "t.py::t"],
        lambda wanted, imported, _: (
            "failed" if len(wanted) > 1 or (by_import and imported) else "passed"
        ),
    )
    status, shown = said(capsys, "t.py::t")
    assert status == 0
    assert ("  to import its file is enough\n" in shown.out) == by_import
    assert ("each seen twice" in shown.out) == by_import
    assert len(suite.runs) == 4 + by_import


@pytest.mark.parametrize(
    ("nodeid", "sentence"),
    [
        ("z.py::z", "'z.py::z' is not among the 3 tests collected; 'x.py::z[a b]' is"),
        ("t.py::gone", "'t.py::gone' is deselected by pytest's arguments or configuration"),
        ("t", "'t' is not among the 3 tests collected"),
        ("a.py::t", "'a.py::t' may be any of d/a.py::t, e/a.py::t"),
    ],
)
def test_a_test_that_is_not_there_is_one_sentence(monkeypatch, capsys, nodeid, sentence):
    Suite(monkeypatch, ["d/a.py::t", "e/a.py::t", "x.py::z[a b]"], None)
    status, shown = said(capsys, nodeid)
    assert status == 2
    assert shown.err.startswith(f"gpumem blame: error: {sentence}")
    assert shown.err.count("\n") == 1


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(subset, "collect", interrupted)
    status, shown = said(capsys, "t.py::t")
    assert (status, shown.err) == (130, "gpumem blame: ended by Ctrl-C\n")


def test_of_a_record_those_before_it_in_its_process_are_meant(monkeypatch, capsys, tmp_path):
    def test(name, worker, start, outcome="passed"):
        return records.RecordedTest(f"t.py::{name}", outcome, 1.0, worker, start=start)

    tests = (
        test("b", "gw1", 1), test("a", "gw0", 3), test("c", "gw0", 2), test("gone", "gw0", 1),
        test("t", "gw0", 4, "rerun"), test("t", "gw1", 5, "failed"), test("d", "gw1", 4),
        test("e", "gw1", 6),
    )  # fmt: skip
    run = records.RunRecord(records.SCHEMA, "on", (), True, 2, tests)
    records.save(run, tmp_path / "run.json")
    suite = Suite(
        monkeypatch,
        ["t.py::t", *(f"t.py::{name}" for name in "abcde")],
        lambda wanted, *_: "failed" if "t.py::d" in wanted else "passed",
    )
    status, shown = said(capsys, "--record", str(tmp_path / "run.json"), "t.py::t")
    assert status == 0
    assert shown.out.startswith("t.py::d makes t.py::t fail\n")
    assert suite.runs[1] == ("t.py::b", "t.py::d", "t.py::t")

    status, shown = said(capsys, "--record", str(tmp_path / "run.json"), "t.py::a")
    assert status == 1
    assert "left out, for pytest does not collect them here: 1 of the 2 tests" in shown.err


FILES = {
    "pytest.ini": "[pytest]\naddopts = -n 2 -x\ntestpaths = tests\n",
    "state.py": "KEPT = []\n",
    "tests/test_a.py": """
import pytest, state
@pytest.fixture(scope="module", autouse=True)
def wide(): yield
@pytest.mark.parametrize("text", ["@f", "x::y", "[\\n ", "\\u00e9"])
def test_a(text):
    if text == "x::y":
        state.KEPT.append(text)
    assert text != "@f"
""",
    "tests/test_b.py": "raise SystemExit('imported')\n",
    "tests/test_c.py": """
import state
def test_t(): assert not state.KEPT, "gone"
""",
}


def test_a_real_suite_whatever_its_node_ids_and_configuration(tmp_path):
    """From below pytest's root; a file of which nothing is wanted is not even imported."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GPUMEM", "PYTEST_"))}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest_gpumem.cli.main", "blame", "test_c.py::test_t",
         "--", "-p", "xdist", "--ignore=test_b.py", ".", "-W", "error"],
        cwd=tmp_path / "tests", env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.startswith(
        "tests/test_a.py::test_a[x::y] makes tests/test_c.py::test_t fail\n"
        "  it passes alone, passes with its file imported, and fails after that one, seen twice: "
        "AssertionError: gone\n"
    ), done.stderr
    assert done.returncode == 0
    again = "-p xdist --ignore=test_b.py -W error -n 0 'test_a.py::test_a[x::y]' test_c.py::test_t"
    assert done.stdout.splitlines()[-1] == f"  pytest {again}"
    assert "gpumem blame: run 2 of about 7: fails after 4 tests" in done.stderr


def test_searching_needs_no_terminal_and_shows_a_bar_in_one():
    with blame._Bar() as bar:
        bar.step("passes alone")
        bar.expect(3)
        for _ in range(4):
            bar.step("fails after 1 test")
        (task,) = bar._bar.tasks
    assert (task.completed, task.total) == (5, 5)

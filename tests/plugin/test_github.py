"""What a run in GitHub Actions says there, and that nothing else of it changes."""

from __future__ import annotations

import pytest
from harness import SIMULATE, TAKE, TAKE_WITHOUT_TORCH, WITHOUT_TORCH, run_pytest, write_suite

SUITE = (
    TAKE
    + """
def test_leaks():
    KEPT.append(take(1024))

def test_runs_out():
    take(8 * 2**20)

def test_plain():
    pass
"""
)
INNER = """
pytest_plugins = "pytester"

def test_an_inner_run(pytester):
    pytester.makepyfile(test_inner='''SUITE''')
    assert pytester.runpytest_subprocess("-p", "gpumem").ret == 1
"""


@pytest.fixture
def job(tmp_path):
    """Return the environment of a step of a job whose repository is around the suite."""
    (tmp_path / "suite").mkdir()
    summary = tmp_path / "summary.md"
    summary.write_text("of an earlier command\n")
    return {
        "GITHUB_ACTIONS": "true",
        "GITHUB_STEP_SUMMARY": str(summary),
        "GITHUB_WORKSPACE": str(tmp_path),
    }


def commands(output):
    return [line for line in output.splitlines() if line.startswith("::")]


@pytest.mark.parametrize("mode", [pytest.param((), marks=pytest.mark.slow), ("-n", "2")])
def test_leaks_and_failures_are_told_once_at_their_lines(tmp_path, job, mode):
    suite = write_suite(tmp_path / "suite", test_it=SUITE)
    run = run_pytest(suite, *SIMULATE, *mode, "--gpumem-base", "none.json", env=job)
    summary = (tmp_path / "summary.md").read_text()
    lines = SUITE.splitlines()

    error, warning = commands(run.output)
    at = lines.index("def test_runs_out():") + 1
    assert error.startswith(f"::error file=suite/test_it.py,line={at},title=out of memory%3A ")
    at = lines.index("def test_leaks():") + 1
    assert warning.startswith(f"::warning file=suite/test_it.py,line={at},title=GPU memory leak")
    assert "held by test_it.py: module global KEPT[0]" in warning
    assert summary.startswith("of an earlier command\n# GPU memory\n")
    assert summary.count("# GPU memory\n") == 1
    assert "test\\_it.py::test\\_leaks" in summary
    assert "no base run: " in run.section
    assert run.status == 1


def test_it_is_silent_when_switched_off_and_in_runs_within_tests(tmp_path, job):
    source = SUITE.replace(TAKE, TAKE_WITHOUT_TORCH + "KEPT = []\n")
    suite = write_suite(
        tmp_path / "suite", test_it=source, test_inner=INNER.replace("SUITE", source)
    )
    here = {"PYTHONPATH": str(WITHOUT_TORCH.parent)}
    off = run_pytest(suite, *SIMULATE, "--gpumem-github=off", "test_it.py", env=job | here)
    job["GITHUB_STEP_SUMMARY"] = "/no/such/directory"
    inner = run_pytest(suite, *SIMULATE, "-s", "test_inner.py", env=job | here)

    assert commands(off.output) == commands(inner.output) == []
    assert "1 failed, 2 passed" in off.output, off.output
    assert (tmp_path / "summary.md").read_text() == "of an earlier command\n"
    assert inner.outcomes == {"passed": 1}, inner.output
    assert "1 failed, 2 passed" in inner.output
    assert "the job summary cannot be written: No such file or directory" in inner.output

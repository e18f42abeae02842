"""The workflow in the documentation: its commands run, and what it keeps between runs is there."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from harness import run_pytest, write_suite

ROOT = Path(__file__).parents[2]
WORKFLOW = yaml.safe_load((ROOT / "docs" / "examples" / "github-actions.yml").read_text())
JOBS = WORKFLOW["jobs"]
CARD = {"GPUMEM_SIMULATE": "3.81GiB"}
"""Stands in for the GPU of the other job's machine."""
SUITE = """
import pytest, torch

@pytest.mark.parametrize("n", [1, 2])
def test_model(n): assert torch.ones(n * 2**20, device="cuda").sum() == n * 2**20

def test_plain(): pass
"""


def steps(job, action):
    """Return the inputs of the job's steps that use the action."""
    return [step["with"] for step in JOBS[job]["steps"] if step.get("uses", "").startswith(action)]


def commands(job):
    """Return what the job's steps run, but for the installation and the look at a real card."""
    runs = [step["run"] for step in JOBS[job]["steps"] if "run" in step]
    return [each for each in runs if not each.startswith(("pip ", "gpumem doctor"))]


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_the_steps_of_each_job_run_and_leave_the_files_that_are_kept(tmp_path, job):
    write_suite(tmp_path, test_model=SUITE)
    tests, *others = commands(job)
    program, *arguments = shlex.split(tests)
    (saved,), (artifact,) = steps(job, "actions/cache/save"), steps(job, "actions/upload-artifact")
    summary = tmp_path / "summary.md"
    github = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(summary)}

    for _ in range(2):  # the second time with the history and the base of the first
        summary.write_text("")
        run = run_pytest(tmp_path, *arguments, env=CARD | github)
        assert run.status == 0, run.output
        assert run.outcomes == {"passed": 3}
        for other in others:
            subprocess.run(shlex.split(other), cwd=tmp_path, check=True)
    assert program == "pytest"
    history, base = (tmp_path / name for name in saved["path"].split())
    assert "test_model.py::test_model[2]" in history.read_text()
    assert base.read_bytes() == (tmp_path / "gpu.json").read_bytes()
    assert "## Against the base run" in summary.read_text()
    assert [name for name in artifact["path"].split() if not (tmp_path / name).exists()] == []


@pytest.mark.parametrize("job", JOBS)
def test_each_job_restores_what_it_saved_and_no_other_job_did(job):
    (saved,), (restored,) = steps(job, "actions/cache/save"), steps(job, "actions/cache/restore")
    prefixes = {name: steps(name, "actions/cache/restore")[0]["restore-keys"] for name in JOBS}
    used = shlex.split(" ".join(commands(job)))

    assert saved["path"] == restored["path"]
    assert [name for name in saved["path"].split() if name not in used] == []
    assert [name for name, prefix in prefixes.items() if saved["key"].startswith(prefix)] == [job]


def test_a_machine_that_should_have_a_card_is_looked_at_before_its_tests():
    runs = [step["run"] for step in JOBS["gpu"]["steps"] if "run" in step]

    assert runs.index("gpumem doctor --strict") < runs.index(commands("gpu")[0])

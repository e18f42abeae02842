"""The workflow in the documentation: its commands run, and what it keeps between runs is there."""

from __future__ import annotations

import shlex
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


def command(job):
    (found,) = [step["run"] for step in JOBS[job]["steps"] if "pytest -p" in step.get("run", "")]
    return shlex.split(found)


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_the_command_of_each_job_runs_and_leaves_the_files_that_are_kept(tmp_path, job):
    write_suite(tmp_path, test_model=SUITE)
    program, *arguments = command(job)
    (saved,), (artifact,) = steps(job, "actions/cache/save"), steps(job, "actions/upload-artifact")

    for _ in range(2):  # the second time with the history of the first
        run = run_pytest(tmp_path, *arguments, env=CARD)
        assert run.status == 0, run.output
        assert run.outcomes == {"passed": 3}
    assert program == "pytest"
    assert "test_model.py::test_model[2]" in (tmp_path / saved["path"]).read_text()
    assert [name for name in artifact["path"].split() if not (tmp_path / name).exists()] == []


@pytest.mark.parametrize("job", JOBS)
def test_each_job_restores_what_it_saved_and_no_other_job_did(job):
    (saved,), (restored,) = steps(job, "actions/cache/save"), steps(job, "actions/cache/restore")
    prefixes = {name: steps(name, "actions/cache/restore")[0]["restore-keys"] for name in JOBS}

    assert saved["path"] == restored["path"]
    assert saved["path"] in command(job)
    assert [name for name, prefix in prefixes.items() if saved["key"].startswith(prefix)] == [job]

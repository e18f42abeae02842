"""Tests on a real CUDA card: each runs a small suite in a process of its own and reads its records.

Without a card they are deselected, unless ``GPUMEM_SIMULATE`` asks for a rehearsal on a simulated
one, which shows that the tests run and proves nothing about a GPU.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pytest_gpumem.records import RunRecord, from_plain

REHEARSAL = "GPUMEM_SIMULATE" in os.environ
HERE = Path(__file__).parent
TIMEOUT = 60
"""Seconds that one suite may take."""


def _has_card():
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return False
    listed = subprocess.run([smi, "-L"], capture_output=True, text=True, check=False)
    return "GPU 0" in listed.stdout


def pytest_collection_modifyitems(config, items):
    ours = [item for item in items if HERE in item.path.parents]
    for item in ours:
        item.add_marker("real_gpu")
    if ours and not REHEARSAL and not _has_card():
        config.hook.pytest_deselected(items=ours)
        items[:] = [item for item in items if item not in ours]


@pytest.fixture(scope="session")
def rehearsal():
    return REHEARSAL


@pytest.fixture
def figure(record_property):
    """Call it with a name and a text: `scripts/gpu_check.py` prints both."""
    return lambda name, text: record_property("figure", [name, text])


@pytest.fixture(scope="session")
def environment():
    """The environment without what belongs to this pytest, such as its xdist worker's name."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return ours | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def run_suite(tmp_path, environment):
    """Run a module of tests with the plugin on, in a new process; return the run's record."""

    def run(source, *args):
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        (tmp_path / "test_suite.py").write_text(textwrap.dedent(source))
        records = tmp_path / "records.json"
        command = [sys.executable, "-m", "pytest", "-p", "gpumem", "--gpumem-json", str(records)]
        done = subprocess.run(
            [*command, *args],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT,
            text=True,
            check=False,
        )
        assert records.exists(), done.stdout
        sys.stdout.write(done.stdout)  # pytest shows it where the outer test fails
        return from_plain(RunRecord, json.loads(records.read_text()))

    return run


@pytest.fixture
def usages(run_suite):
    """Like `run_suite`, but return what each test did to the one card, by the test's name."""

    def run(source, *args):
        tests = run_suite(source, *args).tests
        return {test.nodeid.split("::")[-1]: test.cards[0] for test in tests if test.cards}

    return run

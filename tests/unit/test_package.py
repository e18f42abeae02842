import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import pytest_gpumem
from pytest_gpumem import files

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(
    not getattr(sys.flags, "safe_path", False),
    reason="only make tests the built wheel, and Python 3.10 has no PYTHONSAFEPATH",
)
def test_what_is_tested_is_the_installed_wheel():
    assert Path(pytest_gpumem.__file__).parent != ROOT / "pytest_gpumem"
    code = "import pytest_gpumem; print(pytest_gpumem.__file__)"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert child.stdout.decode().strip() == pytest_gpumem.__file__


def test_version_is_that_of_the_distribution():
    assert pytest_gpumem.__version__ == metadata.version("pytest-gpumem")


def test_package_says_that_it_is_typed():
    assert (Path(pytest_gpumem.__file__).parent / "py.typed").exists()


def test_importing_the_plugin_imports_nothing_heavy():
    code = "import pytest, sys, pytest_gpumem.plugin; print(*sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    loaded = set(child.stdout.decode().split())
    assert not loaded & {"torch", "pynvml", "numpy", "cryptography", "zstandard", "rich"}


def test_each_python_that_is_claimed_is_run_by_the_workflow():
    project = files.read_toml(ROOT / "pyproject.toml")["project"]
    claimed = {each.rpartition(" ")[2] for each in project["classifiers"] if " :: 3." in each}
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    sessions = set(re.findall(r"\bnewest-(3\.\d+)", text))

    # .ci/run is the one of 3.11, the oldest that pyproject.toml allows is run as session oldest.
    assert sessions | {"3.11"} == claimed
    assert project["requires-python"] == ">=3.10"
    assert "[oldest, newest-3.10," in text

"""The public names: the same to programs, to type checkers and to readers of the reference."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pytest_gpumem

HERE = Path(__file__).parent
STUB = Path(pytest_gpumem.__file__).with_suffix(".pyi")


def test_the_stub_and_the_package_offer_the_same():
    tree = ast.parse(STUB.read_text())
    told = {
        alias.name: f"{node.module}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    offered = {name: f"pytest_gpumem.{home}" for name, home in pytest_gpumem._HOME.items()}
    assert told == offered
    assert set(pytest_gpumem.__all__) == set(told)


@pytest.mark.parametrize("name", pytest_gpumem.__all__)
def test_each_name_is_there_typed_and_documented(name):
    assert getattr(pytest_gpumem, name).__doc__
    assert name in (HERE / "typed" / "suite.py").read_text()
    reference = (HERE.parents[1] / "docs" / "reference.md").read_text()
    assert re.search(rf"`{name}[(`]", reference), f"docs/reference.md does not name {name}"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = pytest_gpumem.nothing


def test_asking_for_the_package_imports_nothing_else():
    code = (
        "import sys, pytest_gpumem; print(sum(m.startswith('pytest_gpumem') for m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_a_typed_suite_passes_pyright(tmp_path):
    # mypy reads it in `make lint`.
    pytest.importorskip("basedpyright", reason="basedpyright is not installed")
    suite = tmp_path / "suite.py"
    suite.write_text((HERE / "typed" / "suite.py").read_text())
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    command = [sys.executable, "-m", "basedpyright", "--level=error"]
    command += [f"--pythonpath={sys.executable}", str(suite)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

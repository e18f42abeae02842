"""The compiled card in pytest runs: all processes have it, or the run says why not."""

import pytest
from harness import run_pytest, write_suite

from pytest_gpumem.simulator.torch_face import compilation

COMPILED = ("-p", "gpumem", "--gpumem-simulate", "1GiB*2", "--gpumem-simulate-compiled")
SUITE = """
import subprocess
import sys

import pytest
import torch

CHILD = "import torch; print(torch._C._dispatch_keys(torch.ones(1, device='cuda:1')))"


def test_keys():
    kept = torch.ones(2**20, device="cuda")
    assert "{word}" in str(torch._C._dispatch_keys(kept))


def test_child():
    said = subprocess.run([sys.executable, "-c", CHILD], check=True, capture_output=True, text=True)
    assert "{word}" in said.stdout


LEAKED = []


def test_leak():
    LEAKED.append(torch.ones(2**20, device="cuda"))


def test_full():
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2**40, device="cuda")
"""


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(("-n", "2"), marks=pytest.mark.slow),
        pytest.param(("-n", "0"), marks=pytest.mark.slow),
        ("-p", "no:xdist"),
    ],
)
def test_every_process_of_a_run_has_it(tmp_path, how):
    try:
        compilation.library()
    except compilation.CannotCompileError as error:
        pytest.skip(str(error))
    write_suite(tmp_path, test_it=SUITE.replace("{word}", "CUDA"))
    run = run_pytest(tmp_path, *COMPILED, "--gpumem-json=run.json", "-v", *how)

    assert run.outcomes == {"passed": 4}, run.output
    assert run.card("test_leak").leaked == 4 * 2**20
    assert "DLPack" not in run.output
    assert run.record.notes == ()


def test_a_run_without_a_compiler_says_so_and_goes_on(tmp_path):
    write_suite(tmp_path, test_it=SUITE.replace("{word}", "CPU"))
    asked = ("--gpumem-json=run.json", "-n", "1", "-k", "keys or full")
    run = run_pytest(tmp_path, *COMPILED, *asked, env={"CXX": "no-such-compiler"})

    assert run.outcomes == {"passed": 2}, run.output
    (note,) = run.record.notes
    assert note.startswith("the simulated card is not compiled, but simulated in Python: there is")
    assert note.endswith("no compiler for C++ here (no-such-compiler)")

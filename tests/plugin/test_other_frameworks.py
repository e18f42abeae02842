"""Tests that use another framework than torch: by a stand-in for CuPy, on the simulated card."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from harness import MODES, SIMULATE, run_pytest, write_suite

FAKES = Path(__file__).parents[1] / "unit" / "devices" / "framework_fakes.py"

JAX = "--gpumem-jax-preallocate=off"
CONFTEST = """
import sys
import pynvml  # as NVML is on a machine with a card
import framework_fakes
from pytest_gpumem.devices import contexts

contexts.held = lambda: (0,)
sys.modules["cupy"] = framework_fakes.cupy(limit=64 * 2**20)
"""
SUITE = """
import cupy, os, pytest, sys

CACHE = []

class XlaRuntimeError(RuntimeError): pass
class ResourceExhaustedError(Exception): pass
class CudaAPIError(Exception): pass

@pytest.fixture(scope="module")
def table():
    return [cupy.ndarray(4096)]

@pytest.fixture
def batch():
    return {"x": cupy.ndarray(1 << 20)}

def test_takes(batch):
    assert cupy.ndarray(512).shape == (512,)

def test_keeps():
    CACHE.append(cupy.ndarray(8192))

def test_uses(table):
    pass

def test_fills():
    cupy.ndarray(65 * 2**20)

@pytest.mark.parametrize("error", [
    XlaRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8589934592 bytes."),
    ResourceExhaustedError(
        "{{function_node __wrapped__AddV2_device_/job:localhost/replica:0/task:0/device:GPU:0}} "
        "OOM when allocating tensor with shape[8192,8192] and type float on "
        "/job:localhost/replica:0/task:0/device:GPU:0 by allocator GPU_0_bfc [Op:AddV2] name: "),
    CudaAPIError("[2] Call to cuMemAlloc results in CUDA_ERROR_OUT_OF_MEMORY"),
    CudaAPIError("[CUresult.CUDA_ERROR_OUT_OF_MEMORY] Call to cuMemAlloc results in "
                 "CUDA_ERROR_OUT_OF_MEMORY"),
    MemoryError("std::bad_alloc: out_of_memory: CUDA error (failed to allocate 1024 bytes) at: "
                "/include/rmm/mr/device/cuda_memory_resource.hpp:62: cudaErrorMemoryAllocation "
                "out of memory"),
    MemoryError("std::bad_alloc: out_of_memory: RMM failure at: pool_memory_resource.hpp:257: "
                "Maximum pool size exceeded (failed to allocate 4.000 GiB): No room in arena."),
], ids=["jax", "tensorflow", "numba", "numba-cuda", "rmm", "rmm-pool"])
def test_says(error):
    raise error

def test_loaded_nothing():
    names = {"rmm", "jax", "jaxlib", "numba", "tensorflow"}
    assert not names & set(sys.modules)
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
"""


@pytest.mark.parametrize("mode", MODES)
def test_another_framework_is_measured_judged_and_understood(tmp_path, mode):
    write_suite(tmp_path, conftest=CONFTEST, test_it=SUITE)
    shutil.copy(FAKES, tmp_path)
    run = run_pytest(tmp_path, *SIMULATE, "--gpumem-json=run.json", JAX, *MODES[mode])

    outcomes = run.outcomes
    # Beside another test of its card, one that ran out of memory is run again.
    assert (outcomes.pop("rerun", 0) == 0) or mode == "n2"
    assert outcomes == {"passed": 4, "failed": 7}
    took, kept, used = (run.card(f"test_{name}") for name in ("takes", "keeps", "uses"))
    assert (took.leftover, took.vague) == (0, ("CuPy",))
    assert (took.peak - took.baseline) == 1 << 20
    assert (kept.leaked, kept.holders[0].where) == (8192, "test_it.py: module global CACHE[0]")
    assert (used.leaked, used.leftover, used.fixture_bytes) == (0, 0, 4096)
    (*_, filled) = [each for each in run.record.tests if each.nodeid.endswith("test_fills")]
    assert filled.oom.startswith("Out of memory allocating 68,157,440 bytes")
    said = [each for each in run.record.tests if "test_says" in each.nodeid]
    assert {each.nodeid for each in said if each.oom} == {each.nodeid for each in said}
    assert [note for note in run.record.notes if "CuPy" in note] == []

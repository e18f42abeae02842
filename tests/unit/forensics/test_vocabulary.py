from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pytest_gpumem.forensics.vocabulary import classify

TORCH = (
    "CUDA out of memory. Tried to allocate 300.00 MiB. GPU 0 has a total capacity of 1.00 GiB of "
    "which 936.00 MiB is free. Process 7 has 88.00 MiB memory in use. 204.80 MiB allowed; Of the "
    "allocated memory 0 bytes is allocated by PyTorch, and 0 bytes is reserved by PyTorch but "
    "unallocated."
)
RMM = "std::bad_alloc: out_of_memory: CUDA error at: /rmm/mr.hpp:70: cudaErrorMemoryAllocation"
VLLM = (
    "Free memory on device cuda:0 (7.34/15.49 GiB) on startup is less than desired GPU memory "
    "utilization (0.8, 12.39 GiB). Decrease GPU memory utilization"
)

CARD = {
    "torch": TORCH,
    "torch 1.x": "CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; 8.00 GiB total capacity)",
    "ROCm": "HIP out of memory. Tried to allocate 46.00 MiB",
    "MPS": "MPS backend out of memory (MPS allocated: 1 GB, max allowed: 2 GB)",
    "runtime": "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "driver": "CUDA driver error: out of memory",
    "cuBLAS": "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN": "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "numba": "[2] Call to cuMemAlloc results in CUDA_ERROR_OUT_OF_MEMORY",
    "JAX": "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 73300 bytes.",
    "TensorFlow": (
        "OOM when allocating tensor with shape[8,1024] and type float on "
        "/job:localhost/replica:0/task:0/device:GPU:0 by allocator GPU_0_bfc"
    ),
    "RMM": RMM,
    "CuPy": "Out of memory allocating 4,096 bytes (allocated so far: 1,024 bytes).",
    "vLLM": VLLM,
    "NCCL": "NCCL error in: x.cpp:7, unhandled cuda error\nCuda failure 2 'out of memory'",
    "MIG": 'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../CUDACachingAllocator.cpp":1131',
    "a text before": "Worker failed: CUDA out of memory",
    "words before": "the engine died with CUDA out of memory",
    "figures anywhere": f"Engine core 3 saw {TORCH}",
    "a repr": "job 7 failed (RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB'))",
    "a remote traceback": f"task failed\n  File 'x.py', line 3\ntorch.OutOfMemoryError: {TORCH}",
}


@pytest.mark.parametrize("text", CARD.values(), ids=CARD)
def test_memory_of_a_card_is_known_by_any_frameworks_words(text: str) -> None:
    said = classify(text)
    assert said is not None
    assert (said.host, said.weak) == (False, False)
    assert "\n" not in said.text


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
        "Worker failed: cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
        "bfc_arena.cc:342 Failed to allocate memory for requested buffer of size 3300000000",
        "UR backend failed. UR backend returns:40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)",
    ],
)
def test_weak_evidence_is_called_so(text: str) -> None:
    said = classify(text)
    assert said is not None
    assert said.weak


def test_what_was_only_logged_may_have_been_survived() -> None:
    record = f"WARNING {TORCH}"
    assert classify(record) is not None
    assert classify(record, logged=True) is None
    assert classify(f"RuntimeError: {TORCH}", logged=True) is not None
    assert classify(f"terminate called\n  what():  {TORCH}", logged=True) is not None


@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at alloc_cpu.cpp:73] . DefaultCPUAllocator: can't allocate memory: you tr",
        "Unable to allocate 535. MiB for an array with shape (70000, 1000) and data type float64",
        "Task was killed due to the node running low on memory",
        "OOM when allocating tensor with shape[8] on /device:CPU:0 by allocator cpu",
        "UR_RESULT_ERROR_OUT_OF_HOST_MEMORY",
    ],
)
def test_the_hosts_memory_is_told_apart(text: str) -> None:
    said = classify(text)
    assert said is not None
    assert said.host


@pytest.mark.parametrize(
    "text",
    [
        "",
        "boom",
        "no memory of it",
        "Buffer pool: out of memory pages",
        "OutOfMemoryError: page pool of the database",
        "expected CUDA out of memory, but nothing was raised",
        "cannot parse 'CUDA out of memory. Tried to allocate 2.00 GiB'",
        "AssertionError: CUDA out of memory",
        "assert 'x' in f: CUDA out of memory. Tried to allocate 2.00 GiB",
        "std::bad_alloc: CUDA error at: /rmm/x.hpp:7: cudaErrorIllegalAddress",
        "RESOURCE_EXHAUSTED: Quota exceeded for quota metric 'Requests'",
        "out of resource: shared memory, Required: 167936, Hardware limit: 101376",
    ],
)
def test_what_says_nothing_of_the_kind_is_nothing(text: str) -> None:
    assert classify(text) is None


def test_its_figures_are_told() -> None:
    said = classify(f"Worker failed: {TORCH}")
    assert said is not None
    assert (said.tried, said.allowed) == (300 * 2**20, "204.80 MiB")
    assert said.text == TORCH


def test_a_long_text_costs_little_time() -> None:
    noise = "memory alloc: " * 60
    before = time.process_time()
    assert classify(f"{noise}\n" * 20_000) is None
    assert time.process_time() - before < 5


def test_the_grammars_are_loaded_only_for_a_text_that_may_be_one() -> None:
    code = (
        "import sys; from pytest_gpumem.forensics.vocabulary import classify; classify('boom'); "
        "sys.exit('pytest_gpumem.forensics.grammars' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_knows_the_words_that_forensics_knows() -> None:
    table = Path(__file__).parent / "messages.tsv"
    rows = [line.split("\t") for line in table.read_text().splitlines()[1:]]
    unknown = [
        text
        for memory, _, text in rows
        if (said := classify(text.removeprefix("E   ").replace("\\n", "\n"))) is None
        or said.host != (memory == "host")
    ]
    assert unknown == [], "a word of each belongs into _HINT of forensics/vocabulary.py"

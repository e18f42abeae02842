"""Logs of every grammar, carrier and trap, with what they tell; each written for this project."""

from __future__ import annotations

import gzip
import html
import json
import pickle
from fractions import Fraction
from typing import NamedTuple

import zstandard

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50}


def size(text):
    number, unit = text.split()
    return int(Fraction(number) * UNITS[unit])


class Case(NamedTuple):
    name: str
    data: bytes
    events: list
    suffix: str = ".log"


CASES: list[Case] = []


def case(name, data, *events, suffix=".log"):
    CASES.append(Case(name, data.encode() if isinstance(data, str) else data, list(events), suffix))


def event(nodeid=None, **expected):
    """Expect an event; sizes are written as they are printed."""
    for key, value in expected.items():
        if key in SIZES and isinstance(value, str):
            expected[key] = size(value)
    return {"nodeid": nodeid, **expected}


SIZES = {"tried", "total", "free", "allocated", "reserved_unallocated", "allowed"}
NODE = "tests/unit/test_model.py::TestEncoder::test_forward[fp16-8]"


def section(
    message, *, header="TestEncoder.test_forward[fp16-8]", location="tests/unit/test_model.py:41"
):
    """Return a failing test's section as --tb=long writes it."""
    body = "\n".join(f"E       {line}" for line in message.split("\n"))
    return (
        f"{f' {header} ':_^80}\n\nself = <test_model.TestEncoder object at 0x7f11>\n\n"
        "    def test_forward(self, dtype, batch):\n"
        f">       out = self.model(batch)\n{body}\n\n{location}: Error\n"
    )


def run(*sections, summary=(), progress=(), ends="1 failed in 3.20s", session=True):
    parts = []
    if session:
        parts.append(
            f"{' test session starts ':=^80}\nplatform linux -- Python 3.12.4, pytest-8.3.2, "
            "pluggy-1.5.0\nrootdir: /home/ci/repo\n"
        )
    parts += [*progress, ""]
    if sections:
        parts += [f"{' FAILURES ':=^80}", *sections]
    parts += [f"{' short test summary info ':=^80}", *summary]
    if ends:
        parts.append(f"{f' {ends} ':=^80}")
    return "\n".join(parts) + "\n"


def failed(message, nodeid=NODE):
    """Return a run in which one test failed with ``message``."""
    first = message.split("\n")[0]
    return run(section(message), summary=[f"FAILED {nodeid} - {first[:60]}..."])


def torch(
    tried="46.00 MiB", total="7.43 GiB", free="21.06 MiB", processes="", allowed="",
    allocated="6.02 GiB", private="", pieces="88.11 MiB", name="CUDA", capacity="capacity",
    hint="If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF="
    "expandable_segments:True to avoid fragmentation.  See documentation for Memory Management  "
    "(https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)",
    device=0,
):  # fmt: skip
    return (
        f"{name} out of memory. Tried to allocate {tried}. GPU {device} has a total {capacity} of "
        f"{total} of which {free} is free. {processes}{allowed}Of the allocated memory "
        f"{allocated} is allocated by PyTorch, {private}and {pieces} is reserved by PyTorch but "
        f"unallocated. {hint}"
    )


def old(
    tried="46.00 MiB", total="7.43 GiB", allocated="6.02 GiB", free="21.06 MiB",
    last="6.11 GiB reserved in total by PyTorch", device=0, name="CUDA", unit="GPU", hint="",
):  # fmt: skip
    return (
        f"{name} out of memory. Tried to allocate {tried} ({unit} {device}; {total} total capacity; "
        f"{allocated} already allocated; {free} free; {last}){hint}"
    )


PLAIN = {
    "tried": "46.00 MiB", "total": "7.43 GiB", "free": "21.06 MiB", "allocated": "6.02 GiB",
    "reserved_unallocated": "88.11 MiB", "device": 0, "backend": "cuda", "confirmed": True,
}  # fmt: skip
OLD = PLAIN | {"reserved_unallocated": size("6.11 GiB") - size("6.02 GiB")}
SPLIT = (
    " If reserved memory is >> allocated memory try setting max_split_size_mb to avoid "
    "fragmentation.  See documentation for Memory Management and PYTORCH_CUDA_ALLOC_CONF"
)
URL = "https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage"
ME = "Including non-PyTorch memory, this process has 6.61 GiB memory in use. "

# --- every grammar, as the error of a test -------------------------------------------------------

GRAMMARS = [
    ("torch 0.4", "RuntimeError: cuda runtime error (2) : out of memory at /opt/THCStorage.cu:58",
     {"backend": "cuda", "cause": "unknown"}),
    ("torch 1.2", "RuntimeError: " + old(last="88.11 MiB cached"), PLAIN),
    ("torch 1.4", "RuntimeError: " + old() + " (malloc at /pytorch/c10/cuda/CUDACachingAllocator"
     ".cpp:289)\nframe #0: c10::Error::Error(c10::SourceLocation) + 0x47 (0x7f in libc10.so)", OLD),
    ("torch 1.9", "RuntimeError: " + old(), OLD),
    ("torch 1.12", "RuntimeError: " + old(hint=SPLIT), OLD),
    ("torch 1.8 with a fraction", "RuntimeError: " + old(
        free="1.35 GiB", last="6.05 GiB allowed; 6.11 GiB reserved in total by PyTorch"),
     OLD | {"free": "1.35 GiB", "allowed": "6.05 GiB", "cause": "memory_fraction"}),
    ("torch 2.0", "torch.cuda.OutOfMemoryError: " + old(hint=SPLIT), OLD),
    ("torch 2.1", "torch.cuda.OutOfMemoryError: " + torch(capacity="capacty", processes=ME), PLAIN),
    ("torch 2.3", "torch.cuda.OutOfMemoryError: " + torch(processes=ME), PLAIN),
    ("torch 2.5", "torch.OutOfMemoryError: " + torch(processes=ME), PLAIN),
    ("torch 2.10", "torch.OutOfMemoryError: " + torch(
        hint="If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF="
        "expandable_segments:True to avoid fragmentation."), PLAIN),
    ("torch 2.11", "torch.OutOfMemoryError: " + torch(hint=f"See {URL}", device=3),
     PLAIN | {"device": 3}),
    ("torch with graphs", "torch.OutOfMemoryError: " + torch(
        private="with 512.00 MiB allocated in private pools (e.g., CUDA Graphs), "), PLAIN),
    ("torch on HIP with graphs", "torch.OutOfMemoryError: " + torch(
        name="HIP", private="with 512.00 MiB allocated in private pools (e.g., HIP Graphs), "),
     PLAIN | {"backend": "hip"}),
    ("torch with a fraction", "torch.OutOfMemoryError: " + torch(
        free="5.20 GiB", allowed="2.00 GiB allowed; ", allocated="1.98 GiB", pieces="3.10 MiB"),
     PLAIN | {"free": "5.20 GiB", "allowed": "2.00 GiB", "allocated": "1.98 GiB",
              "reserved_unallocated": "3.10 MiB", "cause": "memory_fraction"}),
    ("torch in bytes", "torch.OutOfMemoryError: " + torch(tried="512 bytes", free="0 bytes"),
     PLAIN | {"tried": "512 bytes", "free": "0 bytes"}),
    ("torch in KiB", "torch.OutOfMemoryError: " + torch(tried="928.50 KiB", free="17.25 KiB"),
     PLAIN | {"tried": "928.50 KiB", "free": "17.25 KiB"}),
    ("torch at a boundary", "torch.OutOfMemoryError: " + torch(tried="1024.00 MiB"),
     PLAIN | {"tried": "1024.00 MiB"}),
    ("torch asked for too much", "torch.OutOfMemoryError: " + torch(tried="6080.27 GiB"),
     PLAIN | {"tried": "6080.27 GiB", "cause": "larger_than_card"}),
    ("torch on ROCm 5.6", "torch.cuda.OutOfMemoryError: " + torch(name="HIP", free="131065.27 GiB"),
     PLAIN | {"backend": "hip", "free": "131065.27 GiB"}),
    ("torch under WSL2", "torch.OutOfMemoryError: " + torch(
        processes="Process 977 has 17179869184.00 GiB memory in use. " + ME), PLAIN),
    ("torch on XPU", "torch.OutOfMemoryError: XPU out of memory. Tried to allocate 46.00 MiB. GPU 1 "
     "has a total capacity of 7.43 GiB of which 21.06 MiB is free.Of the allocated memory 6.02 GiB "
     "is allocated by PyTorch, and 88.11 MiB is reserved by PyTorch but unallocated. Please use "
     "`empty_cache` to release all unoccupied cached memory.",
     PLAIN | {"backend": "xpu", "device": 1}),
    ("torch on MPS", "RuntimeError: MPS backend out of memory (MPS allocated: 8.61 GiB, other "
     "allocations: 384.00 KiB, max allowed: 9.07 GiB). Tried to allocate 512.00 MiB on private pool"
     ". Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit for memory allocations.",
     {"backend": "mps", "tried": "512.00 MiB", "allocated": "8.61 GiB", "allowed": "9.07 GiB",
      "device": None, "total": None, "free": None}),
    ("torch on MPS in GB", "RuntimeError: MPS backend out of memory (MPS allocated: 3.40 GB, other "
     "allocations: 5.13 GB, max allowed: 9.07 GB). Tried to allocate 1.00 GB on shared pool.",
     {"backend": "mps", "tried": "1.00 GiB", "allocated": "3.40 GiB", "allowed": "9.07 GiB",
      "cause": "other_processes"}),
    ("torch on NPU", "RuntimeError: NPU out of memory. Tried to allocate 2.00 GiB (NPU 5; 60.97 GiB "
     "total capacity; 55.10 GiB already allocated; 55.10 GiB current active; 1.02 GiB free; "
     "56.00 GiB reserved in total by PyTorch) If reserved memory is >> allocated memory try setting "
     "max_split_size_mb to avoid fragmentation.",
     {"backend": "npu", "device": 5, "tried": "2.00 GiB", "total": "60.97 GiB",
      "allocated": "55.10 GiB", "free": "1.02 GiB"}),
    ("torch on MUSA", "RuntimeError: " + old(name="MUSA"), OLD | {"backend": "musa"}),
    ("STAlloc", "RuntimeError: STAlloc : " + old(), OLD),
    ("no backend", "RuntimeError: Out of memory. Tried to allocate 3.00 GiB",
     {"backend": "unknown", "tried": "3.00 GiB"}),
    ("Jetson", "RuntimeError: NVML_SUCCESS == r INTERNAL ASSERT FAILED at \"/opt/pytorch/c10/cuda/"
     "CUDACachingAllocator.cpp\":1131, please report a bug to PyTorch. ", {"backend": "cuda"}),
    ("CUDA error", "RuntimeError: CUDA error: out of memory\nCUDA kernel errors might be "
     "asynchronously reported at some other API call", {"backend": "cuda", "cause": "unknown"}),
    ("AcceleratorError", "torch.AcceleratorError: CUDA error: out of memory",
     {"backend": "cuda", "tried": None}),
    ("driver error", "RuntimeError: CUDA driver error: out of memory", {"backend": "cuda"}),
    ("cuBLAS", "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling "
     "`cublasCreate(handle)`", {"backend": "cuda", "confirmed": True}),
    ("cuDNN", "RuntimeError: cuDNN error: CUDNN_STATUS_ALLOC_FAILED", {"backend": "cuda"}),
    ("cuBLAS, weak", "RuntimeError: CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling "
     "`cublasCreate(handle)`", {"backend": "cuda", "confirmed": False}),
    ("DataParallel", "RuntimeError: Caught OutOfMemoryError in replica 0 on device 0.\nOriginal "
     "Traceback (most recent call last):\n  File \"x.py\", line 3, in _worker\ntorch.cuda."
     "OutOfMemoryError: " + torch(), PLAIN),
    ("inductor", "torch._inductor.exc.InductorError: RuntimeError: Failed to run autotuning code "
     "block: " + torch(), PLAIN),
    ("SGLang", "Exception: Capture cuda graph failed: CUDA out of memory. Tried to allocate "
     "46.00 MiB.", {"backend": "cuda", "tried": "46.00 MiB", "total": None}),
    ("CPU", "RuntimeError: [enforce fail at alloc_cpu.cpp:73] . DefaultCPUAllocator: can't allocate "
     "memory: you tried to allocate 274877906944 bytes. Error code 12 (Cannot allocate memory)",
     {"backend": "cpu", "tried": 2**38, "cause": "host_ram"}),
    ("CPU, newer", "RuntimeError: [enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator:"
     " can't allocate memory: you tried to allocate 4096 bytes. Error code 12 (Cannot allocate "
     "memory)", {"backend": "cpu", "tried": 4096, "cause": "host_ram"}),
    ("CPU, 1.7", "RuntimeError: [enforce fail at CPUAllocator.cpp:67] . DefaultCPUAllocator: can't "
     "allocate memory: you tried to allocate 8000000000 bytes. Error code 12 (Cannot allocate "
     "memory)", {"backend": "cpu", "tried": 8_000_000_000}),
    ("CPU, Windows", "RuntimeError: [enforce fail at ..\\c10\\core\\CPUAllocator.cpp:76] data. "
     "DefaultCPUAllocator: not enough memory: you tried to allocate 1073741824 bytes.",
     {"backend": "cpu", "tried": 2**30}),
    ("CPU, 1.1", "RuntimeError: [enforce fail at CPUAllocator.cpp:64] posix_memalign(&data, "
     "gAlignment, nbytes) == 0. 12 vs 0", {"backend": "cpu", "tried": None, "cause": "host_ram"}),
    ("JAX of 2021", "RuntimeError: Resource exhausted: Out of memory while trying to allocate "
     "123456789 bytes.", {"backend": "jax", "tried": 123456789}),
    ("JAX", "jaxlib.xla_extension.XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to"
     " allocate 4294967296 bytes.", {"backend": "jax", "tried": 2**32, "device": None}),
    ("JAX of 2025", "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to "
     "allocate 73.25GiB. [executable_name='jit_step']", {"backend": "jax", "tried": "73.25 GiB"}),
    ("JAX CUBIN", "jaxlib.xla_extension.XlaRuntimeError: INTERNAL: Failed to load in-memory CUBIN: "
     "CUDA_ERROR_OUT_OF_MEMORY: out of memory", {"backend": "jax", "tried": None}),
    ("TensorFlow", "tensorflow.python.framework.errors_impl.ResourceExhaustedError: OOM when "
     "allocating tensor with shape[64,1024,1024] and type float on /job:localhost/replica:0/task:0/"
     "device:GPU:1 by allocator GPU_1_bfc [Op:Mul]",
     {"backend": "tensorflow", "tried": 64 * 2**20 * 4, "device": 1}),
    ("TensorFlow XLA", "tensorflow.python.framework.errors_impl.ResourceExhaustedError: Failed to "
     "allocate request for 1.46GiB (1573524800B) on device ordinal 0",
     {"backend": "tensorflow", "tried": 1573524800, "device": 0}),
    ("CuPy 6", "cupy.cuda.memory.OutOfMemoryError: out of memory to allocate 8589934592 bytes "
     "(total 17179869184 bytes)", {"backend": "cupy", "tried": 2**33, "allocated": 2**34,
                                   "total": None}),
    ("CuPy 6 with a limit", "cupy.cuda.memory.OutOfMemoryError: out of memory to allocate 1024 bytes"
     " (total 4096 bytes, limit set to 4608 bytes)",
     {"backend": "cupy", "tried": 1024, "allowed": 4608, "cause": "memory_fraction"}),
    ("CuPy", "cupy.cuda.memory.OutOfMemoryError: Out of memory allocating 1,200,000,000 bytes "
     "(allocated so far: 14,800,000,512 bytes).",
     {"backend": "cupy", "tried": 1_200_000_000, "allocated": 14_800_000_512}),
    ("CuPy with a limit", "cupy.cuda.memory.OutOfMemoryError: Out of memory allocating 2,048 bytes "
     "(allocated so far: 1,073,741,312 bytes, limit set to: 1,073,741,824 bytes).",
     {"backend": "cupy", "tried": 2048, "allowed": 2**30, "cause": "memory_fraction"}),
    ("CuPy, the runtime", "cupy_backends.cuda.api.runtime.CUDARuntimeError: "
     "cudaErrorMemoryAllocation: out of memory", {"backend": "cupy"}),
    ("NCCL within PyTorch", "torch.distributed.DistBackendError: NCCL error in: "
     "ProcessGroupNCCL.cpp:1333, unhandled cuda error, NCCL version 2.21.5\nncclUnhandledCudaError: "
     "Call to CUDA function failed.\nLast error:\nFailed to CUDA calloc async 608 bytes",
     {"backend": "nccl", "tried": 608}),
    ("RMM", "MemoryError: std::bad_alloc: out_of_memory: CUDA error at: /opt/rmm/cuda_memory_resource"
     ".hpp:70: cudaErrorMemoryAllocation out of memory", {"backend": "rmm"}),
    ("RMM, newer", "MemoryError: std::bad_alloc: out_of_memory: CUDA error (failed to allocate "
     "2000000000 bytes) at: /opt/rmm/mr.hpp:62: cudaErrorMemoryAllocation out of memory",
     {"backend": "rmm", "tried": 2_000_000_000}),
    ("RMM pool", "MemoryError: std::bad_alloc: out_of_memory: RMM failure at: /opt/rmm/pool.hpp:254:"
     " Maximum pool size exceeded (failed to allocate 256.000000 MiB)",
     {"backend": "rmm", "cause": "memory_fraction"}),
    ("RMM cut at a line number", "MemoryError: std::bad_alloc: out_of_memory: CUDA error at: /opt/"
     "rmm/mr.hpp", {"backend": "rmm", "tried": None}),
    ("vLLM", "ValueError: Free memory on device cuda:0 (7.34/15.49 GiB) on startup is less than "
     "desired GPU memory utilization (0.8, 12.39 GiB). Decrease GPU memory utilization or reduce "
     "GPU memory used by other processes.",
     {"backend": "vllm", "device": 0, "free": "7.34 GiB", "total": "15.49 GiB",
      "tried": "12.39 GiB", "cause": "other_processes"}),
    ("vLLM, older", "ValueError: Free memory on device (2.10/23.64 GiB) on startup is less than "
     "desired GPU memory utilization (0.9, 21.28 GiB).",
     {"backend": "vllm", "device": None, "free": "2.10 GiB", "tried": "21.28 GiB"}),
    ("vLLM cache", "ValueError: No available memory for the cache blocks. Try increasing "
     "`gpu_memory_utilization` when initializing the engine.",
     {"backend": "vllm", "cause": "memory_fraction"}),
    ("Numba", "numba.cuda.cudadrv.driver.CudaAPIError: [2] Call to cuMemAlloc results in "
     "CUDA_ERROR_OUT_OF_MEMORY", {"backend": "numba"}),
    ("numpy", "numpy.core._exceptions._ArrayMemoryError: Unable to allocate 535. MiB for an array "
     "with shape (70123, 1000) and data type float64",
     {"backend": "host", "tried": "535 MiB", "cause": "host_ram"}),
    ("numpy 2", "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 7.28 PiB for an array "
     "with shape (1024, 1000000000000) and data type float64",
     {"backend": "host", "tried": "7.28 PiB", "cause": "host_ram"}),
    ("ONNX Runtime", "onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException: "
     "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : /ort/core/framework/bfc_arena.cc:342 void* "
     "onnxruntime::BFCArena::AllocateRawInternal(size_t, bool) Failed to allocate memory for "
     "requested buffer of size 67108864", {"backend": "onnxruntime", "tried": 2**26}),
    ("TensorRT", "RuntimeError: [TRT] Error Code 2: OutOfMemory (Requested size was 12884901888 "
     "bytes.)", {"backend": "tensorrt", "tried": 12884901888}),
    ("Paddle", "SystemError: (Fatal) Operator conv2d error: \nResourceExhaustedError: \n\nOut of memory error "
     "on GPU 2. Cannot allocate 15.500000GB memory on GPU 2, 28.750000GB memory has been allocated "
     "and available memory is only 10.250000GB.",
     {"backend": "paddle", "device": 2, "tried": "15.5 GiB", "allocated": "28.75 GiB",
      "free": "10.25 GiB"}),
    ("Paddle 1", "paddle.fluid.core_avx.EnforceNotMet: Enforce allocating <= available failed, "
     "8421376 > 4096", {"backend": "paddle", "tried": 8421376, "free": 4096}),
    ("CUDA by name", "RuntimeError: cuMemCreate failed with CUDA_ERROR_OUT_OF_MEMORY",
     {"backend": "cuda"}),
]  # fmt: skip
for title, message, expected in GRAMMARS:
    case(f"grammar: {title}", failed(message), event(NODE, **expected))

# --- causes --------------------------------------------------------------------------------------

OTHERS = "".join(f"Process {pid} has 384.00 MiB memory in use. " for pid in (2101, 2102, 2103))
CAUSES = [
    ("three workers beside", torch(
        tried="48.00 MiB", total="3.81 GiB", free="12.44 MiB", allocated="1.71 GiB",
        pieces="141.90 MiB", processes=OTHERS + "Including non-PyTorch memory, this process has "
        "2.20 GiB memory in use. "), "other_processes"),
    ("one server beside", torch(
        tried="2.00 GiB", total="23.65 GiB", free="1.10 GiB", allocated="3.00 GiB",
        processes="Process 400 has 18.90 GiB memory in use. " + ME), "other_processes"),
    ("in pieces", torch(tried="2.00 GiB", total="23.65 GiB", free="420.00 MiB",
                        allocated="14.00 GiB", pieces="8.40 GiB", processes=ME), "fragmentation"),
    ("in pieces beside a desktop", torch(
        tried="1.00 GiB", total="23.65 GiB", free="20.00 MiB", allocated="16.00 GiB",
        pieces="6.20 GiB", processes="Process 1200 has 310.00 MiB memory in use. " + ME),
     "fragmentation"),
    ("old, in pieces", old(tried="1.00 GiB", total="15.78 GiB", allocated="9.00 GiB",
                           free="300.00 MiB", last="14.60 GiB reserved in total by PyTorch"),
     "fragmentation"),
    ("own process alone", torch(tried="128.00 MiB", processes=ME), "unknown"),
    ("own process, by the host's number", torch(
        tried="128.00 MiB", processes="Process 77120 has 6.61 GiB memory in use. "), "unknown"),
    ("two in a container", torch(
        tried="64.00 MiB", allocated="2.00 GiB", processes="Process 77120 has 2.61 GiB memory in "
        "use. Process 77121 has 4.70 GiB memory in use. "), "other_processes"),
    ("more than the card", torch(tried="93.13 GiB", free="7.20 GiB", allocated="0 bytes",
                                 pieces="0 bytes"), "larger_than_card"),
    ("plenty was free", torch(tried="20.00 MiB", free="5.01 GiB", allocated="1.00 GiB",
                              pieces="4.00 MiB", processes=ME), "driver"),
    ("a fraction left behind", torch(
        tried="1.50 GiB", total="268.72 GiB", free="252.97 GiB", allowed="1.20 GiB allowed; ",
        allocated="0 bytes", pieces="0 bytes"), "memory_fraction"),
    ("a fraction, but others too", torch(
        tried="1.00 GiB", free="100.00 MiB", allowed="6.00 GiB allowed; ", allocated="1.00 GiB",
        processes="Process 9 has 5.80 GiB memory in use. " + ME), "other_processes"),
    ("no list of processes", torch(
        tried="512.00 MiB", total="23.98 GiB", free="96.00 MiB", allocated="1.00 GiB",
        pieces="10.00 MiB", name="HIP"), "other_processes"),
]  # fmt: skip
for title, message, cause in CAUSES:
    case(
        f"cause: {title}",
        failed(f"torch.OutOfMemoryError: {message}"),
        event(NODE, cause=cause, confirmed=True),
    )

# --- carriers ------------------------------------------------------------------------------------

ERROR = "torch.OutOfMemoryError: " + torch(processes=ME)
FULL = event(NODE, **PLAIN)
SUMMARY = f"FAILED {NODE} - torch.OutOfMemoryError: CUDA out of mem..."
VERBOSE = [
    "tests/unit/test_data.py::test_read PASSED                                    [ 33%]",
    "tests/unit/test_data.py::test_write PASSED                                   [ 66%]",
    f"{NODE} FAILED [100%]",
]
LOG = run(section(ERROR), summary=[SUMMARY], progress=VERBOSE, ends="1 failed, 2 passed in 9.10s")
AT3 = FULL | {"position": 3, "worker": None}

case("carrier: verbose", LOG, AT3)
case(
    "carrier: quiet",
    run(
        section(ERROR),
        summary=[SUMMARY],
        progress=[
            "tests/unit/test_data.py ..s                                   [ 60%]",
            "tests/unit/test_model.py .F                                   [100%]",
        ],
        ends="1 failed, 3 passed, 1 skipped in 9.10s",
    ),
    FULL | {"position": 5},
)
case(
    "carrier: -q prints the last line bare",
    f"...F  [100%]\n{' FAILURES ':=^80}\n{section(ERROR)}{SUMMARY}\n1 failed, 3 passed in 0.52s\n",
    FULL | {"position": 4},
)
case("carrier: summary cut within the words", run(summary=[SUMMARY]), event(NODE, backend="cuda"))
case(
    "carrier: summary cut after the class",
    run(summary=[f"FAILED {NODE} - torch.OutOfMemoryError..."]),
    event(NODE, backend="cuda", tried=None),
)
case(
    "carrier: summary cut within a number",
    run(summary=[f"FAILED {NODE} - RuntimeError: CUDA out of memory. Tried to allocate 46.0..."]),
    event(NODE, backend="cuda", tried=None),
)
case(
    "carrier: summary cut after a number",
    run(
        summary=[
            f"FAILED {NODE} - RuntimeError: CUDA out of memory. Tried to allocate 46.00 MiB..."
        ]
    ),
    event(NODE, tried="46.00 MiB", total=None),
)
case(
    "carrier: summary cut early",
    run(summary=[f"FAILED {NODE} - RuntimeError: CUDA out o..."]),
    event(NODE, backend="cuda"),
)
case("carrier: summary in full", run(summary=[f"FAILED {NODE} - {ERROR}"]), FULL)
case(
    "carrier: summary with durations",
    run(summary=[f"FAILED [0.0003s] {NODE} - {ERROR}"]),
    FULL,
)
case("carrier: section only", run(section(ERROR), ends=""), event(NODE, **PLAIN))
case(
    "carrier: --tb=short",
    run(
        f"{' TestEncoder.test_forward[fp16-8] ':_^80}\ntests/unit/test_model.py:41: in test_forward\n"
        f"    out = self.model(batch)\nE   {ERROR}\n",
        summary=[SUMMARY],
    ),
    FULL,
)
case(
    "carrier: --tb=line",
    run(f"/home/ci/repo/tests/unit/test_model.py:41: {ERROR}", summary=[SUMMARY]),
    FULL,
)
case(
    "carrier: --tb=native",
    run(
        f"{' TestEncoder.test_forward[fp16-8] ':_^80}\nTraceback (most recent call last):\n"
        '  File "/home/ci/repo/tests/unit/test_model.py", line 41, in test_forward\n'
        f"    out = self.model(batch)\n{ERROR}\n",
        summary=[SUMMARY],
    ),
    FULL,
)
case("carrier: CRLF", LOG.replace("\n", "\r\n"), AT3)
case("carrier: CRLF twice", LOG.replace("\n", "\r\r\n"), AT3)
case("carrier: UTF-16 with a mark", LOG.encode("utf-16"), AT3)
case("carrier: UTF-16 big-endian", b"\xfe\xff" + LOG.encode("utf-16-be"), AT3)
case("carrier: UTF-16 without a mark", LOG.encode("utf-16-le"), AT3)
case("carrier: UTF-8 with a mark", b"\xef\xbb\xbf" + LOG.encode(), AT3)
case("carrier: bytes of no encoding", b"\xff\xfe\xfd\n" + b"\x80caf\xe9\n" * 9 + LOG.encode(), AT3)
case("carrier: UTF-8 and UTF-16 mixed", LOG.encode() + "done\n".encode("utf-16-le"), AT3)
case(
    "carrier: colours",
    LOG.replace("FAILED", "\x1b[31mFAILED\x1b[0m")
    .replace("E       ", "\x1b[1m\x1b[31mE       ")
    .replace("::Test", "::\x1b[1mTest")
    .replace(" FAILURES ", "\x1b[1m FAILURES \x1b[0m"),
    AT3,
)
case("carrier: colours without their escapes", LOG.replace("FAILED", "[31mFAILED[0m"), AT3)
case(
    "carrier: colours within the message",
    LOG.replace("46.00 MiB", "\x1b[1;36m46.00\x1b[0m MiB").replace(
        "CUDA out of", "CUDA \x1b[1mout\x1b[0m of"
    ),
    AT3,
)
PREFIXES = {
    "GitHub": "2025-03-04T10:20:30.1234567Z ",
    "gh run view": "test (3.12)\tRun tests\t2025-03-04T10:20:30.1234567Z ",
    "Jenkins": "[2025-03-04T10:20:30.123Z] ",
    "a clock": "10:20:30 ",
    "syslog": "Nov 07 16:05:57 ",
    "a rank": "[rank0]: ",
    "compose": "tests-1  | ",
    "mail": "> ",
    "two clocks": "2025-03-04T10:20:30.1234567Z 10:20:30 ",
    "a shard and a clock": "tests-2  | 2025-03-04 10:20:30,123 ",
}
for title, prefix in PREFIXES.items():
    case(
        f"carrier: prefixed by {title}",
        "".join(f"{prefix}{line}\n" for line in LOG.splitlines()),
        AT3 if title != "a rank" else FULL,
    )


def words_wrapped(text, width):
    lines, line = [], ""
    for word in text.split(" "):
        if len(line) + len(word) + 1 > width and line:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    return "\n".join([*lines, line])


for width in (70, 80, 100, 121):
    case(
        f"carrier: wrapped at words, {width}",
        run(
            f"{' TestEncoder.test_forward[fp16-8] ':_^60}\n" + words_wrapped(f"E   {ERROR}", width),
            "",
            summary=[SUMMARY],
        ),
        FULL,
    )
    hard = f"E   {ERROR}"
    case(
        f"carrier: wrapped anywhere, {width}",
        run(
            f"{' TestEncoder.test_forward[fp16-8] ':_^60}\n"
            + "\n".join(hard[at : at + width] for at in range(0, len(hard), width)),
            "",
            summary=[SUMMARY],
        ),
        FULL,
    )

XDIST = [
    "4 workers [3 items]",
    "scheduling tests via LoadScheduling",
    "",
    "tests/unit/test_data.py::test_read ",
    f"{NODE} ",
    "[gw1] [ 33%] PASSED tests/unit/test_data.py::test_read ",
    "tests/unit/test_data.py::test_write ",
    "[gw3] [ 66%] PASSED tests/unit/test_data.py::test_write ",
    f"[gw3] [100%] FAILED {NODE} ",
]
GW3 = section(ERROR).replace(
    "\n\nself", "\n[gw3] linux -- Python 3.12.4 /opt/venv/bin/python\n\nself", 1
)
case(
    "carrier: xdist",
    run(GW3, summary=[SUMMARY], progress=XDIST),
    FULL | {"worker": "gw3", "position": 2},
)
case("carrier: xdist, quiet", run(GW3, summary=[SUMMARY]), FULL | {"worker": "gw3"})
case(
    "carrier: two runs in one file",
    LOG + LOG.replace("46.00 MiB", "80.00 MiB"),
    AT3,
    AT3 | {"tried": size("80.00 MiB")},
)
case(
    "carrier: set-up",
    run(
        section(ERROR, header="ERROR at setup of TestEncoder.test_forward[fp16-8]"),
        summary=[f"ERROR {NODE} - torch.OutOfMemoryError: CUDA out of..."],
        ends="1 error in 1.00s",
    ).replace(" FAILURES ", " ERRORS "),
    FULL | {"phase": "setup"},
)
case(
    "carrier: teardown",
    run(
        section(ERROR, header="ERROR at teardown of TestEncoder.test_forward[fp16-8]"),
        summary=[f"ERROR {NODE} - torch.OutOfMemoryError: CUDA out of..."],
        ends="1 passed, 1 error in 1.00s",
    ).replace(" FAILURES ", " ERRORS "),
    FULL | {"phase": "teardown"},
)
case(
    "carrier: collection",
    run(
        f"{' ERROR collecting tests/unit/test_model.py ':_^80}\ntests/unit/test_model.py:3: in "
        f"<module>\n    MODEL = load()\nE   {ERROR}\n",
        summary=["ERROR tests/unit/test_model.py - torch.OutOfMemoryError: CUDA out of..."],
        ends="1 error in 1.00s",
    ).replace(" FAILURES ", " ERRORS "),
    event("tests/unit/test_model.py", phase="collect", **PLAIN),
)
case(
    "carrier: chained errors are one event",
    run(
        section(ERROR) + "\nDuring handling of the above exception, another exception occurred:\n\n"
        "    def test_forward(self):\n>       raise Failed(e) from e\n"
        f"E       RuntimeError: worker failed: {torch(processes=ME)}\n",
        summary=[f"FAILED {NODE} - RuntimeError: worker failed: CUDA out of..."],
    ),
    FULL,
)
case(
    "carrier: one header in two files",
    run(
        section(ERROR, header="test_forward", location="tests/b/test_model.py:41"),
        summary=[
            "FAILED tests/a/test_model.py::test_forward - ValueError: no",
            "FAILED tests/b/test_model.py::test_forward - torch.OutOfMemoryError: CUDA...",
        ],
    ).replace(
        f"{' test_forward ':_^80}",
        f"{' test_forward ':_^80}\nE   ValueError: no\n\ntests/a/test_model.py:9: ValueError\n"
        f"{' test_forward ':_^80}",
    ),
    event("tests/b/test_model.py::test_forward", **PLAIN),
)
case(
    "carrier: nested classes",
    run(
        section(ERROR, header="TestA.TestB.test_c"),
        summary=["FAILED tests/test_n.py::TestA::TestB::test_c - torch.OutOf..."],
    ),
    event("tests/test_n.py::TestA::TestB::test_c", **PLAIN),
)
case(
    "carrier: a parameter with dots, colons and a dash",
    run(
        section(ERROR, header="test_p[a.b::c - d]"),
        summary=["FAILED tests/test_n.py::test_p[a.b::c - d] - torch.OutOf..."],
    ),
    event("tests/test_n.py::test_p[a.b::c - d]", **PLAIN),
)
case(
    "carrier: no summary, the file by the location",
    run(section(ERROR), ends="").replace(" short test summary info ", " warnings summary "),
    FULL,
)
case(
    "carrier: unittest",
    "test_step (test_opt.TestAdam) ... ERROR\n\n"
    f"{'=' * 70}\nERROR: test_step (test_opt.TestAdam)\n{'-' * 70}\n"
    'Traceback (most recent call last):\n  File "test/test_opt.py", line 9, in test_step\n'
    f"    x = y()\n{ERROR}\n\n{'-' * 70}\nRan 7 tests in 1.5s\n\nFAILED (errors=1)\n",
    event("test/test_opt.py::TestAdam::test_step", **PLAIN),
)
case(
    "carrier: header missing",
    f"self = <test_opt.TestAdam testMethod=test_step>\n\n    def test_step(self):\n>       f()\n"
    f"E       {ERROR}\n",
    event(**PLAIN),
)
case(
    "carrier: the log begins within a section",
    section(ERROR) + f"{' short test summary info ':=^80}\n{SUMMARY}\n1 failed in 2.00s\n",
    FULL,
)
case(
    "carrier: abort without an outcome",
    f"{' test session starts ':=^80}\ntests/test_a.py::test_ok PASSED [ 50%]\n"
    "tests/test_a.py::test_dies terminate called after throwing an instance of "
    f"'c10::OutOfMemoryError'\n  what():  {torch(processes=ME)}\n"
    "Exception raised from malloc at CUDACachingAllocator.cpp:1434\nFatal Python error: Aborted\n",
    event("tests/test_a.py::test_dies", position=2, **PLAIN),
)
case(
    "carrier: -s prints before the outcome",
    run(
        section(ERROR),
        summary=[SUMMARY],
        progress=[
            "tests/unit/test_data.py::test_read loading 3 items",
            "done",
            "PASSED                                  [ 50%]",
            f"{NODE} step 1: ok",
            "FAILED                                  [100%]",
        ],
    ),
    FULL | {"position": 2},
)
case(
    "carrier: the fixture of a session fells three tests once",
    run(
        *(
            section(ERROR, header=f"ERROR at setup of test_{name}", location="tests/conftest.py:7")
            for name in "abc"
        ),
        summary=[f"ERROR tests/test_s.py::test_{name} - torch.OutOfMemory..." for name in "abc"],
        ends="3 errors in 2.00s",
    ).replace(" FAILURES ", " ERRORS "),
    event("tests/test_s.py::test_a", felled=3, **PLAIN),
)
case(
    "carrier: two tests in the same state",
    run(
        section(ERROR, header="test_a"),
        section(ERROR, header="test_b"),
        summary=["FAILED tests/test_s.py::test_a - t...", "FAILED tests/test_s.py::test_b - t..."],
        ends="2 failed in 2.00s",
    ),
    event("tests/test_s.py::test_a", cascade_of=None, **PLAIN),
    event("tests/test_s.py::test_b", cascade_of=0, **PLAIN),
)
GROWING = run(
    *(
        section(
            ERROR.replace("6.02 GiB", held).replace("88.11 MiB", "8.11 MiB"), header=f"test_{name}"
        )
        for name, held in zip("abc", ("6.02 GiB", "6.25 GiB", "6.50 GiB"), strict=True)
    ),
    summary=[f"FAILED tests/test_s.py::test_{name} - t..." for name in "abc"],
    ends="3 failed in 2.00s",
)
case(
    "carrier: growth from each failure to the next is probably accumulation",
    GROWING,
    event("tests/test_s.py::test_a", cause="unknown"),
    event("tests/test_s.py::test_b", cause="unknown"),
    event(
        "tests/test_s.py::test_c",
        cause="accumulation",
        inferred=True,
        growth=size("6.50 GiB") - size("6.02 GiB"),
    ),
)
case(
    "carrier: what falls again is no accumulation",
    GROWING.replace("6.25 GiB", "6.75 GiB"),
    event("tests/test_s.py::test_a", cause="unknown"),
    event("tests/test_s.py::test_b", cause="unknown"),
    event("tests/test_s.py::test_c", cause="unknown"),
)

JUNIT = f"""<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" errors="0" failures="1" tests="2" time="4.5">
<testcase classname="tests.unit.test_data" name="test_read" time="0.5" />
<testcase classname="tests.unit.test_model.TestEncoder" name="test_forward[fp16-8]" time="4.0">
<failure message="{html.escape(ERROR)}">{html.escape(section(ERROR))}</failure></testcase>
</testsuite></testsuites>
"""
case("carrier: JUnit", JUNIT, FULL | {"position": None}, suffix=".xml")
case(
    "carrier: JUnit with files",
    JUNIT.replace('name="test_f', 'file="tests/unit/test_model.py" name="test_f'),
    FULL,
    suffix=".xml",
)
case("carrier: JUnit cut off", JUNIT.replace("</testsuite></testsuites>", ""), FULL, suffix=".xml")
BLOB = json.dumps(
    {"environment": {}, "tests": {NODE: [
        {"extras": [], "result": "Failed", "testId": NODE, "duration": "4.0 s", "log": html.escape(section(ERROR))}
    ]}}
)  # fmt: skip
PAGE = (
    '<!DOCTYPE html><html><body><div id="data-container" data-jsonblob="'
    + html.escape(BLOB)
    + '"></div></body></html>'
)
case("carrier: pytest-html", PAGE, FULL, suffix=".html")
OLD_PAGE = (
    '<!DOCTYPE html><html><body><table id="results-table"><tbody class="failed results-table-row">'
    f'<tr><td class="col-result">Failed</td><td class="col-name">{NODE}</td></tr>'
    f'<tr><td><div class="log">{html.escape(section(ERROR))}</div></td></tr></tbody></table></html>'
)
case("carrier: pytest-html 3", OLD_PAGE, FULL, suffix=".html")
case("carrier: gzip", gzip.compress(LOG.encode()), AT3, suffix=".log.gz")
case("carrier: gzip cut off", gzip.compress((LOG + "x" * 99).encode())[:-12], AT3, suffix=".log.gz")
case("carrier: zstd", zstandard.compress(LOG.encode()), AT3, suffix=".log.zst")
case(
    "carrier: zstd in frames",
    zstandard.compress(LOG[:900].encode()) + zstandard.compress(LOG[900:].encode()),
    AT3,
    suffix=".log.zst",
)
SNAPSHOT = {
    "segments": [
        {"device": 0, "total_size": 20 << 20, "allocated_size": 17 << 20},
        {"device": 1, "total_size": 2 << 20, "allocated_size": 1 << 20},
    ],
    "device_traces": [
        [
            {"action": "alloc", "size": 512},
            {
                "action": "oom", "size": 64 << 20, "device_free": 3 << 20,
                "frames": [{"filename": "tests/test_x.py", "name": "test_y", "line": 3}],
            },
        ],
        [],
    ],
}  # fmt: skip
case(
    "carrier: torch snapshot",
    pickle.dumps(SNAPSHOT),
    event("tests/test_x.py::test_y", backend="cuda", device=0, tried=64 << 20, free=3 << 20,
          allocated=17 << 20, reserved_unallocated=3 << 20),
    suffix=".pickle",
)  # fmt: skip
USAGE = {
    "card": "GPU-1", "baseline": 0, "peak": 3 << 30, "leftover": 1 << 30, "reserved": 0,
    "reserved_peak": 0, "retries": 0, "ooms": 0, "process": None, "leaked": 1 << 30, "holders": [],
}  # fmt: skip
RECORD = {
    "schema": 1, "mode": "track", "simulated": False, "workers": 0,
    "cards": [{"uuid": "GPU-1", "name": "A card", "total": 4 << 30}],
    "tests": [
        {"nodeid": "test_x.py::test_leaks", "outcome": "passed", "duration": 1.0, "worker": "",
         "cards": [USAGE]},
        {"nodeid": "test_x.py::test_victim", "outcome": "failed", "duration": 1.0, "worker": "",
         "cards": [USAGE | {"leaked": 0}],
         "oom": "CUDA out of memory. Tried to allocate 2.00 GiB."},
    ],
}  # fmt: skip
case(
    "carrier: our JSON names who left what",
    json.dumps(RECORD),
    event("test_x.py::test_victim", position=2, tried="2.00 GiB", total="4.00 GiB",
          cause="accumulation"),
    suffix=".json",
)  # fmt: skip

# --- outside of tests ----------------------------------------------------------------------------

TRACE = 'Traceback (most recent call last):\n  File "train.py", line 8, in <module>\n    main()\n'
case("script: traceback", f"step 1\n{TRACE}{ERROR}\n", event(**PLAIN))
case(
    "script: ranks are two events",
    f"[rank0]: {ERROR}\n[rank1]: {ERROR.replace('GPU 0', 'GPU 1')}\n",
    event(**PLAIN | {"worker": "rank0"}),
    event(**PLAIN | {"worker": "rank1", "device": 1}),
)
case(
    "script: vLLM tells the same twice",
    f"(EngineCore pid=44) ERROR 03-04 10:20:30 [core.py:396] {ERROR}\n"
    + "INFO x\n" * 40
    + f"(EngineCore pid=44) {ERROR}\nRuntimeError: Engine core initialization failed.\n",
    event(**PLAIN),
)
case(
    "script: llama.cpp's two lines",
    "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 3072.00 MiB on device 0: cudaMalloc "
    "failed: out of memory\nggml_gallocr_reserve_n: failed to allocate CUDA0 buffer of size "
    "3221225472\nllama_init_from_model: failed to initialize the context\n",
    event(backend="ggml", device=0, tried="3072.00 MiB"),
)
case(
    "script: TensorFlow's allocator and error",
    "2025-03-04 10:20:30.123456: W tensorflow/core/common_runtime/bfc_allocator.cc:479] Allocator "
    "(GPU_0_bfc) ran out of memory trying to allocate 3.07GiB (rounded to 3300000000)requested by "
    "op model/dense\nCurrent allocation summary follows.\n"
    + "Bin (256): Total Chunks: 3\n"
    * 500
    + "tensorflow.python.framework.errors_impl.ResourceExhaustedError: 2 root error(s) found.\n"
    "  (0) RESOURCE_EXHAUSTED: OOM when allocating tensor with shape[825000000] and type float on "
    "/job:localhost/replica:0/task:0/device:GPU:0 by allocator GPU_0_bfc\n"
    "Hint: If you want to see a list of allocated tensors when OOM happens, add it.\n",
    event(backend="tensorflow", device=0, tried="3.07 GiB"),
)
case(
    "script: TensorRT's two lines",
    "[03/04/2025-10:20:30] [TRT] [E] 1: [defaultAllocator.cpp::allocate::20] Error Code 1: Cuda "
    "Runtime (out of memory)\n[03/04/2025-10:20:30] [TRT] [E] 2: [executionContext.cpp::"
    "ExecutionContext::410] Error Code 2: OutOfMemory (Requested size was 1048576 bytes.)\n",
    event(backend="tensorrt", tried=1048576),
)
case(
    "script: NCCL",
    "node1:301:377 [2] init.cc:1100 NCCL WARN Cuda failure 'out of memory'\n"
    "node1:301:377 [2] alloc.h:178 NCCL WARN Failed to CUDA calloc 6291456 bytes\n",
    event(backend="nccl", tried=6291456),
)
case(
    "script: cuda-memcheck",
    "========= CUDA-MEMCHECK\n========= Program hit cudaErrorMemoryAllocation (error 2) due to "
    '"out of memory" on CUDA API call to cudaMalloc.\n',
    event(backend="cuda"),
)
case(
    "script: old cuML",
    "terminate called after throwing\nFAIL: call='cudaMalloc(&ptr, n)'. Reason:out of memory\n",
    event(backend="rmm"),
)
case(
    "script: C++ abort",
    "terminate called after throwing an instance of 'c10::OutOfMemoryError'\n"
    f"  what():  {torch()}\nException raised from malloc at CUDACachingAllocator.cpp:1434\n",
    event(**PLAIN),
)

# --- the host ------------------------------------------------------------------------------------

case(
    "host: the kernel's lines are one event",
    "[71030.125011] python invoked oom-killer: gfp_mask=0xcc0, order=0, oom_score_adj=0\n"
    "[71030.125900] Out of memory: Killed process 4711 (python) total-vm:52428800kB, "
    "anon-rss:31457280kB, file-rss:0kB\n[71031.5000] oom_reaper: reaped process 4711 (python)\n",
    event(backend="host", cause="host_ram", confirmed=True),
)
case(
    "host: two processes are two events",
    "[5.125900] Out of memory: Killed process 11 (python) total-vm:1kB, anon-rss:1kB\n"
    "[9.125900] Out of memory: Killed process 12 (python) total-vm:1kB, anon-rss:1kB\n",
    event(backend="host", cause="host_ram"),
    event(backend="host", cause="host_ram"),
)
case(
    "host: cgroup, by syslog",
    "Nov 07 16:05:57 node7 kernel: Memory cgroup out of memory: Killed process 99 (pytest) "
    "total-vm:9000kB, anon-rss:8000kB\n",
    event(cause="host_ram", confirmed=True),
)
case(
    "host: Slurm",
    "slurmstepd: error: Detected 1 oom_kill event in StepId=8812.batch. Some of the step tasks have "
    "been OOM Killed.\nsrun: error: node7: task 1: Out Of Memory\n",
    event(cause="host_ram", confirmed=True),
)
case(
    "host: the shell's word is only probable",
    "run.sh: line 3:  4711 Killed                  python -m pytest tests\n",
    event(cause="host_ram", confirmed=False),
)
case("host: Killed alone", "loading\nKilled\n", event(cause="host_ram", confirmed=False))
case(
    "host: GitHub's exit code",
    "2025-03-04T10:20:30.1234567Z ##[error]Process completed with exit code 137.\n",
    event(cause="host_ram", confirmed=False),
)
case(
    "host: CircleCI's exit code",
    "Exited with code exit status 137\n",
    event(cause="host_ram", confirmed=False),
)
case(
    "host: killed amid a test",
    f"{' test session starts ':=^80}\ntests/test_a.py::test_ok PASSED [ 50%]\n"
    "tests/test_a.py::test_big \nKilled\nError: Process completed with exit code 137.\n",
    event("tests/test_a.py::test_big", cause="host_ram", confirmed=False, position=2),
)
case(
    "host: told before pytest's buffered output",
    "run.sh: line 3:  4711 Killed                  python -m pytest -v\n"
    f"{' test session starts ':=^80}\ntests/test_a.py::test_ok PASSED [ 50%]\n"
    "tests/test_a.py::test_big ",
    event("tests/test_a.py::test_big", cause="host_ram", confirmed=False),
)
CRASHED = run(
    f"{' tests/test_c.py ':_^80}\n[gw2] linux -- Python 3.12.4 /opt/venv/bin/python\n"
    "worker 'gw2' crashed while running 'tests/test_c.py::test_huge'\n",
    progress=["[gw2] node down: Not properly terminated", "replacing crashed worker gw2"],
    summary=["FAILED tests/test_c.py::test_huge - worker 'gw2' crashed while running 'tests/te..."],
)
case("no event: a crashed worker of which the log does not tell why", CRASHED)
case(
    "host: a crashed worker, probably killed",
    CRASHED + "Error: Process completed with exit code 137.\n",
    event("tests/test_c.py::test_huge", worker="gw2", confirmed=False, cause="host_ram"),
)
case(
    "no event: a worker that ran into a timeout",
    CRASHED.replace("[gw2] node down", f"{' Timeout ':+^80}\n[gw2] node down"),
)
case(
    "host: a crashed worker, explained by the kernel",
    CRASHED + "[5.125900] Out of memory: Killed process 11 (python) total-vm:1kB, anon-rss:1kB\n",
    event("tests/test_c.py::test_huge", worker="gw2", confirmed=True, cause="host_ram"),
)
case(
    "host: a crashed worker that had told why",
    CRASHED.replace(
        "[gw2] node down",
        "terminate called after throwing an instance of 'c10::OutOfMemoryError'\n"
        f"  what():  {torch(processes=ME)}\n[gw2] node down",
    ),
    event("tests/test_c.py::test_huge", **PLAIN | {"worker": "gw2"}),
)

# --- what is no event ----------------------------------------------------------------------------

PASSED = run(progress=VERBOSE[:2], ends="").replace("short test summary info", "PASSES")


def other(message, extra=""):
    return run(section(message) + extra, summary=[f"FAILED {NODE} - {message[:50]}"])


NOTHING = [
    ("a test's name", run(progress=["tests/test_cuda_out_of_memory.py::test_out_of_memory PASSED [50%]"],
                          ends="1 passed in 1.00s")),
    ("a failing test's name", run(summary=["FAILED tests/test_oom.py::test_out_of_memory - ValueError: x"])),
    ("a source line", other("ValueError: no").replace(
        ">       out", f'>       raise RuntimeError("{old()}")\n        out')),
    ("a source line with the class", other("ValueError: no").replace(
        ">       out", "        except torch.OutOfMemoryError:  # CUDA out of memory\n>       out")),
    ("an expected error that did not come", other(
        "Failed: DID NOT RAISE <class 'torch.OutOfMemoryError'>")),
    ("a pattern that did not match", other(
        "AssertionError: Regex pattern did not match.\n  Expected regex: 'CUDA out of memory'\n"
        "  Actual message: 'fine'")),
    ("an assertion about the words", other("AssertionError: assert 'CUDA out of memory' in 'ok'")),
    ("an assertion that quotes it whole", other(f"AssertionError: assert '{old()}' == ''")),
    ("captured output of a passing test", PASSED + f"{' test_read ':_^80}\n"
     f"{' Captured stdout call ':-^80}\n{ERROR}\n"),
    ("a warning that tells of a retry", other("ValueError: no", (
        f"{' Captured log call ':-^80}\nWARNING  pool:pool.py:31 {torch()} retrying with batch 8\n"))),
    ("a warning of the allocator", "[rank0]:[W304 10:20:30.123456789 CUDACachingAllocator.cpp:3933] "
     "memory allocation failed with OOM on device 0 while trying to allocate 2097152 bytes (free: "
     "1048576, total: 4090956349).\n"),
    ("a warning of expandable segments", "[W304 10:20:30.123456789 CUDACachingAllocator.cpp:508] "
     "expandable_segments: memory mapping failed with OOM on device 0 while trying to map 20971520 "
     "bytes (free: 1048576, total: 4090956349).\n"),
    ("a survived retry in a script", f"{torch()} Retrying with a smaller batch.\nstep 2 done\n"),
    ("a logged fallback", f"WARNING:root:{torch()}; falling back to CPU\n"),
    ("an info record", f"2025-03-04 10:20:30,123 - app - INFO - {torch()}\n"),
    ("TensorFlow's not a failure", "Allocator (GPU_0_bfc) ran out of memory trying to allocate "
     "2.13GiB with freed_by_count=0. The caller indicates that this is not a failure, but this may "
     "mean that there could be performance gains if more memory were available.\n"),
    ("TensorFlow's limit", "Not enough memory to allocate 256 on device 0 within provided limit.\n"),
    ("TensorFlow's hint", "Hint: If you want to see a list of allocated tensors when OOM happens, "
     "add report_tensor_allocations_upon_oom to RunOptions.\n"),
    ("Triton's shared memory", other("triton.runtime.errors.OutOfResources: out of resource: shared "
                                     "memory, Required: 139264, Hardware limit: 101376.")),
    ("an illegal address", other("MemoryError: std::bad_alloc: CUDA error at: /opt/rmm/mr.hpp:70: "
                                 "cudaErrorIllegalAddress an illegal memory access")),
    ("ggml's pinned memory", "ggml_cuda_host_malloc: failed to allocate 12.00 MiB of pinned memory: "
     "invalid argument\n"),
    ("DeepSpeed's warning", "3 pytorch allocator cache flushes since last step. this happens when "
     "there is high memory pressure\n"),
    ("XLA's rematerialisation", "W hlo_rematerialization.cc:3005] Can't reduce memory use below "
     "5.71GiB (6133600000 bytes) by rematerialization; only reduced to 12.3GiB\n"),
    ("documentation", "Out-of-memory errors\n====================\nIf you see CUDA out of memory, "
     "try a smaller batch. RuntimeError: CUDA out of memory. Tried to allocate more.\n"),
    ("a docstring", other("ValueError: no").replace(
        "    def test", '    """Raises:\n        RuntimeError: CUDA out of memory.\n    """\n    def test')),
    ("a rerun that passed", run(progress=[
        "tests/test_r.py::test_a RERUN [ 50%]", "tests/test_r.py::test_a PASSED [100%]"],
        ends="1 passed, 1 rerun in 2.00s")),
    ("an expected failure", run(summary=[f"XFAIL {NODE} - CUDA out of memory"],
                                ends="1 xfailed in 1.00s")),
    ("output of a test that passed", run(progress=[
        f"{NODE} {torch()}", "PASSED        [100%]"], ends="1 passed in 1.00s")),
    ("a worker that crashed of a fault", CRASHED.replace(
        "[gw2] node down", "Fatal Python error: Segmentation fault\n\n[gw2] node down")),
    ("our own section", PASSED.replace("PASSES", "GPU memory") + f"out of memory\n  {NODE}\n      {ERROR}\n"),
    ("numbers like exit codes", "batch 137 done\nloss 0.137\nKilled by death: a film\n"),
    ("an empty log", ""),
    ("a printed exception", f"OOM caught: {torch()}\n"),
    ("other errors", other("ValueError: no")),
    ("a list of settings", "PYTORCH_NO_CUDA_MEMORY_CACHING=1 # Killed processes: 0, out of memory: 0\n"),
]  # fmt: skip
for title, log in NOTHING:
    case(f"no event: {title}", log)

# --- more of the field ---------------------------------------------------------------------------

case(
    "field: cudaMallocAsync",
    failed(
        "torch.OutOfMemoryError: Allocation on device 0 would exceed allowed memory. (out of memory)"
        "\nCurrently allocated     : 7.14 GiB\nRequested               : 2.25 MiB\nDevice limit     "
        "       : 8.00 GiB\nFree (according to CUDA): 0 bytes\nPyTorch limit (set by user-supplied "
        "memory fraction)\n                        : 17179869184.00 GiB"
    ),
    event(NODE, backend="cuda", device=0, tried="2.25 MiB", allocated="7.14 GiB", total="8.00 GiB",
          free="0 bytes"),
)  # fmt: skip
case(
    "field: Ray",
    failed(
        "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory."
    ),
    event(NODE, backend="host", cause="host_ram"),
)
case(
    "field: a loader's worker",
    failed("RuntimeError: DataLoader worker (pid 4711) is killed by signal: Killed. "),
    event(NODE, backend="host", cause="host_ram", confirmed=False),
)
case("field: Python's own", failed("MemoryError"), event(NODE, backend="host", cause="host_ram"))
case("field: make", "make: *** [Makefile:9: test] Error 137\n", event(confirmed=False))
case(
    "field: Kubernetes",
    "    State:          Terminated\n      Reason:       OOMKilled\n      Exit Code:    137\n",
    event(cause="host_ram", confirmed=True),
)
case(
    "field: a container's exit code",
    "tests-1 exited with code 137\n",
    event(cause="host_ram", confirmed=False),
)
case(
    "field: an IDE's exit code",
    "Process finished with exit code 137 (interrupted by signal 9: SIGKILL)\n",
    event(cause="host_ram", confirmed=False),
)
case(
    "field: GitLab's clock",
    "".join(f"2025-03-04T10:20:30.123456Z 01O {line}\n" for line in LOG.splitlines()),
    AT3,
)
case(
    "field: pytest's own end",
    f"{' test session starts ':=^80}\nINTERNALERROR> Traceback (most recent call last):\n"
    f"INTERNALERROR> {ERROR}\n",
    event(**PLAIN),
)
case(
    "field: PyTorch's repeat line names the file",
    f"{'=' * 70}\nERROR: test_step (__main__.TestAdam)\n{'-' * 70}\n"
    f"Traceback (most recent call last):\n{ERROR}\n\nTo execute this test, run the following from "
    "the base repo dir:\n    python test/test_opt.py TestAdam.test_step\n",
    event("test/test_opt.py::TestAdam::test_step", **PLAIN),
)
case(
    "field: a process that the test started ran out",
    run(
        section("AssertionError: assert 1 == 0")
        + f"{' Captured stderr call ':-^80}\n{TRACE}{ERROR}\n",
        summary=[f"FAILED {NODE} - AssertionError: assert 1 == 0"],
    ),
    FULL,
)
case(
    "field: the next line tells of a retry",
    f"{TRACE}{ERROR}\nRetrying with batch size 4 ...\nstep 1 done\n",
)
case(
    "field: a group of exceptions",
    failed(
        "ExceptionGroup: several (1 sub-exception)\n+-+---------------- 1 ----------------\n"
        f"  | {ERROR}\n  +------------------------------------"
    ),
    FULL,
)
case(
    "field: a test that gives up on running out",
    failed(f"Failed: {torch(processes=ME)}"),
    FULL,
)
case(
    "field: JUnit, set-up",
    JUNIT.replace('<failure message="', '<error message="failed on setup with &quot;').replace(
        "</failure>", "</error>"
    ),
    FULL | {"phase": "setup"},
    suffix=".xml",
)
case(
    "field: Windows paths and lines",
    run(section(ERROR, location="tests\\unit\\test_model.py:41"), ends="")
    .replace(" short test summary info ", " warnings summary ")
    .replace("\n", "\r\n"),
    FULL,
)
case(
    "field: Slurm numbers its tasks",
    f"0: step 1\n1: step 1\n1: {ERROR}\n",
    event(**PLAIN | {"worker": "rank1"}),
)
case(
    "field: JAX's allocator speaks before JAX",
    "2025-03-04 10:20:30.123456: W external/xla/xla/tsl/framework/bfc_allocator.cc:501] Allocator "
    "(GPU_0_bfc) ran out of memory trying to allocate 4.00GiB (rounded to 4294967296)requested by "
    f"op \n{TRACE}jaxlib.xla_extension.XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory while "
    "trying to allocate 4294967296 bytes.\n",
    event(backend="jax", tried=2**32),
)
case(
    "field: ONNX Runtime's own log",
    "2025-03-04 10:20:30.123456 [E:onnxruntime:, sequential_executor.cc:516 ExecuteKernel] Non-zero "
    "status code returned while running Conv node. Status Message: /ort/bfc_arena.cc:342 void* "
    "onnxruntime::BFCArena::AllocateRawInternal(size_t, bool) Failed to allocate memory for "
    "requested buffer of size 67108864\n",
    event(backend="onnxruntime", tried=2**26),
)
case(
    "field: gtest",
    'unknown file: Failure\nC++ exception with description "std::bad_alloc: out_of_memory: CUDA '
    'error at: /opt/rmm/mr.hpp:70: cudaErrorMemoryAllocation out of memory" thrown in the test '
    "body.\n",
    event(backend="rmm"),
)
case(
    "field: llama.cpp by the host's buffer is nothing",
    "ggml_cuda_host_malloc: failed to allocate 512.00 MiB of pinned memory: out of memory\n",
)
case(
    "field: a summary line of two tests, one of them about memory",
    run(
        summary=[
            f"FAILED {NODE} - torch.OutOfMemoryError: CUDA out of memo...",
            "FAILED tests/unit/test_data.py::test_x - ...",
        ],
        ends="2 failed in 1.00s",
    ),
    event(NODE),
)
case(
    "field: parameters with spaces, quotes and brackets",
    run(
        section(ERROR, header="test_q[x y-'[1]' - ok]"),
        summary=[
            "FAILED tests/test_q.py::test_q[x y-'[1]' - ok] - torch.OutOfMemoryError: CUDA..."
        ],
    ),
    event("tests/test_q.py::test_q[x y-'[1]' - ok]", **PLAIN),
)

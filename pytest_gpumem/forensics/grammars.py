"""How each framework says that memory ran out, as data: one table for all of them.

A grammar is a message's own words, found wherever they stand, and the figures in it. In its
patterns ``<tried>`` stands for a size with its unit, ``<tried#>`` for a bare number of bytes; the
name is the figure's. Sizes are powers of two whatever their unit's spelling: PyTorch, Paddle,
TensorFlow, XLA and the kernel print them so. ``total`` and ``free`` are the card's; ``allocated``,
``reserved``, ``private``, ``other`` and ``reserved_unallocated`` (reserved but unallocated) the
process's; ``allowed`` is a limit set below the card's size.

Figures make a message: behind any head, in any carrier. Without them it needs a context that says
error, unless nobody but a framework writes such words.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem.records.findings import GpuProcess

if TYPE_CHECKING:
    from collections.abc import Mapping

# No more digits than a size can have: whoever prints 3,000 of them does not tell a size.
_DIGITS = r"\d[\d,]{0,24}"
_UNIT = re.compile(r"([\d,.]+?)\.?\s*(?:bytes|([KMGTPEk])(?:i?B)?|B)?")
_SHIFTS = {"": 0, "k": 10, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}


def _figure(match: re.Match[str]) -> str:
    """Return the expression for ``<name>``, a size with its unit, or ``<name#>``, bare bytes."""
    name, bare = match.groups()
    if bare:
        return rf"(?P<{name}>{_DIGITS})(?!\d)"
    return rf"(?P<{name}>{_DIGITS}(?:\.\d{{0,6}})?\s?(?:bytes|[KMGTPE](?:i?B)?|kB|B)\b)"


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"(?<!\?P)<([a-z_]+)(#?)>", _figure, pattern))


class Grammar(NamedTuple):
    """One way to say it."""

    backend: str
    needles: tuple[str, ...]
    """Texts of which each message has one: what a log is searched for."""
    head: re.Pattern[str]
    """Matches where the message begins."""
    figures: tuple[re.Pattern[str], ...] = ()
    """Each searched for on its own, so that a message cut anywhere gives what is left of it."""
    distinct: bool = False
    """Whether nobody but the framework writes these words, so that they need no context."""
    kind: str = "error"
    """``error``; ``kill``: the host's word for a killed process; ``weak``: needs more evidence."""
    limit: bool = False
    """Whether the message itself says that a limit below the card's size was hit."""
    words: str = ""
    """The literal beginning of the message, by which one cut short is known."""


def _grammar(
    backend: str,
    needles: str,
    head: str,
    *figures: str,
    distinct: bool = False,
    kind: str = "error",
    limit: bool = False,
    words: str = "",
) -> Grammar:
    """Return a grammar; ``|`` separates its needles, which are its head where that is empty."""
    literal = tuple(needles.split("|"))
    pattern = _compile(head or "|".join(map(re.escape, literal)))
    return Grammar(
        backend, literal, pattern, tuple(map(_compile, figures)), distinct, kind, limit, words
    )


# c10/cuda/CUDACachingAllocator.cpp and its twins, from 1.0 ("cached", "total capacity;") to today
# ("has a total capacity of"; 2.1 wrote "capacty").
_TORCH = (
    r"(?:Tried|tried) to allocate <tried>",
    r"\b[GNX]PU (?P<device>\d{1,4})\b",
    r"capaci?ty of <total>",
    r"<total> total capacity",
    r"of which <free> is free",
    r"; <free> free\b",
    r"<allowed> allowed;",
    r"<allocated> is allocated by PyTorch",
    r"<allocated> already allocated",
    r"with <private> allocated in private pools",
    r"<reserved_unallocated> is reserved by PyTorch but unallocated",
    r"<reserved_unallocated> cached\b",
    r"<reserved> reserved in total",
)
_MPS = (
    r"MPS allocated: <allocated>",
    r"other allocations: <other>",
    r"max allowed: <allowed>",
    r"Tried to allocate <tried>",
)
# 2.13 warns so of each refused request, also of those that it then meets from its cache.
_REFUSED = (
    r"trying to (?:allocate|map) <tried>",
    r"on device (?P<device>\d{1,4})",
    r"\(free: <free#>",
    r"total: <total#>",
)
_HOST = r"(?:anon-rss|total-vm):<tried>"
_EXHAUSTED = r"(?:RESOURCE_EXHAUSTED|Resource exhausted)"
_OUT = r"[Oo]ut\s+of\s+memory"

GRAMMARS = (
    *(
        _grammar(
            backend,
            "out of memory",
            rf"(?:STAlloc : |GMLake : )?{words}(?! error)",
            *figures,
            words=words,
        )
        for backend, words, figures in (
            ("cuda", "CUDA out of memory", _TORCH),
            ("hip", "HIP out of memory", _TORCH),
            ("xpu", "XPU out of memory", _TORCH),
            ("mps", "MPS backend out of memory", _MPS),
            ("npu", "NPU out of memory", _TORCH),
            ("musa", "MUSA out of memory", _TORCH),
        )
    ),
    _grammar("unknown", "Tried to allocate", r"\bOut of memory\. Tried to allocate", *_TORCH),
    _grammar(
        "cuda",
        "failed with OOM on device",
        r"(?:memory \w+ )?failed with OOM on device",
        *_REFUSED,
    ),
    # Jetson: the allocator's own report fails before it can say that memory ran out.
    _grammar(
        "cuda",
        "NVML_SUCCESS ==",
        r"NVML_SUCCESS == .{0,80}INTERNAL ASSERT FAILED.{0,200}CUDACachingAllocator",
        distinct=True,
    ),
    _grammar(
        "cuda",
        "out of memory",
        r"cuda runtime error \(2\) ?: out of memory",
        distinct=True,
        words="cuda runtime error (2) :",
    ),
    # The allocator of cudaMallocAsync; its figures stand on lines of their own.
    _grammar(
        "cuda",
        "Allocation on device",
        r"Allocation on device(?: \d+)?(?: would exceed allowed memory| *$)",
        r"Allocation on device (?P<device>\d{1,4})",
        r"Currently allocated *: <allocated>",
        r"Requested *: <tried>",
        r"Device limit *: <total>",
        r"Free \(according to CUDA\): <free>",
        r"memory fraction\)\s*: <allowed>",
        words="Allocation on device",
    ),
    _grammar(
        "hip",
        "hipErrorOutOfMemory|hipErrorMemoryAllocation|out of memory",
        r"hipErrorOutOfMemory|hipErrorMemoryAllocation|HIP error: out of memory"
        r"|\bhip[A-Z]\w+\b.{0,120}?\bout of memory",
        distinct=True,
    ),
    # The libraries of CUDA and of ROCm, whoever calls them.
    _grammar(
        "hip",
        "ALLOC_FAILED|ALLOCATION_FAILED|miopenStatusAllocFailed|rocblas_status_memory_error",
        r"\b(?:HIP|ROC)[A-Z]+_(?:STATUS_)?ALLOC\w*_FAILED|\bMIOPEN\w*ALLOC\w*_?FAILED"
        r"|miopenStatusAllocFailed|rocblas_status_memory_error",
        distinct=True,
    ),
    _grammar(
        "hip",
        "not available to allocate buffer",
        r"Memory not available to allocate buffer",
        r"allocate buffer: <tried#>",
        distinct=True,
    ),
    _grammar(
        "cuda",
        "ALLOC_FAILED|ALLOCATION_FAILED|INSUFFICIENT_RESOURCES",
        r"\b(?:CU[A-Z]+|NV[A-Z]+)_(?:\w+_)?(?:ALLOC(?:ATION)?_FAILED|INSUFFICIENT_RESOURCES)\b",
        distinct=True,
    ),
    _grammar(
        "cuda",
        "STATUS_NOT_INITIALIZED",
        r"\b(?:CUBLAS|CUDNN|CUSOLVER)_STATUS_NOT_INITIALIZED",
        kind="weak",
        distinct=True,
    ),
    # The host's memory, by PyTorch.
    _grammar(
        "cpu",
        "DefaultCPUAllocator",
        r"DefaultCPUAllocator: (?:can't allocate memory|not enough memory)",
        r"tried to allocate <tried>",
        words="DefaultCPUAllocator: ",
    ),
    _grammar("cpu", "posix_memalign(", r"posix_memalign\(.{0,80}\) == 0\. 12 vs 0", distinct=True),
    _grammar(
        "cpu",
        "CPUAllocator|alloc_cpu",
        r"\[enforce fail at (?:alloc_cpu|CPUAllocator)\.cpp",
        distinct=True,
    ),
    # JAX and XLA.
    _grammar(
        "jax",
        "emory space",
        r"Ran out of memory in memory space",
        r"Used <tried> of",
        r"Used \S+ of <total>",
        distinct=True,
    ),
    _grammar(
        "jax",
        "That was not possible",
        r"Attempting to (?:reserve|allocate) .{0,80}?That was not possible",
        r"Attempting to (?:reserve|allocate) <tried>",
        r"There are <free> free",
        distinct=True,
    ),
    _grammar(
        "jax",
        "ut of memory while|ut of memory alloc",
        rf"{_EXHAUSTED}: (?:.{{0,200}}: )?Out\s+of\s+memory (?:while trying to allocate|"
        r"allocating)",
        r"allocat(?:e|ing) <tried>",
    ),
    _grammar(
        "jax",
        "ailed to allocate request",
        rf"{_EXHAUSTED}: Failed to allocate request for",
        r"request for \S+ \(<tried>\)",
        r"request for <tried>",
        r"device ordinal (?P<device>\d{1,4})",
    ),
    _grammar(
        "jax",
        "CUDA_ERROR_OUT_",
        r"(?:INTERNAL|Internal): .{0,200}CUDA_ERROR_OUT_(?:OF_MEMORY|\w*\.\.\.)",
        distinct=True,
    ),
    # TensorFlow.
    _grammar(
        "tensorflow",
        "ran out of memory",
        r"Allocator \((?P<allocator>GPU\w+)\) ran out of memory trying to allocate",
        r"trying to allocate <tried>",
        r"\(GPU_(?P<device>\d{1,4})_bfc\)",
        distinct=True,
    ),
    _grammar(
        "cpu",
        "ran out of memory|OOM when allocating",
        r"Allocator \((?:mkl)?cpu\w*\) ran out of memory trying to allocate"
        r"|OOM when allocating tensor.{0,400}?(?:device:CPU|allocator (?:mkl)?cpu)",
        r"trying to allocate <tried>",
        distinct=True,
    ),
    _grammar(
        "tensorflow",
        "OOM when allocating",
        r"OOM when allocating tensor",
        r"device:GPU:(?P<device>\d{1,4})",
        distinct=True,
        words="OOM when allocating tensor",
    ),
    _grammar(
        "tensorflow",
        "an out of memory trying",
        r"\bRan out of memory trying to allocate",
        r"trying to allocate <tried>",
        distinct=True,
    ),
    _grammar(
        "tensorflow",
        "ailed to allocate request",
        r"Failed to allocate request for",
        r"request for \S+ \(<tried>\)",
        r"request for <tried>",
        r"device ordinal (?P<device>\d{1,4})",
        distinct=True,
    ),
    _grammar("tensorflow", "ailed to allocate memory", r"failed to allocate memory(?: \[Op:|$)"),
    # CuPy.
    _grammar(
        "cupy",
        "out of memory to alloc",
        r"out of memory to allocate ",
        r"to allocate <tried>",
        r"\(total <allocated>",
        r"limit set to <allowed>",
        words="out of memory to allocate ",
    ),
    _grammar(
        "cupy",
        "ut of memory alloc",
        r"Out of memory allocating ",
        r"allocating <tried>",
        r"allocated so far: <allocated>",
        r"limit set to: <allowed>",
        words="Out of memory allocating ",
    ),
    _grammar(
        "cupy",
        "cudaErrorMemoryAllocation",
        r"CUDARuntimeError: cudaErrorMemoryAllocation",
        distinct=True,
    ),
    # RMM, cuDF, cuML: a bare "std::bad_alloc: CUDA error" may be any CUDA error.
    _grammar(
        "rmm",
        "ool size exceeded",
        r"Maximum pool size exceeded",
        r"failed to allocate <tried>",
        limit=True,
        distinct=True,
        words="Maximum pool size exceeded",
    ),
    _grammar(
        "rmm",
        "out_of_memory|bad_alloc|RMM_ERROR_OUT_OF_MEMORY",
        r"(?:std::bad_alloc: )?out_of_memory: .{0,400}(?:cudaErrorMemoryAllocation|out of memory"
        r"|CUDA error)|std::bad_alloc: (?:out_of_memory|CUDA error at: "
        r".{0,400}cudaErrorMemoryAllocation)|RMM_ERROR_OUT_OF_MEMORY",
        r"failed to allocate <tried>",
        distinct=True,
        words="std::bad_alloc: out_of_memory",
    ),
    _grammar(
        "rmm",
        "out of memory",
        r"FAIL: call='cudaMalloc\(.{0,200}\)'\. Reason: ?out of memory",
        distinct=True,
    ),
    # vLLM and SGLang set the card's memory aside beforehand.
    _grammar(
        "vllm",
        "Free memory on device",
        r"Free memory on device (?:cuda:(?P<device>\d{1,4}) )?\(",
        r"Free memory on device (?:cuda:\d+ )?\((?P<free_over>[\d.]{1,12})/<total>\)",
        r"utilization \([\d.]+, <tried>\)",
    ),
    _grammar(
        "vllm",
        "KV cache is needed",
        r"<tried> KV cache is needed, which is larger than",
        r"available KV cache memory \(<free>\)",
        limit=True,
        distinct=True,
    ),
    _grammar(
        "vllm",
        "stored in KV cache",
        r"is larger than the maximum number of tokens that can be "
        "stored in KV cache",
        limit=True,
        distinct=True,
    ),
    _grammar("vllm", "No available memory for", "", limit=True, distinct=True),
    _grammar(
        "sglang",
        "mem-fraction-static",
        r"[Nn]ot enough memory.{0,20}[Pp]lease try to (?:in|de)crease --mem-fraction-static",
        limit=True,
        distinct=True,
    ),
    # ggml and llama.cpp; the buffer of a CPU is the host's.
    _grammar(
        "ggml",
        "out of memory",
        r"ggml_\w+: allocating .{0,60}? on device \d+: (?:cuda|hip|musa)Malloc failed: out of "
        "memory",
        r"allocating <tried>",
        r"on device (?P<device>\d{1,4})",
        distinct=True,
    ),
    _grammar(
        "cpu",
        "ailed to allocate",
        r"ggml_backend_cpu\w*: failed to allocate buffer of size"
        r"|(?:ggml_\w+|alloc_tensor_range): failed to allocate (?:CPU\w*|CUDA_Host) buffer of size",
        r"buffer of size <tried#>",
        distinct=True,
    ),
    _grammar(
        "ggml",
        "ailed to allocate|nable to allocate",
        r"(?:failed|unable) to allocate (?:CUDA|ROCm|MUSA|SYCL|Vulkan|Metal|MTL|CANN)\d* buffer",
        r"buffer of size <tried#>",
        r"(?:CUDA|ROCm|MUSA|SYCL|Vulkan)(?P<device>\d{1,4}) buffer",
        distinct=True,
    ),
    # Vulkan, Metal, Level Zero, OpenCL, OptiX.
    _grammar(
        "vulkan",
        "evice memory allocation of size",
        r"[Dd]evice memory allocation of size",
        r"of size <tried#>",
        distinct=True,
    ),
    _grammar(
        "vulkan",
        "OutOfDeviceMemory|ERROR_OUT_OF_DEVICE_MEMORY",
        r"\bErrorOutOfDeviceMemory|\bVK_ERROR_OUT_OF_DEVICE_MEMORY",
        distinct=True,
    ),
    _grammar(
        "metal",
        "ErrorOutOfMemory|nsufficient Memory",
        r"Insufficient Memory(?: \((?:\d{8}:|IOAF)|$)|kIOGPU\w*ErrorOutOfMemory",
        distinct=True,
    ),
    _grammar(
        "metal",
        "maximum allowed buffer",
        r"Attempting to allocate .{0,40} which is greater than the maximum allowed buffer size",
        r"allocate <tried>",
        r"buffer size of <allowed>",
        distinct=True,
    ),
    _grammar(
        "metal",
        "nable to allocate",
        r"\[(?:metal::malloc|malloc_or_wait|malloc)\] Unable to allocate",
        r"allocate <tried>",
        distinct=True,
    ),
    _grammar(
        "xpu",
        "ERROR_OUT_OF_DEVICE_MEMORY|ERROR_MEM_OBJECT",
        r"\b(?:UR|ZE|PI)_(?:RESULT_)?ERROR_(?:OUT_OF_DEVICE_MEMORY|MEM_OBJECT_ALLOCATION_FAILURE)",
        distinct=True,
    ),
    _grammar(
        "host",
        "OUT_OF_HOST_MEMORY|OutOfHostMemory",
        r"\b(?:UR|ZE|PI|VK|CL)_(?:RESULT_)?(?:ERROR_)?OUT_OF_HOST_MEMORY|\bErrorOutOfHostMemory",
        distinct=True,
    ),
    _grammar(
        "opencl",
        "MEM_OBJECT_ALLOCATION_FAILURE",
        r"(?:\bCL_)?MEM_OBJECT_ALLOCATION_FAILURE",
        distinct=True,
    ),
    _grammar(
        "opencl",
        "bytes on device",
        r"POCL\b.{0,200}Failed to allocate \d+ bytes on device"
        r"|ERROR \| +Failed to allocate \d+ bytes on device",
        r"allocate <tried>",
        distinct=True,
    ),
    _grammar("cuda", "DEVICE_OUT_OF_MEMORY", r"\bOPTIX_ERROR_DEVICE_OUT_OF_MEMORY", distinct=True),
    # ONNX Runtime: the arena may be the host's.
    _grammar(
        "onnxruntime",
        "ailed to allocate memory for",
        r"Failed to allocate memory for requested buffer of size",
        r"buffer of size <tried#>",
        distinct=True,
    ),
    _grammar(
        "onnxruntime",
        "smaller than requested bytes",
        r"Available memory of \d+ is smaller than requested bytes of",
        r"memory of <free#>",
        r"requested bytes of <tried#>",
        limit=True,
        distinct=True,
    ),
    _grammar(
        "onnxruntime",
        "could not be allocated",
        r"Requested amount of memory \(.{0,40}\) could not be allocated",
        r"amount of memory \(<tried>\)",
        distinct=True,
    ),
    # TensorRT.
    _grammar(
        "tensorrt",
        "OutOfMemory|could not be allocated",
        r"Error Code \d+: OutOfMemory|OutOfMemory \(Requested size was"
        r"|Requested amount of GPU memory \(.{0,40}\) could not be",
        r"Requested size was <tried>",
        r"amount of GPU memory \(<tried>\)",
        distinct=True,
    ),
    _grammar(
        "tensorrt",
        "out of memory",
        r"(?i:Cuda Runtime \(out of memory\)|Cuda Error in \w+: 2 \(out of memory\))",
        distinct=True,
    ),
    # Paddle.
    _grammar(
        "paddle",
        "ut of memory error on",
        r"Out of memory error on GPU",
        r"Cannot allocate <tried>",
        r"on GPU (?P<device>\d{1,4})",
        r"<allocated> memory has been allocated",
        r"available memory is only <free>",
        distinct=True,
    ),
    _grammar(
        "paddle",
        "nforce allocating",
        r"[Ee]nforce allocating <= available failed",
        r"failed, <tried#>",
        r"> <free#>",
        distinct=True,
    ),
    # NCCL, Numba, Julia, Warp, Blender, faiss, XGBoost.
    _grammar(
        "nccl",
        "Cuda failure",
        r"(?:\S+:\d+:\d+ \[(?P<device>\d{1,4})\] .{0,80}?)?(?:NCCL WARN )?Cuda failure (?:\d+ )?"
        "'out of memory'",
        distinct=True,
    ),
    _grammar(
        "nccl",
        "ailed to CUDA calloc",
        r"(?:NCCL WARN )?Failed to CUDA calloc",
        r"calloc (?:async )?<tried>",
        distinct=True,
    ),
    _grammar(
        "numba",
        "CUDA_ERROR_OUT_",
        r"\[2\] Call to cu\w+ results in CUDA_ERROR_OUT_\w*",
        distinct=True,
    ),
    _grammar(
        "cuda",
        "ut of GPU memory|ut of device memory|ut of video memory",
        r"(?i:\bout of (?:gpu|device|video) memory)",
        r"trying to allocate <tried>",
    ),
    _grammar("cuda", "out of GPU and shared host memory", "", distinct=True),
    _grammar(
        "cuda",
        "(cudaMalloc error out",
        r"\bsize \d+ bytes \(cudaMalloc error out of memory",
        r"size <tried>",
        distinct=True,
    ),
    _grammar("cuda", "ailed to cudaMalloc", "", r"cudaMalloc <tried>", distinct=True),
    _grammar("cuda", "inside the cuDNN", r"Resource allocation failed inside the cuDNN library"),
    _grammar(
        "cuda",
        "Memory allocation failed",
        r"storage_manager\.h:\d+: Memory allocation failed",
        distinct=True,
    ),
    _grammar(
        "cuda",
        "on device 'cuda",
        r"Failed to allocate \d+ bytes on device 'cuda",
        r"allocate <tried>",
        r"cuda:(?P<device>\d{1,4})",
        distinct=True,
    ),
    # The driver's and the runtime's own name for it, and their calls, wherever they surface.
    _grammar(
        "cuda",
        "CUDA_ERROR_OUT_|cudaErrorMemoryAllocation|CUDA_OUT_OF_MEMORY",
        r"\bCUDA_ERROR_OUT_(?:OF_MEMORY\b|\w*(?:\.\.\.|\N{HORIZONTAL ELLIPSIS}))"
        r"|\bcudaErrorMemoryAllocation\b|\bCUDA_OUT_OF_MEMORY\b",
        r"allocate \S+ \(<tried>\)",
        r"allocate <tried>",
        r"Requested memory: <tried>",
        r"Free memory: <free>",
        distinct=True,
    ),
    _grammar(
        "cuda",
        "ut of memory",
        rf"\b(?i:CUDA (?:driver |runtime )?(?:API )?(?:error|fail(?:ure|ed)|runtime)|cu(?:da)?blas)"
        rf"\b.{{0,100}}?\b{_OUT}\b"
        rf"|\b(?:cuda|cu)[A-Z]\w+.{{0,160}}?\b{_OUT}\b|\bOut of memory in cu[A-Z]\w+\("
        rf"|(?i:gpu api call\)? ?\(?){_OUT}|\bcuda: ?{_OUT}\b"
        rf"|== cudaSuccess.{{0,60}}?\b{_OUT}\b|\bcudaSuccess ==.{{0,60}}?\b{_OUT}\b",
        r"cudaMalloc\w* <tried>",
        r"allocat(?:e|ing) <tried>",
        distinct=True,
        words="CUDA error: out of memory",
    ),
    _grammar("cuda", "out of memory", rf"(?i:cuda|gpu|vram|device).{{0,200}}?\b{_OUT}\b"),
    # The host's memory.
    _grammar(
        "host",
        "nable to allocate",
        r"Unable to allocate .{1,40} for an array with shape",
        r"Unable to allocate <tried>",
        words="Unable to allocate ",
    ),
    _grammar(
        "host",
        "low on memory|NODE_OUT_OF_MEMORY|due to memory pressure",
        r"Task was killed due to the node running low on memory|NODE_OUT_OF_MEMORY"
        r"|\b[1-9]\d* Workers? \(tasks / actors\) killed due to memory pressure",
        distinct=True,
    ),
    _grammar(
        "host",
        "is killed by signal",
        r"DataLoader worker \(pid (?P<pid>\d{1,10})\) is killed by signal: Killed",
        kind="weak",
        distinct=True,
    ),
    _grammar(
        "host",
        "Cannot allocate memory",
        r"(?:Errno 12\]|fork:) Cannot allocate memory",
        distinct=True,
    ),
    _grammar("host", "MemoryError", r"^(?:\w+\.)*_?(?:Array)?MemoryError:?$", distinct=True),
    _grammar("host", "std::bad_alloc", r"std::bad_alloc(?=['\"]?$)", distinct=True),
    _grammar(
        "host",
        "ut of memory: Kill|illed process",
        r"(?:Memory cgroup )?[Oo]ut of memory: Kill(?:ed)? process (?P<pid>\d{1,10})"
        r"|\bKilled process (?P<victim>\d{1,10}),? \(.{1,40}?\).{0,40}(?:total-vm|anon-rss)",
        _HOST,
        distinct=True,
        kind="kill",
    ),
    _grammar("host", "invoked oom", r"\S+ invoked oom-killer:", distinct=True, kind="kill"),
    _grammar(
        "host",
        "oom-kill|oom_kill|oom_reaper",
        r"\boom-kill:|oom_reaper: reaped process (?P<pid>\d{1,10})|Detected \d+ oom[_-]kill",
        distinct=True,
        kind="kill",
    ),
    _grammar(
        "host",
        "Out Of Memory",
        r"srun: error: \S+: tasks? [\d,-]+: Out Of Memory",
        distinct=True,
        kind="kill",
    ),
    _grammar(
        "host",
        "OOMKilled",
        r"\bOOMKilled\b(?!\W{0,3}(?:false|FALSE|False|0|null))",
        distinct=True,
        kind="kill",
    ),
)

PROBABLE_KILL = re.compile(
    r"(?:\S+: line \d+: +(?P<pid>\d{1,10}) [Kk]illed\b.*|\[\d+\]\+? +(?:\d+ )?Killed\b.*"
    r"|(?:zsh: )?[Kk]illed(?: {2,}\S.*)?|make(?:\[\d+\])?: \*\*\* .{0,200}(?:Killed|Error 137)"
    r"|(?:.{0,120}\b)?(?i:exit(?:ed)?(?: with)?(?: exit)?(?: (?:code|status|exit)|code){0,2})"
    r" ?[:=]? *\"?137\b.*)"
)
"""A process ended by SIGKILL; whoever sent it, memory is the likeliest reason."""
SHELL_KILL = re.compile(r"\S+: line \d+: +(?P<pid>\d{1,10}) [Kk]illed\b")
"""The shell's form of it, which needs no line of its own: it interrupts what others print."""

_CLASS = re.compile(
    r"(?!cudaError[A-Z])(?:[A-Za-z_]\w{0,80}(?:\.|::)){0,12}\w{0,80}?"
    r"(?:Error|Exception|Exhausted|Exit|Failure|OutOfMemory|EnforceNotMet|\bFailed\b)\w{0,80}"
    r"(?: ?\([^()]{1,60}\))?: ?"
)
_OOM_CLASS = re.compile(
    r"(?<![\w.])(?P<module>(?:[A-Za-z_]\w{0,80}(?:\.|::)){0,12})OutOfMemoryError\b(?![.(]\w)"
)
# Words of an error before the message, whoever wrote them.
_ERROR_HEAD = re.compile(
    r"(?i:error|exception|fail(?:ed|ure|s)?\b|fatal|panic|abort|critical|crash|terminat|\berr\b"
    r"|could not|cannot|unable)|\[[EF]\b|\b[EF]\d{4} |\b[EF] [\w./-]+:\d+\]"
)
_STATED = re.compile(r"(?i)\b(?:error|exception|failed|fatal): $")
_SEPARATED = re.compile(r"(?:^|[:=>|\]})\"'`(,.;!*-]|\\n)\s*$")
# Code and documents speak of the message; they do not report it.
_CODE = re.compile(
    r"\s*(?:>\s+|\d+\s+)?(?:(?:raise|return|assert|def|class|import|case|throw|grep|echo)\s"
    r"|from\s+\S+\s+import|[\w.]+(?: = [rfb(]{0,2}[\"\x27]| ?= ?\()"
    r"|(?:el)?if\s.{0,120}?\bin\b|except\s+[\w.(]|with\s+[\w.]+\("
    r"|print\(|logg?(?:er|ing)?\.\w+\(|self\.\w+\(|pytest\.|#(?!\d)|//|/?\*(?!\*)|\"\"\"|\x27{3})"
    r"|.*(?:\b(?:raises|match|compile|search|skip|warns|print|Error)\s?\(|\bmatch\s?=|==)"
    r"\s?[rfb]?[\"'][^\"')]*$",
    re.DOTALL,
)
QUOTING = re.compile(
    r"\bassert\b|\bAssertionError\b|DID NOT RAISE|Regex pattern|Expected regex|Actual message"
    r"|does not match|^\s*(?:Input|Regex|Pattern|Expected|Actual): |^\s*[-+?] +['\"]"
)
"""An assertion about a message: it quotes one, and what follows it compares."""
_PROSE_HEAD = re.compile(
    r"(?i)\b(?:if|when(?:ever)?|avoid\w*|prevent\w*|you|your|in case of|to fix|how to|see also|"
    r"hint|note|tip|e\.g\.|may|might|can|would|likely)\b[^:\]]{0,80}$"
)
_PROSE_TAIL = re.compile(
    r"(?i)[\"'`]?\s*(?:,? ?(?:errors?|issues?|problems?|exceptions?|conditions?|handling|handler|"
    r"situations?|crash(?:es)?|tests?|or|and|if|when(?! calling)|can|may|might|will|should|is|are|"
    r"try|consider)\b)"
)
HANDLED = re.compile(
    r"(?i)\b(?:retrying|retried|will retry|fall(?:ing|s)?[ -]?back|recover(?:ed|ing|y)?|"
    r"skipp(?:ed|ing)|reducing|halving|will try|trying again|not a failure|handled|"
    r"ignor(?:ed|ing)|moving to cpu|using cpu|switching to cpu|on cpu instead|"
    r"clearing (?:the )?cache|caught (?:an? )?(?:cuda )?(?:oom|out)|oom caught|caught:|"
    r"as expected|expected error)"
)
_BELOW_ERROR = re.compile(
    r"\b(?:WARN(?:ING)?|INFO|DEBUG|TRACE|NOTICE)\b(?![=/.])|(?i:level\W{1,4}(?:warn|info|debug|"
    r"trace|notice))|\b\w*Warning: |^\[[WI]\d{3,4} |\[[WI]:onnxruntime|^I[ \d][\w/. :]{3,80}\]"
)
_ERROR_LEVEL = re.compile(r"\b(?:ERROR|CRITICAL|FATAL|[\w.]+(?:Error|Exception))\b|(?i:level\W{1,4}"
                          r"(?:error|fatal|crit))")  # fmt: skip
_PROCESS = re.compile(
    r"\b(?:Process (?P<pid>\d{1,10})|[Tt]his process) has "
    r"(?P<size>\d[\d,]{0,24}\.?\d{0,6}\s?(?:bytes|[KMGT]iB)) memory in use"
)
_SHAPE = re.compile(
    r"shape ?(?:\[([\d,]{1,200})\]|((?:dim ?\{ ?size: \d{1,12} ?\} ?){1,16}))(?: and type (\w+))?"
)
_DTYPES = {"half": 2, "bfloat16": 2, "float": 4, "double": 8, "int32": 4, "int64": 8, "bool": 1}
ENDS = re.compile(
    r"but unallocated\b|reserved in total by PyTorch\)|cached\)|unoccupied cached memory"
)
"""Where PyTorch's message has given its figures."""
_PACKAGES = {"": "cuda", "torch": "cuda", "c10": "cuda", "cupy": "cupy", "ray": "host"}
"""Whose memory an exception named OutOfMemoryError is about, by the package it comes from."""
_CUT_CLASSES = ("torch.OutOfMemoryError", "torch.cuda.OutOfMemoryError", "cupy.cuda.memory.Out")
_CUT_CLASS = len("torch.OutOf")
_CUT_WORDS = 8
"""Fewer characters could begin anything."""
_AROUND = 200
"""How far from a message what is said of it stands."""
_DIMENSIONS = 16


class Message(NamedTuple):
    """What one message says; sizes in bytes."""

    backend: str
    kind: str
    limit: bool
    named: bool
    """Whether its context says that it is an error, or its words are nobody else's."""
    sizes: dict[str, int]
    printed: dict[str, str]
    device: int | None
    processes: tuple[GpuProcess, ...]
    pid: int | None
    whole: bool
    """Whether each figure of its grammar was there."""
    text: str
    start: int
    """Where in ``text`` the framework's own words begin."""

    @property
    def figures(self) -> int:
        """How much it tells."""
        return len(self.sizes) + len(self.processes)

    @property
    def complete(self) -> bool:
        """Whether nothing of the message is missing that could stand on further lines."""
        return self.whole or ENDS.search(self.text) is not None


_learned: list[Grammar] = []
_FIGURES = ("tried", "total", "free", "allocated", "allowed")
_SHORTEST = 6


def learn(messages: Mapping[str, str]) -> None:
    """Add a suite's own messages to the vocabulary, in the place of those that were added before.

    Args:
        messages: from a message, with ``<tried>``, ``<total>`` and the like where it has sizes,
            to whose memory ran out: ``card`` or ``host``.

    Raises:
        ValueError: in one sentence, when one is no message.

    """
    _learned[:] = [_taught(text, memory) for text, memory in messages.items()]


def _taught(text: str, memory: object) -> Grammar:
    backend = {"card": "unknown", "host": "host"}.get(str(memory))
    if backend is None:
        raise ValueError(f"{memory!r} for {text!r} is neither 'card' nor 'host'")
    parts = re.split(r"<([a-z_]+)>", text)
    wrong = next((name for name in parts[1::2] if name not in _FIGURES), None)
    if wrong is not None:
        allowed = ", ".join(f"<{name}>" for name in _FIGURES)
        raise ValueError(f"<{wrong}> in {text!r} is no figure; allowed are {allowed}")
    needle = max((part.strip() for part in parts[::2]), key=len)
    if len(needle) < _SHORTEST:
        raise ValueError(f"{text!r} is too short to be told from other lines")
    for at in range(0, len(parts), 2):
        parts[at] = re.escape(parts[at])
    for at in range(1, len(parts), 2):
        parts[at] = f"<{parts[at]}>"
    # With its sizes read on their own, a message that was cut is still one.
    return _grammar(backend, needle, f"{''.join(parts)}|{re.escape(needle)}", distinct=True)


def vocabulary() -> tuple[Grammar, ...]:
    """Return every grammar, those that a suite added first."""
    return (*_learned, *GRAMMARS)


def needles() -> tuple[str, ...]:
    """Return texts of which every message has one."""
    found = (needle for grammar in vocabulary() for needle in grammar.needles)
    return tuple(dict.fromkeys([*found, "OutOfMemory"]))


def size(text: str) -> int | None:
    """Return the bytes that a printed size names, None when it is none."""
    match = _UNIT.fullmatch(text.strip())
    if match is None:
        return None
    number = match[1].replace(",", "")
    if not re.fullmatch(r"\d{1,26}(?:\.\d+)?", number):
        return None
    return int(Decimal(number) * 2 ** _SHIFTS[match[2] or ""])


def parse(text: str, *, raised: bool = False) -> Message | None:
    """Return what ``text`` says if it is a message that memory ran out, else None.

    Args:
        text: a line, or the lines of one message, with whatever stands before it.
        raised: whether the carrier shows it as the error of a test; elsewhere a text that goes
            on about a retry or a fallback, or a log record below an error, was survived.

    """
    for grammar in vocabulary():
        if not any(needle in text for needle in grammar.needles):
            continue
        match = grammar.head.search(text)
        if match is None or "cudaErrorIllegal" in text:
            continue
        found = _message(grammar, text, match)
        if _reported(text, match.span(), found, raised=raised):
            return found
    return _by_class(text, raised=raised) or _cut_short(text)


def _reported(text: str, span: tuple[int, int], found: Message, *, raised: bool) -> bool:
    """Tell whether the text reports the message, rather than speaks of it or of its end."""
    start, end = span
    head = text[max(0, start - 2 * _AROUND) : start]
    if QUOTING.search(head) or _CODE.match(head):
        return False
    if not raised and _survived(text, end, head):
        return False
    if found.figures or found.kind == "kill":
        return True
    if _PROSE_HEAD.search(head):
        return False
    return _STATED.search(head) is not None or not _PROSE_TAIL.match(text[end : end + _AROUND])


def _survived(text: str, end: int, head: str) -> bool:
    """Tell whether the line itself says that the program went on."""
    last = ENDS.search(text, end)
    after = text[end : (last.end() if last else end) + 2 * _AROUND]
    if HANDLED.search(head[-_AROUND:]) or HANDLED.search(after):
        return True
    return _BELOW_ERROR.search(head) is not None and _ERROR_LEVEL.search(head) is None


def _named(head: str, tail: str) -> bool:
    """Tell whether what stands around words without figures says that they are an error."""
    if not head.strip():
        return not tail.strip(" .!\"'")
    return _SEPARATED.search(head) is not None and _ERROR_HEAD.search(head) is not None


def _by_class(text: str, *, raised: bool) -> Message | None:
    """Recognise the exception's name where the message is cut off or missing."""
    match = _OOM_CLASS.search(text) if "OutOfMemoryError" in text else None
    if match is None:
        return None
    backend = _PACKAGES.get(re.split(r"\.|::", match["module"])[0])
    grammar = next((each for each in GRAMMARS if each.backend == backend), None)
    head, tail = text[: match.start()], text[match.end() : match.end() + 1]
    if grammar is None or not _SEPARATED.search(head) or tail.isalnum():
        return None
    found = _message(grammar, text, match)._replace(named=True)
    return found if _reported(text, match.span(), found, raised=raised) else None


def _cut_short(text: str) -> Message | None:
    """Recognise a message that the summary cut within its first words."""
    start = text.rstrip().removesuffix("...").removesuffix("\N{HORIZONTAL ELLIPSIS}")
    if len(start) == len(text.rstrip()) or QUOTING.search(start):
        return None
    if len(start) >= _CUT_CLASS and any(each.startswith(start) for each in _CUT_CLASSES):
        return _message(GRAMMARS[0], text, None)
    words = start[max((match.end() for match in _CLASS.finditer(start)), default=len(start)) :]
    grammar = next((each for each in GRAMMARS if each.words.startswith(words)), None)
    return _message(grammar, text, None) if grammar and len(words) >= _CUT_WORDS else None


def _message(grammar: Grammar, text: str, match: re.Match[str] | None) -> Message:
    start, end = match.span() if match else (0, len(text))
    rest = text[start:]
    groups: dict[str, str] = dict(match.groupdict()) if match else {}
    missing = 0
    for pattern in grammar.figures:
        found = pattern.search(rest)
        missing += found is None
        for name, value in found.groupdict().items() if found else ():
            groups.setdefault(name, value)
    groups = {name: value for name, value in groups.items() if value is not None}
    over = groups.pop("free_over", None)
    if over and "total" in groups:
        # vLLM prints "(7.34/15.49 GiB)": one unit for both.
        groups["free"] = f"{over} {groups['total'].split()[-1]}"
    device = groups.pop("device", None)
    pid = groups.pop("pid", None) or groups.pop("victim", None)
    sizes = {name: value for name in groups if (value := size(groups[name])) is not None}
    if "tried" not in sizes and (tensor := _tensor(rest)):
        sizes["tried"] = tensor
    processes = tuple(
        GpuProcess(int(each["pid"]) if each["pid"] else None, taken, each["pid"] is None)
        for each in _PROCESS.finditer(rest)
        if (taken := size(each["size"])) is not None
    )
    if "reserved_unallocated" not in sizes and {"reserved", "allocated"} <= set(sizes):
        sizes["reserved_unallocated"] = max(0, sizes["reserved"] - sizes["allocated"])
    head = text[max(0, start - 2 * _AROUND) : start]
    return Message(
        grammar.backend,
        grammar.kind,
        grammar.limit,
        match is None or grammar.distinct or _named(head, text[end:]),
        sizes,
        {name: groups[name] for name in sizes if name in groups},
        None if device is None else int(device),
        processes,
        None if pid is None else int(pid),
        not missing,
        text,
        start,
    )


def _tensor(text: str) -> int | None:
    """Return the bytes of the tensor that TensorFlow names by its shape and type."""
    match = _SHAPE.search(text)
    if match is None:
        return None
    dims = re.findall(r"\d{1,12}", match[1] or match[2])
    size_of_one = _DTYPES.get(match[3] or "")
    if size_of_one is None or len(dims) > _DIMENSIONS:
        return None
    product = size_of_one
    for dim in dims:
        product *= int(dim)
    return product

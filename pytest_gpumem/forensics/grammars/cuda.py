"""What calls CUDA on its own, and the driver's and the runtime's words, wherever they surface."""

import re

from pytest_gpumem.forensics.grammars.language import grammar

_OUT = r"[Oo]ut\s+of\s+memory"
_CARDS = ("GPU", "gpu", "CUDA", "device", "video", "VRAM")

GRAMMARS = (
    # Pinned memory is the host's.
    grammar(
        "host",
        "HostAlloc|MallocHost|AllocHost|HostMalloc",
        rf"\b(?:cu|hip)(?:da)?(?:Mem)?(?:HostAlloc|MallocHost|AllocHost|HostMalloc)\w*\b"
        rf".{{0,160}}?\b{_OUT}\b",
        distinct=True,
    ),
    # A frame of Julia's trace, where its words were lost.
    grammar("cuda", "CUDA.OutOfGPUMemoryError(", r"\] CUDA\.OutOfGPUMemoryError\(", distinct=True),
    # NCCL, Numba, Julia, Warp, Blender, faiss, XGBoost.
    grammar(
        "nccl",
        "Cuda failure",
        r"(?:\S+:\d+:\d+ \[(?P<device>\d{1,4})\] .{0,80}?)?(?:NCCL WARN )?Cuda failure (?:\d+ )?"
        "'out of memory'",
        distinct=True,
    ),
    grammar(
        "nccl",
        "ailed to CUDA calloc",
        r"(?:NCCL WARN )?Failed to CUDA calloc",
        r"calloc (?:async )?<tried>",
        distinct=True,
    ),
    grammar(
        "numba",
        "CUDA_ERROR_OUT_",
        r"\[2\] Call to cu\w+ results in CUDA_ERROR_OUT_\w*",
        distinct=True,
    ),
    grammar(
        "cuda",
        "ut of GPU memory|ut of device memory|ut of video memory",
        r"(?i:\bout of (?:gpu|device|video) memory)",
        r"trying to allocate <tried>",
    ),
    grammar(
        "cuda",
        "out of GPU and shared host memory",
        r"(?:System is )?out of GPU and shared host memory",
        distinct=True,
    ),
    grammar(
        "cuda",
        "alloc fail type|allocator fail type",
        r"(?:Resources: alloc|device allocator) fail type \w+",
        r"size <tried>",
        distinct=True,
    ),
    # RELION; the rest of the card is its cache.
    grammar(
        "cuda",
        "ustomAllocator out of memory",
        r"(?i:cuda)CustomAllocator out of memory",
        r"requestedSpace: *<tried>",
        distinct=True,
    ),
    grammar("cuda", "bad_alloc: out of memory", "", distinct=True),
    grammar(
        "cuda",
        "ed to allocate|ble to allocate|not allocate|n't allocate",
        r"(?i:(?:failed|unable) to|could not|can(?:not|'t)) allocate (?:\S+ \S+ )?(?:of )?"
        r"(?:(?i:gpu|cuda|device|video|hpu|npu|xpu) memory"
        r"|(?:memory )?on (?:the )?(?i:gpu|device)\b)"
        r"(?!.{0,200}(?:insufficient|not supported|invalid))",
        r"allocate <tried>",
    ),
    grammar("cuda", "ailed to cudaMalloc", "", r"cudaMalloc <tried>", distinct=True),
    # Whoever prints the number of the error only, beside the call or its own check.
    grammar(
        "cuda",
        "cudaMalloc|cuMemAlloc|GPUassert: out",
        r"\bcu(?:da)?(?:Mem)?[Mm]?[Aa]lloc\w*\b[^;]{0,60}\b(?i:error|code|failed|returned)\b\D{0,20}\b2\b(?!\.)"
        r"|(?i:\berror):? ?2\b\W{0,3}cu(?:da)?(?:Mem)?[Mm]?[Aa]lloc\w*\("
        r"|\bGPUassert: out of memory",
        distinct=True,
    ),
    # What the runtime's manual says of cudaErrorMemoryAllocation, which bindings print.
    grammar("cuda", "unable to allocate enough memory to perform", "", distinct=True),
    # Who says so in words of his own.
    grammar(
        "cuda",
        "|".join(f"{lack} {card}" for lack in ("nsufficient", "ot enough") for card in _CARDS),
        rf"(?i:\b(?:insufficient|not enough) (?:{'|'.join(_CARDS)})(?: memory)?\b)",
    ),
    # What cuBLAS calls CUBLAS_STATUS_ALLOC_FAILED in words.
    grammar(
        "cuda",
        "resource allocation failed",
        r"(?i:cuda|cublas)\b.{0,40}: the resource allocation failed",
        distinct=True,
    ),
    # CatBoost.
    grammar(
        "cuda",
        "memory. Requested",
        r"Out of memory\. Requested \d",
        r"Requested <tried>",
        r"Free <free>",
        distinct=True,
    ),
    grammar(
        "cuda",
        "insufficient resources|out of GPU resources|NPP_MEMORY_ALL|NvMapMemAlloc",
        r"(?i:\bcu(?:sparse|blas|solver|dnn|fft)).{0,80}\binsufficient resources"
        r"|\[GPU\] .{0,40}\bout of GPU resources|\bNPP_MEMORY_ALLOCATION_ERR"
        r"|\bNvMapMemAlloc\w*: \d+ error 12\b",
        distinct=True,
    ),
    grammar("cuda", "inside the cuDNN", r"Resource allocation failed inside the cuDNN library"),
    grammar(
        "cuda",
        "Memory allocation failed",
        r"storage_manager\.h:\d+: Memory allocation failed",
        distinct=True,
    ),
    # The driver's and the runtime's own name for it, and their calls, wherever they surface.
    grammar(
        "cuda",
        "CUDA_ERROR_OUT_|cudaErrorMemoryAllocation|CUDA_OUT_OF_MEMORY",
        r"\bCUDA_ERROR_OUT_OF_MEMORY\b(?:: out of memory)?"
        r"|\bCUDA_ERROR_OUT_\w*(?:\.\.\.|\N{HORIZONTAL ELLIPSIS})"
        r"|\bcudaErrorMemoryAllocation\b(?::? out of memory)?|\bCUDA_OUT_OF_MEMORY\b",
        r"allocate \S+ \(<tried>\)",
        r"allocate <tried>",
        r"Requested memory: <tried#>",
        r"Free memory: <free#>",
        distinct=True,
    ),
    grammar(
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
    grammar("cuda", "out of memory", rf"(?i:cuda|gpu|vram|device)(?:(?! # ).){{0,200}}?\b{_OUT}\b"),
)

STICKY = re.compile(
    r"illegal memory access|device-side assert|unspecified launch failure|misaligned address"
    r"|cudaErrorIllegalAddress|uncorrectable ECC|CUDA_ERROR_ILLEGAL_ADDRESS"
)
"""Errors after which a process's card answers nothing else."""

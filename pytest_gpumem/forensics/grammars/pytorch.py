"""PyTorch: its allocators on every kind of card, the libraries that it calls, and the host."""

from pytest_gpumem.forensics.grammars.language import grammar

# c10/cuda/CUDACachingAllocator.cpp and its twins, from 1.0 ("cached", "total capacity;") to today
# ("has a total capacity of"; 2.1 wrote "capacty").
_TORCH = (
    r"(?:Tried|tried) to allocate <tried>",
    r"\b[A-Z]{2}U (?P<device>\d{1,4})\b",
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

GRAMMARS = (
    *(
        grammar(
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
    grammar(
        "unknown",
        "Tried to allocate",
        r"\b(?:Out|[A-Z]{2,8} out) of memory\. Tried to allocate \d"
        r"|\bTried to allocate [\d.]+ [KMG]iB(?: \(|\. )GPU \d+(?:;| has a total)",
        *_TORCH,
    ),
    grammar(
        "cuda",
        "failed with OOM on device",
        r"(?:memory \w+ )?failed with OOM on device",
        *_REFUSED,
    ),
    # Jetson: the allocator's own report fails before it can say that memory ran out.
    grammar(
        "cuda",
        "NVML_SUCCESS ==",
        r"NVML_SUCCESS == .{0,80}INTERNAL ASSERT FAILED.{0,200}CUDACachingAllocator",
        distinct=True,
    ),
    grammar(
        "cuda",
        "out of memory",
        r"cuda runtime error \(2\) ?: out of memory",
        distinct=True,
        words="cuda runtime error (2) :",
    ),
    # The allocator of cudaMallocAsync; its figures stand on lines of their own.
    grammar(
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
    grammar(
        "hip",
        "hipErrorOutOfMemory|hipErrorMemoryAllocation|out of memory",
        r"hipErrorOutOfMemory|hipErrorMemoryAllocation|HIP error: out of memory"
        r"|\bhip[A-Z]\w+\b.{0,120}?\bout of memory",
        distinct=True,
    ),
    # The libraries of CUDA and of ROCm, whoever calls them.
    grammar(
        "hip",
        "ALLOC_FAILED|ALLOCATION_FAILED|miopenStatusAllocFailed|rocblas_status_memory_error",
        r"\b(?:HIP|ROC)[A-Z]+_(?:STATUS_)?ALLOC\w*_FAILED|\bMIOPEN\w*ALLOC\w*_?FAILED"
        r"|miopenStatusAllocFailed|rocblas_status_memory_error",
        distinct=True,
    ),
    grammar(
        "hip",
        "not available to allocate buffer",
        r"Memory not available to allocate buffer",
        r"allocate buffer: <tried#>",
        distinct=True,
    ),
    grammar(
        "cuda",
        "ALLOC_FAILED|ALLOCATION_FAILED|INSUFFICIENT_RESOURCES",
        r"\b(?:CU[A-Z]+|NV[A-Z]+)_(?:\w+_)?(?:ALLOC(?:ATION)?_FAILED|INSUFFICIENT_RESOURCES)\b",
        distinct=True,
    ),
    grammar(
        "cuda",
        "STATUS_NOT_INITIALIZED",
        r"\b(?:CUBLAS|CUDNN|CUSOLVER)_STATUS_NOT_INITIALIZED",
        kind="weak",
        distinct=True,
    ),
    # The host's memory, by PyTorch.
    grammar(
        "cpu",
        "DefaultCPUAllocator|: you tried to alloc",
        r"(?:DefaultCPUAllocator: )?(?:can't allocate memory|not enough memory): you tried"
        r"|DefaultCPUAllocator: (?:can't allocate memory|not enough memory)",
        r"tried to allocate <tried>",
        words="DefaultCPUAllocator: ",
    ),
    grammar("cpu", "posix_memalign(", r"posix_memalign\(.{0,80}\) == 0\. 12 vs 0", distinct=True),
    grammar(
        "cpu",
        "CPUAllocator|alloc_cpu",
        r"\[enforce fail at (?:alloc_cpu|CPUAllocator)\.cpp",
        distinct=True,
    ),
)

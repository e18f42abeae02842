"""CuPy, and RMM, which cuDF and cuML allocate from."""

from pytest_gpumem.forensics.grammars.language import grammar

GRAMMARS = (
    grammar(
        "cupy",
        "out of memory to alloc",
        r"out of memory to allocate ",
        r"to allocate <tried>",
        r"\(total <allocated>",
        r"limit set to <allowed>",
        words="out of memory to allocate ",
    ),
    grammar(
        "cupy",
        "ut of memory alloc",
        r"Out of memory allocating ",
        r"allocating <tried>",
        r"allocated so far: <allocated>",
        r"limit set to: <allowed>",
        words="Out of memory allocating ",
    ),
    grammar(
        "cupy",
        "cudaErrorMemoryAllocation",
        r"CUDARuntimeError: cudaErrorMemoryAllocation",
        distinct=True,
    ),
    # RMM, cuDF, cuML: a bare "std::bad_alloc: CUDA error" may be any CUDA error.
    grammar(
        "rmm",
        "ool size exceed",
        r"Maximum pool size exceeded|Initial pool size exceeds the maximum pool size",
        r"failed to allocate <tried>",
        limit=True,
        distinct=True,
        words="Maximum pool size exceeded",
    ),
    grammar(
        "rmm",
        "out_of_memory|bad_alloc|RMM_ERROR_OUT_OF_MEMORY",
        r"(?:std::bad_alloc: )?out_of_memory: .{0,400}(?:cudaErrorMemoryAllocation|out of memory"
        r"|CUDA error)|std::bad_alloc: (?:out_of_memory|CUDA error at: "
        r".{0,400}cudaErrorMemoryAllocation)|RMM_ERROR_OUT_OF_MEMORY",
        r"failed to allocate <tried>",
        distinct=True,
        words="std::bad_alloc: out_of_memory",
    ),
    grammar(
        "rmm",
        "out of memory",
        r"FAIL: call='cudaMalloc\(.{0,200}\)'\. Reason: ?out of memory",
        distinct=True,
    ),
)

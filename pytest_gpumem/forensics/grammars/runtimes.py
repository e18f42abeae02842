"""ONNX Runtime, TensorRT and Paddle."""

from pytest_gpumem.forensics.grammars.language import grammar

GRAMMARS = (
    # ONNX Runtime: the arena may be the host's.
    grammar(
        "onnxruntime",
        "ailed to allocate memory for",
        r"Failed to allocate memory for requested buffer of size",
        r"buffer of size <tried#>",
        distinct=True,
    ),
    grammar(
        "onnxruntime",
        "smaller than requested bytes",
        r"Available memory of \d+ is smaller than requested bytes of",
        r"memory of <free#>",
        r"requested bytes of <tried#>",
        limit=True,
        distinct=True,
    ),
    grammar(
        "onnxruntime",
        "could not be allocated",
        r"Requested amount of memory \(.{0,40}\) could not be allocated",
        r"amount of memory \(<tried>\)",
        distinct=True,
    ),
    # TensorRT.
    grammar(
        "tensorrt",
        "OutOfMemory|could not be allocated",
        r"Error Code \d+: OutOfMemory|OutOfMemory \(Requested size was"
        r"|Requested amount of GPU memory \(.{0,40}\) could not be",
        r"Requested size was <tried>",
        r"amount of GPU memory \(<tried>\)",
        distinct=True,
    ),
    grammar(
        "tensorrt",
        "out of memory",
        r"(?i:Cuda Runtime \(out of memory\)|Cuda Error in \w+: 2 \(out of memory\))",
        distinct=True,
    ),
    # Paddle.
    grammar(
        "paddle",
        "ut of memory error on",
        r"Out of memory error on GPU",
        r"Cannot allocate <tried>",
        r"on GPU (?P<device>\d{1,4})",
        r"<allocated> memory has been allocated",
        r"available memory is only <free>",
        distinct=True,
    ),
    grammar("paddle", "memory::allocation::BadAlloc", "", distinct=True),
    grammar(
        "paddle",
        "nforce allocating",
        r"[Ee]nforce allocating <= available failed",
        r"failed, <tried#>",
        r"> <free#>",
        distinct=True,
    ),
)

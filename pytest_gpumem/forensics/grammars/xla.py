"""JAX and TensorFlow, which share XLA."""

from pytest_gpumem.forensics.grammars.language import grammar

_EXHAUSTED = r"(?:RESOURCE_EXHAUSTED|Resource exhausted)"

GRAMMARS = (
    # JAX and XLA.
    grammar(
        "jax",
        "emory space",
        r"Ran out of memory in memory space",
        r"Used <tried> of",
        r"Used \S+ of <total>",
        distinct=True,
    ),
    grammar("jax", "unlikely to have enough memory. Requires", "", distinct=True),
    grammar(
        "jax",
        "That was not possible",
        r"Attempting to (?:reserve|allocate) .{0,80}?That was not possible",
        r"Attempting to (?:reserve|allocate) <tried>",
        r"There are <free> free",
        distinct=True,
    ),
    grammar(
        "jax",
        "ut of memory while|ut of memory alloc",
        rf"{_EXHAUSTED}: (?:.{{0,200}}: )?Out\s+of\s+memory (?:while trying to allocate|"
        r"allocating)",
        r"allocat(?:e|ing) <tried>",
    ),
    grammar(
        "jax",
        "ailed to allocate request",
        rf"{_EXHAUSTED}: Failed to allocate request for",
        r"request for \S+ \(<tried>\)",
        r"request for <tried>",
        r"device ordinal (?P<device>\d{1,4})",
    ),
    grammar(
        "jax",
        "CUDA_ERROR_OUT_",
        r"(?:INTERNAL|Internal): .{0,200}CUDA_ERROR_OUT_(?:OF_MEMORY|\w*\.\.\.)",
        distinct=True,
    ),
    # TensorFlow.
    grammar(
        "tensorflow",
        "ran out of memory",
        r"Allocator \((?P<allocator>GPU\w+)\) ran out of memory trying to allocate",
        r"trying to allocate <tried>",
        r"\(GPU_(?P<device>\d{1,4})_bfc\)",
        distinct=True,
    ),
    grammar(
        "cpu",
        "ran out of memory|OOM when allocating",
        r"Allocator \((?:mkl)?cpu\w*\) ran out of memory trying to allocate"
        r"|OOM when allocating tensor.{0,400}?(?:device:CPU|allocator (?:mkl)?cpu)",
        r"trying to allocate <tried>",
        distinct=True,
    ),
    grammar(
        "tensorflow",
        "OOM when allocating",
        r"OOM when allocating tensor",
        r"device:GPU:(?P<device>\d{1,4})",
        distinct=True,
        words="OOM when allocating tensor",
    ),
    grammar(
        "tensorflow",
        "an out of memory trying",
        r"\bRan out of memory trying to allocate",
        r"trying to allocate <tried>",
        distinct=True,
    ),
    grammar(
        "tensorflow",
        "ailed to allocate request",
        r"Failed to allocate request for",
        r"request for \S+ \(<tried>\)",
        r"request for <tried>",
        r"device ordinal (?P<device>\d{1,4})",
        distinct=True,
    ),
    grammar(
        "cpu",
        "ailed to allocate memory",
        r"device:CPU:\d+\}\} failed to allocate memory \[Op:",
        distinct=True,
    ),
    grammar(
        "tensorflow",
        "ailed to allocate memory",
        rf"{_EXHAUSTED}: (?:.{{0,200}}[:}}] )?failed to allocate memory"
        r"|(?:device:GPU:(?P<device>\d{1,4})\}\} )?failed to allocate memory \[Op:",
        distinct=True,
    ),
)

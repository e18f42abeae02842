"""What serves language models: vLLM, SGLang, and llama.cpp with ggml."""

from pytest_gpumem.forensics.grammars.language import grammar

GRAMMARS = (
    # vLLM and SGLang set the card's memory aside beforehand.
    grammar(
        "vllm",
        "Free memory on device",
        r"Free memory on device (?:cuda:(?P<device>\d{1,4}) )?\(",
        r"Free memory on device (?:cuda:\d+ )?\((?P<free_over>[\d.]{1,12})/<total>\)",
        r"utilization \([\d.]+, <tried>\)",
    ),
    grammar(
        "vllm",
        "KV cache is needed",
        r"<tried> KV cache is needed, which is larger than",
        r"available KV cache memory \(<free>\)",
        limit=True,
        distinct=True,
    ),
    grammar(
        "vllm",
        "stored in KV cache",
        r"is larger than the maximum number of tokens that can be "
        "stored in KV cache",
        limit=True,
        distinct=True,
    ),
    grammar("vllm", "No available memory for", "", limit=True, distinct=True),
    grammar(
        "sglang",
        "mem-fraction-static",
        r"[Nn]ot enough memory.{0,20}[Pp]lease try to (?:in|de)crease --mem-fraction-static",
        limit=True,
        distinct=True,
    ),
    grammar(
        "sglang",
        "ry to lower your batch size",
        r"\b[A-Z]\w+ out of memory\. Try to lower your batch size",
        limit=True,
        distinct=True,
    ),
    # FlashInfer, from a workspace of a fixed size.
    grammar(
        "sglang",
        "in AlignedAllocator",
        r"Failed to allocate memory for \w+ with size \d+",
        r"with size <tried#>",
        limit=True,
        distinct=True,
    ),
    grammar(
        "tgi",
        "ot enough memory to handle",
        r"Not enough memory to handle .{0,80}\btokens",
        distinct=True,
    ),
    # ggml and llama.cpp; the buffer of a CPU is the host's.
    grammar(
        "ggml",
        "out of memory",
        r"ggml_\w+: allocating .{0,60}? on device \d+: (?:cuda|hip|musa)Malloc failed: out of "
        "memory",
        r"allocating <tried>",
        r"on device (?P<device>\d{1,4})",
        distinct=True,
    ),
    grammar(
        "cpu",
        "ailed to allocate",
        r"ggml_backend_cpu\w*: failed to allocate buffer of size"
        r"|(?:ggml_\w+|alloc_tensor_range): failed to allocate (?:CPU\w*|CUDA_Host) buffer of size",
        r"buffer of size <tried#>",
        distinct=True,
    ),
    grammar(
        "ggml",
        "ailed to allocate|nable to allocate",
        r"(?:failed|unable) to allocate (?:CUDA|ROCm|MUSA|SYCL|Vulkan|Metal|MTL|CANN)\d* buffer",
        r"buffer of size <tried#>",
        r"(?:CUDA|ROCm|MUSA|SYCL|Vulkan)(?P<device>\d{1,4}) buffer",
        distinct=True,
    ),
)

"""How each framework says that memory ran out, as data: one table for all of them.

A grammar is the beginning of a message and the figures in it. In its patterns ``<tried>`` stands
for a size with its unit, ``<tried#>`` for a bare number of bytes; the name is the figure's. Sizes
are powers of two whatever their unit's spelling: PyTorch, Paddle, TensorFlow, XLA and the kernel
print them so. ``total`` and ``free`` are the card's; ``allocated``, ``reserved``, ``private``,
``other`` and ``reserved_unallocated`` (reserved but unallocated) the process's; ``allowed`` is a
limit set below the card's size.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import NamedTuple

from pytest_gpumem.forensics.records import GpuProcess

_SIZE = r"(?P<{}>\d[\d,]*\.?\d*\s?(?:bytes|[KMGTPE]i?B|kB|B)\b)"
_NUMBER = r"(?P<{}>\d[\d,]*)\b"
_UNIT = re.compile(r"([\d,.]+?)\.?\s*(?:bytes|([KMGTPEk])i?B|B)?")
_SHIFTS = {"": 0, "k": 10, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}


def _compile(pattern: str) -> re.Pattern[str]:
    pattern = re.sub(r"<(\w+)#>", lambda match: _NUMBER.format(match[1]), pattern)
    return re.compile(re.sub(r"(?<!\?P)<(\w+)>", lambda match: _SIZE.format(match[1]), pattern))


class Grammar(NamedTuple):
    """One way to say it."""

    backend: str
    head: re.Pattern[str]
    """Matches where the message begins."""
    figures: tuple[re.Pattern[str], ...] = ()
    """Each searched for on its own, so that a message cut anywhere gives what is left of it."""
    bare: bool = False
    """Whether the framework prints it without the name of an exception."""
    kind: str = "error"
    """``error``; ``kill``: the host's word for a killed process; ``weak``: needs more evidence."""
    limit: bool = False
    """Whether the message itself says that a limit below the card's size was hit."""
    words: str = ""
    """The literal beginning of the message, by which one cut short is known."""


def _grammar(
    backend: str,
    head: str,
    *figures: str,
    bare: bool = False,
    kind: str = "error",
    limit: bool = False,
    words: str = "",
) -> Grammar:
    return Grammar(backend, _compile(head), tuple(map(_compile, figures)), bare, kind, limit, words)


# c10/cuda/CUDACachingAllocator.cpp and its twins, from 1.0 ("cached", "total capacity;") to today
# ("has a total capacity of"; 2.1 wrote "capacty").
_TORCH = (
    r"(?:Tried|tried) to allocate <tried>",
    r"\b[GNX]PU (?P<device>\d+)\b",
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
_HOST = r"(?:anon-rss|total-vm):<tried>"

GRAMMARS = (
    *(
        _grammar(
            backend,
            rf"(?:STAlloc : |GMLake : )?{words}(?:\.|\b)(?! error)",
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
    _grammar("unknown", r"Out of memory\. Tried to allocate", *_TORCH),
    # Jetson: the allocator's own report fails before it can say that memory ran out.
    _grammar("cuda", r"NVML_SUCCESS == .*INTERNAL ASSERT FAILED.*CUDACachingAllocator"),
    _grammar(
        "cuda", r"cuda runtime error \(2\) ?: out of memory", words="cuda runtime error (2) :"
    ),
    # The allocator of cudaMallocAsync; its figures stand on lines of their own.
    _grammar(
        "cuda",
        r"Allocation on device(?: \d+)? would exceed allowed memory",
        r"Allocation on device (?P<device>\d+)",
        r"Currently allocated *: <allocated>",
        r"Requested *: <tried>",
        r"Device limit *: <total>",
        r"Free \(according to CUDA\): <free>",
        r"memory fraction\)\s*: <allowed>",
        words="Allocation on device",
    ),
    _grammar("cuda", r"(?i:CUDA error: out of memory)", words="CUDA error: out of memory"),
    _grammar("cuda", r"CUDA driver error: out of memory", words="CUDA driver error: out of memory"),
    _grammar("hip", r"(?:HIP error: out of memory|.*hipErrorOutOfMemory)"),
    _grammar("xpu", r".*UR_RESULT_ERROR_OUT_OF_(?:DEVICE|HOST)_MEMORY"),
    _grammar("cuda", r"(?:CUDA error: )?CUBLAS_STATUS_ALLOC_FAILED"),
    _grammar("cuda", r"(?:cuDNN error: )?CUDNN_STATUS_ALLOC_FAILED"),
    _grammar(
        "cuda",
        r"(?:CUDA error: |cuDNN error: |cusolver error: )?"
        r"(?:CUBLAS|CUDNN|CUSOLVER)_STATUS_NOT_INITIALIZED",
        kind="weak",
    ),
    _grammar(
        "cpu",
        r"(?:\[enforce fail at .{0,200}?\] ?.{0,60}?|data\. )?DefaultCPUAllocator: "
        r"(?:can't allocate memory|not enough memory)",
        r"tried to allocate <tried>",
        words="DefaultCPUAllocator: ",
    ),
    _grammar("cpu", r"(?:\[enforce fail at .{0,200}?\] ?)?posix_memalign\(.*\) == 0\. 12 vs 0"),
    _grammar("cpu", r"\[enforce fail at (?:alloc_cpu|CPUAllocator)\.cpp"),
    # JAX and XLA.
    _grammar(
        "jax",
        r"(?:RESOURCE_EXHAUSTED|Resource exhausted): Out of memory (?:while trying to allocate|"
        r"allocating)",
        r"allocat(?:e|ing) <tried>",
    ),
    _grammar("jax", r"(?:RESOURCE_EXHAUSTED|Resource exhausted): (?:.* )?[Oo]ut of memory"),
    _grammar("jax", r"(?:INTERNAL|Internal): .*CUDA_ERROR_OUT_OF_MEMORY"),
    _grammar(
        "jax",
        r"(?:RESOURCE_EXHAUSTED|Resource exhausted): Failed to allocate request for",
        r"request for <tried>",
    ),
    # TensorFlow.
    _grammar(
        "tensorflow",
        r"Allocator \((?P<allocator>\w+)\) ran out of memory trying to allocate",
        r"trying to allocate <tried>",
        r"\(GPU_(?P<device>\d+)_bfc\)",
        bare=True,
    ),
    _grammar(
        "tensorflow",
        r"(?:.{0,80}?(?:RESOURCE_EXHAUSTED|Resource exhausted)[:.] ?)?"
        r"(?:\{\{node .{0,200}?\}\} ?)?OOM when allocating tensor",
        r"device:GPU:(?P<device>\d+)",
        bare=True,
        words="OOM when allocating tensor",
    ),
    _grammar(
        "tensorflow",
        r"Failed to allocate request for",
        r"request for \S+ \(<tried>\)",
        r"request for <tried>",
        r"device ordinal (?P<device>\d+)",
        bare=True,
    ),
    # CuPy.
    _grammar(
        "cupy",
        r"out of memory to allocate ",
        r"to allocate <tried>",
        r"\(total <allocated>",
        r"limit set to <allowed>",
        words="out of memory to allocate ",
    ),
    _grammar(
        "cupy",
        r"Out of memory allocating ",
        r"allocating <tried>",
        r"allocated so far: <allocated>",
        r"limit set to: <allowed>",
        words="Out of memory allocating ",
    ),
    _grammar("cupy", r"cudaErrorMemoryAllocation: out of memory"),
    # RMM, cuDF, cuML: a bare "std::bad_alloc: CUDA error" may be any CUDA error.
    _grammar(
        "rmm",
        r"(?:std::bad_alloc: )?(?:out_of_memory: )?(?:RMM failure at: ?\S+ )?"
        r"Maximum pool size exceeded",
        r"failed to allocate <tried>",
        limit=True,
        words="Maximum pool size exceeded",
    ),
    _grammar(
        "rmm",
        r"(?:std::bad_alloc: )?out_of_memory: .*(?:cudaErrorMemoryAllocation|out of memory|"
        r"CUDA error)|std::bad_alloc: (?:out_of_memory|CUDA error at: "
        r".*cudaErrorMemoryAllocation)",
        r"failed to allocate <tried>",
        words="std::bad_alloc: out_of_memory",
    ),
    _grammar(
        "rmm",
        r"(?:.* )?FAIL: call='cudaMalloc\(.*\)'\. Reason: ?out of memory",
        bare=True,
    ),
    # vLLM.
    _grammar(
        "vllm",
        r"Free memory on device (?:cuda:(?P<device>\d+) )?\(",
        r"Free memory on device (?:cuda:\d+ )?\((?P<free_over>[\d.]+)/<total>\)",
        r"utilization \([\d.]+, <tried>\)",
    ),
    _grammar("vllm", r"No available memory for the cache blocks", limit=True),
    # ggml and llama.cpp.
    _grammar(
        "ggml",
        r"ggml_\w+: allocating .* on device \d+: (?:cuda|hip|musa)Malloc failed: out of memory",
        r"allocating <tried>",
        r"on device (?P<device>\d+)",
        bare=True,
    ),
    _grammar(
        "ggml",
        r"(?:ggml_\w+|alloc_tensor_range): failed to allocate (?:CUDA|ROCm|MUSA|SYCL|Vulkan)\d* "
        r"buffer of size",
        r"buffer of size <tried#>",
        r"(?:CUDA|ROCm|MUSA|SYCL|Vulkan)(?P<device>\d+) buffer",
        bare=True,
    ),
    # ONNX Runtime: the arena may be the host's.
    _grammar(
        "onnxruntime",
        r"(?:.*bfc_arena\.cc.* )?Failed to allocate memory for requested buffer of size",
        r"buffer of size <tried#>",
        bare=True,
    ),
    # TensorRT.
    _grammar(
        "tensorrt",
        r"(?:.*\b)?Error Code \d+: OutOfMemory|.*Requested amount of GPU memory \(.*could not be",
        r"Requested size was <tried>",
        r"amount of GPU memory \(<tried>\)",
        bare=True,
    ),
    _grammar("tensorrt", r"(?:.*\b)?Error Code 1: Cuda Runtime \(out of memory\)", bare=True),
    # Paddle.
    _grammar(
        "paddle",
        r"(?:ResourceExhaustedError: |\(ResourceExhausted\) )?\s*Out of memory error on GPU",
        r"Cannot allocate <tried>",
        r"on GPU (?P<device>\d+)",
        r"<allocated> memory has been allocated",
        r"available memory is only <free>",
        bare=True,
    ),
    _grammar(
        "paddle",
        r"[Ee]nforce allocating <= available failed",
        r"failed, <tried#>\b",
        r"> <free#>\b",
        bare=True,
    ),
    # Numba, NCCL, cuda-memcheck, and the driver's own name for it, wherever it surfaces.
    _grammar("numba", r"\[2\] Call to cu\w+ results in CUDA_ERROR_OUT_OF_MEMORY"),
    _grammar(
        "nccl",
        r"(?:\S+:\d+:\d+ \[(?P<device>\d+)\] )?(?:.* )?(?:NCCL WARN )?Cuda failure (?:\d+ )?"
        r"'out of memory'",
        bare=True,
    ),
    _grammar(
        "nccl",
        r"(?:(?:.* )?NCCL WARN )?Failed to CUDA calloc\b",
        r"calloc (?:async )?<tried>",
        bare=True,
    ),
    _grammar(
        "cuda",
        r"(?:========= )?Program hit cudaErrorMemoryAllocation",
        bare=True,
    ),
    _grammar("cuda", r".{0,200}?\bCUDA_ERROR_OUT_OF_MEMORY"),
    _grammar("cuda", r".{0,200}?\bcudaErrorMemoryAllocation\b.{0,40}out of memory"),
    # The host's memory.
    _grammar(
        "host",
        r"Unable to allocate .* for an array with shape",
        r"Unable to allocate <tried>",
        words="Unable to allocate ",
    ),
    _grammar("host", r"Task was killed due to the node running low on memory"),
    _grammar(
        "host",
        r"DataLoader worker \(pid (?P<pid>\d+)\) is killed by signal: Killed",
        kind="weak",
    ),
    _grammar("host", r"MemoryError$", bare=True),
    _grammar(
        "host",
        r"(?:Memory cgroup )?[Oo]ut of memory: Kill(?:ed)? process (?P<pid>\d+)",
        _HOST,
        bare=True,
        kind="kill",
    ),
    _grammar("host", r"\S+ invoked oom-killer:", bare=True, kind="kill"),
    _grammar("host", r"oom-kill:|oom_reaper: reaped process (?P<pid>\d+)", bare=True, kind="kill"),
    _grammar("host", r"slurmstepd: error: Detected \d+ oom[_-]kill", bare=True, kind="kill"),
    _grammar("host", r"srun: error: \S+: tasks? [\d,-]+: Out Of Memory", bare=True, kind="kill"),
    _grammar("host", r"(?:Reason: +|\"reason\": ?\")?OOMKilled\b", bare=True, kind="kill"),
)

PROBABLE_KILL = re.compile(
    r"(?:\S+: line \d+: +(?P<pid>\d+) Killed\b.*|\[\d+\]\+? +(?:\d+ )?Killed\b.*"
    r"|(?:zsh: )?[Kk]illed(?: {2,}\S.*)?|make(?:\[\d+\])?: \*\*\* .{0,200}(?:Killed|Error 137)"
    r"|(?:.{0,120}\b)?(?i:exit(?:ed)?(?: with)?(?: exit)?(?: (?:code|status|exit)|code){0,2})"
    r" ?[:=]? *\"?137\b.*)"
)
"""A process ended by SIGKILL; whoever sent it, memory is the likeliest reason."""

_CLASS = re.compile(
    r"(?!cudaError[A-Z])(?:[A-Za-z_]\w{0,80}(?:\.|::)){0,12}\w{0,80}?"
    r"(?:Error|Exception|Exhausted|Exit|Failure|OutOfMemory|EnforceNotMet|\bFailed\b)\w{0,80}"
    r"(?:\(\w+\))?: ?|C\+\+ exception with description \""
)
_OOM_CLASS = re.compile(r"(?P<module>(?:[A-Za-z_]\w{0,80}(?:\.|::)){0,12})OutOfMemoryError\b")
# What stands between an exception's name and the framework's own words.
_WRAPPER = re.compile(
    r"(?:\[ONNXRuntimeError\] : \d+ : \w+ : "
    r"|Failed to run autotuning code block: |Capture cuda graph failed: "
    r"|\{\{function_node .{0,200}?\}\} |Graph execution error:\s*|RMM failure at: ?\S+ "
    r"|\[\w+\d*\]: |std::exception: |\(External\) ?|\[\w+, \w+\] ?)"
)
_QUOTING = re.compile(r"^(?:assert\b|AssertionError\b|Failed: |Regex pattern|Pattern )|['\"`]")
HANDLED = re.compile(
    r"(?i)\b(?:retry(?:ing)?|retried|fall(?:ing|s)?[ -]?back|recover(?:ed|ing|y)|skipp(?:ed|ing)|"
    r"reducing|halving|will try|trying again|not a failure|handled|ignor(?:ed|ing)|"
    r"moving to cpu|using cpu|switching to cpu|on cpu instead)\b"
)
_PROCESS = re.compile(
    r"\b(?:Process (?P<pid>\d+)|[Tt]his process) has "
    r"(?P<size>\d[\d,]*\.?\d*\s?(?:bytes|[KMGT]iB)) memory in use"
)
_SHAPE = re.compile(r"shape ?(?:\[([\d,]+)\]|((?:dim ?\{ ?size: \d+ ?\} ?)+))(?: and type (\w+))?")
_DTYPES = {"half": 2, "bfloat16": 2, "float": 4, "double": 8, "int32": 4, "int64": 8, "bool": 1}
ENDS = re.compile(
    r"but unallocated\b|reserved in total by PyTorch\)|cached\)|unoccupied cached memory"
)

_WORDS = tuple(grammar.words for grammar in GRAMMARS if grammar.words)


class Message(NamedTuple):
    """What one message says; sizes in bytes."""

    backend: str
    kind: str
    limit: bool
    named: bool
    """Whether it stood behind the name of an exception, or is printed so by its framework."""
    sizes: dict[str, int]
    printed: dict[str, str]
    device: int | None
    processes: tuple[GpuProcess, ...]
    pid: int | None
    whole: bool
    """Whether each figure of its grammar was there."""
    text: str

    @property
    def figures(self) -> int:
        """How much it tells."""
        return len(self.sizes) + len(self.processes)

    @property
    def complete(self) -> bool:
        """Whether nothing of the message is missing that could stand on further lines."""
        return self.whole or ENDS.search(self.text) is not None


def size(text: str) -> int | None:
    """Return the bytes that a printed size names, None when it is none."""
    match = _UNIT.fullmatch(text.strip())
    if match is None:
        return None
    number = match[1].replace(",", "")
    if not re.fullmatch(r"\d+(?:\.\d+)?", number):
        return None
    return int(Decimal(number) * 2 ** _SHIFTS[match[2] or ""])


def parse(text: str, *, raised: bool = False) -> Message | None:
    """Return what ``text`` says if it is a message that memory ran out, else None.

    Args:
        text: from where the message may begin, without the carrier's prefixes.
        raised: whether the carrier shows it as the error of a test; elsewhere a text that goes
            on about a retry or a fallback tells of a failure that was survived.

    """
    rest, named = _unwrap(text)
    if not raised and HANDLED.search(text):
        return None
    for grammar in GRAMMARS:
        match = grammar.head.match(rest)
        if match is not None and "cudaErrorIllegal" not in rest:
            return _message(grammar, text, rest, named or grammar.bare, match)
    found = _cut_short(rest, named) or _by_class(text) or (_inside(rest) if named else None)
    return found and _message(*found, True, None)


def _unwrap(text: str) -> tuple[str, bool]:
    """Return the text behind exceptions' names and wrappers, and whether there was a name."""
    at = 0
    named = False
    for _ in range(8):
        match = _CLASS.match(text, at)
        if match is None:
            wrapper = _WRAPPER.match(text, at)
            if wrapper is None:
                break
            at = wrapper.end()
        else:
            # "AssertionError: CUDA out of memory" quotes; it did not run out itself.
            named = named or not match[0].startswith("AssertionError")
            at = match.end()
    return text[at:].lstrip(), named


def _cut_short(rest: str, named: bool) -> tuple[Grammar, str, str] | None:
    """Recognise a message that the summary cut within its first words."""
    start = rest.rstrip().removesuffix("...").removesuffix("\N{HORIZONTAL ELLIPSIS}")
    if not named or len(start) == len(rest.rstrip()) or len(start) < 8:
        return None
    grammar = next((each for each in GRAMMARS if each.words.startswith(start)), None)
    return grammar and (grammar, rest, rest)


def _by_class(text: str) -> tuple[Grammar, str, str] | None:
    """Recognise the exception's name where the message is cut off or missing."""
    match = _OOM_CLASS.match(text)
    if match is None:
        return None
    module = match["module"]
    backend = "cupy" if module.startswith("cupy") else "cuda"
    if module and not module.startswith(("torch", "cupy", "c10")):
        return None
    return next(each for each in GRAMMARS if each.backend == backend), text, text


def _inside(rest: str) -> tuple[Grammar, str, str] | None:
    """Recognise PyTorch's message with its figures within another exception's own words."""
    for grammar in GRAMMARS[:6]:
        at = rest.find(f"{grammar.words}. Tried to allocate ")
        if at > 0 and not _QUOTING.search(rest[:at]):
            return grammar, rest, rest[at:]
    return None


def _message(
    grammar: Grammar, text: str, rest: str, named: bool, match: re.Match[str] | None
) -> Message:
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
    pid = groups.pop("pid", None)
    groups.pop("allocator", None)
    sizes = {name: value for name in groups if (value := size(groups[name])) is not None}
    if grammar.backend == "tensorflow" and "tried" not in sizes and (shape := _tensor(rest)):
        sizes["tried"] = shape
    processes = tuple(
        GpuProcess(int(each["pid"]) if each["pid"] else None, taken, each["pid"] is None)
        for each in _PROCESS.finditer(rest)
        if (taken := size(each["size"])) is not None
    )
    if "reserved_unallocated" not in sizes and {"reserved", "allocated"} <= set(sizes):
        sizes["reserved_unallocated"] = max(0, sizes["reserved"] - sizes["allocated"])
    return Message(
        grammar.backend,
        grammar.kind,
        grammar.limit,
        named,
        sizes,
        {name: groups[name] for name in sizes if name in groups},
        None if device is None else int(device),
        processes,
        None if pid is None else int(pid),
        not missing,
        text,
    )


def _tensor(text: str) -> int | None:
    """Return the bytes of the tensor that TensorFlow names by its shape and type."""
    match = _SHAPE.search(text)
    if match is None:
        return None
    dims = re.findall(r"\d+", match[1] or match[2])
    size_of_one = _DTYPES.get(match[3] or "")
    if size_of_one is None or len(dims) > 16:
        return None
    product = size_of_one
    for dim in dims:
        product *= int(dim)
    return product

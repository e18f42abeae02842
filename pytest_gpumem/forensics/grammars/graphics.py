"""The interfaces of graphics and of other cards: Vulkan, Metal, Level Zero, OpenCL, OptiX."""

from pytest_gpumem.forensics.grammars.language import grammar

GRAMMARS = (
    # Vulkan, Metal, Level Zero, OpenCL, OptiX.
    grammar(
        "vulkan",
        "evice memory allocation of size",
        r"[Dd]evice memory allocation of size",
        r"of size <tried#>",
        distinct=True,
    ),
    grammar(
        "vulkan",
        "OutOfDeviceMemory|ERROR_OUT_OF_DEVICE_MEMORY",
        r"\bErrorOutOfDeviceMemory|\bVK_ERROR_OUT_OF_DEVICE_MEMORY",
        distinct=True,
    ),
    grammar(
        "metal",
        "ErrorOutOfMemory|nsufficient Memory",
        r"Insufficient Memory(?: \((?:\d{8}:|IOAF)|$)|kIOGPU\w*ErrorOutOfMemory",
        distinct=True,
    ),
    grammar(
        "metal",
        "maximum allowed buffer",
        r"Attempting to allocate .{0,40} which is greater than the maximum allowed buffer size",
        r"allocate <tried>",
        r"buffer size of <allowed>",
        distinct=True,
    ),
    grammar(
        "metal",
        "nable to allocate",
        r"\[(?:metal::malloc|malloc_or_wait|malloc)\] Unable to allocate",
        r"allocate <tried>",
        distinct=True,
    ),
    grammar(
        "xpu",
        "ERROR_OUT_OF_DEVICE_MEMORY|ERROR_MEM_OBJECT",
        r"\b(?:UR|ZE|PI)_(?:RESULT_)?ERROR_(?:OUT_OF_DEVICE_MEMORY|MEM_OBJECT_ALLOCATION_FAILURE)",
        distinct=True,
    ),
    # Of memory or of anything else that a kernel needs.
    grammar(
        "xpu",
        "UR_RESULT_ERROR_OUT_OF_RESOURCES",
        "",
        kind="weak",
        distinct=True,
    ),
    grammar(
        "host",
        "OUT_OF_HOST_MEMORY|OutOfHostMemory",
        r"\b(?:UR|ZE|PI|VK|CL)_(?:RESULT_)?(?:ERROR_)?OUT_OF_HOST_MEMORY|\bErrorOutOfHostMemory",
        distinct=True,
    ),
    grammar(
        "opencl",
        "MEM_OBJECT_ALLOCATION_FAILURE",
        r"(?:\bCL_)?MEM_OBJECT_ALLOCATION_FAILURE",
        distinct=True,
    ),
    # Its number.
    grammar(
        "opencl",
        "clCreate|clEnqueue",
        r"\bcl(?:Create|Enqueue)\w+\W{0,6}(?:(?i:failed|error|returned|code|with)\W{1,3}){0,4}-4\b"
        r"|(?i:\berror) ?\(?-4\)? .{0,20}\bcl(?:Create|Enqueue)[A-Z]",
        distinct=True,
    ),
    grammar(
        "opencl",
        "bytes on device",
        r"POCL\b.{0,200}Failed to allocate \d+ bytes on device"
        r"|ERROR \| +Failed to allocate \d+ bytes on device",
        r"allocate <tried>",
        distinct=True,
    ),
    # wgpu, of Rust's frameworks; DirectML; OpenGL; what encodes and decodes images and video.
    grammar(
        "unknown",
        "ot enough memory left|wgpu error: ",
        r"(?:^|: )[Nn]ot enough memory left(?=\W*$|\x27,)|wgpu error: (?i:out of memory)",
        distinct=True,
    ),
    grammar(
        "unknown",
        "not enough GPU video memory",
        r"Could not allocate tensor with.{0,40}\. There is not enough GPU video memory",
        r"tensor with <tried>",
        distinct=True,
    ),
    grammar(
        "unknown", "GL_OUT_OF_MEMORY", r"\bGL_OUT_OF_MEMORY\b(?: error generated)?", distinct=True
    ),
    # AWS Neuron, of any of its calls; MATLAB, of a whole array.
    grammar(
        "unknown",
        "Allocation Failure",
        r"\bstatus=4 message=\"?Allocation Failure",
        distinct=True,
    ),
    grammar(
        "unknown",
        "allowed on the device is exceeded",
        r"Maximum variable size allowed on the device is exceeded",
        distinct=True,
    ),
    # Tenstorrent, of a core's or the card's memory.
    grammar(
        "unknown",
        "space to allocate",
        r"Not enough space to allocate \d+ B (?:L1|DRAM)",
        r"to allocate <tried>",
        distinct=True,
    ),
    grammar("cuda", "EncodeSessionEx failed", r"EncodeSessionEx failed: out of memory"),
    grammar("cuda", "ALLOCATOR_FAILURE", r"\bNVJPEG_STATUS_ALLOCATOR_FAILURE", distinct=True),
    grammar("cuda", "DEVICE_OUT_OF_MEMORY", r"\bOPTIX_ERROR_DEVICE_OUT_OF_MEMORY", distinct=True),
)

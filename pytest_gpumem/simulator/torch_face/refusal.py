"""What torch says when memory runs out."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pytest_gpumem.simulator.card import SharedCard
    from pytest_gpumem.simulator.segments import OutOfMemory

__tracebackhide__ = True  # pytest shows the test's line last, none of these

TORCH_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
_EXABYTE = 2**60

if TORCH_VERSION >= (2, 11):
    _ADVICE_URL = (
        "https://docs.pytorch.org/docs/stable/notes/cuda.html"
        "#optimizing-memory-usage-with-pytorch-cuda-alloc-conf"
    )
else:
    _ADVICE_URL = "https://pytorch.org/docs/stable/notes/cuda.html#environment-variables"

OutOfMemoryError: Any = torch.cuda.OutOfMemoryError  # torch.OutOfMemoryError, older than that name


def beyond_any_card(size: int) -> RuntimeError | None:
    """Return what torch raises for more bytes than it asks any card for."""
    if size < _EXABYTE:
        return None
    error: RuntimeError = OutOfMemoryError(
        "CUDA out of memory. Tried to allocate more than 1EB memory."
    )
    return error


def _format_size(size: int) -> str:
    """Return ``size`` bytes as ``format_size`` of c10/cuda/CUDACachingAllocator.cpp does."""
    if size <= 2**10:
        return f"{size} bytes"
    if size <= 2**20:
        return f"{size / 2**10:.2f} KiB"
    if size <= 2**30:
        return f"{size / 2**20:.2f} MiB"
    return f"{size / 2**30:.2f} GiB"


def out_of_memory_text(refusal: OutOfMemory, card: SharedCard, index: int, free: int) -> str:
    """Return the text of ``DeviceCachingAllocator::malloc``, c10/cuda/CUDACachingAllocator.cpp."""
    processes = "".join(
        (
            "Including non-PyTorch memory, this process has "
            if pid == os.getpid()
            else f"Process {pid} has "
        )
        + f"{_format_size(size)} memory in use. "
        for pid, size in card.processes().items()
    )
    allowed = "" if refusal.allowed is None else f"{_format_size(refusal.allowed)} allowed; "
    unallocated = refusal.reserved - refusal.allocated
    return (
        f"CUDA out of memory. Tried to allocate {_format_size(refusal.requested)}."
        f" GPU {index} has a total capacity of {_format_size(card.total)}"
        f" of which {_format_size(free)} is free. {processes}{allowed}"
        f"Of the allocated memory {_format_size(refusal.allocated)} is allocated by PyTorch,"
        f" and {_format_size(unallocated)} is reserved by PyTorch but unallocated."
        " If reserved but unallocated memory is large try setting"
        " PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation. "
        f" See documentation for Memory Management  ({_ADVICE_URL})"
    )

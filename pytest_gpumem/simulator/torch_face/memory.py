"""Which storages live on the card, what each costs, and what it says when memory runs out."""

from __future__ import annotations

import os
import sys
import time
import traceback
import weakref
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.simulator.allocator import CachingAllocator, OutOfMemory

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.simulator.blocks import Block
    from pytest_gpumem.simulator.card import SharedCard

_C: Any = torch._C
_cuda: Any = torch.cuda
_storage_address: Callable[[torch.Tensor], int] = _C._storage_address

_PACKAGE = str(Path(__file__).parent)
TORCH_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])

if TORCH_VERSION >= (2, 11):
    _ADVICE_URL = (
        "https://docs.pytorch.org/docs/stable/notes/cuda.html"
        "#optimizing-memory-usage-with-pytorch-cuda-alloc-conf"
    )
else:
    _ADVICE_URL = "https://pytorch.org/docs/stable/notes/cuda.html#environment-variables"

OutOfMemoryError: Any = _cuda.OutOfMemoryError  # torch.OutOfMemoryError, older than that name


class _Held(weakref.ref[Any]):
    """A storage on the card and its block; an empty storage has none."""

    __slots__ = ("address", "block", "size")

    address: int
    size: int
    block: Block | None


class CardMemory:
    """The card as this process's torch uses it: one block per storage, freed with the storage."""

    def __init__(self, card: SharedCard) -> None:
        self.card = card
        self.allocator = CachingAllocator(card.reserve, card.release, card.total)
        self.history = History()
        self.oom_observers: list[Callable[[int, int, int, int], object]] = []
        self.ready = False
        """Whether this very process has initialised CUDA."""
        self.forked = False
        """Whether the parent had: CUDA does not survive a fork."""
        self._held: dict[int, _Held] = {}
        self._told = 0
        """The highest peak of which ``card.grown`` was told."""
        os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        self.forked = self.forked or self.ready
        self.ready = False

    def holds(self, tensor: torch.Tensor) -> bool:
        """Tell whether ``tensor`` lives on the card."""
        try:
            return _storage_address(tensor) in self._held
        except NotImplementedError:
            inner = unwrapped(tensor)
            return inner is not None and self.holds(inner)

    def holds_storage(self, storage: torch.UntypedStorage) -> bool:
        """Tell whether ``storage`` lives on the card."""
        return storage._cdata in self._held

    def charge(self, tensor: torch.Tensor) -> None:
        """Take a block for the storage of ``tensor``, unless it has one.

        Raises:
            torch.OutOfMemoryError: when it does not fit.
            NotImplementedError: for tensors without one storage, such as sparse ones.

        """
        try:
            known = _storage_address(tensor) in self._held
        except NotImplementedError:
            self._charge_wrapped(tensor)
            return
        if not known:
            storage = tensor.untyped_storage()
            self.put(storage, self.take(storage.nbytes()))

    def _charge_wrapped(self, tensor: torch.Tensor) -> None:
        inner = unwrapped(tensor)
        if inner is None:
            raise NotImplementedError(
                f"a {tensor.layout} tensor on the simulated card: only strided ones are simulated"
            )
        self.charge(inner)

    def recharge(self, tensor: torch.Tensor) -> None:
        """Take a new block where an operation changed the size of a storage on the card."""
        storage = tensor.untyped_storage()
        self.resize(storage, storage.nbytes())

    def resize(self, storage: torch.UntypedStorage, size: int) -> None:
        """Take a new block of ``size`` bytes, then free the old one, as CUDA's resize does."""
        held = self._held.get(storage._cdata)
        if held is not None and held.size != size:
            old, held.block = held.block, self.take(size)
            held.size = size
            self._free(old)

    def put(self, storage: torch.UntypedStorage, block: Block | None) -> None:
        """Say that ``storage`` lives on the card, in ``block``."""
        held = _Held(storage, self._died)
        held.address = storage._cdata
        held.size = storage.nbytes()
        held.block = block
        self._held[held.address] = held

    def snapshot(self) -> dict[str, Any]:
        """Return the allocator's state in the form of ``torch.cuda.memory._snapshot``.

        A living block has the address that its tensors tell (``data_ptr``), which is the host's.
        """
        described = self.history.describe(self.allocator.snapshot())
        alive = [(held.block, held()) for held in list(self._held.values())]
        told = {block.address: it.data_ptr() for block, it in alive if block and it is not None}
        for segment in described["segments"]:
            for block in segment["blocks"]:
                block["address"] = told.get(block["address"], block["address"])
        return described

    def take(self, size: int) -> Block | None:
        """Return a block for ``size`` bytes, None for nothing; initialises CUDA.

        Raises:
            torch.OutOfMemoryError: when it does not fit.
            RuntimeError: what torch raises when CUDA cannot be initialised.

        """
        if not self.ready:
            _cuda._lazy_init()
        if size == 0:
            return None
        try:
            block = self.allocator.malloc(size)
        except OutOfMemory as error:
            # With its traceback it would be a cycle, which keeps the frames of all callers.
            refusal = error.with_traceback(None)
        else:
            self.history.allocated(block)
            if self.card.grown is not None and self.allocator.peak > self._told:
                self._told = self.allocator.peak
                self.card.grown()
            return block
        # Outside the handler, so that the error has no context the real one would not have.
        raise self._out_of_memory(refusal)

    def give_back(self, block: Block | None) -> None:
        """Free a block that no storage got."""
        self._free(block)

    def _died(self, held: Any) -> None:
        del self._held[held.address]
        self._free(held.block)

    def _free(self, block: Block | None) -> None:
        if block is not None and not self.forked:
            self.history.freed(block)
            self.allocator.free(block)

    def _out_of_memory(self, refusal: OutOfMemory) -> RuntimeError:
        free = self.card.free()
        self.history.refused(refusal.requested, free)
        for observer in self.oom_observers:
            observer(0, refusal.requested, self.card.total, free)
        error: RuntimeError = OutOfMemoryError(_out_of_memory_text(refusal, self.card, free))
        return error


def unwrapped(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the tensor inside one that ``torch.func`` wrapped, None for any other."""
    functorch = _C._functorch
    if functorch.is_functorch_wrapped_tensor(tensor):
        inner: torch.Tensor = functorch.get_unwrapped(tensor)
        return inner
    return None


def _format_size(size: int) -> str:
    """Return ``size`` bytes as ``format_size`` of c10/cuda/CUDACachingAllocator.cpp does."""
    if size <= 2**10:
        return f"{size} bytes"
    if size <= 2**20:
        return f"{size / 2**10:.2f} KiB"
    if size <= 2**30:
        return f"{size / 2**20:.2f} MiB"
    return f"{size / 2**30:.2f} GiB"


def _out_of_memory_text(refusal: OutOfMemory, card: SharedCard, free: int) -> str:
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
        f" GPU 0 has a total capacity of {_format_size(card.total)}"
        f" of which {_format_size(free)} is free. {processes}{allowed}"
        f"Of the allocated memory {_format_size(refusal.allocated)} is allocated by PyTorch,"
        f" and {_format_size(unallocated)} is reserved by PyTorch but unallocated."
        " If reserved but unallocated memory is large try setting"
        " PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation. "
        f" See documentation for Memory Management  ({_ADVICE_URL})"
    )


_Stack = list[tuple[Any, int]]


class History:
    """Where blocks were allocated, once ``_record_memory_history`` of torch asks for it."""

    def __init__(self) -> None:
        self._stacks: dict[int, _Stack] | None = None
        self._events: deque[dict[str, Any]] = deque(maxlen=0)

    @property
    def recording(self) -> bool:
        """Whether stacks are kept."""
        return self._stacks is not None

    def record(self, enabled: str | None, max_entries: int, *, clear: bool) -> None:
        """Start (``"state"``: living blocks, ``"all"``: every event too) or stop (None)."""
        kept = [] if clear else self._events
        self._events = deque(kept, maxlen=max_entries if enabled == "all" else 0)
        if enabled is None:
            self._stacks = None
        elif self._stacks is None or clear:
            self._stacks = {}

    def allocated(self, block: Block) -> None:
        """Keep the stack of a new block."""
        if self._stacks is not None:
            self._stacks[block.address] = _stack()
            self._note("alloc", block.address, block.requested)

    def freed(self, block: Block) -> None:
        """Forget the stack of a block."""
        if self._stacks is not None:
            self._stacks.pop(block.address, None)
            self._note("free_completed", block.address, block.requested)

    def refused(self, size: int, free: int) -> None:
        """Keep an out-of-memory event."""
        if self._stacks is not None:
            self._note("oom", free, size)

    def _note(self, action: str, address: int, size: int) -> None:
        if self._events.maxlen:
            event = {"action": action, "addr": address, "size": size, "stream": 0}
            event |= {"time_us": time.time_ns() // 1000, "stack": _stack()}
            self._events.append(event)

    def describe(self, segments: list[dict[str, Any]]) -> dict[str, Any]:
        """Return ``segments`` with their stacks, in the form of ``torch.cuda.memory._snapshot``."""
        stacks = self._stacks or {}
        for segment in segments:
            for block in segment["blocks"]:
                block["frames"] = _frames(stacks.get(block["address"], []))
        return {
            "segments": segments,
            "device_traces": [[_event(event) for event in self._events]],
            "allocator_settings": {"expandable_segments": False, "max_split_size": -1},
            "external_annotations": [],
        }


def _event(event: dict[str, Any]) -> dict[str, Any]:
    described = {key: value for key, value in event.items() if key != "stack"}
    return described | {"frames": _frames(event["stack"])}


def _stack() -> _Stack:
    """Return the Python stack above this package, innermost frame first."""
    return [
        (frame.f_code, line)
        for frame, line in traceback.walk_stack(sys._getframe())
        if not frame.f_code.co_filename.startswith(_PACKAGE)
    ]


def _frames(stack: _Stack) -> list[dict[str, Any]]:
    return [
        {"filename": code.co_filename, "line": line, "name": code.co_name} for code, line in stack
    ]

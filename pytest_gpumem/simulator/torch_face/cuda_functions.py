"""The functions of ``torch._C`` that the Python of ``torch.cuda`` and ``torch.accelerator`` calls.

That Python stays torch's own; this is the layer right below it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.simulator.torch_face.stubs import (
    CARD,
    CUDA_DEVICE_TYPE,
    CardGenerator,
    Stream,
    device_error,
    properties,
)

if TYPE_CHECKING:
    from pytest_gpumem.simulator.torch_face.memory import CardMemory

Functions = dict[str, Callable[..., Any]]
_cuda: Any = torch.cuda


def functions(memory: CardMemory, generator: CardGenerator) -> Functions:
    """Return every function by its name in ``torch._C``."""
    return (
        _life(memory, generator)
        | _devices()
        | _streams()
        | _statistics(memory)
        | _allocation(memory)
        | _accelerator(memory)
    )


def _life(memory: CardMemory, generator: CardGenerator) -> Functions:
    def init() -> None:
        if _device_count() == 0:
            raise RuntimeError("No CUDA GPUs are available")
        if not memory.card.join():
            raise device_error("out of memory", 2)
        _cuda._get_device_properties = lambda _device: properties(memory.card)
        _cuda.default_generators = (generator,)
        memory.ready = True

    return {
        "_cuda_init": init,
        "_cuda_isInBadFork": lambda: memory.forked,
        "_cuda_getDeviceCount": _device_count,
        "_cuda_getArchFlags": lambda: "sm_80",
        "_cuda_getCompiledVersion": lambda: 12000,
        "_cuda_synchronize": _nothing,
        "_cuda_ipc_collect": _nothing,
        "_cuda_sleep": _nothing,
        "_cuda_get_sync_debug_mode": lambda: 0,
        "_cuda_set_sync_debug_mode": _nothing,
        "_cuda_clearCublasWorkspaces": _nothing,
        "_cuda_isCurrentStreamCapturing": lambda: False,
    }


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """Stand for what has no meaning without a driver."""


def _device_count() -> int:
    return max(0, int(_cuda._device_count_nvml()))


def _devices() -> Functions:
    def set_device(index: int) -> None:
        if index > 0:
            raise device_error("invalid device ordinal", 101)

    def exchange(index: int) -> int:
        if index >= 0:
            _cuda._lazy_init()
            set_device(index)
            return 0
        return -1

    return {
        "_cuda_getDevice": lambda: 0,
        "_cuda_setDevice": set_device,
        "_cuda_exchangeDevice": exchange,
        "_cuda_maybeExchangeDevice": exchange,
        "_cuda_canDeviceAccessPeer": lambda _device, _peer: False,
    }


def _streams() -> Functions:
    current = threading.local()

    def get_current(_device: int) -> tuple[int, int, int]:
        return getattr(current, "number", 0), 0, CUDA_DEVICE_TYPE

    def set_current(stream_id: int, **_where: int) -> None:
        current.number = stream_id

    return {
        "_cuda_getCurrentStream": get_current,
        "_cuda_getCurrentRawStream": lambda _device: getattr(current, "number", 0),
        "_cuda_getDefaultStream": lambda _device: (0, 0, CUDA_DEVICE_TYPE),
        "_cuda_setStream": set_current,
    }


def _statistics(memory: CardMemory) -> Functions:
    allocator, history = memory.allocator, memory.history

    def record(
        enabled: str | None = "all",
        _context: str | None = None,
        _stacks: str = "all",
        max_entries: int = 2**63 - 1,
        clear_history: bool = False,
        *_others: Any,
    ) -> None:
        history.record(enabled, max_entries, clear=clear_history)

    def record_legacy(
        enabled: bool,
        _record_context: bool = True,
        max_entries: int = 1,
        *_others: Any,
    ) -> None:
        history.record("all" if enabled else None, max_entries, clear=False)

    return {
        "_cuda_memoryStats": lambda _device: allocator.stats(),
        "_cuda_resetPeakMemoryStats": lambda _device: allocator.reset_peak_stats(),
        "_cuda_resetAccumulatedMemoryStats": lambda _device: allocator.reset_accumulated_stats(),
        "_cuda_memorySnapshot": lambda *_pool: memory.snapshot(),
        "_cuda_record_memory_history": record,
        "_cuda_record_memory_history_legacy": record_legacy,
        "_cuda_isHistoryEnabled": lambda: history.recording,
        "_cuda_attach_out_of_memory_observer": memory.oom_observers.append,
        "_cuda_hostMemoryStats": dict,
        "_cuda_resetPeakHostMemoryStats": _nothing,
        "_cuda_resetAccumulatedHostMemoryStats": _nothing,
    }


def _allocation(memory: CardMemory) -> Functions:
    allocator = memory.allocator
    raw: dict[int, Any] = {}

    def raw_alloc(size: int, _stream: int) -> int:
        block = memory.take(size)
        if block is None:
            return 0
        raw[block.address] = block
        return block.address

    def set_fraction(fraction: float, _device: int = 0) -> None:
        allocator.memory_fraction = fraction

    return {
        "_cuda_emptyCache": lambda *_pool: allocator.empty_cache(),
        "_cuda_setMemoryFraction": set_fraction,
        "_cuda_getMemoryFraction": lambda _device=0: allocator.memory_fraction,
        "_cuda_getAllocatorBackend": lambda: "native",
        "_cuda_cudaCachingAllocator_raw_alloc": raw_alloc,
        "_cuda_cudaCachingAllocator_raw_delete": lambda address: memory.give_back(raw.pop(address)),
        "_cuda_cudaCachingAllocator_set_allocator_settings": _nothing,
        "_cuda_cudaCachingAllocator_enable": _nothing,
        "_cuda_cudaCachingAllocator_is_enabled": lambda: True,
        "_cuda_hasPrimaryContext": lambda _device: memory.card.joined,
        "_cuda_setMemoryMetadata": _nothing,
        "_cuda_getMemoryMetadata": str,
    }


def _accelerator(memory: CardMemory) -> Functions:
    allocator, devices = memory.allocator, _devices()

    def after_init(function: Callable[[], Any]) -> Callable[..., Any]:
        def initialised(*_device: int) -> Any:
            _cuda._lazy_init()
            return function()

        return initialised

    def set_stream(stream: Stream) -> None:
        _cuda.set_stream(stream)

    return {
        "_get_accelerator": lambda *_check: torch.device(CARD.type),
        "_accelerator_getAccelerator": lambda: torch.device(CARD.type),
        "_accelerator_getDeviceIndex": after_init(lambda: 0),
        "_accelerator_setDeviceIndex": devices["_cuda_setDevice"],
        "_accelerator_exchangeDevice": devices["_cuda_exchangeDevice"],
        "_accelerator_maybeExchangeDevice": devices["_cuda_maybeExchangeDevice"],
        "_accelerator_getStream": after_init(_cuda.current_stream),
        "_accelerator_setStream": set_stream,
        "_accelerator_synchronizeDevice": _nothing,
        "_accelerator_isAllocatorInitialized": lambda: memory.ready,
        "_accelerator_emptyCache": allocator.empty_cache,
        "_accelerator_emptyHostCache": _nothing,
        "_accelerator_getDeviceStats": lambda _device: allocator.stats(),
        "_accelerator_resetPeakStats": lambda _device: allocator.reset_peak_stats(),
        "_accelerator_resetAccumulatedStats": lambda _device: allocator.reset_accumulated_stats(),
        "_accelerator_getMemoryInfo": lambda _device: (memory.card.free(), memory.card.total),
    }

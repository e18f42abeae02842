"""The functions of ``torch._C`` that the Python of ``torch.cuda`` and ``torch.accelerator`` calls.

That Python stays torch's own; this is the layer right below it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.simulator import spec
from pytest_gpumem.simulator.torch_face import communication
from pytest_gpumem.simulator.torch_face.stubs import (
    CUDA_DEVICE_TYPE,
    Device,
    Stream,
    properties,
)

if TYPE_CHECKING:
    from pytest_gpumem.simulator.torch_face.memory import CardMemory

__tracebackhide__ = True  # pytest shows the test's line last, none of these

Functions = dict[str, Callable[..., Any]]
_C: Any = torch._C
_cuda: Any = torch.cuda


def functions(memory: CardMemory) -> Functions:
    """Return every function by its name in ``torch._C``."""
    return (
        _life(memory)
        | _devices(memory)
        | _streams(memory)
        | _statistics(memory)
        | _allocation(memory)
        | _accelerator(memory)
        | communication.functions()
    )


def _life(memory: CardMemory) -> Functions:
    def init() -> None:
        visible = _visible(memory)
        if not visible:
            raise RuntimeError("No CUDA GPUs are available")
        # torch reads the older name only where the newer one is not set.
        for variable in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
            if os.environ.get(variable):
                memory.obey(os.environ[variable], variable)
        memory.begin(visible)
        _cuda._get_device_properties = lambda index: properties(
            memory.cards[index].shared, visible[index]
        )
        _cuda.default_generators = tuple(card.generator for card in memory.cards)

    debugged = [0]

    def debug(mode: int) -> None:  # whatever it is, nothing waits
        debugged[0] = mode

    def synchronize(*_device: Any) -> None:
        memory.check()
        memory.card(None).enter()

    return {
        "_cuda_init": init,
        "_cuda_isInBadFork": lambda: memory.forked,
        "_cuda_getDeviceCount": lambda: len(memory.cards if memory.ready else _visible(memory)),
        "_cuda_getArchFlags": lambda: spec.ARCHITECTURE,
        "_cuda_getCompiledVersion": lambda: spec.cuda_number(torch.version.cuda or spec.CUDA),
        "_cuda_synchronize": synchronize,
        "_cuda_ipc_collect": _nothing,
        "_cuda_sleep": _nothing,
        "_cuda_get_sync_debug_mode": lambda: debugged[0],
        "_cuda_set_sync_debug_mode": debug,
        "_cuda_clearCublasWorkspaces": memory.clear_workspaces,
        "_cuda_isCurrentStreamCapturing": lambda: False,
    }


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """Stand for what has no meaning without a driver."""


def _visible(memory: CardMemory) -> list[int]:
    """Return which cards of the machine this process sees, as torch reads the environment."""
    named: Any = _cuda._parse_visible_devices()
    count = max(0, _cuda._device_count_nvml())
    if count and isinstance(named[0], str):
        named = _cuda._transform_uuid_to_ordinals(named, [card.uuid for card in memory.machine])
    return list(named[:count])


def _devices(memory: CardMemory) -> Functions:
    def exchange(index: int, *, enter: bool = True) -> int:
        if index < 0:
            return -1
        before = memory.current
        memory.choose(index, enter=enter)
        return before

    return {
        "_cuda_getDevice": lambda: memory.current,
        "_cuda_setDevice": memory.choose,
        "_cuda_exchangeDevice": exchange,
        "_cuda_maybeExchangeDevice": lambda index: exchange(index, enter=False),
        "_cuda_canDeviceAccessPeer": lambda device, peer: device != peer,
    }


def _streams(memory: CardMemory) -> Functions:
    def set_current(stream_id: int, device_index: int, **_type: int) -> None:
        memory.choose_stream(device_index, stream_id)

    return {
        "_cuda_getCurrentStream": lambda index: (memory.stream(index), index, CUDA_DEVICE_TYPE),
        "_cuda_getCurrentRawStream": memory.stream,
        "_cuda_getDefaultStream": lambda index: (0, index, CUDA_DEVICE_TYPE),
        "_cuda_setStream": set_current,
    }


_OF_RECORDING = {
    "state": (("state", "all", None), "'state', 'all', or None"),
    "context": (("state", "alloc", "all", None), "'state', 'alloc', 'all', or None"),
    "stacks": (("python", "all"), "'python', or 'all'"),
}
"""What ``_record_memory_history`` takes, and torch's words for that."""


def _statistics(memory: CardMemory) -> Functions:
    def record(
        enabled: str | None = "all",
        context: str | None = "all",
        stacks: str = "all",
        max_entries: int = 2**63 - 1,
        clear_history: bool = False,
        *_others: Any,
    ) -> None:
        given = {"state": enabled, "context": context, "stacks": stacks}
        for name, (allowed, words) in _OF_RECORDING.items():
            if given[name] not in allowed:
                raise RuntimeError(f"expected {name} to be {words}")
        memory.history.record(enabled, context, max_entries, clear=clear_history)

    def record_legacy(
        enabled: bool,
        record_context: bool = True,
        max_entries: int = 1,
        *_others: Any,
    ) -> None:
        context = "all" if record_context else None
        memory.history.record("all" if enabled else None, context, max_entries, clear=False)

    return {
        "_cuda_memoryStats": lambda index: memory.card(index).allocator.stats(),
        "_cuda_resetPeakMemoryStats": lambda index: memory.card(index).allocator.reset_peak_stats(),
        "_cuda_resetAccumulatedMemoryStats": lambda index: memory.card(
            index
        ).allocator.reset_accumulated_stats(),
        "_cuda_memorySnapshot": lambda *_pool: memory.snapshot(),
        "_cuda_record_memory_history": record,
        "_cuda_record_memory_history_legacy": record_legacy,
        "_cuda_isHistoryEnabled": lambda: memory.history.recording,
        "_cuda_attach_out_of_memory_observer": memory.oom_observers.append,
        "_cuda_hostMemoryStats": memory.pinned.stats,
        "_cuda_resetPeakHostMemoryStats": memory.pinned.reset_peak_stats,
        "_cuda_resetAccumulatedHostMemoryStats": memory.pinned.reset_accumulated_stats,
    }


def _allocation(memory: CardMemory) -> Functions:
    raw: dict[int, Any] = {}

    def raw_delete(address: int) -> None:
        memory.give_back(*raw.pop(address))

    def raw_alloc(size: int, stream: int) -> int:
        device = memory.card(None).device
        block = memory.take(size, device, stream)
        if block is None:
            return 0
        raw[block.address] = block, device
        return block.address

    def set_fraction(fraction: float, index: int | None = None) -> None:
        memory.card(index).allocator.memory_fraction = fraction

    def set_settings(settings: str) -> None:
        if torch_sets is not None:
            torch_sets(settings)  # which raises what torch raises for bad ones
        memory.obey(settings, "torch.cuda.memory._set_allocator_settings")

    torch_sets = getattr(_C, "_accelerator_setAllocatorSettings", None)

    def enable(on: bool) -> None:
        if not on:
            memory.note(
                "the simulated card does not obey torch.cuda.memory.caching_allocator_enable(False)"
            )

    def has_context(index: int) -> bool:
        return memory.ready and memory.card(index).entered

    return {
        "_cuda_emptyCache": lambda *_pool: _empty_caches(memory),
        "_cuda_setMemoryFraction": set_fraction,
        "_cuda_getMemoryFraction": lambda index=None: memory.card(index).allocator.memory_fraction,
        "_cuda_getAllocatorBackend": lambda: "native",
        "_cuda_cudaCachingAllocator_raw_alloc": raw_alloc,
        "_cuda_cudaCachingAllocator_raw_delete": raw_delete,
        "_cuda_cudaCachingAllocator_set_allocator_settings": set_settings,
        "_accelerator_setAllocatorSettings": set_settings,
        "_cuda_cudaCachingAllocator_enable": enable,
        "_cuda_cudaCachingAllocator_is_enabled": lambda: True,
        "_cuda_hasPrimaryContext": has_context,
        "_cuda_setMemoryMetadata": _nothing,
        "_cuda_getMemoryMetadata": str,
    }


def _empty_caches(memory: CardMemory) -> None:
    for card in memory.cards:
        card.allocator.empty_cache()


def memory_of(memory: CardMemory) -> Callable[[int], tuple[int, int]]:
    """Return what answers for ``cudaMemGetInfo``: free and total bytes of a card."""

    def of(index: int) -> tuple[int, int]:
        card = memory.card(index)
        card.enter()
        return card.shared.free(), card.shared.total

    return of


def _accelerator(memory: CardMemory) -> Functions:
    cuda = _devices(memory) | _statistics(memory)

    def after_init(function: Callable[..., Any]) -> Callable[..., Any]:
        def initialised(*device: int) -> Any:
            _cuda._lazy_init()
            return function(*device)

        return initialised

    def set_stream(stream: Stream) -> None:
        _cuda.set_stream(stream)

    return {
        "_get_accelerator": lambda *_check: Device("cuda"),
        "_accelerator_getAccelerator": lambda: Device("cuda"),
        "_accelerator_getDeviceIndex": after_init(cuda["_cuda_getDevice"]),
        "_accelerator_setDeviceIndex": cuda["_cuda_setDevice"],
        "_accelerator_exchangeDevice": cuda["_cuda_exchangeDevice"],
        "_accelerator_maybeExchangeDevice": cuda["_cuda_maybeExchangeDevice"],
        "_accelerator_getStream": after_init(_cuda.current_stream),
        "_accelerator_setStream": set_stream,
        "_accelerator_synchronizeDevice": _nothing,
        "_accelerator_isAllocatorInitialized": lambda: memory.ready,
        "_accelerator_emptyCache": lambda: _empty_caches(memory),
        "_accelerator_emptyHostCache": memory.pinned.empty_cache,
        "_host_emptyCache": memory.pinned.empty_cache,
        "_accelerator_getDeviceStats": cuda["_cuda_memoryStats"],
        "_accelerator_resetPeakStats": cuda["_cuda_resetPeakMemoryStats"],
        "_accelerator_resetAccumulatedStats": cuda["_cuda_resetAccumulatedMemoryStats"],
        "_accelerator_getMemoryInfo": memory_of(memory),
    }

"""Page-locked memory of the host, as torch counts it: ``ATen/core/CachingHostAllocator.h``.

Blocks are powers of two, are never split, and stay torch's when a tensor gives them back.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter, deque
from typing import Any

from pytest_gpumem.simulator.blocks import Figure

__tracebackhide__ = True  # pytest shows the test's line last, none of these


class _Pinned(weakref.ref[Any]):
    """A storage that is pinned, and the bytes of its block."""

    __slots__ = ("address", "block")

    address: int
    block: int


class PinnedMemory:
    """Which storages are pinned, and what ``torch.cuda.host_memory_stats`` tells of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pinned: dict[int, _Pinned] = {}
        self._registered: dict[int, int] = {}
        """Bytes by address of what the program itself locked (``cudaHostRegister``)."""
        # A storage dies at any moment, even while the figures are changed.
        self._returned: deque[int] = deque()
        self._cached: Counter[int] = Counter()
        self._active_requests = Figure()
        self._active_bytes = Figure()
        self._allocations = Figure()
        self._allocated_bytes = Figure()

    def pin(self, storage: Any) -> None:
        """Count ``storage`` as page-locked from now on."""
        if storage._cdata in self._pinned:
            return
        pinned = _Pinned(storage, self._died)
        pinned.address = storage._cdata
        pinned.block = self.take(storage.nbytes())
        self._pinned[pinned.address] = pinned

    def take(self, size: int) -> int:
        """Count ``size`` bytes as page-locked; returns those of their block."""
        if not size:
            return 0
        block = 1 << (size - 1).bit_length()
        with self._lock:
            self._settle()
            if self._cached[block]:
                self._cached[block] -= 1
            else:
                self._allocations.add(1)
                self._allocated_bytes.add(block)
            self._active_requests.add(1)
            self._active_bytes.add(block)
        return block

    def give_back(self, block: int) -> None:
        """Say that the tensor that had ``block`` is gone; at any moment."""
        if block:
            self._returned.append(block)

    def register(self, address: int, size: int, _flags: int = 0) -> int:
        """Lock a range of memory, as ``cudaHostRegister`` does; returns its code of success."""
        self._registered[address] = size
        return 0

    def unregister(self, address: int) -> int:
        """Unlock it, as ``cudaHostUnregister`` does; returns its code of success."""
        self._registered.pop(address, None)
        return 0

    def covers(self, tensor: Any, storage: Any) -> bool:
        """Tell whether a tensor is pinned, or lies in a range that the program locked."""
        if storage._cdata in self._pinned:
            return True
        if not self._registered:  # nor has each tensor an address
            return False
        return self.locked(tensor.data_ptr())

    def locked(self, address: int) -> bool:
        """Tell whether an address lies in a range that the program locked."""
        return any(first <= address < first + size for first, size in self._registered.items())

    def _died(self, pinned: Any) -> None:
        del self._pinned[pinned.address]
        self.give_back(pinned.block)

    def _settle(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            self._active_requests.take(1)
            self._active_bytes.take(block)
            self._cached[block] += 1

    def empty_cache(self) -> None:
        """Give back every block that no tensor has."""
        with self._lock:
            self._settle()
            for block, count in self._cached.items():
                for _ in range(count):
                    self._allocations.take(1)
                    self._allocated_bytes.take(block)
            self._cached.clear()

    def stats(self) -> dict[str, Any]:
        """Return what ``torch._C._cuda_hostMemoryStats`` returns; times are 0."""
        with self._lock:
            self._settle()
            made, gone = self._allocations.allocated, self._allocations.freed
            return {
                "active_requests": self._active_requests.as_dict(),
                "active_bytes": self._active_bytes.as_dict(),
                "allocations": self._allocations.as_dict(),
                "allocated_bytes": self._allocated_bytes.as_dict(),
                "num_host_alloc": made,
                "num_host_free": gone,
                "host_alloc_time": _without_time(made),
                "host_free_time": _without_time(gone),
            }

    def reset_peak_stats(self) -> None:
        """Let every peak start again from its current value."""
        with self._lock:
            self._settle()
            for figure in self._figures():
                figure.peak = figure.current

    def reset_accumulated_stats(self) -> None:
        """Let every sum start from 0."""
        with self._lock:
            self._settle()
            for figure in self._figures():
                figure.allocated = figure.freed = 0

    def _figures(self) -> tuple[Figure, ...]:
        active = self._active_requests, self._active_bytes
        return *active, self._allocations, self._allocated_bytes


def _without_time(count: int) -> dict[str, int]:
    return {"total": 0, "max": 0, "min": 0, "count": count, "avg": 0}

"""CuPy: its default memory pool, and the pool that a suite has put in its place.

By CuPy 13 to 15 (``cupy/cuda/memory.pyx``): ``MemoryPool.used_bytes``, ``total_bytes`` and
``free_all_blocks`` speak of the current device; a pool counts what it gave out in blocks of 512
bytes. It keeps no peak. Its memory hooks would, at the price of six calls into Python an
allocation, in each thread of its own: they are left to the suite. What an allocator takes that is
no pool (``cupy.cuda.set_allocator(None)``, RMM's) is not counted here; RMM tells its own.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from pytest_gpumem.devices import contexts
from pytest_gpumem.devices.frameworks.base import Array, Framework, Level
from pytest_gpumem.devices.heap import instances

if TYPE_CHECKING:
    from collections.abc import Iterable


class CuPy(Framework):
    """CuPy's pools."""

    name = "CuPy"

    def active(self) -> bool:
        """Whether CuPy is there and anybody in this process uses a card."""
        return hasattr(sys.modules.get("cupy"), "get_default_memory_pool") and bool(contexts.held())

    def levels(self) -> dict[int, Level]:
        """Return the sums of the pools on each device with a context."""
        found = {}
        for index in contexts.held():
            # Only where there is a context: entering a device makes one.
            with _cupy().cuda.Device(index):
                pools = _pools()
                used = sum(int(pool.used_bytes()) for pool in pools)
                found[index] = Level(used, sum(int(pool.total_bytes()) for pool in pools))
        return found

    def uuid(self, index: int) -> str:
        """Return what the runtime says: the 16 bytes of ``cudaDeviceProp.uuid``."""
        told = _cupy().cuda.runtime.getDeviceProperties(index).get("uuid", b"")[:16].hex()
        parts = (told[:8], told[8:12], told[12:16], told[16:20], told[20:])
        return f"GPU-{'-'.join(parts)}" if told else ""

    def give_back(self) -> None:
        """Free the blocks that the pools keep, those of pinned host memory too."""
        for index in contexts.held():
            with _cupy().cuda.Device(index):
                for pool in _pools():
                    pool.free_all_blocks()
        _cupy().get_default_pinned_memory_pool().free_all_blocks()

    def things(self) -> Iterable[Any]:
        """Return the living ``cupy.ndarray``."""
        return instances(_cupy().ndarray)

    def array(self, thing: Any) -> Array | None:
        """Return the memory that an array shares with its views."""
        memory, device = thing.data.mem, f"{self.name}:{thing.data.device_id}"
        shape, dtype = tuple(thing.shape), str(thing.dtype)
        return Array(thing, int(memory.ptr), int(memory.size), device, shape, dtype)


def _cupy() -> Any:
    return sys.modules["cupy"]


def _pools() -> list[Any]:
    """Return the default pool, and the one that allocates now if that is another."""
    default = _cupy().get_default_memory_pool()
    current = getattr(_cupy().cuda.get_allocator(), "__self__", None)
    other = current is not None and current is not default and hasattr(current, "used_bytes")
    return [default, current] if other else [default]


ALLOCATOR = CuPy()

"""Numba: the allocations that its CUDA target keeps a list of.

By numba 0.60 and numba-cuda 0.30 (``numba/cuda/cudadrv/driver.py``): the driver object knows the
devices in use, each has a ``primary_context`` once it has one, whose ``memory_manager`` lists the
living ``allocations`` and the pending ``deallocations``, which still take memory. Numba keeps no
peak; ``Context.get_memory_info`` is the driver's view of the card, others' memory included. A
memory manager that is not Numba's (RMM's) allocates elsewhere, and is counted there.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from pytest_gpumem.devices.frameworks.base import Array, Framework, Level
from pytest_gpumem.devices.heap import instances

if TYPE_CHECKING:
    from collections.abc import Iterable

_DRIVER = "numba.cuda.cudadrv.driver"
_ARRAYS = "numba.cuda.cudadrv.devicearray"
_OWN = "NumbaCUDAMemoryManager"
_HOST = ("MappedMemory", "PinnedMemory")
"""Kinds of allocations that are host memory, seen from the device too."""


class Numba(Framework):
    """Numba's own memory managers."""

    name = "Numba"

    def active(self) -> bool:
        """Whether Numba has a context; its simulator of CUDA has none."""
        return bool(_managers())

    def levels(self) -> dict[int, Level]:
        """Return what lives, and with what is to be freed, on each device."""
        found = {}
        for index, manager in _managers().items():
            living = [each for each in list(manager.allocations.values()) if _on_card(each)]
            used = sum(int(each.size) for each in living)
            pending = (int(size) for _, _, size in list(manager.deallocations._cons))
            found[index] = Level(used, used + sum(pending))
        return found

    def uuid(self, index: int) -> str:
        """Return what the device says."""
        return str(getattr(_devices()[index], "uuid", ""))

    def give_back(self) -> None:
        """Free what is pending."""
        self.finish()

    def finish(self) -> None:
        """Free what is pending, unless the suite has put that off."""
        for manager in _managers().values():
            manager.deallocations.clear()

    def things(self) -> Iterable[Any]:
        """Return the living device arrays."""
        kind = getattr(sys.modules.get(_ARRAYS), "DeviceNDArrayBase", None)
        return instances(kind) if isinstance(kind, type) else ()

    def array(self, thing: Any) -> Array | None:
        """Return the memory of an array; a view counts as large as it is."""
        address = thing.device_ctypes_pointer.value
        device = f"{self.name}:{thing.gpu_data.context.device.id}"
        shape, dtype = tuple(thing.shape), str(thing.dtype)
        return Array(thing, int(address), int(thing.alloc_size), device, shape, dtype)


def _devices() -> dict[int, Any]:
    """Return the devices that Numba has looked at; asks the driver nothing."""
    driver = getattr(sys.modules.get(_DRIVER), "driver", None)
    found = getattr(driver, "devices", None)
    return dict(found) if isinstance(found, dict) else {}


def _managers() -> dict[int, Any]:
    """Return Numba's own memory manager of each device that has a context."""
    found = {}
    for index, device in _devices().items():
        manager = getattr(getattr(device, "primary_context", None), "memory_manager", None)
        if any(kind.__name__ == _OWN for kind in type(manager).__mro__):
            found[index] = manager
    return found


def _on_card(allocation: object) -> bool:
    return type(allocation).__name__ not in _HOST


ALLOCATOR = Numba()

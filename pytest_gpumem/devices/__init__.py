"""What memory there is: cards by UUID, what the driver says of them and what this process holds.

Nothing here creates a CUDA context, imports torch or initialises a framework: torch is looked
up where the suite has loaded it, NVML answers for the rest.
"""

from __future__ import annotations

from pytest_gpumem.devices.allocator import (
    Allocator,
    AllocatorReading,
    allocators,
    register,
)
from pytest_gpumem.devices.cards import CardsFound, driver_reading, find_cards, process_bytes
from pytest_gpumem.devices.notebook import notes
from pytest_gpumem.devices.nvml import DriverReading
from pytest_gpumem.devices.torch_private import allocation_stacks, record_stacks, watch_peaks

__all__ = [
    "Allocator",
    "AllocatorReading",
    "CardsFound",
    "DriverReading",
    "allocation_stacks",
    "allocators",
    "driver_reading",
    "find_cards",
    "notes",
    "process_bytes",
    "record_stacks",
    "register",
    "watch_peaks",
]

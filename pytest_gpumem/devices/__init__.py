"""What memory there is: cards by UUID, what the driver says of them and what this process holds.

Nothing here creates a CUDA context, imports torch or initialises a framework: torch is looked
up where the suite has loaded it, NVML answers for the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_gpumem.devices.allocator import Allocator, allocators, any_loaded, register
    from pytest_gpumem.devices.cards import (
        CardsFound,
        cards_to_choose,
        driver_reading,
        find_cards,
    )
    from pytest_gpumem.devices.frameworks import living_arrays
    from pytest_gpumem.devices.frameworks.base import Array
    from pytest_gpumem.devices.notebook import note, notes
    from pytest_gpumem.devices.nvml import DriverReading
    from pytest_gpumem.devices.reading import AllocatorReading
    from pytest_gpumem.devices.torch_private import (
        Recording,
        allocation_stacks,
        living_blocks,
        record_stacks,
        watch_peaks,
    )
    from pytest_gpumem.devices.torch_state import other_maker
    from pytest_gpumem.devices.users import (
        Usage,
        held,
        others_bytes,
        own_bytes,
        process_bytes,
        totals,
        usage,
        used_by_others,
        used_bytes,
    )

__all__ = [
    "Allocator",
    "AllocatorReading",
    "Array",
    "CardsFound",
    "DriverReading",
    "Recording",
    "Usage",
    "allocation_stacks",
    "allocators",
    "any_loaded",
    "cards_to_choose",
    "driver_reading",
    "find_cards",
    "held",
    "living_arrays",
    "living_blocks",
    "note",
    "notes",
    "other_maker",
    "others_bytes",
    "own_bytes",
    "process_bytes",
    "record_stacks",
    "register",
    "totals",
    "usage",
    "used_by_others",
    "used_bytes",
    "watch_peaks",
]

_HOMES = {
    "cards": ("CardsFound", "cards_to_choose", "driver_reading", "find_cards"),
    "allocator": ("Allocator", "allocators", "any_loaded", "register"),
    "frameworks": ("living_arrays",),
    "frameworks.base": ("Array",),
    "nvml": ("DriverReading",),
    "reading": ("AllocatorReading",),
    "torch_private": (
        "Recording",
        "allocation_stacks",
        "living_blocks",
        "record_stacks",
        "watch_peaks",
    ),
    "notebook": ("note", "notes"),
    "torch_state": ("other_maker",),
    "users": (
        "Usage",
        "held",
        "others_bytes",
        "own_bytes",
        "process_bytes",
        "totals",
        "usage",
        "used_by_others",
        "used_bytes",
    ),
}


def __getattr__(name: str) -> object:
    """Import the module that is asked for by a name of it: without a card few of them are."""
    for home, names in _HOMES.items():
        if name in names:
            found: object = getattr(importlib.import_module(f"{__name__}.{home}"), name)
            globals()[name] = found
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

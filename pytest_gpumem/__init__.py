"""GPU memory hygiene for pytest: every test's VRAM, what it left behind, and who holds it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_gpumem.archive.consolidator import (
        Consolidation,
        GpuConsolidator,
        get_gpu_consolidator,
    )
    from pytest_gpumem.archive.errors import (
        ArchiveError,
        DamagedError,
        DiskError,
        KeyRefusedError,
        MismatchError,
        NotFoundError,
        QuotaError,
        StateRefusedError,
        UnknownVersionError,
        WrongKeyError,
    )
    from pytest_gpumem.archive.store import ArchiveStore
    from pytest_gpumem.archive.tree import allow_subclass
    from pytest_gpumem.forensics.analysis import analyze_oom_sequence
    from pytest_gpumem.leases.store import LeaseError, LeaseTimeout, TooLarge, gpu_lease
    from pytest_gpumem.routing.model_pool import ModelPool
    from pytest_gpumem.routing.placing import load_sentence_transformer
    from pytest_gpumem.routing.resource_manager import (
        HybridResourceManager,
        get_resource_manager,
        get_sentence_transformer_device,
    )

__all__ = [
    "ArchiveError",
    "ArchiveStore",
    "Consolidation",
    "DamagedError",
    "DiskError",
    "GpuConsolidator",
    "HybridResourceManager",
    "KeyRefusedError",
    "LeaseError",
    "LeaseTimeout",
    "MismatchError",
    "ModelPool",
    "NotFoundError",
    "QuotaError",
    "StateRefusedError",
    "TooLarge",
    "UnknownVersionError",
    "WrongKeyError",
    "allow_subclass",
    "analyze_oom_sequence",
    "get_gpu_consolidator",
    "get_resource_manager",
    "get_sentence_transformer_device",
    "gpu_lease",
    "load_sentence_transformer",
]
__version__ = "0.1.0"

_HOMES = {
    "pytest_gpumem.archive.consolidator": (
        "Consolidation",
        "GpuConsolidator",
        "get_gpu_consolidator",
    ),
    "pytest_gpumem.archive.errors": (
        "ArchiveError",
        "DamagedError",
        "DiskError",
        "KeyRefusedError",
        "MismatchError",
        "NotFoundError",
        "QuotaError",
        "StateRefusedError",
        "UnknownVersionError",
        "WrongKeyError",
    ),
    "pytest_gpumem.archive.store": ("ArchiveStore",),
    "pytest_gpumem.archive.tree": ("allow_subclass",),
    "pytest_gpumem.forensics.analysis": ("analyze_oom_sequence",),
    "pytest_gpumem.routing.model_pool": ("ModelPool",),
    "pytest_gpumem.routing.placing": ("load_sentence_transformer",),
    "pytest_gpumem.routing.resource_manager": (
        "HybridResourceManager",
        "get_resource_manager",
        "get_sentence_transformer_device",
    ),
    "pytest_gpumem.leases.store": ("LeaseError", "LeaseTimeout", "TooLarge", "gpu_lease"),
}
"""Where each public name lives; it is imported when it is first asked for."""


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            found = getattr(importlib.import_module(home), name)
            globals()[name] = found
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""GPU memory hygiene for pytest: every test's VRAM, what it left behind, and who holds it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_gpumem.forensics.analysis import analyze_oom_sequence
    from pytest_gpumem.sharing.lease import LeaseError, LeaseTimeout, TooLarge, gpu_lease

__all__ = ["LeaseError", "LeaseTimeout", "TooLarge", "analyze_oom_sequence", "gpu_lease"]
__version__ = "0.1.0"

_HOMES = {
    "LeaseError": "pytest_gpumem.sharing.lease",
    "LeaseTimeout": "pytest_gpumem.sharing.lease",
    "TooLarge": "pytest_gpumem.sharing.lease",
    "analyze_oom_sequence": "pytest_gpumem.forensics.analysis",
    "gpu_lease": "pytest_gpumem.sharing.lease",
}
"""Where each public name lives; it is imported when it is first asked for."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

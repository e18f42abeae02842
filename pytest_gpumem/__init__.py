"""GPU memory hygiene for pytest: every test's VRAM, what it left behind, and who holds it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_gpumem.forensics.analysis import analyze_oom_sequence as analyze_oom_sequence

__version__ = "0.1.0"

_HOMES = {
    "analyze_oom_sequence": "pytest_gpumem.forensics.analysis",
}
"""Where each public name lives; it is imported on first use, for the plugin must load fast."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

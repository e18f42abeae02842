"""GPU memory hygiene for pytest: every test's VRAM, what it left behind, and who holds it."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_HOMES = {
    "ArchiveStore": "archive.store",
    "GpuConsolidator": "archive.consolidator",
    "get_gpu_consolidator": "archive.consolidator",
}
"""Public names and the modules they are in, imported when they are first asked for."""


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found

"""GPU memory hygiene for pytest: every test's VRAM, what it left behind, and who holds it.

A name is imported from its home when it is first asked for, so that importing the package, which
pytest does in each run, costs next to nothing. ``__init__.pyi`` says the same to type checkers.

PYTEST_DONT_REWRITE: in a pytest that a test starts it is imported before pytest is, which pytest
would warn of.
"""

from __future__ import annotations

__version__ = "0.1.0"

_HOMES = {
    "archive.consolidator": ("Consolidation", "GpuConsolidator"),
    "archive.shared": ("get_gpu_consolidator",),
    "archive.store": ("ArchiveStore",),
    "archive.subclasses": ("allow_subclass",),
    "errors": (
        "ArchiveError",
        "ArgumentError",
        "DamagedError",
        "DiskError",
        "InUseError",
        "KeyRefusedError",
        "LeaseError",
        "LeaseTimeout",
        "NotFoundError",
        "QuotaError",
        "RequestRefusedError",
        "StateRefusedError",
        "TooLarge",
        "UnknownVersionError",
        "WrongKeyError",
    ),
    "forensics.analysis": ("analyze_oom_sequence",),
    "leases.api": ("gpu_lease",),
    "leases.store": ("Lease",),
    "records.plain": ("load_run",),
    "records.run": ("RunRecord",),
    "routing.model_pool": ("ModelPool",),
    "routing.placement": ("load_sentence_transformer",),
    "routing.resource_manager": (
        "HybridResourceManager",
        "get_resource_manager",
        "get_sentence_transformer_device",
    ),
    "tracking.memory": ("GpuMemory",),
}
"""Each public name's home, a module of this package."""
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)  # noqa: PLE0605  # type checkers read the stub


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib  # not above: children of a run import the package as they start

    found: object = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

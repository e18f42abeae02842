"""The consolidator that all of a process share."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_gpumem.archive.consolidator import GpuConsolidator

_the_one: GpuConsolidator | None = None
_options: dict[str, Any] = {}
_mutex = threading.Lock()


def get_gpu_consolidator() -> GpuConsolidator:
    """Return this process's consolidator; under pytest it follows the suite's settings."""
    global _the_one  # noqa: PLW0603  # the plan's name is a function, and one is enough
    with _mutex:
        if _the_one is None:
            from pytest_gpumem.archive.consolidator import (
                GpuConsolidator,  # which most never ask for
            )

            _the_one = GpuConsolidator(**_options)
        return _the_one


def registered() -> GpuConsolidator | None:
    """Return the process's consolidator, if anything is registered that it could consolidate."""
    here = _the_one  # asked for with each test: nobody is made for that
    return None if here is None or here.idle else here


def configure(**options: Any) -> None:
    """Set the arguments of the process's consolidator, which begins anew."""
    global _the_one  # noqa: PLW0603  # see above
    with _mutex:
        _options.clear()
        _options.update(options)
        _the_one = None

"""The allocators of the frameworks beside torch, a file for each; none imports its framework."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.devices.frameworks.base import Array, Framework

MODULES = {
    "cupy": "cupy",
    "rmm": "rmm",
    "jax._src.xla_bridge": "jax",
    "numba.cuda.cudadrv.driver": "numba",
    "tensorflow.python.eager.context": "tensorflow",
}
"""The module by which each shows that it is loaded, and the file here that measures it."""

_met: dict[str, Framework] = {}


def loaded() -> tuple[Framework, ...]:
    """Return the allocators of those that are loaded, whether or not they use a card."""
    for module, name in MODULES.items():
        if module in sys.modules and name not in _met:
            _met[name] = importlib.import_module(f"{__name__}.{name}").ALLOCATOR
    return tuple(_met[name] for module, name in MODULES.items() if module in sys.modules)


def living_arrays() -> Iterator[Array]:
    """Yield the arrays on cards of all that are in use; RMM keeps no list of its buffers."""
    for each in loaded():
        if each.active():
            yield from each.living()

"""JAX: what XLA's allocator tells of each GPU.

By JAX 0.4 to 0.10: ``Device.memory_stats()`` is None on a CPU; on a GPU it has ``bytes_in_use``,
``peak_bytes_in_use``, ``bytes_limit`` and, where XLA keeps a pool, ``pool_bytes``. The peak is the
process's and cannot be set back. ``Client.live_arrays()`` lists arrays (``jax.live_arrays`` is
that of the default backend). Nothing public tells whether a backend has been initialised without
initialising one: ``jax._src.xla_bridge._backends`` is private.
"""

from __future__ import annotations

import math
import os
import sys
from typing import TYPE_CHECKING, Any

from pytest_gpumem.devices.frameworks.base import Array, Framework, Level
from pytest_gpumem.devices.notebook import note
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

FOUND_IN = "0.10.2"
"""Version in which the private name was found."""
GPUS = ("gpu", "cuda", "rocm")
PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"
"""Of ``jaxlib/xla_client.py``, as are the words that mean no."""
_NO = ("false", "False", "0")


class Jax(Framework):
    """JAX's GPUs, in the order of its backends."""

    name = "JAX"

    def __init__(self) -> None:
        super().__init__()
        self._known: tuple[int, ...] = ()
        """The backends whose GPUs ``_gpus`` are."""
        self._gpus: list[Any] = []

    def active(self) -> bool:
        """Whether a backend with a GPU has been initialised."""
        backends = _backends()
        known = tuple(map(id, backends))
        if known != self._known:
            self._known = known
            found = (each for backend in backends for each in backend.local_devices())
            self._gpus = [each for each in found if each.platform in GPUS]
        return bool(self._gpus)

    def levels(self) -> dict[int, Level]:
        """Return what each GPU tells."""
        return {
            index: _level(stats)
            for index, device in enumerate(self._gpus)
            if (stats := device.memory_stats())
        }

    def ordinal(self, index: int) -> int:
        """Return the number by which CUDA knows a device: others may be hidden from JAX."""
        told = getattr(self._gpus[index], "local_hardware_id", None)
        return index if told is None else int(told)

    def things(self) -> Iterable[Any]:
        """Return what the backends list."""
        return (array for backend in _backends() for array in backend.live_arrays())

    def array(self, thing: Any) -> Array | None:
        """Return an array's part on one GPU: where it is spread, the first that has any of it."""
        on = thing.devices()
        index = next((index for index, each in enumerate(self._gpus) if each in on), None)
        if index is None or thing.is_deleted():
            return None
        shape = tuple(thing.sharding.shard_shape(thing.shape))
        size = math.prod(shape) * thing.dtype.itemsize
        # Addresses of other frameworks are above zero.
        device = f"{self.name}:{index}"
        return Array(thing, -id(thing), size, device, shape, str(thing.dtype))


def _backends() -> list[Any]:
    """Return the backends that have been initialised; each counts its devices' arrays."""
    found = getattr(sys.modules.get("jax._src.xla_bridge"), "_backends", None)
    return list(found.values()) if isinstance(found, dict) else []


def _level(stats: dict[str, int]) -> Level:
    used, limit = stats.get("bytes_in_use", 0), stats.get("bytes_limit", 0)
    pool = stats.get("pool_bytes", 0)
    if limit and pool >= limit and os.environ.get(PREALLOCATE, "") not in _NO:
        note(
            f"JAX reserved {format_bytes(pool)} of a card when it started, more than it uses: no "
            "other process can have it; --gpumem-jax-preallocate=off lets it take what it needs"
        )
    return Level(used, pool, stats.get("peak_bytes_in_use"))


ALLOCATOR = Jax()

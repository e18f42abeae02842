"""RMM: what its resources count, where the suite set one that counts.

By RMM 24 to 26 (``rmm.mr``, ``rmm.statistics``): a ``StatisticsResourceAdaptor`` tells current and
peak bytes (``allocation_counts``), ``TrackingResourceAdaptor`` and ``LimitingResourceAdaptor`` the
current ones (``get_allocated_bytes``), a ``PoolMemoryResource`` its size; each leads to the next by
``upstream_mr``. None is set here: that would change what the suite allocates with. Nor is a peak
set back: ``push_counters`` would be seen by the suite. What CuPy, Numba or torch allocate by way of
RMM is counted here, and in no pool of theirs.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from pytest_gpumem.devices import contexts
from pytest_gpumem.devices.frameworks.base import Framework, Level
from pytest_gpumem.devices.notebook import note

if TYPE_CHECKING:
    from collections.abc import Iterator

_SILENT = (
    "RMM counts only what a pool of it reserved: rmm.statistics.enable_statistics() would let it "
    "tell what tests allocate"
)


class Rmm(Framework):
    """RMM's resource on each device."""

    name = "RMM"

    def active(self) -> bool:
        """Whether RMM is there and anybody in this process uses a card."""
        return hasattr(sys.modules.get("rmm"), "mr") and bool(contexts.held())

    def levels(self) -> dict[int, Level]:
        """Return what the resource of each device with a context counts."""
        per_device = sys.modules["rmm"].mr.get_per_device_resource
        return {index: _level(list(_stack(per_device(index)))) for index in contexts.held()}


def _stack(resource: Any) -> Iterator[Any]:
    """Yield a resource, and those below it from which it allocates."""
    while resource is not None:
        yield resource
        resource = getattr(resource, "upstream_mr", None)


def _level(stack: list[Any]) -> Level:
    pools = [int(each.pool_size()) for each in stack if hasattr(each, "pool_size")]
    reserved = sum(pools)
    statistics = next((each for each in stack if hasattr(each, "allocation_counts")), None)
    # Those of the statistics begin anew where the suite pushes counters; these never do.
    counted = next((each for each in stack if hasattr(each, "get_allocated_bytes")), None)
    if statistics is None and counted is None:
        if reserved:
            note(_SILENT)
        return Level(0, reserved)
    counts = None if statistics is None else statistics.allocation_counts
    current = _figure(counts, "current_bytes") if counted is None else counted.get_allocated_bytes()
    peak = None if counts is None else _figure(counts, "peak_bytes")
    return Level(max(0, int(current)), reserved, peak)


def _figure(counts: Any, name: str) -> int:
    """Return a figure of the statistics, which were a dict before RMM 24.06."""
    return int(counts[name] if isinstance(counts, dict) else getattr(counts, name))


ALLOCATOR = Rmm()

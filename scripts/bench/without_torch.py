"""VRAM without torch: takes bytes of the simulated card, and shows them to pytest-gpumem.

Copied beside the suites of the scheduling benchmark and of the soak runs: importing torch in
every worker would be most of their time.
"""

from __future__ import annotations

import os
from pathlib import Path

from pytest_gpumem import devices
from pytest_gpumem.devices import AllocatorReading
from pytest_gpumem.records import Card
from pytest_gpumem.simulator.card import SharedCard
from pytest_gpumem.units import format_bytes


class OutOfMemoryError(RuntimeError):
    """What torch would raise; known by its name."""


class PlainAllocator:
    """Reserves just what is taken."""

    name = "plain"
    exact_peaks = True

    def __init__(self, card: SharedCard) -> None:
        self.shared = card
        self._now = self._peak = self._ooms = 0
        self.used: set[int] = set()

    def take(self, size: int) -> None:
        """Take ``size`` bytes and, the first time, a context."""
        if not (self.shared.join() and self.shared.reserve(size)):
            self._ooms += 1
            raise OutOfMemoryError(f"CUDA out of memory. Tried to allocate {format_bytes(size)}")
        self._now += size
        self._peak = max(self._peak, self._now)

    def give(self, size: int) -> None:
        """Give ``size`` bytes back."""
        self.shared.release(size)
        self._now -= size

    def active(self) -> bool:
        """Whether the card was used."""
        return self.shared.joined or bool(self._ooms)

    def read(self) -> tuple[AllocatorReading, ...]:
        """Return the figures of the one card."""
        return (AllocatorReading(self._now, self._peak, self._now, self._peak, 0, self._ooms),)

    def card(self, _index: int) -> Card:
        """Return the card."""
        return Card(self.shared.uuid, self.shared.name, self.shared.total)

    def reset_peak(self, _index: int) -> None:
        """Begin a stretch of time with a peak of its own."""
        self._peak = self._now
        self.used.add(0)

    def release_cached(self) -> None:
        """Do nothing: there is no cache."""

    def settle(self) -> None:
        """Do nothing: there are no workspaces."""


ALLOCATOR = PlainAllocator(SharedCard.open(Path(os.environ["GPUMEM_SIMULATE_CARD"])))
devices.register(ALLOCATOR)

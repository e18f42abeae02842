"""What a card's allocator said when it was read last, and when its cache is worth keeping."""

from __future__ import annotations

from collections.abc import Callable

from pytest_gpumem import devices
from pytest_gpumem.devices import AllocatorReading
from pytest_gpumem.records import Card

ReleaseCache = Callable[[Card, AllocatorReading], bool]
"""Says whether the allocator's unused cache should go back to the driver after a test."""


_SHARED_CACHE = 64 * 2**20
"""Unused cache worth the price of new segments when other processes want the card."""


def release_when_shared(shared: bool) -> ReleaseCache:
    """Return the rule for giving back unused cache.

    On a shared card, cache above 64 MiB is memory that other processes cannot have; alone on
    it, only a cache above a quarter of the card is worth the new segments the next test pays.
    """

    def worth_it(card: Card, reading: AllocatorReading) -> bool:
        unused = reading.reserved - reading.allocated
        return unused > (_SHARED_CACHE if shared else card.total // 4)

    return worth_it


_NOTHING = AllocatorReading(
    allocated=0, allocated_peak=0, reserved=0, reserved_peak=0, retries=0, ooms=0
)


class Meter:
    """One card as one allocator sees it."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.last = _NOTHING
        self.process: int | None = None
        """This process's bytes by the driver's count."""
        self._process_read_at = -1
        """What was reserved when ``process`` was read."""

    def read_process(self) -> None:
        """Ask the driver for this process's bytes where the reserved memory has changed.

        The driver's answer costs milliseconds on a real card, and moves only with segments.
        """
        if self._process_read_at != self.last.reserved:
            self._process_read_at = self.last.reserved
            self.process = devices.own_bytes(self.card, self.last.reserved)

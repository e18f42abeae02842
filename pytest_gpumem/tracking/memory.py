"""What a running test may ask of its own use of the cards."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_gpumem.records import CardUsage
    from pytest_gpumem.tracking.tracker import Tracker


class GpuMemory:
    """What the fixture ``gpumem`` is: what the running test did to the cards so far.

    All is zero where there is no card.
    """

    def __init__(self, tracker: Tracker | None) -> None:
        self._tracker = tracker

    def usage(self) -> tuple[CardUsage, ...]:
        """Return the usage by card; leaks are judged only when the test has ended."""
        return self._tracker.usage() if self._tracker is not None else ()

    @property
    def allocated(self) -> int:
        """Bytes allocated now on all cards."""
        return self._tracker.meters.allocated if self._tracker is not None else 0

    @property
    def peak(self) -> int:
        """Highest bytes allocated since the test began, summed over cards."""
        return sum(card.peak for card in self.usage())

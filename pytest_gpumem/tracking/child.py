"""What is known of one child."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gpumem.clock import clock
from pytest_gpumem.devices import family
from pytest_gpumem.records import ChildUsage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.devices.book import Figures


# Plain classes: each data class takes half a millisecond of every run's start.


class ChildHolding:
    """What one child holds of one card; bytes, None where its source does not tell."""

    told: Figures | None = None
    used: int | None = None
    used_peak: int | None = None
    leaked = 0

    def now(self, context: int) -> int:
        """Return what it holds: the driver's figure, or else the allocator's and a context."""
        if self.used is not None:
            return self.used
        return 0 if self.told is None else self.told.reserved + context


class Child:
    """A process that used a card.

    Args:
        pid: its number.
        identity: its number and start.
        owner: who started it, by number.
        began: when it was met, by the clock.
        slot: of its page, while it has one.
        command: how it was started.

    """

    def __init__(
        self,
        pid: int,
        identity: str,
        owner: int,
        began: float,
        *,
        slot: int | None = None,
        command: str = "",
    ) -> None:
        self.pid = pid
        self.identity = identity
        self.owner = owner
        self.began = began
        self.slot = slot
        self.command = command
        self.tells = slot is not None
        """Whether it had a page."""
        self.ended = 0.0
        self.judged = False
        """Whether its owner is over."""
        self.news = True
        """Whether something is known that no test's record has."""
        self.cards: dict[str, ChildHolding] = {}

    def on(self, uuid: str) -> ChildHolding:
        """Return what it holds of a card."""
        return self.cards.setdefault(uuid, ChildHolding())

    def leaked_on(self, uuid: str) -> int:
        """Return what it held of a card when its owner was over."""
        return self.cards[uuid].leaked if uuid in self.cards else 0

    def end(self, at: float = 0.0) -> None:
        """Take note that it has ended: now, unless it is known when."""
        self.ended, self.news = at or clock.time(), True

    @property
    def gone(self) -> bool:
        """Whether its process has ended, which no page of its own would tell."""
        silent = self.slot is None and not self.ended
        return silent and self.identity != family.identity(self.pid)

    @property
    def lags(self) -> bool:
        """Whether the driver says that it holds something, though it has ended."""
        return bool(self.ended) and any(held.used for held in list(self.cards.values()))

    def holds(self, context: int) -> bool:
        """Whether it runs and holds something."""
        return not self.ended and any(held.now(context) for held in list(self.cards.values()))

    def usages(self, started_by: str, context: int) -> Iterator[ChildUsage]:
        """Return what it did to each card."""
        for uuid, held in self.cards.items():
            told = held.told
            yield ChildUsage(
                pid=self.pid,
                command=self.command,
                card=uuid,
                started_by=started_by,
                peak=None if told is None else told.peak,
                reserved_peak=None if told is None else told.reserved_peak,
                used_peak=held.used_peak,
                used=0 if self.ended else held.now(context),
                leaked=held.leaked,
                ooms=0 if told is None else told.ooms,
                start=self.began,
                end=self.ended,
            )

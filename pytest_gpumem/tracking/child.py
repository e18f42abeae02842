"""What is known of one child, and of all that one test or fixture started together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_gpumem.devices.book import Figures


@dataclass
class Held:
    """What one child holds of one card; bytes, None where its source does not tell."""

    told: Figures | None = None
    used: int | None = None
    used_peak: int | None = None
    leaked: int = 0

    def now(self, context: int) -> int:
        """Return what it holds: the driver's figure, or else the allocator's and a context."""
        if self.used is not None:
            return self.used
        return 0 if self.told is None else self.told.reserved + context


@dataclass(eq=False)
class Child:
    """A process that used a card."""

    pid: int
    identity: str
    owner: int
    began: float
    slot: int | None = None
    """Of its page, while it has one."""
    tells: bool = False
    """Whether it had a page."""
    command: str = ""
    ended: float = 0.0
    judged: bool = False
    """Whether its owner is over."""
    news: bool = True
    """Whether something is known that no test's record has."""
    cards: dict[str, Held] = field(default_factory=dict)

    def on(self, uuid: str) -> Held:
        """Return what it holds of a card."""
        return self.cards.setdefault(uuid, Held())


@dataclass
class Share:
    """What all children of one owner had of one card together, at their highest; bytes."""

    told: int = 0
    """Allocated, by their allocators."""
    need: int = 0
    """Reserved or used, contexts included."""
    others: dict[Child, int] = field(default_factory=dict)
    """Used by those whose allocators told nothing, when that was most together."""

    @property
    def other(self) -> int:
        """Used by those that never told anything: some do so a moment after they are seen."""
        return sum(size for child, size in self.others.items() if not child.tells)

    @property
    def peak(self) -> int:
        """What counts as allocated."""
        return self.told + self.other

"""What all children of each test and fixture had together, at their highest."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from pytest_gpumem.records import CardUsage, FixtureUsage
    from pytest_gpumem.tracking.child import Child


# A plain class: each data class takes half a millisecond of every run's start.
class Share:
    """What all children of one owner had of one card together, at their highest; bytes."""

    def __init__(self) -> None:
        self.told = 0
        """Allocated, by their allocators."""
        self.need = 0
        """Reserved or used, contexts included."""
        self.others: dict[Child, int] = {}
        """Used by those whose allocators told nothing, when that was most together."""

    @property
    def other(self) -> int:
        """Used by those that never told anything: some do so a moment after they are seen."""
        return sum(size for child, size in self.others.items() if not child.tells)

    @property
    def peak(self) -> int:
        """What counts as allocated."""
        return self.told + self.other

    def widen(self, usage: CardUsage, orphaned: int) -> CardUsage:
        """Return what a test did to a card, with this; its orphans hold ``orphaned`` of it."""
        return usage._replace(
            peak=usage.peak + self.peak,
            leftover=usage.leftover + orphaned,
            leaked=usage.leaked + orphaned,
            extra=usage.extra + self.need,
            children_peak=self.peak,
            orphaned=orphaned,
        )

    def widen_fixture(self, usage: FixtureUsage, orphaned: int) -> FixtureUsage:
        """Return what a fixture did to a card, with this."""
        back = usage.released
        return usage._replace(
            allocated=usage.allocated + self.peak,
            peak=usage.peak + self.peak,
            released=None if back is None else back + max(0, self.peak - orphaned),
            leaked=usage.leaked + orphaned,
            orphaned=orphaned,
        )


class Shares:
    """The shares of all owners, by their numbers and the card."""

    def __init__(self) -> None:
        self._shares: dict[tuple[int, str], Share] = {}

    def __bool__(self) -> bool:
        """Whether there is anything to tell of any child."""
        return bool(self._shares)

    def at(self, owner: int, uuid: str) -> Share:
        """Return the share of one owner on one card."""
        return self._shares.setdefault((owner, uuid), Share())

    def of(self, owner: int) -> dict[str, Share]:
        """Return the shares of one owner, by card."""
        return {uuid: share for (each, uuid), share in self._shares.items() if each == owner}

    def hand_over(self, owner: int, heir: int) -> None:
        """Let another one answer for what the children of ``owner`` had."""
        for uuid in self.of(owner):
            share, mine = self._shares.pop((owner, uuid)), self.at(heir, uuid)
            mine.told += share.told
            mine.need += share.need
            mine.others.update(share.others)

    def needs(self, owners: Collection[int]) -> dict[str, int]:
        """Return the most that the children of ``owners`` had, by card."""
        found: dict[str, int] = {}
        for (owner, uuid), share in self._shares.items():
            if owner in owners:
                found[uuid] = found.get(uuid, 0) + share.need
        return found

    def forget(self, owners: Collection[int]) -> None:
        """Drop the shares of ``owners``."""
        for each in [each for each in self._shares if each[0] in owners]:
            del self._shares[each]

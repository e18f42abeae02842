"""Which entries of a store decay under its rules, and which states go with them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_gpumem.archive.catalogue import Entry


class Forgotten(NamedTuple):
    """What ``forget`` did."""

    decayed: int
    """Entries that the rule no longer keeps; they are gone."""
    removed: int
    """States removed with them: those that no other entry has."""
    freed: int
    """Bytes on the disk."""


class Plan(NamedTuple):
    """What is to be removed."""

    decayed: tuple[str, ...]
    """Ids of entries."""
    orphans: frozenset[str]
    """States that no entry has then."""


def plan(
    entries: Sequence[Entry],
    candidates: Sequence[Entry],
    sizes: Mapping[str, int],
    *,
    before: float | None = None,
    keep_last: int | None = None,
    max_stored: int | None = None,
) -> Plan:
    """Return what no rule keeps.

    Args:
        entries: all of the store.
        candidates: those that may decay, oldest first.
        sizes: bytes of the states' files, by content.
        before: seconds since the epoch; candidates put earlier decay.
        keep_last: so many of the newest candidates stay.
        max_stored: bytes; the oldest candidates decay until all states take no more than that.

    """
    excess = 0 if keep_last is None else max(0, len(candidates) - keep_last)
    decayed = {
        entry.id: entry
        for at, entry in enumerate(candidates)
        if at < excess or (before is not None and entry.created < before)
    }
    holders = Counter(entry.content for entry in entries if entry.id not in decayed)
    if max_stored is not None:
        stored = sum(sizes[content] for content in holders)
        for entry in candidates:
            if stored > max_stored and entry.id not in decayed:
                decayed[entry.id] = entry
                holders[entry.content] -= 1
                stored -= sizes[entry.content] if not holders[entry.content] else 0
    orphans = {entry.content for entry in decayed.values()} - set(+holders)
    return Plan(tuple(decayed), frozenset(orphans))

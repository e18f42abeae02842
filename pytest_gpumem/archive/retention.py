"""Which entries of a store decay under its rules, and which states go with them."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem.archive import arguments

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


class Rules(NamedTuple):
    """What decays; None: nothing by that rule."""

    before: float | None = None
    """Seconds since the epoch; candidates put earlier decay."""
    keep_last: int | None = None
    """So many of the newest candidates stay."""
    max_stored: int | None = None
    """Bytes; the oldest candidates decay until all states take no more than that."""


def rules_of(older_than: float | None, keep_last: int | None, max_stored: int | None) -> Rules:
    """Return the rules that ``ArchiveStore.forget`` was given; ``older_than`` is in seconds.

    Raises:
        ArgumentError: one of them is not what it must be.

    """
    age = arguments.seconds("older_than", older_than)
    return Rules(
        None if age is None else time.time() - age,
        arguments.whole("keep_last", keep_last),
        arguments.whole("max_stored", max_stored),
    )


def plan(
    entries: Sequence[Entry], candidates: Sequence[Entry], sizes: Mapping[str, int], rules: Rules
) -> Plan:
    """Return what no rule keeps.

    Args:
        entries: all of the store.
        candidates: those that may decay, oldest first.
        sizes: bytes of the states' files, by content.
        rules: what decays.

    """
    before, keep_last, max_stored = rules
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

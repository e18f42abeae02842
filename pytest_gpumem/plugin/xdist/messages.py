"""What workers and reports tell the controller, in the planner's terms."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pytest_gpumem.records import properties
from pytest_gpumem.tuples import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pytest_gpumem.scheduling.commands import CardKey
    from pytest_gpumem.scheduling.planner import Planner


class Taken(NamedTuple):
    """What a test took, on the card where that is most; bytes."""

    peak: int = 0
    """Beyond what its process kept before it."""
    fixtures: int = 0
    """What the wider fixtures that it uses hold."""
    oom: bool = False
    """Whether it ran out of memory."""
    ram: int = 0
    """Of main memory beyond what its process had before it, where that was measured."""


NOTHING_TAKEN = Taken()


def cards_of(
    hellos: Iterable[Mapping[str, Any]],
) -> tuple[dict[CardKey, int], dict[CardKey, int]]:
    """Return each card's total, and what anybody uses of it, in bytes.

    Each worker told of its host and cards: uuid, total, used.
    """
    totals: dict[CardKey, int] = {}
    used: dict[CardKey, int] = {}
    for hello in hellos:
        for uuid, total, by_all in hello["cards"]:
            card = hello.get("host", ""), uuid
            totals[card] = total
            used[card] = max(used.get(card, 0), by_all)
    return totals, used


def tests_of(hello: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a worker tells of the tests, see ``planned_tests``; all tell the same."""
    told: dict[str, Any] = json.loads(hello["tests"])
    return told


def rooms_of(hellos: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return the main memory that tests may take, in bytes by host, where workers told of it.

    The least that one told: the others of its host may not have loaded all of theirs before.
    """
    rooms: dict[str, int] = {}
    for hello in hellos:
        room, host = hello.get("ram"), hello.get("host", "")
        if room is not None:
            rooms[host] = min(room, rooms.get(host, room))
    return rooms


def tell_fixtures(planner: Planner, worker: str, message: Mapping[str, Any]) -> None:
    """Tell the planner of wide fixtures that begin to use a card, and of those that stand.

    What these hold is in the same message, or was in one before.
    """
    if "begun" in message:
        planner.begins(worker, message["begun"])
    for fixture, leases in message.get("stand", {}).items():
        planner.stands(fixture, leases=leases)


def taken(told: Sequence[tuple[str, object]]) -> Taken:
    """Return what a test took, from its report."""
    if not told:  # as most
        return NOTHING_TAKEN
    usage = properties.read(told)
    return Taken(
        max((card.extra for card in usage.cards), default=0),
        max((card.fixture_bytes for card in usage.cards), default=0),
        bool(usage.oom),
        usage.ram.own_peak if usage.ram is not None else 0,
    )

"""What a test's user properties tell of it: xdist carries them home, JUnit shows them.

Each ``tell_*`` takes the place of what was told before, so that a report made after a further
attempt tells of that attempt alone.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pytest_gpumem.records.plain import from_plain, to_plain
from pytest_gpumem.records.run import (
    Alive,
    CardUsage,
    ChildUsage,
    FixtureUsage,
    LeaseUsage,
    Left,
    Process,
    Proof,
    RamUsage,
    Route,
    ScopeUsage,
)
from pytest_gpumem.tuples import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Properties = list[tuple[str, object]]

PEAK = "gpumem_peak"
_RECORD = "gpumem_record"
_USAGE = (PEAK, "gpumem_leftover", "gpumem_leaked", _RECORD)
"""Bytes over all cards, and the whole record as JSON text."""
_ROUTES = "gpumem_routes"
_STEP = "gpumem_step"
_OOM = "gpumem_oom"
BROKE = "gpumem_broke"
_CONSOLIDATED = "gpumem_consolidated"
RAM = "gpumem_ram"
_PROOF = "gpumem_proof"


class OwnProperties(NamedTuple):
    """The fields of a ``RecordedTest`` that its own process knows."""

    cards: tuple[CardUsage, ...] = ()
    fixtures: tuple[FixtureUsage, ...] = ()
    oom: str = ""
    lease: LeaseUsage | None = None
    left: tuple[Left, ...] = ()
    children: tuple[ChildUsage, ...] = ()
    beside: tuple[Process, ...] = ()
    scopes: tuple[ScopeUsage, ...] = ()
    routes: tuple[Route, ...] = ()
    step: str = ""
    broke: str = ""
    alive: tuple[Alive, ...] = ()
    ram: RamUsage | None = None
    proof: Proof | None = None


NOTHING = OwnProperties()

_IN_RECORD = (
    "cards",
    "fixtures",
    "oom",
    "lease",
    "left",
    "children",
    "beside",
    "scopes",
    "alive",
)


def tell_usage(properties: Properties, usage: OwnProperties) -> None:
    """Tell what the test did to the cards; nothing where it did nothing."""
    _forget(properties, _USAGE)
    if not any(usage):
        return
    values = (
        sum(card.peak for card in usage.cards),
        sum(card.leftover for card in usage.cards),
        sum(card.leaked for card in usage.cards),
        json.dumps({name: to_plain(getattr(usage, name)) for name in _IN_RECORD}),
    )
    properties.extend(zip(_USAGE, values, strict=True))


def tell_routes(properties: Properties, routes: Sequence[Route]) -> None:
    """Tell where the test's tasks were sent."""
    _forget(properties, (_ROUTES,))
    if routes:
        properties.append((_ROUTES, json.dumps(routes)))


def is_routed(properties: Iterable[tuple[str, object]]) -> bool:
    """Return whether any of the test's tasks was sent to a place."""
    return any(name == _ROUTES for name, _ in properties)


def tell_step(properties: Properties, step: str) -> None:
    """Tell why this is a further attempt."""
    _forget(properties, (_STEP, BROKE))
    properties.append((_STEP, step))


def of_attempt(properties: Iterable[tuple[str, object]]) -> Properties:
    """Return what tells why an attempt is made, and nothing of what came of an earlier one."""
    return [each for each in properties if each[0] in (_STEP, _CONSOLIDATED)]


def tell_oom(properties: Properties, text: str) -> None:
    """Tell what the card said when this phase ran out of memory; "" if it did not."""
    _forget(properties, (_OOM,))
    if text:
        properties.append((_OOM, text))


def read_oom(properties: Iterable[tuple[str, object]]) -> str:
    """Return what the card said when a phase ran out of memory, "" if it did not."""
    return str(dict(properties).get(_OOM, ""))


def read_broke(properties: Iterable[tuple[str, object]]) -> str:
    """Return after what error the card did not answer any more, "" if it did."""
    return str(dict(properties).get(BROKE, ""))


def tell_broke(properties: Properties, sentence: str) -> None:
    """Tell after what error the card does not answer any more."""
    properties.append((BROKE, sentence))


def tell_ram(properties: Properties, usage: RamUsage) -> None:
    """Tell what the test did to main memory."""
    _forget(properties, (RAM,))
    properties.append((RAM, json.dumps(usage)))


def tell_proof(properties: Properties, proof: Proof) -> None:
    """Tell what became of a test whose allocations were made to fail."""
    properties.append((_PROOF, json.dumps(to_plain(proof))))


def tell_consolidated(properties: Properties, done: object) -> None:
    """Tell, beside what was told before, what was consolidated after the test or for it."""
    properties.append((_CONSOLIDATED, str(done)))


def read(properties: Iterable[tuple[str, object]]) -> OwnProperties:
    """Return what was told; the fields of which nothing was are their defaults."""
    found = dict(properties)
    if not found:
        return NOTHING
    plain: dict[str, object] = {}
    if isinstance(record := found.get(_RECORD), str):
        plain = json.loads(record)
    if isinstance(routes := found.get(_ROUTES), str):
        plain["routes"] = [
            dict(zip(Route._fields, each, strict=True)) for each in json.loads(routes)
        ]
    if isinstance(step := found.get(_STEP), str):
        plain["step"] = step
    if isinstance(broke := found.get(BROKE), str):
        plain["broke"] = broke
    if isinstance(ram := found.get(RAM), str):
        plain["ram"] = dict(zip(RamUsage._fields, json.loads(ram), strict=True))
    if isinstance(proof := found.get(_PROOF), str):
        plain["proof"] = json.loads(proof)
    return from_plain(OwnProperties, plain)


def _forget(properties: Properties, names: Sequence[str]) -> None:
    if properties:
        properties[:] = [each for each in properties if each[0] not in names]

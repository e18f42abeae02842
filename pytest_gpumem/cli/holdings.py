"""What is on the cards now, and who has or wants leases: what ``monitor`` and ``ps`` show."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem import devices
from pytest_gpumem.cli import simulated_cards
from pytest_gpumem.devices import family, host
from pytest_gpumem.leases.request import called

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_gpumem.leases.entries import Entry
    from pytest_gpumem.leases.glimpses import Glimpse, Watcher
    from pytest_gpumem.leases.ledger import Ledger
    from pytest_gpumem.leases.page import Page


class Holding(NamedTuple):
    """One process on a card, or a lease or request of one; sizes in bytes."""

    pid: int
    used: int | None = None
    """As the driver says; None where it does not tell."""
    lease: int | None = None
    """Granted or asked for; None without a lease."""
    state: str = ""
    """``held``, ``alone`` or ``waiting``; empty without a lease."""
    test: str = ""
    """The one that it runs, also without a lease; empty between tests."""
    worker: str = ""
    """``gw0`` and so on; empty without xdist."""
    phase: str = ""
    """``setup``, ``call``, ``teardown``: when torch was asked for the next two; ``child`` of a
    process that the test or a fixture started."""
    allocated: int | None = None
    reserved: int | None = None
    """By torch; None where the process did not tell, or does not use the card."""
    starter: int = 0
    """The process with a lease, or request, of the same card that started this one; 0 for none."""
    here: bool = True
    """Whether the process is one of those seen here: not one of another container, nor one that
    has ended and whose lease is kept by what it started."""
    program: bool = False
    """Whether its lease is a program's, and no test's."""


class CardState(NamedTuple):
    """A card at one moment; sizes in bytes."""

    uuid: str
    name: str
    used: int
    free: int
    total: int
    holdings: tuple[Holding, ...]


def look(ledger: Ledger, watcher: Watcher | None = None) -> list[CardState]:
    """Return what is on every card now: the driver's, and simulated ones that are in use.

    Behind them, with an empty UUID, stand the processes that run tests without a card.
    """
    page, glimpses = _page(ledger), watcher.glimpses() if watcher is not None else []
    found = []
    for card in devices.find_cards().cards:
        reading = devices.driver_reading(card)
        if reading is not None:
            sizes = (reading.used, reading.free, reading.total)
            held = devices.process_bytes(card)
            holdings = _holdings(ledger, page, card.uuid, held, glimpses)
            found.append(CardState(card.uuid, card.name, *sizes, holdings))
    seen = {
        state.uuid for state in found
    }  # in a simulated run's child the driver tells of its card
    for each in simulated_cards.cards():
        if each.uuid in seen:
            continue
        used = dict(each.processes())
        free = each.free()
        sizes = (each.total - free, free, each.total)
        holdings = _holdings(ledger, page, each.uuid, used, glimpses)
        if used or holdings:
            found.append(CardState(each.uuid, each.name, *sizes, holdings))
    placed = {row.pid for card in found for row in card.holdings}
    rest = [_seen(Holding(each.pid), each) for each in glimpses if each.pid not in placed]
    return [*found, CardState("", "no card", 0, 0, 0, tuple(rest))] if rest else found


def in_main_memory(ledger: Ledger) -> list[CardState]:
    """Return who has or wants leases of main memory: for each pool of which there are any.

    Its ``holdings`` are these and all that they started, what each has for itself.
    """
    from pytest_gpumem.leases.entries import card_key

    page, found = _page(ledger), []
    if page is None:
        return []
    for pool in host.pools():
        key = card_key(pool.name)
        entries = [entry for entry in page.entries if key in entry.claims]
        if entries:
            pids = {entry.pid for entry in entries if ledger.alive.family.is_here(entry.process)}
            pids.update(*map(host.descendants, pids))
            used: dict[int, int | None] = {pid: host.share_of(pid).now for pid in pids}
            sizes = pool.used, max(0, pool.total - pool.used), pool.total
            holdings = _holdings(ledger, page, pool.name, used, ())
            found.append(CardState(pool.name, called(pool.name), *sizes, holdings))
    return [state for state in found if state.holdings]


def _page(ledger: Ledger) -> Page | None:
    """Read the ledger without taking part in it; None where there is none."""
    try:
        return ledger.page()
    except OSError:
        return None


def _holdings(
    ledger: Ledger,
    page: Page | None,
    uuid: str,
    used: Mapping[int, int | None],
    glimpses: Sequence[Glimpse],
) -> tuple[Holding, ...]:
    """Return who is on a card: leases and requests in the order of the queue, then the others."""
    from pytest_gpumem.leases.entries import HELD, WAITING, card_key

    key = card_key(uuid)
    entries = [
        entry
        for entry in (page.entries if page is not None else ())
        if key in entry.claims and entry.state in (HELD, WAITING)
    ]
    dead = ledger.dead({entry.process for entry in entries})
    entries = [entry for entry in entries if entry.process not in dead]
    born = {line[0]: each.pid for each in entries if (line := _line(ledger, each))}
    rows: list[Holding] = []
    told = dict(used)
    for entry in entries:
        row = _leased(ledger, entry, key)
        # What a process uses is told once, of the first that it has.
        size = told.pop(row.pid, None) if row.here else None
        starter = _starter(_line(ledger, entry), born)
        rows.append(row._replace(used=size, starter=0 if starter == row.pid else starter))
    for pid, size in told.items():
        if not any(row.pid == pid and row.here for row in rows):
            rows.append(_child(Holding(pid, size, starter=_starter(family.lineage(pid), born))))
    for each in glimpses:
        place = next((at for at, row in enumerate(rows) if row.pid == each.pid), None)
        if place is not None:
            rows[place] = _seen(rows[place], each, uuid)
        # In a container the driver knows a process by a number of the host's.
        elif any(each.cards.get(uuid, ())):
            rows.append(_seen(Holding(each.pid), each, uuid))
    return tuple(rows)


def _leased(ledger: Ledger, entry: Entry, key: str) -> Holding:
    from pytest_gpumem.leases.entries import WAITING

    claim = entry.claims[key]
    families = ledger.alive.family
    return Holding(
        entry.pid,
        lease=claim.extra,
        state="waiting" if entry.state == WAITING else "alone" if claim.exclusive else "held",
        test=ledger.label(entry),
        worker=families.worker(entry.process),
        here=families.is_here(entry.process),
        program=not entry.test,
    )


def _line(ledger: Ledger, entry: Entry) -> Sequence[str]:
    return ledger.alive.family.lineage(entry.process)


def _starter(line: Sequence[str], born: Mapping[str, int]) -> int:
    """Return which of the processes ``born`` started the one of this lineage, 0 for none."""
    return next((born[each] for each in line[1:] if each in born), 0)


def _child(row: Holding) -> Holding:
    """Return ``row`` with who started its process, as its environment says."""
    links = family.started_by(row.pid)
    return row._replace(test=links[-1].name, phase="child") if links else row


def _seen(row: Holding, glimpse: Glimpse, uuid: str = "") -> Holding:
    """Return ``row`` with what its process tells of itself."""
    allocated, reserved = glimpse.cards.get(uuid, (None, None))
    return row._replace(
        test=glimpse.test if glimpse.phase else row.test,
        worker=glimpse.worker,
        phase=glimpse.phase,
        allocated=allocated,
        reserved=reserved,
    )

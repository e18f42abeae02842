"""What processes without an entry in the ledger use of the cards, and of main memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from pytest_gpumem.admission import NOTHING, Claim, bounds, foreign
from pytest_gpumem.devices import host
from pytest_gpumem.leases.entries import card_key, pid_of
from pytest_gpumem.tuples import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection

    from pytest_gpumem.devices import Usage
    from pytest_gpumem.leases.family import Families
    from pytest_gpumem.leases.page import Page


class Driver(Protocol):
    """Who tells what is used of a card, by UUID."""

    def used(self, uuid: str) -> int:
        """Return the bytes that anybody uses."""

    def usage(self, uuid: str) -> Usage:
        """Return who uses it."""


class CudaDriver:
    """The driver of CUDA's cards."""

    def used(self, uuid: str) -> int:
        """Return the bytes that anybody uses."""
        from pytest_gpumem import devices
        from pytest_gpumem.records import Card

        return devices.used_bytes(Card(uuid, "", 0))

    def usage(self, uuid: str) -> Usage:
        """Return who uses it."""
        from pytest_gpumem import devices
        from pytest_gpumem.records import Card

        return devices.usage(Card(uuid, "", 0))


class Outside(NamedTuple):
    """What processes without an entry in the ledger use of a card."""

    foreign: int = 0
    """Bytes."""
    family: int = 0
    """Bytes besides, of those that this process or an ancestor started: kept, not waited for."""
    strangers: tuple[tuple[int, int | None], ...] = ()
    """Foreign processes that the driver lists: pid, and bytes if it tells them."""
    within: Mapping[str, int] = MappingProxyType({})
    """Of main memory, by process with an entry, the bytes that were not foreign for that entry.

    A test that ends keeps some, without an entry: that is foreign from then on.
    """

    def beside(self, claims: Mapping[str, Claim]) -> Outside:
        """Return it where processes have these claims by now, fewer perhaps than when it was found.

        Without that, what a test keeps that ended between the look and the decision would be
        nobody's, and would be granted.
        """
        left = 0
        for process, size in self.within.items():
            claim = claims.get(process, NOTHING)
            left += max(0, size - claim.resident - claim.extra)
        return self._replace(foreign=self.foreign + left) if left else self


class Lookout:
    """Looks at what is outside of the ledger, for one process."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._found: dict[str, int] = {}
        """By card, the foreign bytes that were found last."""
        self._pools: dict[str, host.Pool] = {}
        """Those of main memory, once one was asked for."""

    def unused(self, uuid: str, total: int) -> int:
        """Return the bytes of a card of ``total`` that nobody uses at this moment."""
        return total - (self._used_of(uuid) if host.is_pool(uuid) else self._driver.used(uuid))

    def look(
        self, uuid: str, total: int, page: Page, process: str, family: Families, *, needed: int
    ) -> Outside:
        """Return what is outside of ``page``, as ``process`` of ``family`` sees it.

        Of main memory it is no more than told where that leaves the ``needed`` bytes all the same.
        """
        if host.is_pool(uuid):
            return self._look_at_pool(uuid, total, page, process, family, needed=needed)
        ours, used = taken(card_key(uuid), page), self._driver.used(uuid)
        if used <= sum(claim.resident for claim in ours.values()):
            self._found[uuid] = 0
            return Outside()
        usage = self._driver.usage(uuid)
        told = dict(usage.processes)
        strangers = told.keys() - {os.getpid(), *map(pid_of, ours)}
        for pid, starter in family.starters(strangers, ours).items():
            # Within what its starter keeps, or runs with: a worker's engine, say.
            told[pid_of(starter)] = (told.get(pid_of(starter)) or 0) + (told.pop(pid) or 0)
            strangers = strangers - {pid}
        kin = _kin(strangers, family)
        relatives = sum(told[pid] or 0 for pid in kin)
        own, known = ours.pop(process, NOTHING), told.pop(os.getpid(), None)
        # This process may have entered what it started as kept: that counts once.
        relatives = max(0, relatives - max(0, own.resident - usage.own))
        # What this process uses is its own, whether or not it was entered.
        least = max(own.resident, usage.own)
        most = least if known is not None else max(least, own.resident + own.extra)
        # One that is not listed uses no more than those that are leave unexplained.
        listed = list(usage.processes.values())
        limit = total if None in listed or not listed else used - sum(filter(None, listed))
        uses = [bounds(claim, limit, told.get(pid_of(each))) for each, claim in ours.items()]
        uses += [(least, most), (relatives, relatives)]
        size = foreign(used, uses, self._found.get(uuid, 0))
        self._found[uuid] = size
        return Outside(size, relatives, tuple((pid, told[pid]) for pid in sorted(strangers - kin)))

    def _look_at_pool(
        self, uuid: str, total: int, page: Page, process: str, family: Families, *, needed: int
    ) -> Outside:
        ours, used = taken(card_key(uuid), page), self._used_of(uuid)
        if used + sum(claim.resident + claim.extra for claim in ours.values()) + needed <= total:
            return Outside(used)  # whose it is makes no difference, and takes milliseconds to find
        here = {each: pid_of(each) for each in ours if family.is_here(each)}
        pids = {*here.values(), os.getpid()}
        told = {pid: host.family_of(pid, pids - {pid}) for pid in pids}
        # To walk through page tables takes milliseconds, in which a holder may take much.
        used = max(used, self._used_of(uuid))
        ours.pop(process, None)
        own = told[os.getpid()]
        uses = {
            each: bounds(claim, total, told.get(here.get(each, 0))) for each, claim in ours.items()
        }
        size = foreign(used, [*uses.values(), (own, own)], self._found.get(uuid, 0))
        self._found[uuid] = size
        return Outside(size, within={each: most for each, (_, most) in uses.items()})

    def _used_of(self, pool: str) -> int:
        if pool not in self._pools:
            self._pools = {each.name: each for each in host.pools()}
        return self._pools[pool].used if pool in self._pools else 0


def _kin(pids: Collection[int], family: Families) -> set[int]:
    """Return those that this process or an ancestor started, or that started this one."""
    if not pids:
        return set()
    roots = family.roots()
    return {pid for pid in pids if family.is_kin(pid, roots)}


def taken(key: str, page: Page) -> dict[str, Claim]:
    """Return what each process with an entry in the ledger may use of a card."""
    ours: dict[str, Claim] = {}
    for entry in page.taken:
        claim = page.claims[key].get(entry.name)
        if claim is not None:
            ours[entry.process] = claim.beside(ours.get(entry.process, NOTHING))
    return ours

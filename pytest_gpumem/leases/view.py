"""Who may start: what a decision rests on, and the decision. Nothing here looks at the system."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gpumem.admission import Claim, fits, may_start, room, waits_in_vain
from pytest_gpumem.devices import host
from pytest_gpumem.leases.entries import SPARE
from pytest_gpumem.leases.outside import Outside
from pytest_gpumem.leases.request import Hope
from pytest_gpumem.tuples import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from pytest_gpumem.leases.entries import Entry
    from pytest_gpumem.leases.page import Page

_NOTHING_OUTSIDE = Outside()
_NO_HOPE = Hope()


class Known(NamedTuple):
    """A card that this process asked for."""

    uuid: str
    total: int


class View(NamedTuple):
    """What a decision rests on: the ledger, the cards, and what else is on them."""

    page: Page
    cards: Mapping[str, Known]
    """By key."""
    headroom: int = 0
    outside: Mapping[str, Outside] = {}
    """By card; empty where it was not asked for."""

    def beside(self, key: str) -> Outside:
        """Return what others use of a card."""
        return self.outside.get(key, _NOTHING_OUTSIDE)

    def against(self, request: Entry, key: str) -> list[Claim]:
        """Return what leaves ``request`` less of a card."""
        found = self.page.against(request, key)
        if family := self.beside(key).family:
            found.append(Claim(family, 0, exclusive=False))
        return found

    def admits(self, request: Entry, hope: Hope = _NO_HOPE) -> bool:
        """Return whether ``request`` may start on all of its cards.

        With ``hope`` it does not run alone with too little.
        """
        return all(
            self.admits_on(request, key, hope)
            for key in request.claims
            if key in self.cards  # another process's request knows its own
        )

    def admits_on(self, request: Entry, key: str, hope: Hope = _NO_HOPE) -> bool:
        """Return whether it may start on one of them, which is known."""
        new = request.claims[key]
        total, headroom, claims = self.cards[key].total, self.headroom, self.against(request, key)
        ahead = self.page.ahead(request, key)
        others = self.beside(key).foreign
        if may_start(total, others, headroom, claims, new, ahead=ahead):
            return True
        left = self.page.left(request, key, total - headroom)
        if not new.exclusive and not ahead and new.extra <= left:
            return True
        if not waits_in_vain(total, others, headroom, claims, new, ahead=ahead):
            return False
        if fits(total, 0, headroom, claims, new):  # and foreign programs keep it waiting
            if request.test and host.is_pool(self.cards[key].uuid):
                return True  # a suite is used to programs that take main memory beside it
            return not (hope.timed or (hope.freed and others < self.page.lasting(key)))
        return not (hope.spared and self._may_be_spared(request, key))

    def lent(self, request: Entry, leases: Collection[str]) -> View:
        """Return it without ``leases``, and without who waits before ``request``, for these too."""
        before = {each.name for each in self.page.waiting if each.number < request.number}
        return self._replace(page=self.page.without({*leases, *before}))

    def waits_for_strangers(self, request: Entry) -> bool:
        """Return whether only foreign programs keep ``request`` waiting."""
        empty = {key: each._replace(foreign=0) for key, each in self.outside.items()}
        return self._replace(outside=empty).admits(request)

    def next(self, *, behind: int = 0, but: Entry | None = None) -> Iterator[Entry]:
        """Return who behind number ``behind`` may be able to start, first come first.

        That is for those who wait to decide, whose headroom and cards this process may not know:
        it names one too many rather than none.
        """
        if not self.page.waiting:
            return
        hint = self._replace(headroom=0, outside={})
        full = {key for key in self.cards if self._is_full(key)}
        for entry in self.page.waiting:
            if entry.number <= behind or entry == but:
                continue
            if not full.isdisjoint(entry.claims) and not self.page.is_covered(entry):
                continue
            if hint.admits(entry):
                yield entry

    def _is_full(self, key: str) -> bool:
        """Return whether nobody can start on a card; a long queue is then passed over quickly."""
        if not self.page.taken or any(map(self.page.is_stuck, self.page.taken)):
            return False
        claims = self.page.claims[key].values()
        if any(claim.exclusive for claim in claims):
            return True
        running = any(claim.extra for claim in claims)
        return running and room(self.cards[key].total, 0, 0, claims) <= 0

    def short(self, request: Entry, key: str) -> int:
        """Return how many bytes of what ``request`` was granted of a card are not there."""
        others = self.beside(key).foreign
        has = room(self.cards[key].total, others, self.headroom, self.against(request, key))
        return max(0, request.claims[key].extra - has)

    def _may_be_spared(self, request: Entry, key: str) -> bool:
        page, own = self.page, request.process
        return any(
            entry.state == SPARE and entry.process != own and key in entry.claims
            for entry in page.taken
            if not page.descends(own, entry.process) and not page.descends(entry.process, own)
        )

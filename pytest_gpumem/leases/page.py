"""What the ledger says at one moment, and who of those in it is in whose way."""

from __future__ import annotations

import functools
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from pytest_gpumem.admission import Claim
from pytest_gpumem.leases.entries import HELD, LASTING, WAITING, Entry, entry_named

if TYPE_CHECKING:
    from pytest_gpumem.leases.family import Kin


class Page:
    """What the ledger said at one moment, in the order of the queue.

    Whoever is asked for by somebody who has a lease works within that lease: the processes that
    its process started, and, if it is a test's, what its own process asks for later. What they
    hold comes out of it, and they never wait for it.
    """

    def __init__(
        self, names: Collection[str], kin: Callable[[Collection[str]], Kin] = lambda _: {}
    ) -> None:
        """Read ``names``; ``kin`` tells who of some processes descends from whom, when asked."""
        self.names = names
        known = filter(None, map(entry_named, names))
        self.entries = sorted(known, key=operator.attrgetter("number"))
        # Others may come before one of low priority, whose number is a later one's.
        self.last = max((entry.number for entry in self.entries if not entry.low), default=0)
        self.waiting = [entry for entry in self.entries if entry.state == WAITING]
        self.taken = [entry for entry in self.entries if entry.state not in (WAITING, LASTING)]
        """Held and kept ones."""
        self._kin = kin

    @functools.cached_property
    def _ancestors(self) -> Kin:
        """Of processes, those with entries; not asked for where nobody is in anybody's way."""
        return self._kin({entry.process for entry in self.entries})

    def turned(self, entry: Entry, state: str) -> Page:
        """Return what it says once an entry is in another state."""
        return Page({*self.names} - {entry.name} | {entry.turned(state).name}, self._kin)

    def without(self, names: Collection[str]) -> Page:
        """Return what it would say without the entries of these names."""
        return Page({*self.names} - {*names}, self._kin)

    @functools.cached_property
    def strange(self) -> list[str]:
        """Names that are no entry's."""
        return sorted(name for name in self.names if entry_named(name) is None)

    def lasting(self, key: str) -> float:
        """Return the fewest foreign bytes of a card for which somebody waited in vain."""
        told = (entry.claims.get(key) for entry in self.entries if entry.state == LASTING)
        return min((claim.extra for claim in told if claim is not None), default=math.inf)

    def descends(self, process: str, other: str) -> bool:
        """Return whether ``other`` started ``process``, directly or not."""
        return other in self._ancestors.get(process, ())

    def covers(self, lease: Entry, other: Entry) -> bool:
        """Return whether ``other`` is, or would be, within a lease that is held."""
        if lease.state != HELD:
            return False
        if lease.process == other.process:
            return lease.test and lease.number < other.number
        return self.descends(other.process, lease.process)

    def against(self, request: Entry, key: str) -> list[Claim]:
        """Return what leaves ``request`` less of a card.

        What its own children have, and for a test what its process has, it keeps rather than waits
        for. So it is with leases whose holders themselves wait, for they would for ever.
        """
        found = []
        for entry in self.taken:
            claim = self.claims[key].get(entry.name)
            if claim is None or self.covers(entry, request):
                continue
            own = request.test and entry.process == request.process
            if own or self.descends(entry.process, request.process) or self.is_stuck(entry):
                claim = Claim(claim.resident + claim.extra, 0, exclusive=False)
            found.append(claim)
        return found

    def ahead(self, request: Entry, key: str) -> list[Claim]:
        """Return what the requests want of a card that start before ``request``.

        Within a lease others are before it only there: the rest waits for the lease's end.
        """
        around = self._around(request, key)
        return [
            entry.claims[key]
            for entry in self.waiting
            if entry.number < request.number
            and key in entry.claims
            and not self.descends(request.process, entry.process)
            and not self.descends(entry.process, request.process)
            and (not around or any(self.covers(each, entry) for each in around))
        ]

    def left(self, request: Entry, key: str, total: int) -> int:
        """Return what nobody has yet of the lease around ``request``, if there is one."""
        around = self._around(request, key)
        return max(
            (
                (each.claims[key].extra or total) - self._within(each, self.claims[key])
                for each in around
            ),
            default=0,
        )

    def is_covered(self, request: Entry) -> bool:
        """Return whether ``request`` is within somebody's lease."""
        return any(self.covers(each, request) for each in self._lenders)

    def is_stuck(self, holder: Entry) -> bool:
        """Return whether a holder itself waits, or for a process of its own that does."""
        return holder.state == HELD and any(
            self.covers(holder, entry) or (entry.test and entry.process == holder.process)
            for entry in self.waiting
        )

    @functools.cached_property
    def claims(self) -> Mapping[str, Mapping[str, Claim]]:
        """Those of ``taken``, by card and name, without what others hold within them."""
        found: defaultdict[str, dict[str, Claim]] = defaultdict(dict)
        for entry in self.taken:
            for key, claim in entry.claims.items():
                found[key][entry.name] = claim
        if len(self.taken) < 2:
            return found
        # Innermost first: what is within them does not count for those around them once more.
        around = sorted(self._lenders, key=self._depth, reverse=True)
        outside: dict[tuple[str, str, str], int] = {}
        # What no lease of a process has taken in yet, by process, entry and card.
        for lease in around:
            for key, claim in lease.claims.items():
                left = claim.extra
                for entry in self.taken:
                    if key in entry.claims and self.covers(lease, entry):
                        inner = found[key][entry.name]
                        place = lease.process, entry.name, key
                        size = outside.get(place, inner.resident + inner.extra)
                        outside[place] = max(0, size - left)
                        left = max(0, left - size)
                found[key][lease.name] = claim._replace(extra=left)
        return found

    @functools.cached_property
    def _lenders(self) -> list[Entry]:
        """Leases within which somebody else may be."""
        held = [entry for entry in self.taken if entry.state == HELD]
        parents = set().union(*self._ancestors.values()) if held else ()
        return [entry for entry in held if entry.test or entry.process in parents]

    def _around(self, request: Entry, key: str) -> list[Entry]:
        """Return the leases of a card that ``request`` is within."""
        return [e for e in self._lenders if key in e.claims and self.covers(e, request)]

    def _depth(self, entry: Entry) -> tuple[int, int]:
        return len(self._ancestors.get(entry.process, ())), entry.number

    def _within(self, lease: Entry, claims: Mapping[str, Claim]) -> int:
        inside = (entry for entry in self.taken if self.covers(lease, entry))
        found = (claims[entry.name] for entry in inside if entry.name in claims)
        return sum(claim.resident + claim.extra for claim in found)

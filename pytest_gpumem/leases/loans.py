"""Leases that count for nothing while those who hold them sleep.

A test has its lease from before its set-up to its end, though nobody wrote that into the suite. If
it then waits for something else, such as a lock, that another worker holds while that worker waits
for the card, both wait for ever, where they would not without us. What a process waits for cannot
be seen, but that it waits can: neither it nor what it started uses a CPU. So whoever waits for a
test's lease, or as a test for one that a fixture of the same run took, does not wait for sleepers:
where the card has the room all the same, only for a moment; else longer, for whoever merely slept
may then run out of memory beside it. Where main memory has no room one of them would be killed: of
that, only after so long that no test is expected to sleep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gpumem.clock import clock
from pytest_gpumem.leases.entries import HELD
from pytest_gpumem.tuples import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection

    from pytest_gpumem.leases.entries import Entry
    from pytest_gpumem.leases.family import Families
    from pytest_gpumem.leases.page import Page

LOOK = 0.06
"""Seconds between two looks at who holds a lease that may be lent, at first: then a quarter of the
time that was waited so far."""
NAP = 0.25
"""Seconds of sleep after which a lease is lent where there is room, among workers of one run. Not
among tests, which wait for one another as a rule, and of which one may use its share later."""
SLEEP = 10.0
"""Seconds of sleep after which it is lent whatever is free of the card..."""
LONG_SLEEP = 600.0
"""... and of main memory: whoever takes what is not there has the kernel kill somebody."""
_BUSY = 0.1
"""Part of a CPU that nobody uses who only looks now and then whether something is free."""


class Lent(NamedTuple):
    """What is lent to a request now: names of leases."""

    unused: Collection[str] = ()
    """Of those who sleep; for where there is room."""
    asleep: Collection[str] = ()
    """Of those among them who have slept for so long that it may well be for ever..."""
    for_good: Collection[str] = ()
    """... or that main memory is lent that is not there."""


class Nap(NamedTuple):
    """The sleep of a process that has a lease, as far as it was seen."""

    since: float
    looked: float
    """When it was looked at last; both of ``time.monotonic``."""
    seconds: float
    """Of CPU that it had used then."""


class Lending:
    """Tells, again and again, which leases are lent to a request that waits.

    Args:
        request: the entry that waits.
        family: tells who its siblings are, and who sleeps.
        worker: whether ``request`` is of a test in a worker of a run.
        naps: by lease, what requests of this process saw before; whoever slept a moment ago sleeps
            on for this one, or each fixture of a module would wait for the same sleeper anew.

    """

    def __init__(
        self, request: Entry, family: Families, naps: dict[str, Nap], *, worker: bool
    ) -> None:
        self._request = request
        self._family = family
        self._worker = worker
        self._naps = naps
        moment = clock.monotonic() - NAP
        for name in [name for name, nap in naps.items() if nap.looked < moment]:
            del naps[name]

    def look(self, page: Page) -> Lent | None:
        """Return which leases are lent; None where none is ever."""
        lenders = [each for each in page.taken if self._may_lend(each, page)]
        if not lenders:
            return None
        now = clock.monotonic()
        for each in lenders:
            self._naps[each.name] = self._nap(each, now)
        asleep, for_good = (
            {each.name for each in lenders if now - self._naps[each.name].since >= seconds}
            for seconds in (SLEEP, LONG_SLEEP)
        )
        unused = {
            each.name
            for each in lenders
            if each.test != self._request.test
            and now - self._naps[each.name].since >= NAP
            and self._family.is_sibling(each.process)
        }
        return Lent(asleep | unused, asleep, for_good)

    def _may_lend(self, lease: Entry, page: Page) -> bool:
        sibling = self._worker and self._family.is_sibling(lease.process)
        return may_lend(lease, self._request, page, sibling=sibling)

    def _nap(self, lease: Entry, now: float) -> Nap:
        seconds = self._family.seconds_of_sleeper(lease.process)
        if seconds is None:
            return Nap(now, now, 0.0)
        before = self._naps.get(lease.name, Nap(now, now, seconds))
        slept = seconds - before.seconds <= _BUSY * (now - before.looked)
        return Nap(before.since if slept else now, now, seconds)


def may_lend(lease: Entry, request: Entry, page: Page, *, sibling: bool) -> bool:
    """Return whether ``lease`` does not count for ``request`` while its holder sleeps.

    ``sibling`` says whether both are of workers of one run, and ``request`` a test's.
    """
    if lease.state != HELD or lease.process == request.process or not (lease.test or sibling):
        return False
    # These are no hindrance, and their holders sleep because they wait for one another.
    return not (page.covers(lease, request) or page.descends(lease.process, request.process))

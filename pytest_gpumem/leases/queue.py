"""The queue for the cards: how a request gets what it asks for, and wakes who is next."""

from __future__ import annotations

import threading
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from pytest_gpumem.clock import clock
from pytest_gpumem.devices import host
from pytest_gpumem.errors import LeaseError, LeaseTimeout
from pytest_gpumem.leases import describe
from pytest_gpumem.leases.entries import HELD, KEPT, LASTING, WAITING, Entry, entry_of
from pytest_gpumem.leases.loans import LOOK, Lending
from pytest_gpumem.leases.locks import News, Watch
from pytest_gpumem.leases.outside import taken
from pytest_gpumem.leases.place import Vanished
from pytest_gpumem.leases.request import YIELDS
from pytest_gpumem.leases.view import Known, View
from pytest_gpumem.tuples import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from pytest_gpumem.admission import Claim
    from pytest_gpumem.leases.ledger import Ledger
    from pytest_gpumem.leases.loans import Lent, Nap
    from pytest_gpumem.leases.outside import Lookout, Outside
    from pytest_gpumem.leases.page import Page
    from pytest_gpumem.leases.request import Hope, Terms

_OTHERS_EVERY = 0.25
"""Seconds between two looks at foreign processes, which give no sign when they end."""
_LOOK_ANYWAY = 10.0
"""Seconds after which a waiting request looks for itself: who has to wake it may be stopped."""
_STAND_BY = 0.002
"""Seconds that each waiting request gives the one before it to tidy up after a dead process."""
_QUIET = 0.2
"""Seconds of waiting that need no words: to find them takes longer than to pass a lease on."""


class Grant(NamedTuple):
    """What a request got."""

    entry: Entry
    short: int
    """Bytes of it that others use all the same."""
    waited: float
    """Seconds that it was in the queue."""


class Queue:
    """Those who wait for leases in a ledger, as this process takes part."""

    def __init__(self, ledger: Ledger, lookout: Lookout | None) -> None:
        self._ledger = ledger
        self._lookout = lookout
        self.headroom = 0
        self.cards: dict[str, Known] = {}
        """By key, those that this process asked for."""
        self._naps: dict[str, Nap] = {}

    def take(self, claims: dict[str, Claim], terms: Terms) -> Grant:
        """Return an entry that holds ``claims``."""
        ledger = self._ledger
        ledger.join(terms.deadline, terms.on_wait)
        outside = self.outside(claims)
        if terms.test:
            claims = {key: self._in_reach(key, each, outside) for key, each in claims.items()}
        request, waited = None, 0.0
        try:
            with ExitStack() as stack:
                with ledger.alone(terms.deadline, terms.on_wait):
                    view = self._view(ledger.page(), outside)
                    number = ledger.next_number(view.page) + (YIELDS if terms.low else 0)
                    request = entry_of(
                        WAITING, number, ledger.process, claims, test=terms.test, low=terms.low
                    )
                    if view.admits(request, terms.hopes(0)):
                        request = request.turned(HELD)
                    ledger.write(request, terms.label)
                if request.state == WAITING:
                    watch = stack.enter_context(ledger.alive.watch())
                    begun = clock.monotonic()
                    view = self._wait(request, view, watch, terms)
                    waited = clock.monotonic() - begun
                    request = request.turned(HELD)
            ledger.leases[request.name] = threading.current_thread()
            return Grant(request, self._note_short(view, request), waited)
        except BaseException:  # Ctrl-C comes at any line
            if request is not None:
                self._withdraw(request)
            raise

    def _wait(self, request: Entry, view: View, watch: Watch, terms: Terms) -> View:
        """Block until ``request`` is held; return what that was decided by."""
        begun, said = clock.monotonic(), ""
        worker = terms.test and terms.worker
        lending = Lending(request, self._ledger.alive.family, self._naps, worker=worker)
        news = self._missed(request, view.page)
        while True:
            waited = clock.monotonic() - begun
            lent = lending.look(view.page)
            if news is not None:
                view, granted = self._look(request, news, terms.hopes(waited), terms, lent)
                if granted:
                    return view
            if not request.test and any(not each.test for each in self._ledger.taken_here()):
                raise LeaseError(
                    "this thread holds a lease and would wait for another one, which can "
                    f"last for ever; ask for all at once: {self._explain(view, request)}"
                )
            if terms.deadline is not None and clock.monotonic() >= terms.deadline:
                situation = self._explain(view, request)
                raise LeaseTimeout(f"no lease within {terms.timeout:g} s: {situation}")
            if waited >= _QUIET and (text := self._explain(view, request)) != said:
                terms.on_wait(text)
                said = text
            pause = self._pause(view, request, terms, waited)
            pause = pause if lent is None else min(pause, max(LOOK, waited / 4))
            news = watch.wait(pause, lambda: _STAND_BY * self._ahead(request))

    def _ahead(self, request: Entry) -> int:
        """Return how many wait before ``request``; all who wait ask at once when a process ends."""
        with suppress(OSError):
            return sum(each.number < request.number for each in self._ledger.page().waiting)
        return 0

    def _missed(self, request: Entry, before: Page) -> News | None:
        """Return what happened before anybody could wake ``request``, None if nothing did.

        Between the page that it was entered by and its watch somebody may have given back, which
        needs no lock. Of the dead nobody tells but those who saw them end: whoever waits before it
        and lives has looked at all before him, and watches.
        """
        page = self._ledger.read()
        if any(map(page.is_stuck, page.taken)):
            # That this one waits may be what another one waited for.
            self.nudge_first(page, but=request)
        suspects = {entry.process for entry in page.taken}
        dead = self._ledger.dead(suspects)
        for entry in reversed(page.waiting):
            if entry.number < request.number and entry.process not in suspects:
                if not (found := self._ledger.dead([entry.process])):
                    break
                dead += found
        if dead or not set(before.names) <= set(page.names):
            return News(nudged=True, dead=dead)
        return None

    def _look(
        self, request: Entry, news: News, hope: Hope, terms: Terms, lent: Lent | None
    ) -> tuple[View, bool]:
        """Take what ``request`` waits for if it may start, and wake who else may then."""
        outside, of_use = self.outside(request.claims), self._of_use(request, lent)
        dead = self._ledger.dead(None) if news.dead is None else news.dead
        with self._ledger.alone(terms.deadline, terms.on_wait):
            buried = bool(dead) and self._ledger.bury(dead)
            page = self._ledger.page()
            view = self._view(page, outside)
            if request.name not in page.names:
                raise Vanished(f"{self._ledger.directory} is removed while it is used")
            granted = view.admits(request, hope)
            if not granted and of_use and view.lent(request, of_use).admits(request, hope):
                view, granted = view.lent(request, of_use), True
            if granted:
                self._ledger.turn(request, HELD)
        page = page.turned(request, HELD) if granted else page
        if buried:
            self.nudge_first(page, but=request)
        elif news.nudged:
            self.nudge_first(page, behind=request.number)
        return view, granted

    def _of_use(self, request: Entry, lent: Lent | None) -> Collection[str]:
        """Return which of the leases that are ``lent`` leave ``request`` what it asks for."""
        if lent is None or not lent.unused:
            return ()
        if self._lookout is None:
            return lent.asleep
        lacking = []
        for key, claim in request.claims.items():
            uuid, total = self.cards[key]
            # What is asked for of main memory has what this process has of it as a part.
            more = claim.extra - (host.own() if host.is_pool(uuid) else 0)
            if more + self.headroom > self._lookout.unused(uuid, total):
                lacking.append(uuid)
        if any(map(host.is_pool, lacking)):
            return lent.for_good
        return lent.asleep if lacking else lent.unused

    def _pause(self, view: View, request: Entry, terms: Terms, waited: float) -> float:
        """Return the seconds until the next look, if nobody wakes us before."""
        pause = _LOOK_ANYWAY
        if waited < terms.hope:
            pause = min(pause, terms.hope - waited)
        if waited < _QUIET:
            pause = min(pause, _QUIET - waited)
        elif self._lookout is not None and view.waits_for_strangers(request):
            pause = _OTHERS_EVERY
        if terms.deadline is not None:
            pause = min(pause, max(0.0, terms.deadline - clock.monotonic()))
        return pause

    def _withdraw(self, request: Entry) -> None:
        for state in (WAITING, HELD):
            self._ledger.strike(request.turned(state))
        self.nudge_first(self._ledger.read())

    def nudge_first(self, page: Page, *, behind: int = 0, but: Entry | None = None) -> None:
        """Wake the first request behind number ``behind`` that may be able to start."""
        for entry in self._view(page).next(behind=behind, but=but):
            # One that has gone meanwhile woke somebody itself, but perhaps before this change.
            if self._ledger.nudge(entry):
                return

    def _view(self, page: Page, outside: Mapping[str, Outside] | None = None) -> View:
        found = {
            key: each.beside(taken(key, page)) if each.within else each
            for key, each in (outside or {}).items()
        }
        return View(page, self.cards, self.headroom, found)

    def _in_reach(self, key: str, claim: Claim, outside: Mapping[str, Outside]) -> Claim:
        """Return what a test asks for, of main memory no more than other programs leave.

        It runs beside these as it would without us, but not beside other tests that need much.
        """
        uuid, total = self.cards[key]
        if not host.is_pool(uuid) or key not in outside:
            return claim
        most = total - self.headroom - outside[key].foreign
        return claim._replace(extra=max(1, min(claim.extra, most)))

    def outside(self, claims: Mapping[str, Claim]) -> dict[str, Outside]:
        """Return what processes without an entry in the ledger use of each card."""
        if self._lookout is None:
            return {}
        # Without the lock: the driver may take milliseconds.
        ledger, page = self._ledger, self._ledger.read()
        return {
            key: self._lookout.look(
                *self.cards[key],
                page,
                ledger.process,
                ledger.alive.family,
                needed=claim.extra + self.headroom,
            )
            for key, claim in claims.items()
        }

    def _note_short(self, view: View, request: Entry) -> int:
        """Return how many bytes of what ``request`` was granted are not there.

        If foreign programs have them, nobody waits again for as many.
        """
        most = 0
        for key in request.claims:
            if request.test and host.is_pool(self.cards[key].uuid):
                continue  # it is not the card's, and nobody waits for it
            short = view.short(request, key)
            if short and (others := view.beside(key).foreign):
                with suppress(OSError):  # then each process waits for itself
                    self._ledger.tell(self._ledger.lasting, LASTING, key, others)
            most = max(most, short)
        return most

    def _explain(self, view: View, request: Entry) -> str:
        return describe.situation(view, request, self._owner)

    def _owner(self, entry: Entry) -> str:
        """Return what a message calls the process that has something."""
        words = [] if entry.state in KEPT else [self._ledger.label(entry)]
        if self._ledger.alive.family.is_stopped(entry.process):
            words.append("stopped")
        told = f" ({', '.join(words)})" if words else ""
        return f"pid {entry.pid}{told}{' between tests' if entry.state in KEPT else ''}"

"""The processes that tests and fixtures start: whose they are, and what they hold of the cards.

Two sources tell. Children that run Python with torch write down what their allocators hold (see
``devices.book``), which is exact. Of all others, and of what is not torch's, the driver tells what
each process uses at the moment when it is asked, which ``sampler`` does again and again.

Every child belongs to the test or the wider fixture that started it, see ``starters``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from pytest_gpumem import devices
from pytest_gpumem.clock import clock
from pytest_gpumem.devices import family
from pytest_gpumem.devices.book import key
from pytest_gpumem.devices.processes import command
from pytest_gpumem.records import FixtureUsage
from pytest_gpumem.tracking.child import Child
from pytest_gpumem.tracking.offspring import Offspring, has_children
from pytest_gpumem.tracking.shares import Share, Shares

if TYPE_CHECKING:
    from pytest_gpumem.devices.book import ChildFigures, Figures
    from pytest_gpumem.records import Card, CardUsage, ChildUsage
    from pytest_gpumem.tracking.accounts import Fixture, Owner
    from pytest_gpumem.tracking.starters import Starters

ENDING = 0.5
"""Seconds that a child may take to end after who started it: a signal was sent, nobody waited."""
LAG = 5.0
"""Seconds that the driver is waited for to give back what a process had that has ended."""
RECENT = 0.05
"""Seconds for which what the driver said is taken to hold, where nothing was started since."""
_POLL = 0.01


class Children:
    """Knows the children of the tests that this process runs. Any thread may ``look``.

    Args:
        starters: knows who runs.
        cards: returns the cards that are looked at.
        context: bytes that a process is taken to cost where the driver does not tell.

    """

    def __init__(
        self, starters: Starters, cards: Callable[[], Sequence[Card]], context: int
    ) -> None:
        self.starters = starters
        self._cards = cards
        self._context = context
        self._lock = threading.RLock()
        self._children: list[Child] = []
        """Those that live, or were not reported to their end."""
        self._strangers: set[str] = set()
        """Processes on the cards that are no children."""
        self._shares = Shares()
        self._offspring = Offspring()
        self._oom = ""
        """What is said of the last child that ran out of memory in the running test."""
        self._looked = 0.0
        """When the driver was asked last."""

    def enter(self, name: str) -> int:
        """Let a test or fixture run that was not known yet; return its number."""
        if self.starters.begin_anew():  # in a forked child that runs tests, as pytest-forked's do
            self._children, self._shares = [], Shares()
        return self.starters.enter(name)

    def hand_over(self, owner: Owner, to: Owner) -> None:
        """Let another one answer for what ``owner`` started."""
        number, heir = owner.number, to.number
        self.starters.heirs[number] = heir
        with self._lock:
            for child in self._children:
                if child.owner == number:
                    child.owner = heir
            self._shares.hand_over(number, heir)

    def close(self) -> None:
        """Know of no children any more."""
        with self._lock:
            self.starters.close()
            self._offspring.close()

    # Looking

    @property
    def met(self) -> bool:
        """Whether any child was seen on a card, or has told something."""
        return bool(self._children) or self.starters.book.used

    def stirred(self) -> bool:
        """Whether there is anything to look at; some 3 us where nothing was started."""
        return self.met or self._offspring.stirred(self.starters.apart)

    def worth_a_look(self) -> bool:
        """Whether there are children, on a card or not yet."""
        met = any(not child.ended for child in list(self._children))
        return met or has_children(self.starters.apart)

    def look(self, age: float = 0.0) -> None:
        """Take in what children told, and what the driver says of all.

        It is not asked again, which may take milliseconds, if it was within ``age`` seconds.
        """
        with self._lock:
            self._read_book()
            self._note_ends()  # before another one is seen that took its place
            if clock.monotonic() - self._looked >= age:
                for card in self._cards():
                    self._read_driver(card)
                self._looked = clock.monotonic()

    def _read_book(self) -> None:
        uuids = {key(card.uuid): card.uuid for card in self._cards()}
        pages = {child.slot: child for child in self._children if child.slot is not None}
        for told in self.starters.book.read():
            if told.pid == os.getpid():
                continue  # a forked child that runs a test itself, and measures it
            child = pages.get(told.slot) or self._met(told)
            for card, figures in told.cards.items():
                if card in uuids:
                    self._take_in(child, uuids[card], figures)
            if not told.lives:
                self.starters.book.strike(told.slot)
                child.slot = None
                child.end(told.ended)

    def _met(self, told: ChildFigures) -> Child:
        """Return the child whose page is new; the driver may have told of it before."""
        identity = family.identity(told.pid)
        owner = self.starters.heir(told.owner, identity)
        for child in self._children:
            before = not child.ended or told.began <= child.ended
            if child.pid == told.pid and not child.tells and before:
                child.slot, child.owner, child.tells = told.slot, owner, True
                return child
        child = Child(told.pid, identity, owner, told.began, slot=told.slot, command=told.command)
        self._children.append(child)
        return child

    def _take_in(self, child: Child, uuid: str, figures: Figures) -> None:
        held = child.on(uuid)
        if held.told != figures:
            if figures.ooms > (0 if held.told is None else held.told.ooms):
                self._oom = f"CUDA out of memory in process {child.pid} ({child.command})"
            held.told, child.news = figures, True
            share = self._shares.at(child.owner, uuid)
            share.told = max(share.told, figures.sum_peak)
            share.need = max(share.need, figures.need)

    def _read_driver(self, card: Card) -> None:
        told = devices.others_bytes(card)
        living = {child.pid: child for child in self._children if not child.ended}
        sums: dict[int, Share] = {}
        for pid, size in told.items():
            child = living.get(pid) or self._find(pid)
            if child is None:
                continue
            held = child.on(card.uuid)
            held.used = size
            if size is not None and size > (held.used_peak or 0):
                held.used_peak, child.news = size, True
            total = sums.setdefault(child.owner, Share())
            total.need += size or 0
            if not child.tells:
                total.others[child] = size or 0
        for owner, total in sums.items():
            share = self._shares.at(owner, card.uuid)
            share.need = max(share.need, total.need)
            if total.other > share.other:
                share.others = total.others
        for child in self._children:
            if child.pid not in told and card.uuid in child.cards:
                used = child.cards[card.uuid].used
                child.cards[card.uuid].used = None if used is None else 0

    def _find(self, pid: int) -> Child | None:
        """Return the child that a process on a card is, None if it is no child."""
        identity = family.identity(pid)
        for each in self._children:  # one that ends, or has ended while the driver lags
            if each.pid == pid and identity in ("", each.identity):
                return each
        if not identity or identity in self._strangers:
            return None
        owner = self.starters.of(pid, identity)
        if owner is None:
            self._strangers.add(identity)
            return None
        child = Child(pid, identity, owner, clock.time(), command=command(pid))
        self._children.append(child)
        return child

    def _note_ends(self) -> None:
        for child in [each for each in self._children if each.gone]:
            child.end()

    # What it comes to

    @property
    def known(self) -> bool:
        """Whether there is anything to tell of any child."""
        return bool(self._shares)

    def settle(self, owners: Iterable[Owner]) -> None:
        """Find out what stays of the children of ``owners``, whose time is over.

        A child that is about to end has ``ENDING`` seconds for it, the driver ``LAG`` to give back
        what one had that has ended.
        """
        over = {owner.number for owner in owners}
        # Where nothing new was started, and nobody is to be judged, a look of late will do.
        started = self._offspring.stirred()
        self.look(age=RECENT)
        if started or any(self._orphans(over)) or any(child.lags for child in list(self._children)):
            self.look()
        begun = clock.monotonic()
        while (waited := clock.monotonic() - begun) < LAG:
            left = [child for child in self._orphans(over) if child.pid]
            ending = left and (
                waited < ENDING or any(family.is_ending(child.pid) for child in left)
            )
            if not ending and not any(child.lags for child in list(self._children)):
                break
            clock.sleep(_POLL)
            self.look()
        with self._lock:
            for child in list(self._orphans(over)):
                child.judged = child.news = True
                for held in child.cards.values():
                    held.leaked = held.now(self._context)

    def _orphans(self, over: Collection[int]) -> Iterator[Child]:
        for child in list(self._children):
            if child.owner in over and not child.judged and child.holds(self._context):
                yield child

    def report(self) -> tuple[ChildUsage, ...]:
        """Return what became known of children since the last report; of the ended, for good."""
        self._oom = ""
        with self._lock:
            news = [child for child in self._children if child.news]
            self._children = [child for child in self._children if not child.ended]
            for child in news:
                child.news = False
            names = self.starters.names
            return tuple(
                usage for each in news for usage in each.usages(names[each.owner], self._context)
            )

    def living(self) -> dict[str, int]:
        """Return what the children hold that live, by card."""
        found: dict[str, int] = {}
        with self._lock:
            for child in self._children:
                for uuid, held in () if child.ended else child.cards.items():
                    found[uuid] = found.get(uuid, 0) + held.now(self._context)
        return found

    def held_by(self, owners: Iterable[Owner], *, living: bool = True) -> dict[str, int]:
        """Return the most that the children of ``owners`` had, by card: of those where one lives.

        Of all ``owners`` if not ``living``.
        """
        numbers = {owner.number for owner in owners}
        with self._lock:
            if living:
                numbers &= {child.owner for child in self._children if not child.ended}
            return self._shares.needs(numbers)

    def widen(
        self,
        usages: Iterable[CardUsage],
        test: Owner,
        fixtures: Iterable[Owner],
        untouched: Callable[[str], CardUsage],
    ) -> tuple[CardUsage, ...]:
        """Return what a test did with what its children did, and what its fixtures' hold.

        ``untouched`` returns the usage of a card on which the process itself did nothing.
        """
        found = {usage.card: usage for usage in usages}
        for uuid, share, orphaned in self._shares_of(test.number):
            found[uuid] = share.widen(found.get(uuid) or untouched(uuid), orphaned)
        for uuid, size in self.held_by(fixtures, living=False).items():
            usage = found.get(uuid) or untouched(uuid)
            found[uuid] = usage._replace(fixture_bytes=usage.fixture_bytes + size)
        return tuple(found.values())

    def widen_fixtures(
        self, usages: Iterable[FixtureUsage], moved: Iterable[Fixture]
    ) -> tuple[FixtureUsage, ...]:
        """Return what fixtures did that were set up or torn down, with what their children did."""
        found = {(usage.name, usage.scope, usage.card): usage for usage in usages}
        for fixture in moved:
            for uuid, share, orphaned in self._shares_of(fixture.number):
                name = (fixture.name, fixture.scope, uuid)
                usage = found.get(name) or FixtureUsage(
                    *name, 0, 0, 0 if fixture.torn_down else None
                )
                found[name] = share.widen_fixture(usage, orphaned)
        return tuple(found.values())

    def _shares_of(self, owner: int) -> list[tuple[str, Share, int]]:
        """Return what the children of ``owner`` had, by card, and what its orphans held at last."""
        with self._lock:
            mine = [child for child in self._children if child.owner == owner]
            return [
                (uuid, share, sum(child.leaked_on(uuid) for child in mine))
                for uuid, share in self._shares.of(owner).items()
            ]

    def ooms(self) -> dict[str, int]:
        """Return how often which children ran out of memory, by what a message calls them."""
        self.look(age=RECENT)
        with self._lock:
            return {
                f"process {child.pid} ({child.command})": held.told.ooms
                for child in self._children
                for held in child.cards.values()
                if held.told is not None and held.told.ooms
            }

    def oom(self) -> str:
        """Return in one sentence which child ran out of memory in the running test, "" for none."""
        if self.stirred():
            self.look(age=RECENT)
        return self._oom

    def forget(self, owners: Iterable[Owner]) -> None:
        """Drop the sums of those that are over and were told of."""
        numbers = {owner.number for owner in owners}
        with self._lock:
            self._shares.forget(numbers)

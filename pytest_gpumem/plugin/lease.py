"""The lease of the test that runs, and what its process keeps of the cards between tests."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from pytest_gpumem import devices
from pytest_gpumem.archive.shared import registered
from pytest_gpumem.clock import clock
from pytest_gpumem.errors import LeaseError, LeaseTimeout, TooLarge
from pytest_gpumem.leases import notices
from pytest_gpumem.leases.ledger import own_ledger
from pytest_gpumem.plugin import wide_fixtures
from pytest_gpumem.plugin.needs import Needs, too_large
from pytest_gpumem.plugin.standing import Standing, with_leases
from pytest_gpumem.plugin.state import GRANT, ItemMarks, State, marks_of
from pytest_gpumem.records import LeaseUsage
from pytest_gpumem.scheduling.workers import Holdings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    import pytest

    from pytest_gpumem.leases.ask import Need
    from pytest_gpumem.leases.request import Want
    from pytest_gpumem.leases.store import Lease, LeaseStore
    from pytest_gpumem.records import Card
    from pytest_gpumem.scheduling.history import History
    from pytest_gpumem.tracking.tracker import Tracker


class Leases:
    """Takes a lease for a test that uses a card, gives it back, and tells what is kept.

    Args:
        state: the plugin's.
        history: what is known of the tests.
        tracker: knows what wider fixtures hold, and what tests and fixtures started.
        granted: returns what xdist's controller has set aside for the test that begins, None if
            nothing; not given where this process decides by itself.

    """

    def __init__(
        self,
        state: State,
        history: History,
        tracker: Tracker | None,
        granted: Callable[[], Need | None] | None,
    ) -> None:
        self._settings = state.settings
        self._state = state
        self._tracker = tracker
        self._is_scheduled = granted is not None
        self.needs = Needs(state, history, granted)
        """Tells what tests ask for."""
        self._holdings = Holdings(state.settings.context_cost)
        self._notes = state.notes
        self._without = False
        """Whether there are no leases on this machine."""
        self._stuck = False
        """Whether what could be consolidated was not when another process wanted its room."""
        self._lease: Lease | None = None
        self.standing = Standing(tracker)
        """Knows the leases of fixtures."""
        self._ever_kept: set[str] = set()
        """The cards of which something was kept."""
        self._step = ""
        """The step that is being taken with the test, see ``retry``."""
        self._apart = False
        """Whether the test runs in a process of its own."""
        self.waited = 0.0
        """Seconds that the test which is set up, and its fixtures, waited for leases."""
        self.beside = False
        """Whether somebody else was seen on the cards while this attempt ran."""

    @property
    def _cards(self) -> tuple[Card, ...]:
        return self._state.found.cards

    @property
    def alone(self) -> bool:
        """Whether the test has the card to itself, by its lease.

        What others keep or use all the same leaves one with less than it asked for: it has the
        card to itself, and would get no more of it.
        """
        return self._lease is not None and (self._lease.exclusive or self._lease.short > 0)

    def join(self) -> None:
        """Let what tests start find this process, whether or not these ever take a lease."""
        with suppress(LeaseError):  # whoever takes one says so
            ledger = own_ledger()
            ledger.join(clock.monotonic())  # unless somebody has its lock
            if strange := ledger.strange():
                self._notes.append(f"left alone, for they are no leases: {', '.join(strange[:3])}")

    def note_others(self) -> None:
        """Take note of whoever is on the cards now."""
        self.beside = self.beside or any(map(self._is_shared, self._cards))

    def note_fixture(self, fixture: pytest.FixtureDef[Any], before: set[str]) -> None:
        """Take note of what ``fixture`` leased since this thread held ``before``."""
        new = self.held_here() - before
        for lease in new.difference(self.standing.fixtures):  # by another one that it uses
            self.waited += self._open().waited(lease)
        self.standing.set_up(fixture, new)

    def take(self, item: pytest.Item, marked: ItemMarks, step: str, *, apart: bool = False) -> str:
        """Take a lease for the test; return why it can have none, "" otherwise.

        ``step`` is the one that is being taken with it, see ``retry``; ``apart`` says that it runs
        in a process of its own.
        """
        self._step, self.waited, self._apart = step, 0.0, apart
        if self._lease is not None:  # the attempt before, of a plugin that runs tests again
            return ""
        if GRANT in item.stash:  # an earlier attempt's
            del item.stash[GRANT]
        need = self.needs.of(item, marked, step)
        if need is None or self._without:
            return ""
        try:
            if self._is_within(item):
                return ""
            refusal = too_large(item, need, self._cards, self._settings)
            if not refusal:
                self._acquire(item, need)
            return refusal
        except (LeaseTimeout, TooLarge) as error:
            return str(error)
        except LeaseError as error:
            self._do_without(error)
            return ""

    def _is_within(self, item: pytest.Item) -> bool:
        """Return whether a test runs within a lease of the suite's own.

        One of a fixture is for the tests that use the fixture, any other is for all of them; and
        what a test runs in this process is within that test's.
        """
        fixtures = (self.standing.fixtures.get(lease) for lease in self.held_here())
        names = getattr(item, "fixturenames", ())
        return self._open().has_test() or any(name is None or name in names for name in fixtures)

    def held_here(self) -> set[str]:
        """Return the names of the leases that this thread holds, of tests apart."""
        try:
            taken = () if self._without else own_ledger().taken_here()
        except LeaseError as error:
            self._do_without(error)
            taken = ()
        return {entry.name for entry in taken if not entry.test}

    def _acquire(self, item: pytest.Item, need: Need) -> None:
        cards = self._cards[: need.cards]
        wants, totals = self._wants(item, need, cards)
        begun = clock.monotonic()
        with notices.Waiting(item.nodeid, self._open().ancestors) as waiting:

            def on_wait(text: str) -> None:
                waiting.note(text)
                if self._spare():
                    self.keep()

            try:
                self._lease = self._wait(item, wants, totals, on_wait)
            except BaseException:
                self.waited = clock.monotonic() - begun
                if waiting.what:  # pytest-timeout's, or Ctrl-C
                    item.add_report_section("setup", "GPU memory", f"waited for {waiting.what}")
                raise
            else:
                self.waited = self._lease.waited
        if not cards:
            return
        sizes = [(card.total, wants[card.uuid].size) for card in cards]
        size = min(total if size is None else size for total, size in sizes)
        mark = marks_of(item).need
        uuids = tuple(card.uuid for card in cards)
        item.stash[GRANT] = LeaseUsage(
            uuids, size, self._lease.exclusive, self.waited, mark.vram if mark else None
        )
        self.beside = any(map(self._open().is_shared, uuids))

    def _wants(
        self, item: pytest.Item, need: Need, cards: Sequence[Card]
    ) -> tuple[dict[str, Want], dict[str, int]]:
        """Return by card, and pool of main memory, what to ask for, and what there is."""
        wants, totals = {}, {card.uuid: card.total for card in cards}
        if cards:
            held, standing = self._kept(), self._standing()
            names = wide_fixtures.used_by(item)
        for card in cards:
            own = sum(size for name, size in standing.get(card.uuid, {}).items() if name in names)
            wants[card.uuid] = self._want(need, card, held.get(card.uuid, 0), own)
        if need.ram:
            from pytest_gpumem.leases.ask import in_main_memory

            in_ram = in_main_memory(need.ram, self._settings.headroom)
            wants, totals = wants | in_ram[0], totals | in_ram[1]
        return wants, totals

    def _wait(
        self,
        item: pytest.Item,
        wants: Mapping[str, Want],
        totals: Mapping[str, int],
        on_wait: Callable[[str], None],
    ) -> Lease:
        """Return a lease.

        A test that the scheduler sent does not hope for models to be spared: idle workers are the
        scheduler's to ask, and do not look themselves.
        """
        from pytest_gpumem.leases.request import HOPE

        hope = 0.0 if self._is_scheduled else HOPE
        timeout = self._settings.lease_timeout
        worker = hasattr(item.config, "workerinput")
        return self._open().acquire(
            wants, totals, item.nodeid, timeout, on_wait, hope=hope, test=True, worker=worker
        )

    @property
    def moved(self) -> bool:
        """Whether there is something to give back, or to tell that is new; after few tests."""
        return self._lease is not None or not 0 <= self.standing.since() == self.standing.noted

    def give_back(self) -> None:
        """Tell what the process keeps, and let others have the rest."""
        self.standing.noted = self.standing.since()
        self._spare()
        self._tell_kept()
        if self._lease is not None:
            try:
                self._lease.release()
            except LeaseError as error:
                self._do_without(error)
        self._lease = None

    def keep(self) -> dict[str, tuple[int, dict[str, int]]]:
        """Tell others what the process keeps on each card; return these bytes.

        The second of each pair are those of them that wider fixtures hold, by identity.
        """
        leased = self.standing.leased(self.held_here)
        self._ever_kept.update(leased)
        # What came while a test runs is a part of its lease, and would count twice for others.
        held = self._tell_kept() if self._lease is None else self._kept()
        standing = self._standing() if held else {}
        found = {uuid: (kept, dict(standing.get(uuid, ()))) for uuid, kept in held.items()}
        return with_leases(found, leased) if leased else found

    def _tell_kept(self) -> dict[str, int]:
        """Tell others what the process keeps on each card; return it."""
        held = self._kept()
        spare = not self._stuck and registered() is not None
        try:
            for uuid, resident in () if self._without else held.items():
                self._open().set_resident(uuid, resident, spare=spare)
        except LeaseError as error:
            self._do_without(error)
        return held

    def _kept(self) -> dict[str, int]:
        """Return by card what this process keeps, and what those keep that it started.

        Of each card of which it kept something before: nothing has to be told as well.
        """
        found: dict[str, int] = {**self._holdings()}
        if self._tracker is not None and self._tracker.children is not None:
            for uuid, size in self._tracker.children.living().items():
                found[uuid] = found.get(uuid, 0) + size
        self._ever_kept.update(found)
        return {uuid: found.get(uuid, 0) for uuid in self._ever_kept} if self._ever_kept else {}

    def _standing(self) -> Mapping[str, Mapping[str, int]]:
        """Return by card what wider fixtures hold, and what they started, by their identity."""
        return {} if self._tracker is None else self._tracker.standing()

    def _spare(self) -> bool:
        """Consolidate what is registered if another process waits for its room; return whether."""
        consolidator = registered()
        if consolidator is None or self._stuck or self._without:
            return False
        try:
            if not any(self._open().is_wanted(card.uuid, card.total) for card in self._cards):
                return False
        except LeaseError as error:
            self._do_without(error)
            return False
        done = consolidator.consolidate_gpu_memory(process_context="wanted by another process")
        self._stuck = bool(done.refused)
        return True

    def _do_without(self, error: LeaseError) -> None:
        self._without = True
        self._notes.append(f"tests ran without leases: {error}")

    def _open(self) -> LeaseStore:
        from pytest_gpumem.leases.api import store

        opened = store()
        opened.headroom = self._settings.headroom
        return opened

    def _want(self, need: Need, card: Card, kept: int, standing: int) -> Want:
        from pytest_gpumem.leases.ask import SOMETHING, Place, want_of
        from pytest_gpumem.leases.request import Want

        if self._step and not self._is_scheduled:
            # Others are to spare what they keep, if they can.
            most = self._open().capacity(card.uuid, card.total) - kept
            return Want(max(SOMETHING, most), exclusive=True)
        if self._apart:
            # Of what this process keeps it has nothing. A grant of the scheduler has its context.
            context = 0 if self._is_scheduled else self._settings.context_cost
            return want_of(need, Place(card.total - kept, self._settings.headroom, context))
        costs = self._settings.headroom, self._settings.context_cost
        return want_of(need, Place(card.total, *costs, kept, standing))

    def _is_shared(self, card: Card) -> bool:
        if self._without:
            return devices.used_by_others(card)
        try:
            opened = self._open()
            return opened.is_shared(card.uuid) or opened.foreign(card.uuid, card.total) > 0
        except LeaseError as error:
            self._do_without(error)
            return False

"""Leases: permission to use bytes of a card, or all of it, among all processes of a user.

Who changes the ledger touches the file of the process whose waiting request is the first that may
now start, which wakes it; it decides for itself, and wakes the next. Nobody else is woken, and
nobody looks again and again.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from pytest_gpumem.admission import Claim
from pytest_gpumem.clock import clock
from pytest_gpumem.errors import LeaseTimeout
from pytest_gpumem.leases.entries import (
    HELD,
    RESIDENT,
    SPARE,
    WAITING,
    Entry,
    card_key,
    entry_named,
)
from pytest_gpumem.leases.ledger import Ledger, LedgerBusyError, own_ledger
from pytest_gpumem.leases.locks import POLL
from pytest_gpumem.leases.outside import Driver, Lookout, Outside
from pytest_gpumem.leases.place import Vanished
from pytest_gpumem.leases.queue import Grant, Queue
from pytest_gpumem.leases.request import HOPE, Terms, Want, check_seconds, check_size, claims_of
from pytest_gpumem.leases.view import Known
from pytest_gpumem.tuples import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

_TRIES = 100
"""How often a request is made anew while somebody removes the directory."""


class HolderInfo(NamedTuple):
    """A lease that is held, or a request that waits."""

    pid: int
    label: str
    size: int | None
    """Bytes; None is the whole card."""
    exclusive: bool
    waiting: bool


class Lease:
    """Permission to use ``wants``, by UUID of the card, until ``release`` or the process ends.

    In a forked child it is void: the parent keeps it.
    """

    def __init__(self, store: LeaseStore, grant: Grant, wants: Mapping[str, Want]) -> None:
        self.wants = dict(wants)
        self.waited = grant.waited
        """Seconds that others made it wait."""
        self.short = grant.short
        """Bytes of it that others use all the same; above 0 only where nobody else has a lease."""
        self._store = store
        self._entry: Entry | None = grant.entry

    @property
    def card(self) -> str:
        """UUID of the (first) card."""
        return next(iter(self.wants))

    @property
    def size(self) -> int | None:
        """Bytes on the (first) card; None is the whole card."""
        return self.wants[self.card].size

    @property
    def exclusive(self) -> bool:
        """Whether nobody else has a lease of the (first) card."""
        return self.wants[self.card].exclusive or self.size is None

    def release(self) -> None:
        """Give it back; once more is harmless."""
        if self._entry is not None:
            self._store.give_back(self._entry)
            self._entry = None

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class LeaseStore:
    """The leases of all processes that use the same directory. Any thread may use it.

    ``headroom`` bytes of each card are never given out; it may be set at any time.
    ``driver`` tells what is used of a card; without it nothing is foreign.
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        headroom: int = 0,
        driver: Driver | None = None,
    ) -> None:
        self.ledger = own_ledger() if directory is None else Ledger(directory)
        self._queue = Queue(self.ledger, None if driver is None else Lookout(driver))
        self._waited: dict[str, float] = {}
        """By lease that is held, the seconds that it was waited for; those that were not are left
        out."""
        self.headroom = headroom

    @property
    def headroom(self) -> int:
        """Bytes of each card that are never given out."""
        return self._queue.headroom

    @headroom.setter
    def headroom(self, size: int) -> None:
        check_size(size, "the headroom of a card")
        self._queue.headroom = size

    def acquire(
        self,
        wants: Mapping[str, Want],
        totals: Mapping[str, int],
        label: str,
        timeout: float | None = None,
        on_wait: Callable[[str], None] | None = None,
        *,
        hope: float = HOPE,
        test: bool = False,
        worker: bool = False,
        low: bool = False,
    ) -> Lease:
        """Return a lease of all ``wants`` (by UUID) at once, first come, first served.

        ``totals`` are the cards' capacities in bytes, ``timeout`` is in seconds (0: do not wait).
        For ``hope`` seconds it waits for what others keep and may spare, and until the timeout,
        or else for ``PATIENCE`` seconds, for what foreign programs use; then it goes without.
        ``on_wait`` is called with a sentence that says what is waited for and who holds it, when
        the wait has lasted a moment and when that changes. Out of the lease of a ``test`` comes
        what its process asks for meanwhile; in a ``worker`` it does not wait for leases of other
        workers that sleep, see ``loans``. One of ``low`` priority lets many who come later go
        first.

        Raises:
            RequestRefusedError: when a size or time is none.
            TooLarge: when a card does not have as much.
            LeaseTimeout: when ``timeout`` has passed.
            LeaseError: when the directory cannot be used, when somebody keeps its lock for long,
                or when this thread would have to wait while it holds a lease that is no test's,
                which could last for ever.

        """
        check_seconds(timeout, "the timeout of a lease")
        deadline = None if timeout is None else clock.monotonic() + timeout
        wait = on_wait or (lambda _: None)
        terms = Terms(label, timeout, deadline, wait, hope, test, worker, low)
        claims = claims_of(wants, totals, self._queue.headroom)
        self._queue.cards |= {card_key(uuid): Known(uuid, totals[uuid]) for uuid in wants}
        tries = _TRIES
        while True:
            try:
                grant = self._queue.take(claims, terms)
                if grant.waited:
                    self._waited[grant.entry.name] = grant.waited
                return Lease(self, grant, wants)
            except (LedgerBusyError, Vanished) as error:
                if deadline is not None and clock.monotonic() >= deadline:
                    raise LeaseTimeout(f"no lease within {timeout:g} s: {error}") from None
                tries -= 1
                if isinstance(error, LedgerBusyError) or not tries:
                    raise
                clock.sleep(POLL)
                self.ledger.mend()

    def is_shared(self, uuid: str) -> bool:
        """Return whether another process, which lives, has a lease of a card or keeps some of it.

        What a forked child kept, say, is in the ledger until somebody tidies up.
        """
        key, taken = card_key(uuid), self.ledger.read().taken
        others = {entry.process for entry in taken if key in entry.claims} - {self.ledger.process}
        return len(self.ledger.dead(others)) < len(others)

    def waited(self, lease: str) -> float:
        """Return the seconds that others made this process wait for a lease that it holds."""
        return self._waited.get(lease, 0.0)

    def has_test(self) -> bool:
        """Return whether this process holds the lease of a test."""
        taken = filter(None, map(entry_named, list(self.ledger.leases)))
        return any(entry.test for entry in taken)

    def ancestors(self) -> Mapping[str, int | None]:
        """Return the processes that started this one and take leases, see ``telling.Waiting``."""
        return self.ledger.alive.family.ancestors()

    def granted_here(self, uuid: str) -> int | None:
        """Return the bytes of a card that this thread's leases are for; None: the whole card."""
        key, size, here = card_key(uuid), 0, self.ledger.taken_here()
        counted = self.ledger.read().claims[key] if here else {}
        for entry in here:
            claim = entry.claims.get(key)
            if claim is not None:
                if claim.exclusive and not claim.extra:
                    return None
                size += counted.get(entry.name, claim).extra
        return size

    def resident(self, uuid: str) -> int:
        """Return the bytes of a card that this process said it keeps without a lease."""
        told = self.ledger.residents.get(card_key(uuid))
        return told.claims[card_key(uuid)].resident if told is not None else 0

    def give_back(self, entry: Entry) -> None:
        """End a lease that this process holds; ``Lease.release`` calls it."""
        self._waited.pop(entry.name, None)
        if self.ledger.drop(entry):
            with suppress(Vanished):  # and with it all that waited
                self._queue.nudge_first(self.ledger.read())

    def holders(self, uuid: str) -> list[HolderInfo]:
        """Return who has leases of a card, and who waits for some, in the order of arrival."""
        dead = self.ledger.dead(None)
        # Whoever keeps the lock keeps nobody from looking.
        with suppress(LedgerBusyError), self.ledger.alone(clock.monotonic()):
            self.ledger.bury(dead)
        page = self.ledger.read()
        self._queue.nudge_first(page)
        return [
            HolderInfo(entry.pid, self.ledger.label(entry), *Want.of(claim), entry.state == WAITING)
            for entry in page.entries
            for key, claim in entry.claims.items()
            if key == card_key(uuid)
            and entry.state in (HELD, WAITING)
            and entry.process not in dead
        ]

    def set_resident(self, uuid: str, size: int, *, spare: bool | None = None) -> None:
        """Tell how many bytes of a card this process keeps while it has no lease.

        ``spare`` says whether it looks, now and then, if they are wanted, and can free some;
        None: as before.
        """
        check_size(size, f"what is kept of card {uuid}")
        key, residents = card_key(uuid), self.ledger.residents
        before = residents.get(key)
        if spare is None:
            spare = before is not None and before.state == SPARE
        state = SPARE if spare else RESIDENT
        if before is None if not size else before == self.ledger.kept(state, key, size):
            return
        with self.ledger.alone():
            self.ledger.tell(residents, state, key, size)
        self._queue.nudge_first(self.ledger.read())

    def is_wanted(self, uuid: str, total: int) -> bool:
        """Return whether others wait for bytes that processes keep without a lease.

        Those waits do not count that end when leases do, nor those behind one of this process.
        ``total`` is the card's capacity.
        """
        key, own, page = card_key(uuid), self.ledger.process, self.ledger.read()
        kept = sum(claim.resident for claim in page.claims[key].values())
        for entry in page.waiting:
            if entry.process == own:
                return False
            if page.descends(own, entry.process) or page.descends(entry.process, own):
                continue
            if (
                key in entry.claims
                and entry.claims[key].extra > total - self._queue.headroom - kept
            ):
                return True
        return False

    def capacity(self, uuid: str, total: int) -> int:
        """Return the bytes of a card that all processes with leases can have together now.

        ``total`` is what there is; foreign processes keep the rest, and the headroom.
        """
        return total - self._queue.headroom - sum(self._outside_of(uuid, total)[:2])

    def foreign(self, uuid: str, total: int) -> int:
        """Return the bytes of a card that others use without an entry in the ledger.

        ``total`` is the card's capacity. What this process's family uses is not foreign.
        """
        return self._outside_of(uuid, total).foreign

    def _outside_of(self, uuid: str, total: int) -> Outside:
        key = card_key(uuid)
        self._queue.cards[key] = Known(uuid, total)
        return self._queue.outside({key: Claim(0, total, exclusive=False)}).get(key, Outside())

    def close(self) -> None:
        """Give everything of this process back."""
        if self.ledger.close():
            with suppress(OSError):  # not ``read``, which takes part again
                self._queue.nudge_first(self.ledger.page())

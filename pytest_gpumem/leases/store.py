"""Leases: permission to use bytes of a card, or all of it, among all processes of a user.

Who changes the ledger touches the file of the first waiting request that may now start, which
wakes its owner; the owner decides for itself, and wakes the next. Nobody else is woken, and
nobody looks again and again.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from pytest_gpumem.admission import (
    NOTHING,
    Claim,
    bounds,
    fits,
    foreign,
    may_start,
    never_fits,
    room,
    waits_in_vain,
)
from pytest_gpumem.errors import LeaseError, LeaseTimeout, TooLarge
from pytest_gpumem.leases import telling
from pytest_gpumem.leases.ledger import (
    HELD,
    KEPT,
    RESIDENT,
    SPARE,
    WAITING,
    Entry,
    Ledger,
    LedgerBusyError,
    Page,
    Vanished,
    card_key,
    entry_named,
    entry_of,
    pid_of,
    run_directory,
)
from pytest_gpumem.leases.locks import POLL, News
from pytest_gpumem.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from pytest_gpumem.devices import Usage
    from pytest_gpumem.records import Card

_OTHERS_EVERY = 0.25
"""Seconds between two looks at foreign processes, which give no sign when they end."""
_LOOK_ANYWAY = 10.0
"""Seconds after which a waiting request looks for itself: who has to wake it may be stopped."""
_TRIES = 100
"""How often a request is made anew while somebody removes the directory."""
HOPE = 5.0
"""Seconds that a request waits for processes to spare what they keep; each looks between tests."""
PATIENCE = 10.0
"""Seconds that a request without a timeout waits for foreign programs, which may keep what they
use for good; then it starts with what there is, as it would without leases."""
_STAND_BY = 0.002
"""Seconds that each waiting request gives the one before it to tidy up after a dead process."""


_stores: list[LeaseStore] = []


class Want(NamedTuple):
    """What is asked for of one card."""

    size: int | None = None
    """Bytes; None is the whole card."""
    exclusive: bool = False
    """Whether nobody else may have a lease of the card meanwhile."""

    def __str__(self) -> str:
        """Return it in words."""
        if self.size is None:
            return "the whole card"
        return format_bytes(self.size) + (" exclusively" if self.exclusive else "")


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

    def __init__(self, store: LeaseStore, entry: Entry, wants: Mapping[str, Want], short: int):
        self.wants = dict(wants)
        self.short = short
        """Bytes of it that idle processes keep; above 0 only where it runs alone."""
        self._store = store
        self._entry: Entry | None = entry

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


class Driver(Protocol):
    """Who tells what is used of a card, by UUID."""

    def used(self, uuid: str) -> int:
        """Return the bytes that anybody uses."""

    def usage(self, uuid: str) -> Usage:
        """Return who uses it."""


class _CudaDriver:
    """The driver of CUDA's cards."""

    def used(self, uuid: str) -> int:
        from pytest_gpumem import devices
        from pytest_gpumem.records import Card

        return devices.used_bytes(Card(uuid, "", 0))

    def usage(self, uuid: str) -> Usage:
        from pytest_gpumem import devices
        from pytest_gpumem.records import Card

        return devices.usage(Card(uuid, "", 0))


class _Outside(NamedTuple):
    """What processes without an entry in the ledger use of a card."""

    foreign: int = 0
    """Bytes."""
    family: int = 0
    """Bytes besides, of those that this process or an ancestor started: kept, not waited for."""
    strangers: tuple[tuple[int, int | None], ...] = ()
    """Foreign processes that the driver lists: pid, and bytes if it tells them."""


class _View(NamedTuple):
    """What a decision rests on: the ledger, and what else is on the cards."""

    page: Page
    outside: Mapping[str, _Outside]
    """By card; empty where it was not asked for."""

    def beside(self, key: str) -> _Outside:
        """Return what others use of a card."""
        return self.outside.get(key, _Outside())

    def against(self, request: Entry, key: str) -> list[Claim]:
        """Return what leaves ``request`` less of a card."""
        found = self.page.against(request, key)
        if family := self.beside(key).family:
            found.append(Claim(family, 0, exclusive=False))
        return found


class _Hope(NamedTuple):
    """What a request still waits for, though no lease that ends brings it."""

    spared: bool = False
    """That processes archive what they keep."""
    freed: bool = False
    """That foreign programs end, if they did when others waited for it."""
    timed: bool = False
    """That foreign programs end before its timeout."""


_NO_HOPE = _Hope()


class _Asking(NamedTuple):
    """How a lease is asked for; see ``LeaseStore.acquire``."""

    label: str
    timeout: float | None
    deadline: float | None
    """Of ``time.monotonic``."""
    on_wait: Callable[[str], None]
    hope: float
    test: bool

    def hopes(self, waited: float) -> _Hope:
        """Return what it still waits for after so many seconds."""
        timed = self.timeout is not None
        spared = waited < self.hope and self.timeout != 0
        return _Hope(spared, freed=not timed and waited < PATIENCE, timed=timed)


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
        self._ledger = Ledger(directory or run_directory())
        self.headroom = headroom
        self._driver = driver
        self._found: dict[str, int] = {}
        """By card, the foreign bytes that were found last."""
        self._lasting: dict[str, int] = {}
        """By card, the foreign bytes that a request waited for in vain."""
        self._cards: dict[str, tuple[str, int]] = {}
        """By key, UUID and total of the cards that this process asked for."""

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
    ) -> Lease:
        """Return a lease of all ``wants`` (by UUID) at once, first come, first served.

        ``totals`` are the cards' capacities in bytes, ``timeout`` is in seconds (0: do not wait).
        For ``hope`` seconds it waits for what others keep and may spare, and until the timeout,
        or else for ``PATIENCE`` seconds, for what foreign programs use; then it goes without.
        ``on_wait`` is called with a sentence that says what is waited for and who holds it, when
        the wait begins and when that changes. Out of the lease of a ``test`` comes what its
        process asks for meanwhile.

        Raises:
            TooLarge: when a card does not have as much.
            LeaseTimeout: when ``timeout`` has passed.
            LeaseError: when the directory cannot be used, when somebody keeps its lock for long,
                or when this thread would have to wait while it holds a lease that is no test's,
                which could last for ever.

        """
        deadline = None if timeout is None else time.monotonic() + timeout
        asking = _Asking(label, timeout, deadline, on_wait or (lambda _: None), hope, test)
        claims = {}
        for uuid, want in wants.items():
            claim, key = _claim(want), card_key(uuid)
            self._cards[key] = uuid, totals[uuid]
            if never_fits(totals[uuid], self.headroom, claim):
                raise TooLarge(self._too_large(uuid, want, totals[uuid]))
            if claim.extra or claim.exclusive:  # who asks for nothing waits for nobody
                claims[key] = claim
        tries = _TRIES
        while True:
            try:
                request, short = self._take(claims, asking)
                return Lease(self, request, wants, short)
            except LedgerBusyError as error:
                if deadline is None or time.monotonic() < deadline:
                    raise
                raise LeaseTimeout(f"no lease within {timeout:g} s: {error}") from None
            except Vanished:
                tries -= 1
                if not tries:
                    raise
                time.sleep(POLL)
                self._ledger.mend()

    def join(self) -> None:
        """Let processes that this one starts find it, if that can be without waiting.

        Raises:
            LeaseError: when the directory cannot be used, or somebody has its lock.

        """
        self._ledger.join(time.monotonic())

    def is_shared(self, uuid: str) -> bool:
        """Return whether another process, which lives, has a lease of a card or keeps some of it.

        What a forked child kept, say, is in the ledger until somebody tidies up.
        """
        key, taken = card_key(uuid), self._ledger.read().taken
        others = {entry.process for entry in taken if key in entry.claims} - {self._ledger.process}
        return len(self._ledger.dead(others)) < len(others)

    def held_here(self) -> set[str]:
        """Return the names of the leases that this thread holds, of tests apart."""
        return {entry.name for entry in self._entries_here() if not entry.test}

    def has_test(self) -> bool:
        """Return whether this process holds the lease of a test."""
        return any(entry_named(name).test for name in list(self._ledger.leases))

    def ancestors(self) -> Mapping[str, int | None]:
        """Return the processes that started this one and take leases, see ``telling.Waiting``."""
        return self._ledger.ancestors()

    def _entries_here(self) -> list[Entry]:
        current = threading.current_thread()
        taken = list(self._ledger.leases.items())
        return [entry_named(name) for name, thread in taken if thread is current]

    def granted_here(self, uuid: str) -> int | None:
        """Return the bytes of a card that this thread's leases are for; None: the whole card."""
        key, size, here = card_key(uuid), 0, self._entries_here()
        counted = self._ledger.read().claims[key] if here else {}
        for entry in here:
            claim = entry.claims.get(key)
            if claim is not None:
                if claim.exclusive and not claim.extra:
                    return None
                size += counted.get(entry.name, claim).extra
        return size

    def resident(self, uuid: str) -> int:
        """Return the bytes of a card that this process said it keeps without a lease."""
        told = self._ledger.residents.get(card_key(uuid))
        return told.claims[card_key(uuid)].resident if told is not None else 0

    def give_back(self, entry: Entry) -> None:
        """End a lease that this process holds; ``Lease.release`` calls it."""
        if self._ledger.drop(entry):
            with suppress(Vanished):  # and with it all that waited
                self._nudge_first(self._ledger.read())

    def holders(self, uuid: str) -> list[HolderInfo]:
        """Return who has leases of a card, and who waits for some, in the order of arrival."""
        dead = self._ledger.dead(None)
        # Whoever keeps the lock keeps nobody from looking.
        with suppress(LedgerBusyError), self._ledger.alone(time.monotonic()):
            self._ledger.bury(dead)
        page = self._ledger.read()
        self._nudge_first(page)
        return [
            HolderInfo(entry.pid, self._ledger.label(entry), *_want(claim), entry.state == WAITING)
            for entry in page.entries
            for key, claim in entry.claims.items()
            if key == card_key(uuid) and entry.state not in KEPT and entry.process not in dead
        ]

    def set_resident(self, uuid: str, size: int, *, spare: bool | None = None) -> None:
        """Tell how many bytes of a card this process keeps while it has no lease.

        ``spare`` says whether it looks, now and then, if they are wanted, and can free some;
        None: as before.
        """
        key, residents = card_key(uuid), self._ledger.residents
        before = residents.get(key)
        if spare is None:
            spare = before is not None and before.state == SPARE
        state = SPARE if spare else RESIDENT
        now = entry_of(state, 0, self._ledger.process, {key: Claim(size, 0, exclusive=False)})
        if now == before or (size == 0 and before is None):
            return
        with self._ledger.alone():
            if size:
                residents[key] = now
                self._ledger.write(now, "")
            else:
                del residents[key]
            if before is not None:
                self._ledger.strike(before)
        self._nudge_first(self._ledger.read())

    def is_wanted(self, uuid: str, total: int) -> bool:
        """Return whether others wait for bytes that processes keep without a lease.

        Those waits do not count that end when leases do, nor those behind one of this process.
        ``total`` is the card's capacity.
        """
        key, own, page = card_key(uuid), self._ledger.process, self._ledger.read()
        kept = sum(claim.resident for claim in page.claims[key].values())
        for entry in page.waiting:
            if entry.process == own:
                return False
            if page.descends(own, entry.process) or page.descends(entry.process, own):
                continue
            if key in entry.claims and entry.claims[key].extra > total - self.headroom - kept:
                return True
        return False

    def capacity(self, uuid: str, total: int) -> int:
        """Return the bytes of a card that all processes with leases can have together now.

        ``total`` is what there is; foreign processes keep the rest, and the headroom.
        """
        return total - self.headroom - sum(self._outside_of(uuid, total)[:2])

    def foreign(self, uuid: str, total: int) -> int:
        """Return the bytes of a card that others use without an entry in the ledger.

        ``total`` is the card's capacity. What this process's family uses is not foreign.
        """
        return self._outside_of(uuid, total).foreign

    def _outside_of(self, uuid: str, total: int) -> _Outside:
        key = card_key(uuid)
        self._cards[key] = uuid, total
        return self._outside((key,)).get(key, _Outside())

    def close(self) -> None:
        """Give everything of this process back."""
        if self._ledger.close():
            with suppress(OSError):  # not ``read``, which takes part again
                self._nudge_first(self._ledger.page())

    def _take(self, claims: dict[str, Claim], asking: _Asking) -> tuple[Entry, int]:
        """Return an entry that holds ``claims``, and how many bytes of them are not there."""
        ledger = self._ledger
        ledger.join(asking.deadline, asking.on_wait)
        outside = self._outside(claims)
        request = None
        try:
            with ledger.alone(asking.deadline, asking.on_wait):
                view = _View(ledger.page(), outside)
                number = ledger.next_number(view.page)
                request = entry_of(WAITING, number, ledger.process, claims, test=asking.test)
                if self._admits(view, request, asking.hopes(0)):
                    request = request.turned(HELD)
                ledger.write(request, asking.label)
            if request.state == WAITING:
                view = self._wait(request, asking)
                request = request.turned(HELD)
            ledger.leases[request.name] = threading.current_thread()
            return request, self._note_short(view, request)
        except BaseException:  # Ctrl-C comes at any line
            if request is not None:
                self._withdraw(request)
            raise

    def _wait(self, request: Entry, asking: _Asking) -> _View:
        """Block until ``request`` is held; return what that was decided by."""
        begun = time.monotonic()
        # Whatever happened before the watch began.
        said, news = "", News(nudged=True, dead=None)
        page = self._ledger.read()
        if any(map(page.is_stuck, page.taken)):
            # That this one waits may be what another one waited for.
            self._nudge_first(page, but=request)
        with self._ledger.watch(request) as watch:
            while True:
                waited = time.monotonic() - begun
                view, granted = self._look(request, news, asking, asking.hopes(waited))
                if granted:
                    return view
                if not request.test and self.held_here():
                    raise LeaseError(
                        "this thread holds a lease and would wait for another one, which can "
                        f"last for ever; ask for all at once: {self._explain(view, request)}"
                    )
                if asking.deadline is not None and time.monotonic() >= asking.deadline:
                    situation = self._explain(view, request)
                    raise LeaseTimeout(f"no lease within {asking.timeout:g} s: {situation}")
                if (text := self._explain(view, request)) != said:
                    asking.on_wait(text)
                    said = text
                pause = self._pause(view, request, asking.deadline, asking.hope - waited)
                news = watch.wait(pause, lambda: _STAND_BY * self._ledger.ahead(request))

    def _look(self, request: Entry, news: News, asking: _Asking, hope: _Hope) -> tuple[_View, bool]:
        """Take what ``request`` waits for if it may start, and wake who else may then."""
        outside, dead = self._outside(request.claims), self._ledger.dead(news.dead)
        with self._ledger.alone(asking.deadline, asking.on_wait):
            buried = self._ledger.bury(dead)
            view = _View(self._ledger.page(), outside)
            if request not in view.page.waiting:
                raise Vanished
            if granted := self._admits(view, request, hope):
                self._ledger.turn(request, HELD)
        if buried:
            self._nudge_first(view.page, but=request)
        elif news.nudged:
            self._nudge_first(view.page, behind=request.number)
        return view, granted

    def _pause(self, view: _View, request: Entry, deadline: float | None, hope: float) -> float:
        """Return the seconds until the next look, if nobody wakes us before."""
        pause = hope if 0 < hope < _LOOK_ANYWAY else _LOOK_ANYWAY
        empty = {key: each._replace(foreign=0) for key, each in view.outside.items()}
        if self._driver is not None and self._admits(_View(view.page, empty), request):
            pause = _OTHERS_EVERY
        return pause if deadline is None else min(pause, max(0.0, deadline - time.monotonic()))

    def _withdraw(self, request: Entry) -> None:
        for state in (WAITING, HELD):
            self._ledger.strike(request.turned(state))
        self._nudge_first(self._ledger.read())

    def _admits(
        self, view: _View, request: Entry, hope: _Hope = _NO_HOPE, *, hint: bool = False
    ) -> bool:
        """Return whether ``request`` may start on all of its cards.

        With ``hope`` it does not run alone with too little. A ``hint`` is for another process,
        whose headroom and cards this one may not know: it says yes too often rather than never.
        """
        headroom = 0 if hint else self.headroom
        for key, new in request.claims.items():
            if hint and key not in self._cards:
                continue
            total, claims = self._cards[key][1], view.against(request, key)
            ahead = view.page.ahead(request, key)
            others = view.beside(key).foreign
            if may_start(total, others, headroom, claims, new, ahead=ahead):
                continue
            left = view.page.left(request, key, total - headroom)
            if not new.exclusive and not ahead and new.extra <= left:
                continue
            if not waits_in_vain(total, others, headroom, claims, new, ahead=ahead):
                return False
            if fits(total, 0, headroom, claims, new):  # and foreign programs keep it waiting
                if hope.timed or (hope.freed and others < self._lasting.get(key, math.inf)):
                    return False
            elif hope.spared and self._may_be_spared(view.page, request, key):
                return False
        return True

    def _may_be_spared(self, page: Page, request: Entry, key: str) -> bool:
        own = request.process
        return any(
            entry.state == SPARE and entry.process != own and key in entry.claims
            for entry in page.taken
            if not page.descends(own, entry.process) and not page.descends(entry.process, own)
        )

    def _nudge_first(self, page: Page, *, behind: int = 0, but: Entry | None = None) -> None:
        """Wake the first request behind number ``behind`` that may be able to start."""
        full = {key for key in self._cards if page.waiting and self._is_full(page, key)}
        for entry in page.waiting:
            if entry.number <= behind or entry == but:
                continue
            if not full.isdisjoint(entry.claims) and not page.is_covered(entry):
                continue
            # One that has gone meanwhile woke somebody itself, but perhaps before this change.
            if self._admits(_View(page, {}), entry, hint=True) and self._ledger.nudge(entry):
                return

    def _is_full(self, page: Page, key: str) -> bool:
        """Return whether nobody can start on a card; a long queue is then passed over quickly."""
        if any(map(page.is_stuck, page.taken)):
            return False
        claims = page.claims[key].values()
        if any(claim.exclusive for claim in claims):
            return True
        running = any(claim.extra for claim in claims)
        return running and room(self._cards[key][1], 0, 0, claims) <= 0

    def _outside(self, keys: Iterable[str]) -> dict[str, _Outside]:
        """Return what processes without an entry in the ledger use of each card."""
        if self._driver is None:
            return {}
        # Without the lock: the driver may take milliseconds.
        page = self._ledger.read()
        return {key: self._look_outside(key, page, self._driver) for key in keys}

    def _look_outside(self, key: str, page: Page, driver: Driver) -> _Outside:
        uuid, total = self._cards[key]
        ours, used = self._ours(key, page), driver.used(uuid)
        if used <= sum(claim.resident for claim in ours.values()):
            self._found[key] = 0
            return _Outside()
        usage = driver.usage(uuid)
        told = dict(usage.processes)
        strangers = told.keys() - {os.getpid(), *map(pid_of, ours)}
        for pid, starter in self._ledger.starters(strangers, ours).items():
            # Within what its starter keeps, or runs with: a worker's engine, say.
            mine = pid_of(starter)
            told[mine] = (told.get(mine) or 0) + (told.pop(pid) or 0)
            strangers = strangers - {pid}
        kin = self._kin(strangers)
        family = sum(told[pid] or 0 for pid in kin)
        own, known = ours.pop(self._ledger.process, NOTHING), told.pop(os.getpid(), None)
        # This process may have entered what it started as kept: that counts once.
        family = max(0, family - max(0, own.resident - usage.own))
        # What this process uses is its own, whether or not it was entered.
        least = max(own.resident, usage.own)
        most = least if known is not None else max(least, own.resident + own.extra)
        # One that is not listed uses no more than those that are leave unexplained.
        listed = list(usage.processes.values())
        limit = total if None in listed or not listed else used - sum(filter(None, listed))
        uses = [bounds(claim, limit, told.get(pid_of(each))) for each, claim in ours.items()]
        uses += [(least, most), (family, family)]
        size = foreign(used, uses, self._found.get(key, 0))
        self._found[key] = size
        return _Outside(size, family, tuple((pid, told[pid]) for pid in sorted(strangers - kin)))

    def _kin(self, pids: Collection[int]) -> set[int]:
        """Return those that this process or an ancestor started, or that started this one."""
        if not pids:
            return set()
        roots = self._ledger.roots()
        return {pid for pid in pids if self._ledger.is_kin(pid, roots)}

    def _ours(self, key: str, page: Page) -> dict[str, Claim]:
        """Return what each process with an entry in the ledger may use of a card."""
        ours: dict[str, Claim] = {}
        for entry in page.taken:
            claim = page.claims[key].get(entry.name)
            if claim is not None:
                ours[entry.process] = claim.beside(ours.get(entry.process, NOTHING))
        return ours

    def _note_short(self, view: _View, request: Entry) -> int:
        """Return how many bytes of what ``request`` was granted are not there.

        If foreign programs have them, nobody waits again for as many.
        """
        most = 0
        for key, new in request.claims.items():
            total, others = self._cards[key][1], view.beside(key).foreign
            short = new.extra - room(total, others, self.headroom, view.against(request, key))
            if short > 0 and others:
                self._lasting[key] = others
            most = max(most, short)
        return most

    # Words

    def _too_large(self, uuid: str, want: Want, total: int) -> str:
        kept = f", of which {format_bytes(self.headroom)} are kept free" if self.headroom else ""
        return f"{want} asked for of card {uuid}, which has {format_bytes(total)}{kept}"

    def _explain(self, view: _View, request: Entry) -> str:
        """Return what ``request`` waits for and who has it."""
        return "; ".join(
            f"{_want(claim)} of card {self._cards[key][0]}: {self._situation(view, request, key)}"
            for key, claim in request.claims.items()
        )

    def _situation(self, view: _View, request: Entry, key: str) -> str:
        total, beside = self._cards[key][1], view.beside(key)
        free = max(0, room(total, beside.foreign, self.headroom, view.against(request, key)))
        parts = [f"{format_bytes(free)} of {format_bytes(total)} are free"]
        for entry in view.page.taken:
            if key in entry.claims and not view.page.covers(entry, request):
                parts.append(self._possession(entry, entry.claims[key]))
        if beside.foreign:
            parts.append(_used_by_others(beside))
        if beside.family:
            parts.append(f"{format_bytes(beside.family)} used by programs of the same family")
        if ahead := len(view.page.ahead(request, key)):
            parts.append(f"{ahead} waiting before")
        return ", ".join(parts)

    def _possession(self, entry: Entry, claim: Claim) -> str:
        if entry.state in KEPT:
            return f"{format_bytes(claim.resident)} kept by pid {entry.pid} between tests"
        return f"{_want(claim)} held by pid {entry.pid} ({self._ledger.label(entry)})"


@contextmanager
def gpu_lease(
    vram: str | int = "1GiB",
    device: int = 0,
    exclusive: bool = False,
    timeout: float | None = None,
) -> Iterator[Lease]:
    """Wait until ``vram`` of a card may be used, and keep others from it meanwhile.

    ``device`` is CUDA's index of the card. ``exclusive`` keeps everybody else's leases off the
    card. At the end the allocator's unused cache goes back to the driver, so that the next in
    turn finds the bytes. ``timeout`` is in seconds; without one it waits for programs that have
    no lease for 10 seconds at most, and then starts with what there is.

    Raises:
        ValueError: when ``vram`` is no size or there is no such card.
        TooLarge: when the card does not have as much.
        LeaseTimeout: when ``timeout`` has passed; says who held the card.
        LeaseError: when leases cannot be kept on this machine, or this thread would wait while it
            holds a lease.

    """
    from pytest_gpumem import devices

    want = Want(parse_bytes(vram), exclusive)
    card, leases = _card(device), store()
    with telling.Waiting(f"gpu_lease of {_label()}", leases.ancestors) as waiting:
        lease = leases.acquire(
            {card.uuid: want}, {card.uuid: card.total}, _label(), timeout, waiting.note
        )
    with lease:
        try:
            yield lease
        finally:
            for allocator in devices.allocators():
                allocator.release_cached()


def _used_by_others(found: _Outside) -> str:
    size = format_bytes(found.foreign)
    if not found.strangers:
        return f"{size} used without a lease, it cannot be told by whom"
    listed = (
        f"pid {pid}" if size is None else f"pid {pid}: {format_bytes(size)}"
        for pid, size in found.strangers
    )
    return f"{size} used by other programs ({', '.join(listed)})"


def _card(device: int) -> Card:
    """Return the card with CUDA's index ``device``."""
    from pytest_gpumem import devices

    found = devices.find_cards()
    if not found.cards:
        # A simulated card answers as soon as pynvml is there, and only then; another thread may
        # just be importing it.
        with suppress(ImportError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("pynvml")
        found = devices.find_cards()
    if not found.cards:
        raise ValueError(f"there is no card to lease: {found.why_none}")
    if not 0 <= device < len(found.cards):
        raise ValueError(f"there is no device {device}; allowed is 0 to {len(found.cards) - 1}")
    return found.cards[device]


def _label() -> str:
    """Return what others see of this process: its test, or else its program."""
    return os.environ.get("PYTEST_CURRENT_TEST") or Path(sys.argv[0]).name or "python"


def store() -> LeaseStore:
    """Return this process's store, which ``gpu_lease`` uses too.

    Raises:
        LeaseError: when GPUMEM_RUN_DIR is not absolute.

    """
    if not _stores:
        _stores.append(LeaseStore(driver=_CudaDriver()))
    return _stores[0]  # the same for all, also if two threads came first


def _claim(want: Want) -> Claim:
    return Claim(0, want.size or 0, want.exclusive or want.size is None)


def _want(claim: Claim) -> Want:
    return Want(None if claim.exclusive and not claim.extra else claim.extra, claim.exclusive)

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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from pytest_gpumem.sharing.admission import (
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
from pytest_gpumem.sharing.ledger import (
    HELD,
    KEPT,
    RESIDENT,
    SPARE,
    WAITING,
    Entry,
    LeaseError,
    Ledger,
    Page,
    Vanished,
    card_key,
    entry_of,
    pid_of,
    run_directory,
)
from pytest_gpumem.sharing.locks import POLL, News
from pytest_gpumem.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from pytest_gpumem.devices import Usage
    from pytest_gpumem.records import Card

__all__ = [
    "HolderInfo",
    "Lease",
    "LeaseError",
    "LeaseStore",
    "LeaseTimeout",
    "TooLarge",
    "Want",
    "gpu_lease",
    "store",
]

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


class TooLarge(LeaseError):  # noqa: N818  # the name says what is wrong with the request
    """More is asked for than the card has."""


class LeaseTimeout(LeaseError):  # noqa: N818  # no error of the program, but of its neighbours
    """The lease did not become free in time; says who held it."""


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


class _Foreign(NamedTuple):
    """What processes without an entry in the ledger use of a card."""

    size: int = 0
    """Bytes."""
    processes: tuple[tuple[int, int | None], ...] = ()
    """Those that the driver lists: pid, and bytes if it tells them."""


class _View(NamedTuple):
    """What a decision rests on: the ledger, and by card what foreign processes use."""

    page: Page
    foreign: Mapping[str, _Foreign]

    def others(self, key: str) -> int:
        """Return the bytes of a card that foreign processes use, 0 where that was not asked."""
        return self.foreign[key].size if key in self.foreign else 0


class _Hope(NamedTuple):
    """What a request still waits for, though no lease that ends brings it."""

    spared: bool = False
    """That processes archive what they keep."""
    freed: bool = False
    """That foreign programs end, if they did when others waited for it."""
    timed: bool = False
    """That foreign programs end before its timeout."""


_NO_HOPE = _Hope()


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
    ) -> Lease:
        """Return a lease of all ``wants`` (by UUID) at once, first come, first served.

        ``totals`` are the cards' capacities in bytes, ``timeout`` is in seconds (0: do not wait).
        For ``hope`` seconds it waits for what others keep and may spare, and until the timeout,
        or else for ``PATIENCE`` seconds, for what foreign programs use; then it goes without.
        ``on_wait`` is called with a sentence that says what is waited for and who holds it, when
        the wait begins and when that changes.

        Raises:
            TooLarge: when a card does not have as much.
            LeaseTimeout: when ``timeout`` has passed.
            LeaseError: when the directory cannot be used, or when this thread would have to wait
                while it holds a lease, which could last for ever.

        """
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
                request, short = self._take(claims, label, timeout, on_wait, hope)
                return Lease(self, request, wants, short)
            except Vanished:
                tries -= 1
                if not tries:
                    raise
                time.sleep(POLL)
                self._ledger.mend()

    def is_shared(self, uuid: str) -> bool:
        """Return whether another process has a lease of a card or keeps something on it."""
        key, own = card_key(uuid), self._ledger.process
        return any(
            entry.process != own and entry.state != WAITING and key in entry.claims
            for entry in self._ledger.read().entries
        )

    def held_here(self) -> bool:
        """Return whether this thread holds a lease of this store, and so may not wait."""
        return threading.current_thread() in list(self._ledger.leases.values())

    def granted_here(self, uuid: str) -> int | None:
        """Return the bytes of a card that this thread's leases are for; None: the whole card."""
        key, size, current = card_key(uuid), 0, threading.current_thread()
        names = {name for name, thread in list(self._ledger.leases.items()) if thread is current}
        for entry in self._ledger.read().entries if names else ():
            claim = entry.claims.get(key)
            if entry.name in names and claim is not None:
                if claim.exclusive and not claim.extra:
                    return None
                size += claim.extra
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
        with self._ledger.alone():
            self._ledger.bury(dead)
        page = self._ledger.read()
        self._nudge_first(page)
        return [
            HolderInfo(entry.pid, self._ledger.label(entry), *_want(claim), entry.state == WAITING)
            for entry in page.entries
            for key, claim in entry.claims.items()
            if key == card_key(uuid) and entry.state not in KEPT
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
        kept = sum(claim.resident for claim in page.claims[key])
        for entry in page.waiting:
            if entry.process == own:
                return False
            if key in entry.claims and entry.claims[key].extra > total - self.headroom - kept:
                return True
        return False

    def capacity(self, uuid: str, total: int) -> int:
        """Return the bytes of a card that all processes with leases can have together now.

        ``total`` is what there is; foreign processes keep the rest, and the headroom.
        """
        return total - self.headroom - self.foreign(uuid, total)

    def foreign(self, uuid: str, total: int) -> int:
        """Return the bytes of a card that others use without an entry in the ledger.

        ``total`` is the card's capacity.
        """
        key = card_key(uuid)
        self._cards[key] = uuid, total
        return sum(found.size for found in self._foreign((key,)).values())

    def close(self) -> None:
        """Give everything of this process back."""
        if self._ledger.close():
            self._nudge_first(self._ledger.read())

    def _take(
        self,
        claims: dict[str, Claim],
        label: str,
        timeout: float | None,
        on_wait: Callable[[str], None] | None,
        hope: float,
    ) -> tuple[Entry, int]:
        """Return an entry that holds ``claims``, and how many bytes of them are not there."""
        foreign = self._foreign(claims)
        request = None
        try:
            with self._ledger.alone():
                view = _View(self._ledger.page(), foreign)
                number = self._ledger.next_number(view.page)
                request = entry_of(WAITING, number, self._ledger.process, claims)
                if self._admits(view, request, self._hope(0, timeout, hope)):
                    request = request.turned(HELD)
                self._ledger.write(request, label)
            if request.state == WAITING:
                view = self._wait(request, timeout, on_wait, hope)
                request = request.turned(HELD)
            self._ledger.leases[request.name] = threading.current_thread()
            return request, self._note_short(view, request)
        except BaseException:  # Ctrl-C comes at any line
            if request is not None:
                self._withdraw(request)
            raise

    def _wait(
        self,
        request: Entry,
        timeout: float | None,
        on_wait: Callable[[str], None] | None,
        hope: float,
    ) -> _View:
        """Block until ``request`` is held; return what that was decided by."""
        begun = time.monotonic()
        deadline = None if timeout is None else begun + timeout
        # Whatever happened before the watch began.
        said, news = "", News(nudged=True, dead=None)
        with self._ledger.watch(request) as watch:
            while True:
                waited = time.monotonic() - begun
                view, granted = self._look(request, news, self._hope(waited, timeout, hope))
                if granted:
                    return view
                if self.held_here():
                    raise LeaseError(
                        "this thread holds a lease and would wait for another one, which can "
                        f"last for ever; ask for all at once: {self._explain(view, request)}"
                    )
                if deadline is not None and time.monotonic() >= deadline:
                    situation = self._explain(view, request)
                    raise LeaseTimeout(f"no lease within {timeout:g} s: {situation}")
                if on_wait is not None and (text := self._explain(view, request)) != said:
                    on_wait(text)
                    said = text
                pause = self._pause(view, request, deadline, hope - waited)
                news = watch.wait(pause, lambda: _STAND_BY * self._ledger.ahead(request))

    def _hope(self, waited: float, timeout: float | None, hope: float) -> _Hope:
        timed = timeout is not None
        return _Hope(waited < hope and timeout != 0, not timed and waited < PATIENCE, timed)

    def _look(self, request: Entry, news: News, hope: _Hope) -> tuple[_View, bool]:
        """Take what ``request`` waits for if it may start, and wake who else may then."""
        foreign, dead = self._foreign(request.claims), self._ledger.dead(news.dead)
        with self._ledger.alone():
            buried = self._ledger.bury(dead)
            view = _View(self._ledger.page(), foreign)
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
        if self._driver is not None and self._admits(_View(view.page, {}), request):
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
            total, claims = self._cards[key][1], view.page.claims[key]
            ahead = view.page.ahead(key, request.number)
            others = view.others(key)
            if may_start(total, others, headroom, claims, new, ahead=ahead):
                continue
            if not waits_in_vain(total, others, headroom, claims, new, ahead=ahead):
                return False
            if fits(total, 0, headroom, claims, new):  # and foreign programs keep it waiting
                if hope.timed or (hope.freed and others < self._lasting.get(key, math.inf)):
                    return False
            elif hope.spared and self._may_be_spared(view.page, key):
                return False
        return True

    def _may_be_spared(self, page: Page, key: str) -> bool:
        own = self._ledger.process
        return any(
            entry.state == SPARE and entry.process != own and key in entry.claims
            for entry in page.entries
        )

    def _nudge_first(self, page: Page, *, behind: int = 0, but: Entry | None = None) -> None:
        """Wake the first request behind number ``behind`` that may be able to start."""
        full = {key for key in self._cards if self._is_full(page, key)}
        for entry in page.waiting:
            if entry.number <= behind or entry == but:
                continue
            if not full.isdisjoint(entry.claims):
                continue
            # One that has gone meanwhile woke somebody itself, but perhaps before this change.
            if self._admits(_View(page, {}), entry, hint=True) and self._ledger.nudge(entry):
                return

    def _is_full(self, page: Page, key: str) -> bool:
        """Return whether nobody can start on a card; a long queue is then passed over quickly."""
        claims = page.claims[key]
        if any(claim.exclusive for claim in claims):
            return True
        running = any(claim.extra for claim in claims)
        return running and room(self._cards[key][1], 0, 0, claims) <= 0

    def _foreign(self, keys: Iterable[str]) -> dict[str, _Foreign]:
        """Return what foreign processes use of each card."""
        if self._driver is None:
            return {}
        # Without the lock: the driver may take milliseconds.
        page = self._ledger.read()
        return {key: self._foreign_of(key, page, self._driver) for key in keys}

    def _foreign_of(self, key: str, page: Page, driver: Driver) -> _Foreign:
        uuid, total = self._cards[key]
        ours, used = self._ours(key, page), driver.used(uuid)
        if used <= sum(claim.resident for claim in ours.values()):
            self._found[key] = 0
            return _Foreign()
        usage = driver.usage(uuid)
        told = dict(usage.processes)
        own, known = ours.pop(self._ledger.process, NOTHING), told.pop(os.getpid(), None)
        # What this process uses is its own, whether or not it was entered.
        least = max(own.resident, usage.own)
        most = least if known is not None else max(least, own.resident + own.extra)
        # One that is not listed uses no more than those that are leave unexplained.
        listed = list(usage.processes.values())
        limit = total if None in listed or not listed else used - sum(filter(None, listed))
        uses = [bounds(claim, limit, told.get(pid_of(each))) for each, claim in ours.items()]
        size = foreign(used, [(least, most), *uses], self._found.get(key, 0))
        self._found[key] = size
        strangers = told.keys() - set(map(pid_of, ours))
        return _Foreign(size, tuple((pid, told[pid]) for pid in sorted(strangers)))

    def _ours(self, key: str, page: Page) -> dict[str, Claim]:
        """Return what each process with an entry in the ledger may use of a card."""
        ours: dict[str, Claim] = {}
        for entry in page.entries:
            if key in entry.claims and entry.state != WAITING:
                before = ours.get(entry.process, NOTHING)
                ours[entry.process] = entry.claims[key].beside(before)
        return ours

    def _note_short(self, view: _View, request: Entry) -> int:
        """Return how many bytes of what ``request`` was granted are not there.

        If foreign programs have them, nobody waits again for as many.
        """
        most = 0
        for key, new in request.claims.items():
            total, others, claims = self._cards[key][1], view.others(key), view.page.claims[key]
            short = new.extra - room(total, others, self.headroom, claims)
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
        total, others = self._cards[key][1], view.others(key)
        free = max(0, room(total, others, self.headroom, view.page.claims[key]))
        parts = [f"{format_bytes(free)} of {format_bytes(total)} are free"]
        for entry in view.page.entries:
            if key in entry.claims and entry.state != WAITING:
                parts.append(self._possession(entry, entry.claims[key]))
        if others:
            parts.append(_used_by_others(view.foreign[key]))
        if ahead := len(view.page.ahead(key, request.number)):
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
    card = _card(device)
    with store().acquire({card.uuid: want}, {card.uuid: card.total}, _label(), timeout) as lease:
        try:
            yield lease
        finally:
            for allocator in devices.allocators():
                allocator.release_cached()


def _used_by_others(found: _Foreign) -> str:
    size = format_bytes(found.size)
    if not found.processes:
        return f"{size} used without a lease, it cannot be told by whom"
    listed = (
        f"pid {pid}" if size is None else f"pid {pid}: {format_bytes(size)}"
        for pid, size in found.processes
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

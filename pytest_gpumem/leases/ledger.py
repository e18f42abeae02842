"""The ledger of leases: a directory of small files, see ``entries``.

The content of an entry is a label for people. Each process keeps one locked file in another
directory, which says from whom the process descends; entries of a process whose lock is gone are
void.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pytest_gpumem.clock import clock
from pytest_gpumem.errors import LeaseError
from pytest_gpumem.files import own_directory, read_own
from pytest_gpumem.leases.alive import Alive
from pytest_gpumem.leases.entries import Entry, claim_in, entry_named, entry_of
from pytest_gpumem.leases.locks import FileLock, LockBusyError, prepare
from pytest_gpumem.leases.page import Page
from pytest_gpumem.leases.place import is_plain, make_own, run_directory, unusable
from pytest_gpumem.tuples import NamedTuple
from pytest_gpumem.units import printable

_LABEL = 500
"""Characters of a label that are kept."""
_MOST = 4 * _LABEL
"""Bytes of a label that are read."""
_FORMAT = 32
"""Bytes that are read of what a later version says of its format."""
_NEW = os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
LOCK_PATIENCE = 10.0
"""Seconds that anybody waits for the ledger's lock, which is held for well under a millisecond."""
_LOCK_LEAST = 0.03
"""Seconds that it gets even where the deadline is nearer: its holder may just not be running."""


class LedgerBusyError(LeaseError):
    """Somebody keeps the ledger's lock; says who."""


class Standing(NamedTuple):
    """The files by which a process takes part."""

    alive: FileLock
    """Shows that it lives."""
    guard: FileLock
    """Lets it alone change the ledger."""


class Ledger:
    """The ledger in ``directory`` as this process keeps it; any thread may."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._queue = directory / "queue"
        self._ignored: set[str] = set()
        """Names in the queue behind which there is no file of ours."""
        self.forget()
        _ledgers.add(self)

    def forget(self) -> None:
        """Have nothing to do with what is in it; a forked child begins so."""
        self._threads = threading.RLock()
        self._standing: Standing | None = None
        self._last = 0
        # Processes of several containers may have the same number.
        self.process = f"{os.getpid()}.{os.urandom(4).hex()}"
        """This process's name in it."""
        self.leases: dict[str, threading.Thread] = {}
        """The thread that took each of this process's leases, by the name of the entry."""
        self.residents: dict[str, Entry] = {}
        """What this process keeps between tests, by card."""
        self.lasting: dict[str, Entry] = {}
        """What it waited for in vain, by card."""
        self.alive = Alive(self.directory / "alive", self.process)
        """Who takes part."""

    def taken_here(self) -> list[Entry]:
        """Return the leases that this thread has taken."""
        current = threading.current_thread() if self.leases else None
        taken = list(self.leases.items())
        return [
            entry
            for name, thread in taken
            if thread is current and (entry := entry_named(name)) is not None
        ]

    def drop(self, entry: Entry) -> bool:
        """Strike out a lease of this process; False when it has none such, as a forked child."""
        if entry.name not in self.leases:
            return False
        self.strike(entry)
        return self.leases.pop(entry.name, None) is not None

    @property
    def standing(self) -> Standing:
        """How this process takes part in it; it joins now if it has not yet.

        Raises:
            LeaseError: when the directory cannot be used.
            LedgerBusyError: when somebody keeps the lock.

        """
        return self._standing or self.join()

    def join(
        self, deadline: float | None = None, on_wait: Callable[[str], None] = lambda _: None
    ) -> Standing:
        """Take part, if this process does not yet; waits and raises as ``alone`` does."""
        if self._standing is not None:
            return self._standing
        limit = _limit(deadline)
        self._take_turn(limit)
        try:
            if self._standing is None:
                self._standing = self._join(limit, on_wait)
            return self._standing
        except OSError as error:
            raise unusable(self.directory, error) from error
        finally:
            self._threads.release()

    @contextmanager
    def alone(
        self, deadline: float | None = None, on_wait: Callable[[str], None] = lambda _: None
    ) -> Iterator[None]:
        """Keep every other thread and process from granting.

        Waits until ``deadline`` (of ``time.monotonic``), but not longer than anybody should have
        to; ``on_wait`` is told when it takes long, and who has the lock.

        Raises:
            LeaseError: also when anything in the block finds the directory unusable.
            LedgerBusyError: when the lock did not come free.

        """
        limit = _limit(deadline)
        self._take_turn(limit)
        try:
            guard = self.join(limit, on_wait).guard
            try:
                self._lock(guard, limit, on_wait)
                while guard.is_gone:  # as when a user logs out, or somebody cleans up
                    self._leave()
                    guard = self.join(limit, on_wait).guard
                    self._lock(guard, limit, on_wait)
                yield
            finally:
                guard.release()
        except OSError as error:
            raise unusable(self.directory, error) from error
        finally:
            self._threads.release()

    def _take_turn(self, limit: float) -> None:
        """Let this thread be the only one of the process that uses the ledger."""
        if not (
            self._threads.acquire(blocking=False)
            or self._threads.acquire(timeout=max(0.0, limit - clock.monotonic()))
        ):
            raise LedgerBusyError(self._busy("another thread of this process"))

    def _lock(self, guard: FileLock, limit: float, on_wait: Callable[[str], None]) -> None:
        try:
            guard.acquire(limit, lambda holder: on_wait(self._busy(holder)))
        except LockBusyError as error:
            raise LedgerBusyError(self._busy(str(error))) from None

    def _busy(self, holder: str) -> str:
        return f"the lock of the leases in {self.directory}, held by {holder}"

    def read(self) -> Page:
        """Return what it says now.

        Raises:
            LeaseError: when the directory cannot be used.

        """
        _ = self.standing  # who has joined has a directory to read
        try:
            try:
                return self.page()
            except FileNotFoundError:
                self.mend()
                _ = self.standing
                return self.page()
        except OSError as error:
            raise unusable(self.directory, error) from error

    def page(self) -> Page:
        """Return what it says now; for where ``alone`` says what is wrong with the directory."""
        names = os.listdir(self._queue)  # noqa: PTH208  # iterdir is slower
        if self._ignored:
            names = [name for name in names if name not in self._ignored]
        return Page(names, self.alive.family.kin)

    def strange(self) -> list[str]:
        """Return the paths of files in it that are none of its own; they are left alone."""
        with suppress(OSError):
            names = set(os.listdir(self._queue))  # noqa: PTH208  # as page
            others = {*Page(names).strange, *(self._ignored & names)}
            found = [f"{self._queue}/{name}" for name in sorted(others)]
            return found + [f"{self.alive.folder}/{name}" for name in self.alive.strange()]
        return []

    def mend(self) -> None:
        """See to it that the next use makes a directory that is gone, or half gone."""
        self._take_turn(_limit(None))
        try:
            if not self._queue.is_dir():
                self._leave()
        finally:
            self._threads.release()

    def next_number(self, page: Page) -> int:
        """Return the number of a request that comes after all in ``page``; needs the lock.

        This process never uses one twice, so that nothing that comes late hits a later entry.
        """
        self._last = max(self._last, page.last) + 1
        return self._last

    def write(self, entry: Entry, label: str) -> None:
        """Add an entry."""
        file = os.open(self._path(entry), _NEW, 0o600)
        try:
            # The name is what counts: a full disk costs the label, not the lease.
            with suppress(OSError):
                os.write(file, label[:_LABEL].encode(errors="replace"))
        finally:
            os.close(file)

    def kept(self, state: str, key: str, size: int) -> Entry:
        """Return the entry by which this process says so of a card for as long as it likes."""
        return entry_of(state, 0, self.process, {key: claim_in(state, size)})

    def tell(self, told: dict[str, Entry], state: str, key: str, size: int) -> None:
        """Put an entry of that kind in the place of the one in ``told``; none for nothing."""
        before, now = told.pop(key, None), self.kept(state, key, size)
        if size:
            told[key] = now
            self.write(now, "")
        if before is not None and before != told.get(key):
            self.strike(before)

    def turn(self, entry: Entry, state: str) -> None:
        """Put an entry into another state."""
        os.rename(self._path(entry), self._path(entry.turned(state)))  # noqa: PTH104  # as _path

    def strike(self, entry: Entry) -> None:
        """Take an entry out, if it is there; needs no lock, because it can only make room."""
        with suppress(FileNotFoundError):
            os.unlink(self._path(entry))  # noqa: PTH108  # as _path

    def label(self, entry: Entry) -> str:
        """Return what its owner calls itself."""
        try:
            told = read_own(self._path(entry), _MOST)
        except FileNotFoundError:
            return "gone meanwhile"
        except OSError:
            return "no label"
        return printable(told.decode(errors="replace")) or "no label"

    def nudge(self, entry: Entry) -> bool:
        """Wake the owner of a waiting entry; False when it does not wait any more."""
        if not self.alive.nudge(entry.process):
            return False
        if not os.path.exists(self._path(entry)):  # noqa: PTH110  # as _path
            return False
        if hasattr(os, "sched_yield"):
            # Where both share a core, the woken one would wait until this one sleeps.
            os.sched_yield()
        return True

    def dead(self, suspects: Collection[str] | None) -> list[str]:
        """Return the processes among ``suspects`` (None: all with entries) that seem dead."""
        if suspects is None:
            suspects = {entry.process for entry in self.read().entries}
        return self.alive.seem_dead(each for each in suspects if each != self.process)

    def bury(self, dead: Collection[str]) -> bool:
        """Take out what ``dead`` processes had; return whether there were any.

        Needs the lock. Somebody may start then, and has to be woken.
        """
        # Looked at again: a process that just joins has its file before it has its lock.
        dead = self.alive.seem_dead(dead)
        for entry in self.page().entries if dead else ():
            if entry.process not in dead:
                continue
            if is_plain(self._path(entry)):
                self.strike(entry)
            else:
                self._ignored.add(entry.name)
        for each in dead:
            self.alive.remove(each)
        return bool(dead)

    def close(self) -> bool:
        """Take everything of this process out; return whether there can have been anything."""
        if self._standing is None:
            return False
        with self.alone():
            for entry in self.page().entries:
                if entry.process == self.process:
                    self.strike(entry)
            self.leases.clear()
            self.residents.clear()
            self.lasting.clear()
            self.alive.remove(self.process)
        self._leave()
        return True

    def _path(self, entry: Entry) -> str:
        return f"{self._queue}/{entry.name}"  # a Path takes longer than the system call

    def _join(self, limit: float, on_wait: Callable[[str], None]) -> Standing:
        """Take part, with all that this process has."""
        make_own(self.directory)
        for each in (self._queue, self.alive.folder):
            own_directory(each)
        prepare()
        files = [FileLock(self.directory / "lock")]
        try:
            self._lock(files[0], limit, on_wait)
            _refuse_later(self.directory, files[0])
            files.append(self.alive.lock())
            self._lock(files[1], limit, on_wait)
            self.alive.tell(files[1])
            kept = (*self.residents.values(), *self.lasting.values())
            for entry in (*filter(None, map(entry_named, self.leases)), *kept):
                self.write(entry, "")
            others = self.alive.others()
            others |= {each.process for each in self.page().entries} - {self.process}
            if self.bury(others):
                for entry in self.page().waiting:  # any of them may be able to start now
                    self.nudge(entry)
            files[0].release()
        except BaseException:
            for file in files:
                file.close()
            raise
        return Standing(alive=files[1], guard=files[0])

    def _leave(self) -> None:
        own, self._standing = self._standing, None
        for file in own or ():
            file.close()


def _refuse_later(directory: Path, guard: FileLock) -> None:
    """Raise where a later version said in the file of the lock that it writes otherwise."""
    if told := guard.read(_FORMAT):
        raise LeaseError(
            f"the leases in {directory} are kept in a format that this version of "
            f"pytest-gpumem does not read: its lock says {told!r}, and should be empty"
        )


def _limit(deadline: float | None) -> float:
    """Return until when to wait for the lock."""
    now = clock.monotonic()
    patient = now + LOCK_PATIENCE
    return patient if deadline is None else min(patient, max(deadline, now + _LOCK_LEAST))


_ledgers: weakref.WeakSet[Ledger] = weakref.WeakSet()
_own: list[Ledger] = []


def own_ledger() -> Ledger:
    """Return the ledger of this user's run directory, as all of this process keeps it.

    Whoever only takes part needs no store, most tests' processes never more than that.

    Raises:
        LeaseError: when GPUMEM_RUN_DIR is not absolute.

    """
    if not _own:
        _own.append(Ledger(run_directory()))
    return _own[0]  # the same for all, also if two threads came first


def _forget_in_child() -> None:
    for ledger in _ledgers:
        ledger.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)

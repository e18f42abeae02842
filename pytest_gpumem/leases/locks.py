"""Locks that the kernel takes back when a process ends, and waiting for such an end.

Locks are ``flock(2)`` on Linux and macOS, byte-range locks on Windows. Waiting for an end blocks
in ``inotify(7)`` on Linux; elsewhere, and where inotify has no instance left, it polls.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
import struct
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gpumem.clock import clock
from pytest_gpumem.devices.family import described
from pytest_gpumem.files import open_own
from pytest_gpumem.tuples import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Self

POLL = 0.01
"""Seconds between two looks where the system does not wake us."""
_DYING = 1.0
"""Seconds that a dying process gets between closing its files and losing its locks."""
_RETRY = 0.0001
_FIRST = 0.00005
"""Seconds until a lock that somebody has is tried again, at first; then ever longer."""
_LONG = 0.05
"""Seconds after which a lock is held for long: its holder is stopped, or the machine busy."""
_NEVER = math.inf
_IN_ATTRIB, _IN_CLOSE_WRITE, _IN_Q_OVERFLOW = 0x4, 0x8, 0x4000
_EVENT = struct.Struct("iIII")
_NO_CHILD = getattr(os, "O_NOINHERIT", 0)
"""On Windows; elsewhere ``open_own`` sees to it."""
_NO_LOCK = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EINVAL, errno.ELOOP, errno.ENOTDIR}
_NO_LOCK |= {errno.ENXIO, errno.ENODEV, errno.EISDIR}
"""What the system, or ``open_own``, says of a file that is not there or not a process's."""

_INHERITED = 200
"""The lowest number under which a program inherits a lock."""

_forking = threading.RLock()
"""Held where a file is opened and noted: a child forked in between would keep it for good."""
_open_files: set[int] = set()
_idle_watchers: list[int] = []


class LockBusyError(Exception):
    """A lock did not come free in time; says who probably has it."""


class FileLock:
    """An exclusive lock on a file of its own, for one thread at a time.

    It ends with this process however that ends; a forked child neither has nor prolongs it.
    """

    def __init__(self, path: Path) -> None:
        with _forking:
            self._file = open_own(path, os.O_RDWR | os.O_CREAT | _NO_CHILD)
            _open_files.add(self._file)

    @property
    def is_gone(self) -> bool:
        """Whether somebody removed the file: the lock then keeps nobody away."""
        return os.fstat(self._file).st_nlink == 0

    def acquire(
        self, deadline: float = _NEVER, on_long: Callable[[str], None] = lambda _: None
    ) -> None:
        """Wait until the lock is this process's; ``deadline`` is of ``time.monotonic``.

        No kernel has a wait for such a lock that ends in time, in any thread, without signals. So
        it is tried again, after at most ``POLL`` seconds: but that long only somebody who is
        stopped has it. ``on_long`` is told then who that is.

        Raises:
            LockBusyError: at the deadline.

        """
        pause, long = _FIRST, 0.0
        while not _try_to_lock(self._file):
            now = clock.monotonic()
            if now >= deadline:
                raise LockBusyError(self._holder())
            long = long or now + _LONG
            if now >= long:
                on_long(self._holder())
                long = _NEVER
            clock.sleep(min(pause, deadline - now))
            pause = POLL if long == _NEVER else min(2 * pause, POLL / 20)

    def _holder(self) -> str:
        """Return who has the lock, as far as /proc/locks tells; see proc_locks(5)."""
        about = os.fstat(self._file)
        device = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}"
        with contextlib.suppress(OSError):
            for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines():
                words = line.split()
                if words[1] == "FLOCK" and words[5] == f"{device}:{about.st_ino}":
                    # Whoever inherited the file has its lock too, also when that one has ended.
                    return f"probably {described(int(words[4]))}"
        return "another process"

    @contextlib.contextmanager
    def inherited(self) -> Iterator[None]:
        """Let programs that are started in the block have the lock too, until the last one ends.

        Under a number that scripts, which count from 3, do not use.
        """
        import fcntl

        try:
            number = fcntl.fcntl(self._file, fcntl.F_DUPFD, _INHERITED)
        except OSError:  # beyond the limit of this process
            number = fcntl.fcntl(self._file, fcntl.F_DUPFD, 3)
        try:
            yield
        finally:
            os.close(number)

    def read(self, most: int) -> str:
        """Return what the file says, its first ``most`` bytes."""
        os.lseek(self._file, 0, os.SEEK_SET)
        return os.read(self._file, most).decode(errors="replace")

    def write(self, text: str) -> None:
        """Let the file say so."""
        os.write(self._file, text.encode())

    def release(self) -> None:
        """Let others have the lock."""
        if self._file in _open_files:
            _unlock(self._file)

    def close(self) -> None:
        """Give the lock and its file back."""
        if self._file in _open_files:
            _open_files.remove(self._file)
            # A child forked in C, past Python's hooks, still has the file: closing is not enough.
            _unlock(self._file)
            os.close(self._file)
            self._file = -1  # the number may be another file's next


def is_held(path: Path | str) -> bool:
    """Return whether a process that lives holds the lock of ``path``.

    False where there is no such file, or what is there can be no process's lock.

    Raises:
        OSError: when the system cannot open any file now: nobody is dead for that.

    """
    try:
        file = open_own(path, os.O_RDONLY | _NO_CHILD)
    except OSError as error:
        if error.errno in _NO_LOCK:
            return False
        raise
    try:
        return not _could_lock(file)
    finally:
        os.close(file)


if sys.platform == "win32":
    import msvcrt

    def _try_to_lock(file: int) -> bool:
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock(file: int) -> None:
        with contextlib.suppress(OSError):
            msvcrt.locking(file, msvcrt.LK_UNLCK, 1)

    def _could_lock(file: int) -> bool:
        if not _try_to_lock(file):
            return False
        _unlock(file)
        return True

else:
    import fcntl

    def _try_to_lock(file: int) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)

    def _could_lock(file: int) -> bool:
        try:
            # Shared, so that two who look at the same time do not see one another.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


class News(NamedTuple):
    """Why a wait ended."""

    nudged: bool
    dead: list[str] | None
    """Files of processes that ended; None: anything may have happened."""


class Watch:
    """Lets one thread wait until its own file is touched or a process ends.

    ``alive`` is a directory in which each process keeps a locked file open for writing, ``own``
    is this process's. What happens after ``__enter__`` is not missed.
    """

    def __init__(self, own: Path, alive: Path) -> None:
        self._own = own
        self._alive = alive
        self._watches: list[int] = []

    def __enter__(self) -> Self:
        self._inotify = _take_inotify()
        if self._inotify is not None:
            add = functools.partial(_libc().inotify_add_watch, self._inotify)
            # After the first time both are there already.
            self._watches = [
                add(os.fsencode(self._own), _IN_ATTRIB),
                add(os.fsencode(self._alive), _IN_CLOSE_WRITE),
            ]
            if min(self._watches) < 0:
                self.__exit__()
        return self

    def __exit__(self, *_: object) -> None:
        """Let the next one have the instance with its watches.

        To remove one may take milliseconds, which would come between a grant and its use.
        """
        if self._inotify is not None:
            _idle_watchers.append(self._inotify)
            self._inotify = None

    def wait(self, timeout: float | None, patience: Callable[[], float] = lambda: 0) -> News:
        """Block until there is news, or for ``timeout`` seconds; any thread may.

        The end of a process is news only if nobody has tidied up after it for ``patience()``
        seconds: of many that wait, not all have to.
        """
        if self._inotify is None:
            clock.sleep(POLL if timeout is None else max(0, min(POLL, timeout)))
            return News(nudged=True, dead=None)
        end = _NEVER if timeout is None else clock.monotonic() + timeout
        closed: set[str] = set()
        look = _NEVER
        while _readable(self._inotify, min(end, look)) or (closed and look <= end):
            events = list(_events(self._inotify))
            if any(mask & _IN_Q_OVERFLOW for _, mask, _ in events):
                return News(nudged=True, dead=None)
            if new := {name for watch, _, name in events if watch == self._watches[1]}:
                closed |= new
                look = clock.monotonic() + patience()
            if any(watch == self._watches[0] for watch, _, _ in events):
                return News(nudged=True, dead=self._dead(closed, end))
            if closed and clock.monotonic() >= look:
                if dead := self._dead(closed, end):
                    return News(nudged=False, dead=dead)
                closed, look = set(), _NEVER
        return News(nudged=False, dead=self._dead(closed, end))

    def _dead(self, closed: set[str], end: float) -> list[str]:
        return [name for name in closed if _has_died(self._alive / name, end)]


def _has_died(path: Path, end: float) -> bool:
    """Return whether the process that closed ``path`` is dead, and nobody has tidied up yet.

    A dying process closes its file a moment before it loses the lock; not beyond ``end``.
    """
    end = min(end, clock.monotonic() + _DYING)
    while is_held(path):
        if clock.monotonic() > end:
            return False
        clock.sleep(_RETRY)
    return path.exists()


def _readable(file: int, deadline: float) -> bool:
    """Wait until ``file`` has something to read; False when it is ``deadline`` before."""
    import select

    waiter = select.poll()
    waiter.register(file, select.POLLIN)
    # Rounded up, so that the deadline has passed when the time is over.
    left = None if deadline == _NEVER else math.ceil(max(0, deadline - clock.monotonic()) * 1000)
    return bool(waiter.poll(left))


def _events(inotify: int) -> list[tuple[int, int, str]]:
    """Return what an instance has to tell: watch, mask and the name of the file, see inotify(7)."""
    found = []
    with contextlib.suppress(BlockingIOError):
        told = os.read(inotify, 65536)
        while told:
            watch, mask, _, length = _EVENT.unpack_from(told)
            end = _EVENT.size + length
            found.append((watch, mask, os.fsdecode(told[_EVENT.size : end].rstrip(b"\0"))))
            told = told[end:]
    return found


def _take_inotify() -> int | None:
    """Return an inotify instance that no other thread uses, None where there is none to have.

    Instances are kept: closing one that ever watched something costs 16 ms.
    """
    if sys.platform != "linux":
        return None
    with contextlib.suppress(IndexError):
        inotify = _idle_watchers.pop()
        _events(inotify)  # what came after the last wait
        return inotify
    with _forking:
        found: int = _libc().inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if found < 0:
            return None
        _open_files.add(found)
    return found


def prepare() -> None:
    """Have an inotify instance before a process's file in ``alive`` is opened.

    The kernel closes the files of a process that was killed in the reverse order, and takes 16 ms
    for an instance that watches something: nobody is to wait for that.
    """
    if (found := _take_inotify()) is not None:
        _idle_watchers.append(found)


@functools.cache
def _libc() -> Any:
    import ctypes

    return ctypes.CDLL(None)


def _close_in_child() -> None:
    """Close what a forked child inherited: a lock lives as long as any process has its file."""
    for file in _open_files:
        os.close(file)
    _open_files.clear()
    _idle_watchers.clear()
    _forking.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_forking.acquire,
        after_in_parent=_forking.release,
        after_in_child=_close_in_child,
    )

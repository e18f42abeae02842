"""One simulated card: a mapped file whose capacity every process that opens it shares.

The file is a row of native 64-bit integers: a header, then one slot per process with its pid, its
start time, its context and what it reserved, in bytes. What is used is always summed over the
slots and never kept beside them, so that a process killed at any instruction leaves no wrong sum.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import threading
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAGIC = b"gpumem\0\1"
_MAX_PROCESSES = 1024
_HEADER = 6
_TOTAL, _CONTEXT, _UUID, _SLOTS_USED = 1, 2, 3, 5
_SLOT = 4
_PID, _STARTED, _OWN_CONTEXT, _RESERVED = range(_SLOT)
_UNKNOWN = 0
_FILE_SIZE = 8 * (_HEADER + _SLOT * _MAX_PROCESSES)

# Record locks belong to a process: a kill frees them and a forked child does not inherit them
# (a flock lives on in every child). In exchange they do not keep out threads of one process.
_threads = threading.RLock()
_locked: set[Path] = set()


def _forget_other_threads() -> None:
    """Renew the locks in a forked child: those that other threads held would stay held."""
    global _threads  # noqa: PLW0603  # the one lock of the process
    _threads = threading.RLock()
    _locked.clear()


os.register_at_fork(after_in_child=_forget_other_threads)


class SharedCard:
    """A simulated card, open in this process. Sizes are bytes.

    The lock file lies beside the card file. When both are removed, the processes that have the
    card open go on sharing it.
    """

    name = "Simulated CUDA card"
    compute_capability = (9, 0)

    def __init__(self, path: Path) -> None:
        """Open an existing card file; ``create`` and ``open`` are the ways to call it."""
        self.path = path
        with path.open("r+b") as file:
            if file.read(8) != _MAGIC:
                raise ValueError(f"{path} is not the file of a simulated card")
            self._map = mmap.mmap(file.fileno(), _FILE_SIZE)
        self._words = memoryview(self._map).cast("q")
        self._lock_file = os.open(_lock_path(path), os.O_RDWR | os.O_CLOEXEC)
        self.total = self._words[_TOTAL]
        self.context = self._words[_CONTEXT]
        self.uuid = f"GPU-{uuid.UUID(bytes=self._map[8 * _UUID : 8 * (_UUID + 2)])}"
        self._slot = 0
        self._joined_by = 0

    @classmethod
    def create(cls, path: Path, *, total: int, context: int) -> SharedCard:
        """Make the file of a new card; every process that joins it costs ``context`` bytes.

        Raises:
            ValueError: when the sizes make no sense or the file exists already.

        """
        if total <= 0 or not 0 <= context <= total:
            raise ValueError(
                f"a simulated card of {total} bytes with a context of {context} bytes:"
                " the total must be above 0 and the context between 0 and the total"
            )
        identity = uuid.uuid4().bytes
        header = struct.pack("=8sqq16sq", _MAGIC, total, context, identity, 0)
        try:
            with path.open("xb") as file:
                file.write(header.ljust(_FILE_SIZE, b"\0"))
        except FileExistsError:
            raise ValueError(
                f"{path} exists already; a new simulated card needs a new file"
            ) from None
        _lock_path(path).touch()
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> SharedCard:
        """Open the card that another process (or this one) created.

        Raises:
            ValueError: when there is no simulated card at ``path``.

        """
        try:
            return cls(path)
        except FileNotFoundError:
            raise ValueError(f"there is no simulated card at {path}") from None

    @property
    def joined(self) -> bool:
        """Whether this very process, not the parent it was forked from, has a context."""
        return self._joined_by == os.getpid()

    def join(self) -> bool:
        """Take this process's context; ``False`` when it does not fit. Joining twice is harmless.

        Raises:
            RuntimeError: in a forked child of a process that had joined (a CUDA context does not
                survive a fork), and when more processes than the file has slots have joined.

        """
        with self._alone():
            if self.joined:
                return True
            if self._slot:
                raise RuntimeError(
                    "the parent of this forked process had joined the simulated card"
                )
            if not self._fits(self.context):
                return False
            self._slot = self._free_slot()
            self._joined_by = os.getpid()
            # The pid last: it makes the slot count, and a kill may come before it.
            self._words[self._slot + _STARTED] = _start_time(self._joined_by) or _UNKNOWN
            self._words[self._slot + _OWN_CONTEXT] = self.context
            self._words[self._slot + _RESERVED] = 0
            self._words[self._slot + _PID] = self._joined_by
            return True

    def leave(self) -> None:
        """Give everything of this process back: what it reserved and its context."""
        if self.joined:
            with self._alone():
                self._words[self._slot + _PID] = 0
            self._slot = self._joined_by = 0

    def close(self) -> None:
        """Leave the card and close its files; closing twice is harmless."""
        if self._map.closed:
            return
        self.leave()
        with _threads:
            # Inside, because closing the file would end a lock that another thread holds on it.
            os.close(self._lock_file)
            self._lock_file = -1
        self._words.release()
        self._map.close()

    def reserve(self, size: int) -> bool:
        """Take ``size`` bytes; ``False`` when they do not fit or this process has not joined."""
        if not self.joined:
            return False
        with self._alone():
            if not self._fits(size):
                return False
            self._words[self._slot + _RESERVED] += size
            return True

    def release(self, size: int) -> None:
        """Give ``size`` reserved bytes back; nothing happens when this process has not joined.

        Raises:
            ValueError: when the process has not reserved as many.

        """
        if not self.joined:
            return
        with self._alone():
            reserved = self._words[self._slot + _RESERVED]
            if size > reserved:
                raise ValueError(
                    f"{size} bytes released on the simulated card, {reserved} reserved"
                )
            self._words[self._slot + _RESERVED] = reserved - size

    def free(self) -> int:
        """Return the bytes that no living process uses."""
        return self.total - sum(self.processes().values())

    def processes(self) -> dict[int, int]:
        """Return what each living process uses: its context and what it reserved."""
        with self._alone():
            self._reap()
            used: dict[int, int] = {}
            for slot in self._taken_slots():
                pid = self._words[slot + _PID]
                used[pid] = used.get(pid, 0) + self._used(slot)
            return used

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with _threads:
            if self.path in _locked:
                # A collected tensor emptied the cache in the middle of a call of this thread.
                yield
                return
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX)
            _locked.add(self.path)
            try:
                yield
            finally:
                _locked.discard(self.path)
                fcntl.lockf(self._lock_file, fcntl.LOCK_UN)

    def _fits(self, size: int) -> bool:
        room = self.total - size
        if sum(map(self._used, self._taken_slots())) <= room:
            return True
        self._reap()
        return sum(map(self._used, self._taken_slots())) <= room

    def _used(self, slot: int) -> int:
        return self._words[slot + _OWN_CONTEXT] + self._words[slot + _RESERVED]

    def _taken_slots(self) -> list[int]:
        end = _HEADER + _SLOT * self._words[_SLOTS_USED]
        return [slot for slot in range(_HEADER, end, _SLOT) if self._words[slot + _PID]]

    def _free_slot(self) -> int:
        self._reap()
        used = self._words[_SLOTS_USED]
        for slot in range(_HEADER, _HEADER + _SLOT * used, _SLOT):
            if not self._words[slot + _PID]:
                return slot
        if used == _MAX_PROCESSES:
            raise RuntimeError(f"{used} processes use the simulated card; it has room for no more")
        self._words[_SLOTS_USED] = used + 1
        return _HEADER + _SLOT * used

    def _reap(self) -> None:
        """Free the slots of processes that died without leaving."""
        for slot in self._taken_slots():
            own = slot == self._slot and self.joined
            if not own and not _lives(self._words[slot + _PID], self._words[slot + _STARTED]):
                self._words[slot + _PID] = 0


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _start_time(pid: int) -> int | None:
    """Return when a living process started, in clock ticks after boot; ``None`` when not told.

    Fields 3 (state) and 22 (start time) of ``/proc/PID/stat``, see proc(5). A zombie is dead:
    its memory has gone.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The second field, the program's name, may hold blanks and brackets.
    state, *others = stat[stat.rindex(b")") + 2 :].split()
    return None if state in (b"Z", b"X") else int(others[18])


def _lives(pid: int, started: int) -> bool:
    """Tell whether ``pid`` is still the process that started then, not one that got its number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process: there, and nothing more is told
        return True
    return started == _UNKNOWN or _start_time(pid) == started

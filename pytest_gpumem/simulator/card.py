"""One simulated card: a mapped file whose capacity every process that opens it shares.

The file is a row of native 64-bit integers: a header, then one slot per process with its pid, its
pid namespace, its context and what it reserved, in bytes. What is used is always summed over the
slots and never kept beside them, so that a process killed at any instruction leaves no wrong sum.
A process lives as long as it holds the lock of its slot: its number says nothing in another pid
namespace, and is given to another process when it has ended.
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

_MAGIC = b"gpumem\0\2"
_MAX_PROCESSES = 1024
_HEADER = 6
_ALL = 0
"""The byte of the lock file that is locked by who changes the card; slots are from _HEADER on."""
_TOTAL, _CONTEXT, _UUID, _SLOTS_USED = 1, 2, 3, 5
_SLOT = 4
_PID, _NAMESPACE, _OWN_CONTEXT, _RESERVED = range(_SLOT)
_FILE_SIZE = 8 * (_HEADER + _SLOT * _MAX_PROCESSES)

_threads = threading.RLock()


class _LockFile:
    """The lock file of a card, open once in this process.

    Its first byte is locked by whoever changes the card, a slot's by the process that has the
    slot. Record locks belong to a process: a kill frees them and a forked child does not inherit
    them (a flock lives on in every child). In exchange they do not keep out other threads and
    openings of one process, which ``_threads``, ``busy`` and ``slots`` do; and the first close of
    any opening would end them all.
    """

    def __init__(self, path: Path) -> None:
        self.file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.users = 0
        """Openings of the card in this process."""
        self.busy = False
        """Whether this process is changing the card."""
        self.slots: set[int] = set()
        """Those of this process."""

    def lock(self, byte: int) -> None:
        fcntl.lockf(self.file, fcntl.LOCK_EX, 1, byte)

    def unlock(self, byte: int) -> None:
        fcntl.lockf(self.file, fcntl.LOCK_UN, 1, byte)

    def is_locked(self, slot: int) -> bool:
        """Return whether a living process has ``slot``; to ask while no other process may."""
        if slot in self.slots:
            return True  # asking the system would end this process's lock
        try:
            fcntl.lockf(self.file, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, slot)
        except (BlockingIOError, PermissionError):  # which of them, POSIX leaves open
            return True
        self.unlock(slot)
        return False


_lock_files: dict[tuple[int, int], _LockFile] = {}
"""Those that are open, by device and inode."""


def _forget_locks() -> None:
    """Renew the locks in a forked child: those that other threads held would stay held."""
    global _threads  # noqa: PLW0603  # the one lock of the process
    _threads = threading.RLock()
    for each in _lock_files.values():
        each.busy = False
        each.slots.clear()


os.register_at_fork(after_in_child=_forget_locks)


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
        self._locks = _open_locks(_lock_path(path))
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
            self._locks.lock(self._slot)
            self._locks.slots.add(self._slot)
            # The pid last: it makes the slot count, and a kill may come before it.
            self._words[self._slot + _NAMESPACE] = _pid_namespace()
            self._words[self._slot + _OWN_CONTEXT] = self.context
            self._words[self._slot + _RESERVED] = 0
            self._words[self._slot + _PID] = self._joined_by
            return True

    def leave(self) -> None:
        """Give everything of this process back: what it reserved and its context."""
        if self.joined:
            with self._alone():
                self._words[self._slot + _PID] = 0
                self._locks.slots.discard(self._slot)
                self._locks.unlock(self._slot)
            self._slot = self._joined_by = 0

    def close(self) -> None:
        """Leave the card and close its files; closing twice is harmless."""
        if self._map.closed:
            return
        self.leave()
        _close_locks(self._locks)
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
        with self._alone():
            self._reap()
            return self.total - sum(map(self._used, self._taken_slots()))

    def processes(self) -> dict[int, int]:
        """Return what each living process uses: its context and what it reserved.

        Without those of other pid namespaces, whose numbers may be other processes' here.
        """
        here = _pid_namespace()
        with self._alone():
            self._reap()
            used: dict[int, int] = {}
            for slot in self._taken_slots():
                if self._words[slot + _NAMESPACE] != here:
                    continue
                pid = self._words[slot + _PID]
                used[pid] = used.get(pid, 0) + self._used(slot)
            return used

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with _threads:
            if self._locks.busy:
                # A collected tensor emptied the cache in the middle of a call of this thread.
                yield
                return
            self._locks.lock(_ALL)
            self._locks.busy = True
            try:
                yield
            finally:
                self._locks.busy = False
                self._locks.unlock(_ALL)

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
            if not self._locks.is_locked(slot):
                self._words[slot + _PID] = 0


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _open_locks(path: Path) -> _LockFile:
    with _threads:
        found = path.stat()
        key = found.st_dev, found.st_ino
        if key not in _lock_files:
            _lock_files[key] = _LockFile(path)
        _lock_files[key].users += 1
        return _lock_files[key]


def _close_locks(locks: _LockFile) -> None:
    with _threads:
        locks.users -= 1
        if not locks.users:
            for key in [key for key, each in _lock_files.items() if each is locks]:
                del _lock_files[key]
            os.close(locks.file)


def _pid_namespace() -> int:
    """Return the inode of this process's pid namespace, see namespaces(7); 0 where not told."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116  # a Path takes longer
    except OSError:
        return 0

"""A mapped file that processes share: a header, then one slot of words for each of them.

Words are native 64-bit integers; the first one of a slot is its process's number, 0 while nobody
has it. A process lives as long as it holds the lock of its slot: its number says nothing in
another pid namespace, and is given to another process when it has ended.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

WORD = 8
_ALL = 0
"""The byte of the lock file that is locked by who changes the file; a slot's is its number."""

_FLOCK = "@hhqqi0q"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_threads = threading.RLock()


class _LockFile:
    """The lock file beside a file of slots, open once in this process.

    Its first byte is locked by whoever changes the file, a slot's by the process that has the
    slot. Record locks belong to a process: a kill frees them and a forked child does not inherit
    them (a flock lives on in every child). In exchange they do not keep out other threads and
    openings of one process, which ``_threads``, ``busy`` and ``slots`` do; and the first close of
    any opening would end them all.
    """

    def __init__(self, path: Path) -> None:
        self.file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.users = 0
        """Openings in this process."""
        self.busy = False
        """Whether this process is changing the file."""
        self.slots: set[int] = set()
        """Those of this process."""

    def lock(self, byte: int) -> None:
        fcntl.lockf(self.file, fcntl.LOCK_EX, 1, byte)

    def unlock(self, byte: int) -> None:
        fcntl.lockf(self.file, fcntl.LOCK_UN, 1, byte)

    def holder(self, slot: int) -> int:
        """Return the number that who has ``slot`` has in this process's pid namespace.

        0 where the system does not tell, nobody has it, or he is not seen from here.
        """
        if sys.platform != "linux":  # whose struct flock this is, see fcntl(2)
            return 0
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, slot, 1, 0)
        with suppress(OSError):
            kind, *_, pid = struct.unpack(_FLOCK, fcntl.fcntl(self.file, fcntl.F_GETLK, asked))
            return 0 if kind == fcntl.F_UNLCK else int(pid)
        return 0

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


class Slots:
    """A file of slots, open in this process.

    The lock file lies beside the file. When both are removed, the processes that have them open
    go on sharing them.

    Args:
        path: the file.
        magic: what its first word has to be.
        header: words before the first slot; the last of them counts the slots that were used.
        slot: words of a slot.
        most: slots that the file has room for.

    Raises:
        OSError: when it cannot be opened.
        ValueError: when it is no such file.

    """

    def __init__(self, path: Path, magic: bytes, *, header: int, slot: int, most: int) -> None:
        with path.open("r+b") as file:
            if file.read(WORD) != magic:
                raise ValueError(f"{path} has not the form that is expected")
            self.map = mmap.mmap(file.fileno(), WORD * (header + slot * most))
        self.words = memoryview(self.map).cast("q")
        self._path = path
        self._locks = _open_locks(_lock_path(path))
        self._header, self._slot, self._most = header, slot, most

    @staticmethod
    def create(path: Path, header: bytes, *, slot: int, most: int) -> None:
        """Make a file with room for ``most`` slots of ``slot`` words behind its ``header``.

        Raises:
            OSError: when it exists already or cannot be written.

        """
        with path.open("xb") as file:
            file.write(header)
            file.truncate(len(header) + WORD * slot * most)
        _lock_path(path).touch(mode=0o600)

    @staticmethod
    def rename(old: Path, new: Path) -> None:
        """Rename a file and what belongs to it."""
        _lock_path(old).rename(_lock_path(new))
        old.rename(new)

    @staticmethod
    def remove(path: Path) -> None:
        """Remove a file and what belongs to it; those who have it open go on."""
        path.unlink(missing_ok=True)
        _lock_path(path).unlink(missing_ok=True)

    def close(self) -> None:
        """Close it; closing twice is harmless."""
        if not self.map.closed:
            _close_locks(self._locks)
            self.words.release()
            self.map.close()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep everybody else from changing the file; to be held by who calls what follows."""
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

    def taken(self) -> list[int]:
        """Return the slots, by their first word, that processes have or had when they ended."""
        words, end = self.words, self._header + self._slot * self.words[self._header - 1]
        return [slot for slot in range(self._header, end, self._slot) if words[slot]]

    def lives(self, slot: int) -> bool:
        """Return whether the process of a slot lives."""
        return self._locks.is_locked(slot)

    def pid(self, slot: int, own: int, namespace: int) -> int:
        """Return the number here of a slot's process, which calls itself ``own`` in ``namespace``.

        In another pid namespace than its own only the system knows it, and while it lives; 0 where
        that does not tell.
        """
        return own if namespace == pid_namespace() else self._locks.holder(slot)

    def take(self) -> int:
        """Return a free slot, which is this process's from now on.

        Its first word is written by the caller, and last of all: it makes the slot count, and a
        kill may come before it.

        Raises:
            RuntimeError: when there is none.
            OSError: when the file system has no room for it.

        """
        used = self.words[self._header - 1]
        for slot in range(self._header, self._header + self._slot * used, self._slot):
            if not self.words[slot]:
                break
        else:
            if used == self._most:
                raise RuntimeError(f"{used} processes take part; there is room for no more")
            slot = self._header + self._slot * used
            self._make_room(slot)
            self.words[self._header - 1] = used + 1
        self._locks.lock(slot)
        self._locks.slots.add(slot)
        return slot

    def _make_room(self, slot: int) -> None:
        """Have the file system keep room for a slot that is used for the first time.

        Where it has none left, writing to the map would end the process by SIGBUS.
        """
        if not hasattr(os, "posix_fallocate"):  # macOS
            return
        with suppress(FileNotFoundError), self._path.open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), WORD * slot, WORD * self._slot)
            except OSError as error:
                if error.errno in _NO_ROOM:  # and not that it cannot be asked to
                    error.filename = str(self._path)
                    raise

    def leave(self, slot: int) -> None:
        """Free a slot of this process."""
        self.words[slot] = 0
        self._locks.slots.discard(slot)
        self._locks.unlock(slot)

    def reap(self) -> None:
        """Free the slots of processes that ended without leaving."""
        for slot in self.taken():
            if not self.lives(slot):
                self.words[slot] = 0


def pid_namespace() -> int:
    """Return the inode of this process's pid namespace, see namespaces(7); 0 where not told."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116  # a Path takes longer
    except OSError:
        return 0


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

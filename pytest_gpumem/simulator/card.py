"""One simulated card: a mapped file whose capacity every process that opens it shares.

The file has a slot for each process, with its pid, its pid namespace, its context and what it
reserved, in bytes. What is used is always summed over the slots and never kept beside them, so
that a process killed at any instruction leaves no wrong sum.
"""

from __future__ import annotations

import os
import struct
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpumem.simulator import spec
from pytest_gpumem.slots import WORD, Slots, pid_namespace

if TYPE_CHECKING:
    from collections.abc import Callable

_MAGIC = b"gpumem\0\3"
_MAX_PROCESSES = 1024
_HEADER = 7
_TOTAL, _CONTEXT, _UUID, _WORKSPACE = 1, 2, 3, 5
_SLOT = 4
_PID, _NAMESPACE, _OWN_CONTEXT, _RESERVED = range(_SLOT)


class SharedCard:
    """A simulated card, open in this process. Sizes are bytes.

    The lock file lies beside the card file. When both are removed, the processes that have the
    card open go on sharing it.
    """

    name = spec.NAME

    def __init__(self, path: Path) -> None:
        """Open an existing card file; ``create`` and ``open`` are the ways to call it."""
        self.path = path
        try:
            self._slots = Slots(path, _MAGIC, header=_HEADER, slot=_SLOT, most=_MAX_PROCESSES)
        except ValueError:
            raise ValueError(f"{path} is not the file of a simulated card") from None
        self._words, self._alone = self._slots.words, self._slots.alone
        self.total = self._words[_TOTAL]
        self.context = self._words[_CONTEXT]
        self.workspace = self._words[_WORKSPACE]
        """Bytes that cuBLAS takes for each thread and stream; 0: none."""
        identity = self._slots.map[WORD * _UUID : WORD * (_UUID + 2)]
        self.uuid = f"GPU-{uuid.UUID(bytes=identity)}"
        self._slot = 0
        self._joined_by = 0
        self.grown: Callable[[], None] | None = None
        """Called when this process has allocated more than ever before."""

    @classmethod
    def create(cls, path: Path, *, total: int, context: int, workspace: int = 0) -> SharedCard:
        """Make the file of a new card; every process that joins it costs ``context`` bytes.

        In each, cuBLAS takes ``workspace`` bytes for each thread and stream that multiplies.

        Raises:
            ValueError: when the sizes make no sense or the file exists already.

        """
        if total <= 0 or not 0 <= context <= total:
            raise ValueError(
                f"a simulated card of {total} bytes with a context of {context} bytes:"
                " the total must be above 0 and the context between 0 and the total"
            )
        if workspace < 0:
            raise ValueError(f"a simulated card with a workspace of {workspace} bytes: below 0")
        identity = uuid.uuid4().bytes
        header = struct.pack("=8sqq16sqq", _MAGIC, total, context, identity, workspace, 0)
        try:
            Slots.create(path, header, slot=_SLOT, most=_MAX_PROCESSES)
        except FileExistsError:
            raise ValueError(
                f"{path} exists already; a new simulated card needs a new file"
            ) from None
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
            self._slots.reap()
            try:
                self._slot = self._slots.take()
            except RuntimeError:
                raise RuntimeError(
                    f"{_MAX_PROCESSES} processes use the simulated card; it has room for no more"
                ) from None
            self._joined_by = os.getpid()
            self._words[self._slot + _NAMESPACE] = pid_namespace()
            self._words[self._slot + _OWN_CONTEXT] = self.context
            self._words[self._slot + _RESERVED] = 0
            self._words[self._slot + _PID] = self._joined_by
            return True

    def leave(self) -> None:
        """Give everything of this process back: what it reserved and its context."""
        if self.joined:
            with self._alone():
                self._slots.leave(self._slot)
            self._slot = self._joined_by = 0

    def close(self) -> None:
        """Leave the card and close its files; closing twice is harmless."""
        if not self._slots.map.closed:
            self.leave()
            self._slots.close()

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
            self._slots.reap()
            return self.total - sum(map(self._used, self._slots.taken()))

    def processes(self) -> dict[int, int]:
        """Return what each living process uses: its context and what it reserved.

        Without those that have no number in the pid namespace of this process.
        """
        with self._alone():
            self._slots.reap()
            used: dict[int, int] = {}
            for slot in self._slots.taken():
                own, namespace = self._words[slot + _PID], self._words[slot + _NAMESPACE]
                if pid := self._slots.pid(slot, own, namespace):
                    used[pid] = used.get(pid, 0) + self._used(slot)
            return used

    def _fits(self, size: int) -> bool:
        room = self.total - size
        if sum(map(self._used, self._slots.taken())) <= room:
            return True
        self._slots.reap()
        return sum(map(self._used, self._slots.taken())) <= room

    def _used(self, slot: int) -> int:
        return self._words[slot + _OWN_CONTEXT] + self._words[slot + _RESERVED]

"""Whether this process started others: what the kernel tells of that in a microsecond."""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpumem.clock import clock

if TYPE_CHECKING:
    from collections.abc import Collection

# Of its own, as ``clock``: a suite may replace those of the modules, and see who asks.
_pread, _getrusage = os.pread, resource.getrusage
_waitid = getattr(os, "waitid", None)
"""None on macOS before Python 3.13."""
_NUMBERS = "/proc/sys/kernel/ns_last_pid"
SOON = 0.005
"""Seconds within which a program that was started holds nothing of a card yet: Python alone takes
longer to begin, a context of CUDA as well. A fork of this process is no program, and is counted."""
_forks = 0


def _count_fork() -> None:
    global _forks  # noqa: PLW0603  # of this process
    _forks += 1


os.register_at_fork(after_in_parent=_count_fork)


def has_children(besides: Collection[int] = ()) -> bool:
    """Whether this process has a child, a zombie included; takes nothing from who waits for it.

    ``besides`` are children that do not count.
    """
    if besides and (found := _children()) is not None:
        return not found <= set(besides)
    if _waitid is None:
        return True
    try:
        _waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


class Offspring:
    """Notices that this process starts others."""

    def __init__(self) -> None:
        self._reaped = _reaped()
        self._forks = _forks
        self._holds_till = 0.0
        """How long it holds that there were none, unless this process forks."""
        self._last = b""
        """The last number when there were none; empty when there may have been some."""
        self._numbers = -1
        """Tells which number the last process or thread was given in this pid namespace, see
        proc(5); -1 where the system does not."""
        with suppress(OSError):
            self._numbers = os.open(_NUMBERS, os.O_RDONLY | os.O_CLOEXEC)

    def stirred(self, besides: Collection[int] = ()) -> bool:
        """Whether there are some now, ``besides`` those that do not count, or were till now.

        One that was started a moment ago, within ``SOON``, may be noticed the next time.
        """
        # Asked after each test: most start nothing, and most are over in less time than a child
        # would take to its first byte of a card. Each question to the kernel takes 1 to 8 us.
        now = clock.monotonic()
        if now < self._holds_till and self._forks == _forks:
            return False
        self._forks = _forks
        found = self._look(besides)
        self._holds_till = 0.0 if found or besides else now + SOON
        return found

    def _look(self, besides: Collection[int]) -> bool:
        # Mostly nobody on the machine starts anything. While the number stays nobody did, which
        # takes half the time of asking for children: that raises an error where there are none.
        last = b""
        if self._numbers >= 0:
            try:
                last = _pread(self._numbers, 32, 0)
            except OSError:  # a test closed what it did not open
                self._numbers = -1
        if last and last == self._last:
            return False
        reaped, before = _reaped(), self._reaped
        self._reaped = reaped
        found = reaped != before or has_children(besides)
        self._last = b"" if found or besides else last
        return found

    def close(self) -> None:
        """Notice nothing any more."""
        if self._numbers >= 0:
            with suppress(OSError):
                os.close(self._numbers)
        self._numbers = -1


def _children() -> set[int] | None:
    """Return the children of this process, None where the system does not tell."""
    try:
        threads = list(Path("/proc/self/task").iterdir())
        # Of each thread, those that it started; see proc_pid_task_children(5).
        return {
            int(child)
            for thread in threads
            for child in (thread / "children").read_text(encoding="ascii").split()
        }
    except OSError:
        return None


def _reaped() -> int:
    """Return a figure that grows with each child that has ended and was waited for."""
    return _getrusage(resource.RUSAGE_CHILDREN).ru_minflt

"""Whether this process started others: what the kernel tells of that in a microsecond."""

from __future__ import annotations

import os
import resource

_CAN_ASK = hasattr(os, "waitid")
"""Not so on macOS before Python 3.13."""


def has_children() -> bool:
    """Whether this process has a child, a zombie included; takes nothing from who waits for it."""
    if not _CAN_ASK:
        return True
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


class Offspring:
    """Notices that this process starts others."""

    def __init__(self) -> None:
        self._reaped = _reaped()

    def stirred(self) -> bool:
        """Whether there are some now, or were since this was asked last."""
        before, self._reaped = self._reaped, _reaped()
        return self._reaped != before or has_children()


def _reaped() -> int:
    """Return a figure that grows with each child that has ended and was waited for."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt

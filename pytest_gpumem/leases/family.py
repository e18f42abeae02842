"""Who descends from whom. A process is known by its number and the moment at which it began."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class _Born(NamedTuple):
    parent: int
    start: float
    """Of one clock for all processes of the machine."""


def lineage(pid: int) -> tuple[str, ...]:
    """Return a process and its ancestors, closest first, as ``pid:start``; () if it has ended.

    It ends where a parent has ended: whoever is left then belongs to the system.
    """
    found: list[str] = []
    youngest = float("inf")
    while pid > 0 and (born := _born(pid)) is not None:
        if born.start > youngest:  # another one has the parent's number by now
            break
        found.append(f"{pid}:{born.start:.2f}")
        pid, youngest = born.parent, born.start
    return tuple(found)


def described(pid: int) -> str:
    """Return what a message calls a process: its number, its program, and whether it is stopped."""
    if pid == os.getpid():
        return "this process"
    told = _stat(pid)
    if told is None:
        return f"pid {pid}"
    name, state, *_ = told
    return f"pid {pid} ({name}{', stopped' if state in 'Tt' else ''})"


if sys.platform == "linux":  # a tenth of psutil's time, whose import alone takes 15 ms

    def _born(pid: int) -> _Born | None:
        told = _stat(pid)
        return None if told is None else _Born(int(told[2]), int(told[20]))

else:

    def _born(pid: int) -> _Born | None:
        import psutil

        with suppress(psutil.Error):
            process = psutil.Process(pid)
            return _Born(process.ppid(), process.create_time())
        return None


def _stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the second on, see proc_pid_stat(5)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    name, _, rest = text.partition("(")[2].rpartition(")")
    return [name, *rest.split()]

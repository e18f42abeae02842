"""The family of a run: the process that runs tests, and all that it and theirs started.

A process is known by its number and the moment at which it began. Whom it descends from is told by
the tree of processes as long as its parents live, and by a variable in its environment also when
they have ended: each process that runs tests sets it, and what a test starts inherits it. Who
clears its environment and outlives its parents is not known to belong to anybody.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from pytest_gpumem.tuples import NamedTuple

VARIABLE = "GPUMEM_FAMILY"
"""Says who started a process: a line for each run around it, the outermost first. A line is the
number of the test or fixture, the file of ``book.Book``, and the name, with ``|`` between."""
NO_TEST = "0"
"""What the variable says before tests run, so that children have the simulated card; no line."""
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
CLOCK = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", 0))
"""Linux counts the beginnings of processes by it."""
_LONGEST_NAME = 1000
"""Characters of a name in the environment, of which one text may have 128 KiB (execve(2))."""


class Link(NamedTuple):
    """Who started a process, as one run says."""

    owner: int
    """The number of the test or fixture."""
    book: str
    """The file, called by the process that runs the tests as ``pid:start-...``."""
    name: str

    def __str__(self) -> str:
        """Return it as a line of the variable."""
        return f"{self.owner}|{self.book}|{fitting(self.name)}"

    @property
    def root(self) -> str:
        """The process that runs the tests, as ``pid:start``."""
        return Path(self.book).name.partition("-")[0]


def fitting(name: str) -> str:
    """Return a name as the variable can hold it."""
    return name[:_LONGEST_NAME].encode(errors="replace").decode().translate({0: " ", 10: " "})


def links(text: str) -> list[Link]:
    """Return what the variable says; what is no line of ours is left out."""
    found = []
    for line in filter(None, text.split("\n")):
        number, _, rest = line.partition("|")
        book, _, name = rest.partition("|")
        if number.isdecimal() and book:
            found.append(Link(int(number), book, name))
    return found


def started_by(pid: int) -> list[Link]:
    """Return what a process found in its environment when it began; [] where it is not told."""
    try:
        texts = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # another system, another user's, or it has ended
        return []
    start = f"{VARIABLE}=".encode()
    told = next((text for text in texts if text.startswith(start)), start)
    return links(os.fsdecode(told[len(start) :]))


class _Born(NamedTuple):
    parent: int
    start: float
    """Of one clock for all processes of the machine."""


def lineage(pid: int) -> tuple[str, ...]:
    """Return a process and its ancestors, closest first, as ``pid:start``; () if it has ended.

    The tree ends where a parent has ended: whoever is left then belongs to the system. Behind it
    come those that run tests by the process's environment.
    """
    found = _tree(pid)
    if found:
        found += [root for link in reversed(started_by(pid)) if (root := link.root) not in found]
    return tuple(found)


def _tree(pid: int) -> list[str]:
    found: list[str] = []
    youngest = float("inf")
    while pid > 0 and (born := _born(pid)) is not None:
        if born.start > youngest:  # another one has the parent's number by now
            break
        found.append(f"{pid}:{born.start:.2f}")
        pid, youngest = born.parent, born.start
    return found


def begun(process: str) -> float | None:
    """Return when a process, as ``pid:start``, had begun at the latest; None where not told.

    In seconds by ``CLOCK``. The kernel rounds down to a tick of 10 ms.
    """
    if sys.platform != "linux" or not process:
        return None
    return (float(process.partition(":")[2]) + 1) / _TICKS


def identity(pid: int) -> str:
    """Return a process as ``pid:start``; "" if it has ended."""
    born = _born(pid)
    return "" if born is None else f"{pid}:{born.start:.2f}"


def is_ending(pid: int) -> bool:
    """Whether a process was killed and is not gone yet; False where the system does not tell."""
    told = _stat(pid)
    # PF_EXITING of Linux's include/linux/sched.h: it gives its memory back, which takes a while.
    if told is None or int(told[7]) & 0x4:
        return True
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    pending = status.partition("ShdPnd:")[2].split(None, 1)[:1]
    return bool(pending) and bool(int(pending[0], 16) >> (signal.SIGKILL - 1) & 1)


def described(pid: int) -> str:
    """Return what a message calls a process: its number, its program, and whether it is stopped."""
    if pid == os.getpid():
        return "this process"
    told = _stat(pid)
    if told is None:
        return f"pid {pid}"
    return f"pid {pid} ({told[0]}{', stopped' if is_stopped(pid) else ''})"


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped, and may go on."""
    told = _stat(pid)
    return told is not None and told[1] in "Tt"


def seconds_of_sleeper(pid: int) -> float | None:
    """Return the CPU seconds that a process and those it started have used, if all of them sleep.

    None if one runs, reads from a disk or is stopped, and where the system does not tell.
    """
    told = _stat(pid)
    if told is None or told[1] not in "SZ":
        return None
    seconds = (int(told[12]) + int(told[13])) / os.sysconf("SC_CLK_TCK")
    try:
        # Of each thread, those that it started; see proc_pid_task_children(5).
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text(encoding="ascii").split():
                if (more := seconds_of_sleeper(int(child))) is None:
                    return None
                seconds += more
    except OSError:
        return None
    return seconds


if sys.platform == "linux":  # a tenth of psutil's time, whose import alone takes 15 ms

    def _born(pid: int) -> _Born | None:
        told = _stat(pid)
        # A zombie has given everything back, and waits for its parent to ask.
        return None if told is None or told[1] in "ZX" else _Born(int(told[2]), int(told[20]))

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

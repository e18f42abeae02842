"""Main memory: what a process has of it, what may still be taken, and how often it ran out.

Read from Linux's ``/proc`` and its control groups, of both versions; elsewhere nothing is told.
Sizes are bytes.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_ROOT = Path("/")


class Host(NamedTuple):
    """What this process may use of the machine."""

    cpus: int
    ram: int | None
    """Bytes that can still be taken; None where the system does not tell."""


# A process


def resident() -> int | None:
    """Return the bytes that are resident of this process (RSS); None where that is not told.

    One read of some 10 us. The file is opened each time: one that was kept open would tell a child
    that was forked of its parent.
    """
    try:
        file = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return None
    try:
        return int(os.read(file, 100).split()[1]) * _PAGE
    finally:
        os.close(file)


def reset_peak() -> bool:
    """Let the kernel's high-water mark of this process begin anew; return whether it did.

    See ``clear_refs`` in proc_pid_clear_refs(5); under 1 us. The highest that ``getrusage`` tells
    of this process begins anew with it.
    """
    with suppress(OSError):
        file = os.open("/proc/self/clear_refs", os.O_WRONLY)
        try:
            return os.write(file, b"5") == 1
        finally:
            os.close(file)
    return False


def peak() -> int:
    """Return the kernel's high-water mark of this process; 0 where it is not told."""
    return _kib("self/status", "VmHWM:")


def of_files() -> int:
    """Return what is resident of mapped files: processes share it, and it can be read again."""
    return _kib("self/status", "RssFile:")


def _kib(file: str, name: str) -> int:
    return (_field(_text(Path("/proc", file)), name) or 0) * 1024


def has_children() -> bool:
    """Return whether this process has any child; about 1 us."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except (AttributeError, OSError):  # another system, or ECHILD: there is none
        return False
    return True


def descendants(pid: int) -> Iterator[int]:
    """Yield the processes that descend from ``pid`` by those that live."""
    with suppress(OSError):
        # Of each thread, those that it started; see proc_pid_task_children(5).
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in _text(thread / "children").split():
                yield int(child)
                yield from descendants(int(child))


class Share(NamedTuple):
    """What one process has, of pages that several share its part (PSS)."""

    now: int
    peak: int
    """With what it had more by its high-water mark, which nobody shares as a rule."""


def share_of(pid: int) -> Share:
    """Return the part of main memory that is a process's; nothing if it has ended.

    A child that was forked shares most of its pages with its parent: its RSS would count them
    twice. The kernel walks its page tables: about 1 ms for each 300 MiB.
    """
    now = _kib(f"{pid}/smaps_rollup", "Pss:")
    status = _text(Path(f"/proc/{pid}/status"))
    more = (_field(status, "VmHWM:") or 0) - (_field(status, "VmRSS:") or 0)
    return Share(now, now + max(0, more) * 1024)


# The machine


def host(root: Path = _ROOT) -> Host:
    """Return what this process may use of the machine, its control groups regarded.

    Args:
        root: where ``proc`` and ``sys`` are.

    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    groups = list(_groups(root))
    quotas = [quota for group in groups if (quota := _quota(group)) is not None]
    rooms = [room for group in groups if (room := _group_room(group)) is not None]
    available = _available(root)
    if available is not None:
        rooms.append(available)
    return Host(max(1, min([cpus or 1, *quotas])), min(rooms, default=None))


class Killed(NamedTuple):
    """How many processes the kernel has killed for want of main memory."""

    here: int
    """In the control groups of this process."""
    anywhere: int
    """On the machine, these included."""


def killed(root: Path = _ROOT) -> Killed:
    """Return how often the kernel killed for main memory until now.

    By ``oom_kill`` of ``memory.events`` (cgroup v2) and of ``memory.oom_control`` (v1), and of
    ``/proc/vmstat``. What is not told counts as 0.
    """
    here = 0
    for group in _groups(root):
        for name in ("memory.events", "memory.oom_control"):
            here = max(here, _field(_text(group / name), "oom_kill") or 0)
    return Killed(here, _field(_text(root / "proc/vmstat"), "oom_kill") or 0)


def limit(root: Path = _ROOT) -> int | None:
    """Return the least main memory that this process's control groups allow; None: they do not."""
    found = [
        int(text)
        for group in _groups(root)
        for name in ("memory.max", "memory.limit_in_bytes")
        # Version 1 writes no limit as the largest number of whole pages.
        if (text := _text(group / name).strip()).isdecimal() and int(text) < 2**60
    ]
    return min(found, default=None)


def _groups(root: Path) -> Iterator[Path]:
    """Yield the directories of this process's control groups, each with those above it.

    In a container with a namespace of its own the path is ``/``. See cgroups(7); version 1 has a
    hierarchy for each controller.
    """
    base = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        top = base / controllers if controllers else base
        below = top / path.lstrip("/")
        yield from (each for each in (below, *below.parents) if top == each or top in each.parents)


def _quota(group: Path) -> int | None:
    """Return the CPUs a control group may keep busy, rounded up."""
    quota, _, period = _text(group / "cpu.max").strip().partition(" ")
    quota = quota or _text(group / "cpu.cfs_quota_us").strip()
    period = period or _text(group / "cpu.cfs_period_us").strip()
    if not quota.isdecimal() or not period.isdecimal() or int(period) == 0:
        return None  # "max" and "-1" are no quota
    return -(-int(quota) // int(period))


def _group_room(group: Path) -> int | None:
    """Return the bytes a control group may still take; what is only cached counts as free."""
    for limit, usage, inactive in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        top, used = _text(group / limit).strip(), _text(group / usage).strip()
        if top.isdecimal() and used.isdecimal():
            cached = _field(_text(group / "memory.stat"), inactive) or 0
            return max(0, int(top) - int(used) + cached)
    return None


def _available(root: Path) -> int | None:
    kib = _field(_text(root / "proc/meminfo"), "MemAvailable:")
    return None if kib is None else kib * 1024


def _field(text: str, name: str) -> int | None:
    """Return the number behind ``name`` at the beginning of a line."""
    for line in text.splitlines():
        words = line.split(None, 2)
        if words[:1] == [name]:
            return int(words[1]) if words[1:] and words[1].isdecimal() else None
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

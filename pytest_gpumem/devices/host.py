"""Main memory: what a process has of it, what may still be taken, and how often it ran out.

Read from Linux's ``/proc`` and its control groups, of both versions; elsewhere nothing is told.
Sizes are bytes.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpumem.tuples import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

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

    One read of some 6 us.
    """
    told = _read("/proc/self/statm")
    return int(told.split()[1]) * _PAGE if told else None


def _read(file: str) -> bytes:
    """Return the beginning of one of this process's files in ``/proc``; b"" if it is not there.

    At a fifth of the time of a ``Path``. It is opened each time: one that was kept open would tell
    a child that was forked of its parent.
    """
    try:
        opened = os.open(file, os.O_RDONLY)
    except OSError:
        return b""
    try:
        return os.read(opened, 8192)
    finally:
        os.close(opened)


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


class Status(NamedTuple):
    """What the kernel says of this process, at one moment; 0 where it is not told."""

    resident: int
    peak: int
    """The high-water mark of that."""
    of_files: int
    """What is resident of mapped files: processes share it, and it can be read again."""


def status() -> Status:
    """Return what the kernel says of this process; some 13 us."""
    told = _read("/proc/self/status")
    return Status(*(_kib_in(told, name) for name in (b"VmRSS:", b"VmHWM:", b"RssFile:")))


def _kib_in(told: bytes, name: bytes) -> int:
    at = told.find(b"\n" + name)
    return int(told[at + 1 + len(name) : told.index(b"kB", at)]) * 1024 if at >= 0 else 0


def _kib(file: str, name: str) -> int:
    return (_field(_text(Path("/proc", file)), name) or 0) * 1024


def own() -> int:
    """Return what this process has for itself: without the files that it maps; 0 if not told."""
    now = status()
    return max(0, now.resident - now.of_files)


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


def family_of(pid: int, besides: Collection[int]) -> int:
    """Return what a process and its descendants have for themselves, without mapped files.

    Of pages that several share each has its part. Those of ``besides`` and theirs do not count.
    """
    text, found = _text(Path(f"/proc/{pid}/smaps_rollup")), 0
    with suppress(OSError):
        # Of each thread, those that it started; see proc_pid_task_children(5).
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, _text(thread / "children").split()):
                found += 0 if child in besides else family_of(child, besides)
    return found + max(0, (_field(text, "Pss:") or 0) - (_field(text, "Pss_File:") or 0)) * 1024


# The machine


class Pool(NamedTuple):
    """Main memory that processes share: the machine's, or what a control group may take of it."""

    name: str
    """The same for all who share it, also from within a container."""
    total: int
    place: Path
    """Where its figures are."""

    @property
    def used(self) -> int:
        """Return the bytes that cannot be had again; what is only cached can."""
        if self.name == MACHINE:
            free = _field(_text(self.place), "MemAvailable:")
            return 0 if free is None else max(0, self.total - free * 1024)
        return _group_used(self.place) or 0


MACHINE = "RAM-machine"
_GROUP = re.compile("RAM-[0-9]+g")


def is_pool(name: str) -> bool:
    """Return whether something that is leased is a pool of main memory, and no card."""
    return name == MACHINE or _GROUP.fullmatch(name) is not None


def pools(root: Path = _ROOT) -> list[Pool]:
    """Return the pools that this process takes its main memory from, each within the one before.

    None where the system does not tell. A control group is known by the number of its directory,
    which containers do not change.
    """
    meminfo, found = root / "proc/meminfo", []
    text = _text(meminfo)
    if (total := _field(text, "MemTotal:")) and _field(text, "MemAvailable:") is not None:
        found.append(Pool(MACHINE, total * 1024, meminfo))
    limits: dict[str, Pool] = {}
    for group in _groups(root):
        allowed = _group_limit(group)
        if allowed is not None and (not found or allowed < found[0].total):
            name = f"RAM-{group.stat().st_ino}g"
            limits.setdefault(name, Pool(name, allowed, group))
    return [*found, *reversed(limits.values())]


def host(root: Path = _ROOT) -> Host:
    """Return what this process may use of the machine, its control groups regarded.

    Args:
        root: where ``proc`` and ``sys`` are.

    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    groups = list(_groups(root))
    quotas = [quota for group in groups if (quota := _quota(group)) is not None]
    rooms = [max(0, pool.total - pool.used) for pool in pools(root)]
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
    found = [each for group in _groups(root) if (each := _group_limit(group)) is not None]
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


def _group_limit(group: Path) -> int | None:
    """Return the bytes that a control group may take; None: it is not limited."""
    for name in ("memory.max", "memory.limit_in_bytes"):
        text = _text(group / name).strip()
        # Version 1 writes no limit as the largest number of whole pages.
        if text.isdecimal() and int(text) < 2**60:
            return int(text)
    return None


def _group_used(group: Path) -> int | None:
    """Return the bytes that a control group has taken, without the files that are only cached.

    Those that are mapped count: programs run from them. What is read often is cached as well, the
    kernel only gives it back later; see "memory.stat" in the kernel's cgroup-v2.rst.
    """
    for usage, *names in (
        ("memory.current", "inactive_file", "active_file", "file_mapped"),
        (
            "memory.usage_in_bytes",
            "total_inactive_file",
            "total_active_file",
            "total_mapped_file",
        ),
    ):
        used = _text(group / usage).strip()
        if used.isdecimal():
            stat = _text(group / "memory.stat")
            unread, read, mapped = (_field(stat, name) or 0 for name in names)
            return max(0, int(used) - max(unread, unread + read - mapped))
    return None


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

"""Who uses a card, as the driver and this process's allocators tell."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpumem.devices import nvml
from pytest_gpumem.devices.allocator import allocators
from pytest_gpumem.devices.cards import driver_reading, find_cards
from pytest_gpumem.devices.nvml import NoDriverError
from pytest_gpumem.tuples import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pytest_gpumem.records import Card

_FIRST_NAMESPACE = "pid:[4026531836]"
"""The machine's own pid namespace: PROC_PID_INIT_INO in Linux's include/linux/proc_ns.h."""


class Usage(NamedTuple):
    """Who uses a card."""

    processes: Mapping[int, int | None]
    """Bytes by pid, None where the driver does not tell; empty where its numbers are not ours."""
    own: int
    """Bytes that this process uses at least: what the driver says, or its allocators reserved."""


def process_bytes(card: Card) -> dict[int, int | None]:
    """Return pid -> bytes as the driver says, None where it does not tell (WSL, MIG, WDDM).

    The pids are the host's; a container may see other numbers than its own.
    """
    try:
        return nvml.processes(card.uuid) if card.kind == "cuda" else {}
    except NoDriverError:
        return {}


def others_bytes(card: Card) -> dict[int, int | None]:
    """Return what ``process_bytes`` does of other processes, if its numbers are those seen here."""
    told = process_bytes(card)
    own = told.pop(os.getpid(), None) is not None
    return told if own or _numbers_are_ours(told) else {}


def own_bytes(card: Card, reserved: int) -> int | None:
    """Return the bytes of ``card`` that this process uses, as the driver says; None if it does not.

    ``reserved`` is what the process's allocator has of it: a smaller figure is that of another
    process, which has the same number in the driver's pid namespace.
    """
    return _own(process_bytes(card), reserved)


def used_bytes(card: Card) -> int:
    """Return the bytes of ``card`` that anybody uses.

    Of unified memory the driver tells only what each process uses.
    """
    reading = driver_reading(card)
    return reading.used if reading else sum(filter(None, process_bytes(card).values()))


def used_by_others(card: Card) -> bool:
    """Return whether another process is on ``card``, as far as the driver tells."""
    return bool(set(process_bytes(card)) - {os.getpid()})


class OwnUsage(NamedTuple):
    """What this process's allocators have of a card, in bytes."""

    allocated: int
    reserved: int


def held(card: Card) -> OwnUsage:
    """Return what this process's allocators have of ``card``."""
    found = [
        reading
        for allocator in allocators()
        for index, reading in enumerate(allocator.read())
        if allocator.card(index).uuid == card.uuid
    ]
    return OwnUsage(sum(each.allocated for each in found), sum(each.reserved for each in found))


def totals() -> tuple[int, int | None]:
    """Return bytes allocated in this process and used on all cards, None if a card is silent."""
    allocated = sum(each.allocated for one in allocators() for each in one.read())
    used = [reading and reading.used for reading in map(driver_reading, find_cards().cards)]
    told = [each for each in used if each is not None]
    return allocated, sum(told) if told and len(told) == len(used) else None


def usage(card: Card) -> Usage:
    """Return who uses ``card``; the driver's answer takes milliseconds."""
    told = process_bytes(card)
    reserved = held(card).reserved
    own = _own(told, reserved)
    if own is None:
        ours = _numbers_are_ours(told)
        told = {pid: size for pid, size in told.items() if ours and pid != os.getpid()}
    return Usage(told, own or reserved)


def _own(told: Mapping[int, int | None], reserved: int) -> int | None:
    own = told.get(os.getpid())
    return own if own and own >= reserved and _numbers_are_ours(told) else None


def _numbers_are_ours(pids: Iterable[int]) -> bool:
    """Return whether the driver, which listed ``pids``, numbers processes as this one sees them.

    Known in the machine's own pid namespace. Elsewhere some drivers tell the machine's numbers
    and some the container's: then it is taken for so if there is a process of each number.
    """
    if not sys.platform.startswith("linux"):
        return True
    try:
        if str(Path("/proc/self/ns/pid").readlink()) == _FIRST_NAMESPACE:
            return True
    except OSError:
        pass
    return all(map(_exists, pids))


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True

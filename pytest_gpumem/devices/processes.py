"""Who is on a card: the processes of the driver's list, with their commands."""

from __future__ import annotations

import os
from pathlib import Path

from pytest_gpumem.devices.users import process_bytes
from pytest_gpumem.records import Card, Process

_LENGTH = 60


def others(card: Card) -> list[Process]:
    """Return the other processes on ``card``, the largest first.

    None where this one is not on the driver's list: in a container its pids are the host's, and a
    number may be anybody here, or this process itself.
    """
    told = process_bytes(card)
    if told.pop(os.getpid(), -1) == -1:
        return []
    found = [Process(pid, command(pid), size) for pid, size in told.items()]
    return sorted(found, key=lambda each: -(each.size or 0))


def command(pid: int) -> str:
    """Return the command line of a process, cut to 60 characters; "" where it is not told."""
    try:
        told = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # another system, another namespace, or it has ended
        return ""
    text = " ".join(told.decode(errors="replace").replace("\0", " ").split())
    return text if len(text) <= _LENGTH else f"{text[:_LENGTH]}..."

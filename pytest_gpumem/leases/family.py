"""Who descends from whom. A process is known by its number and the moment at which it began."""

from __future__ import annotations

import os
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpumem.devices.family import is_stopped, lineage, seconds_of_sleeper
from pytest_gpumem.errors import LeaseError
from pytest_gpumem.files import read_own
from pytest_gpumem.leases.entries import pid_of
from pytest_gpumem.leases.place import make_own, run_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from pytest_gpumem.devices.book import Book

    Kin = Mapping[str, Collection[str]]
    """Ancestors among some processes, by process; those that have none are left out."""

__all__ = ["Families", "books", "kin_among", "lineage", "new_book"]
_TRIES = 10
_MOST = 2**16
"""Bytes that a process may tell of itself."""


class Families:
    """What the processes of a ledger told of themselves, each in its file of ``alive``."""

    def __init__(self, alive: Path, own: str) -> None:
        self._alive = alive
        self._own = own
        self._lineages: dict[str, tuple[str, ...]] = {}
        self._kin: tuple[Collection[str], Kin] = ((), {})
        """The answer to the last question: it is the same as long as nobody comes or goes."""

    def lineage(self, process: str) -> tuple[str, ...]:
        """Return what a process said of itself and its ancestors, closest first; () if nothing."""
        known = self._lineages.get(process)
        if known is None:
            about = self._about(process)
            known = tuple(about[0].split()) if about else ()
            if known:
                self._lineages[process] = known
        return known

    def kin(self, processes: Collection[str]) -> Kin:
        """Return who of ``processes``, and this one, which may be about to ask, is whose child."""
        processes = {*processes, self._own}
        if len(processes) < 2:
            return {}
        if processes != self._kin[0]:
            self._kin = processes, kin_among(processes, self.lineage)
        return self._kin[1]

    def ancestors(self) -> Mapping[str, int | None]:
        """Return the processes that started this one and take part, outermost first.

        With each comes the number of its file that leads to the terminal, if it has one.
        """
        own = self.lineage(self._own)
        found = {}
        for process in os.listdir(self._alive):  # noqa: PTH208  # iterdir is slower
            line = self.lineage(process)
            if line and line[0] in own[1:]:
                found[line[0]] = self._about(process)
        return {each: _terminal(found[each]) for each in reversed(own) if each in found}

    def is_kin(self, pid: int, roots: Collection[str]) -> bool:
        """Return whether a process started this one, or one of ``roots`` started it."""
        line = lineage(pid)
        return bool(line) and (
            line[0] in self.lineage(self._own) or not set(line).isdisjoint(roots)
        )

    def starters(self, pids: Collection[int], taking_part: Collection[str]) -> dict[int, str]:
        """Return which of the processes ``taking_part`` started which of ``pids``.

        Of those that are no kin of this process, see ``is_kin``.
        """
        born = {"".join(self.lineage(each)[:1]): each for each in taking_part}
        roots, found = self.roots(), {}
        for pid in pids:
            line = lineage(pid)
            starter = next((each for each in line[1:] if each in born), None)
            if starter is not None and starter not in roots:
                found[pid] = born[starter]
        return found

    def roots(self) -> Collection[str]:
        """Return this process and those that started it and take part, as ``lineage`` does."""
        return {*self.lineage(self._own)[:1], *self.ancestors()}

    def worker(self, process: str) -> str:
        """Return which worker of a run of pytest a process said that it is; "" if none."""
        return "".join(self._about(process)[2:3])

    def is_stopped(self, process: str) -> bool:
        """Return whether a process is stopped, as far as it can be seen from here."""
        return self.is_here(process) and is_stopped(pid_of(process))

    def seconds_of_sleeper(self, process: str) -> float | None:
        """Return the CPU seconds of a process that sleeps and whose children do; else None."""
        return seconds_of_sleeper(pid_of(process)) if self.is_here(process) else None

    def is_sibling(self, process: str) -> bool:
        """Return whether a process has the same parent as this one."""
        parent = self.lineage(self._own)[1:2]
        return bool(parent) and self.lineage(process)[1:2] == parent

    def is_here(self, process: str) -> bool:
        """Return whether a process has its number here: one of another container may not."""
        born = self.lineage(process)[:1]
        return bool(born) and lineage(pid_of(process))[:1] == born

    def _about(self, process: str) -> list[str]:
        """Return the lines in which a process told of itself: its lineage, and its terminal."""
        try:
            return read_own(f"{self._alive}/{process}", _MOST).decode(errors="replace").splitlines()
        except OSError:
            return []


def books() -> Path:
    """Return where the books of families lie, beside the leases: any process of the user finds it.

    Raises:
        LeaseError: when GPUMEM_RUN_DIR is not absolute.

    """
    return run_directory() / "families"


def new_book(context: int) -> Book:
    """Return a book in which what this process starts tells what it holds.

    ``context`` is the bytes that a process is taken to cost.

    Raises:
        LeaseError: when GPUMEM_RUN_DIR is not absolute, or the directory is removed at once.
        OSError: when it cannot be written.

    """
    from pytest_gpumem.devices.book import Book

    directory = books()
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):  # whoever ends takes an empty directory out
            make_own(directory.parent)
            return Book.create(directory, context)
    raise LeaseError(f"{directory} is removed again and again")


def kin_among(processes: Collection[str], lineage: Callable[[str], tuple[str, ...]]) -> Kin:
    """Return who of ``processes`` descends from whom, by what each said of its lineage."""
    lines = {process: lineage(process) for process in processes}
    known: defaultdict[str, list[str]] = defaultdict(list)
    for process, line in lines.items():
        known["".join(line[:1])].append(process)
    found = {
        process: {each for one in line[1:] if one in known for each in known[one]}
        for process, line in lines.items()
    }
    return {process: each for process, each in found.items() if each}


def _terminal(about: Sequence[str]) -> int | None:
    told = about[1] if len(about) > 1 else ""
    return int(told) if told.isdecimal() and len(told) < 10 else None

"""The processes that take part in a ledger: each keeps a locked file, which ends with it."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from pytest_gpumem.leases import family, notices
from pytest_gpumem.leases.entries import is_process
from pytest_gpumem.leases.locks import FileLock, Watch, is_held
from pytest_gpumem.leases.place import is_plain

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


class Alive:
    """The files of processes in ``folder``; ``process`` is this one's name."""

    def __init__(self, folder: Path, process: str) -> None:
        self.folder = folder
        self.process = process
        self.family = family.Families(folder, process)

    def lock(self) -> FileLock:
        """Return what shows that this process lives, to be acquired."""
        return FileLock(self.folder / self.process)

    def tell(self, file: FileLock) -> None:
        """Let this process's file say from whom it descends, where its terminal is, its worker."""
        own, terminal = " ".join(family.lineage(os.getpid())), notices.terminal()
        worker = os.environ.get("PYTEST_XDIST_WORKER", "")
        with suppress(OSError):  # a full disk costs what is told, not the lease
            file.write(f"{own}\n{'' if terminal is None else terminal}\n{worker}\n")

    def heirs(self) -> list[int]:
        """Return the other processes that have this one's lock too, as far as the system tells."""
        pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]  # noqa: PTH208  # as strange
        return [pid for pid in pids if pid != os.getpid() and self._is_inherited_by(pid)]

    def _is_inherited_by(self, pid: int) -> bool:
        own = f"{self.folder}/{self.process}"
        try:
            files = [f"/proc/{pid}/fd/{name}" for name in os.listdir(f"/proc/{pid}/fd")]  # noqa: PTH208  # as strange
            return any(os.readlink(file) == own for file in files)  # noqa: PTH115  # a Path takes longer
        except OSError:  # another user's, or it ends
            return False

    def others(self) -> set[str]:
        """Return the names of the files of others, also of what is no process's."""
        return {each.name for each in self.folder.iterdir()} - {self.process}

    def nudge(self, process: str) -> bool:
        """Wake a process that watches; False when it is gone."""
        try:
            os.utime(f"{self.folder}/{process}")
        except FileNotFoundError:
            return False
        return True

    def watch(self) -> Watch:
        """Return what waits for a nudge to this process or the end of any."""
        return Watch(self.folder / self.process, self.folder)

    def seem_dead(self, processes: Iterable[str]) -> list[str]:
        """Return those of ``processes`` that do not hold the locks of their files."""
        return [each for each in processes if not is_held(f"{self.folder}/{each}")]

    def remove(self, process: str) -> None:
        """Take away the file of a process, if it is one."""
        if self._is_one(process):
            (self.folder / process).unlink(missing_ok=True)

    def strange(self) -> list[str]:
        """Return the names of what is no process's."""
        names = sorted(os.listdir(self.folder))  # noqa: PTH208  # iterdir is slower
        # A process may end meanwhile.
        there = (name for name in names if not self._is_one(name))
        return [name for name in there if os.path.lexists(f"{self.folder}/{name}")]

    def _is_one(self, name: str) -> bool:
        """Return whether a file is one by which a process shows that it lives."""
        return is_process(name) and is_plain(f"{self.folder}/{name}")

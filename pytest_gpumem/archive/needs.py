"""Which entries of a store sleeping models need: a file for each, locked by the model's process."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from typing import TYPE_CHECKING

from pytest_gpumem import files
from pytest_gpumem.archive import disk
from pytest_gpumem.archive.disk import explained

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_MARK = re.compile("[0-9a-f]{16}[.][0-9a-f]{8}")


class Needs:
    """Marks entries as needed, and knows which are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def mark(self, name: str) -> Callable[[], None]:
        """Mark an entry as needed until the returned function is called, or this process ends.

        The kernel holds the mark, for children too that are forked meanwhile.
        """
        import fcntl

        path = self.folder / f"{name}.{secrets.token_hex(4)}"
        file = files.open_own(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        fcntl.flock(file, fcntl.LOCK_SH)
        owner = os.getpid()

        def end() -> None:
            # A forked child shares the mark, and must not end its parent's.
            if os.getpid() == owner:
                with contextlib.suppress(OSError):  # who next has the store alone removes it
                    path.unlink()
            os.close(file)

        return end

    def names(self, *, tidy: bool = False) -> set[str]:
        """Return the ids of the entries that are needed.

        ``tidy`` removes the marks of processes that ended; for who has the store alone.

        Raises:
            DiskError: the system would not look at the marks.

        """
        found = set()
        with explained("look at", self.folder):
            for mark in self._marks():
                if _is_held(self.folder / mark):
                    found.add(mark.partition(".")[0])
                elif tidy:
                    (self.folder / mark).unlink(missing_ok=True)
        return found

    def foreign(self) -> list[str]:
        """Return the names of what is no mark."""
        return disk.foreign(self.folder, _is_mark)

    def _marks(self) -> set[str]:
        return {each.name for each in disk.listed(self.folder) if _is_mark(each)}


def _is_mark(found: os.DirEntry[str]) -> bool:
    return bool(_MARK.fullmatch(found.name)) and found.is_file(follow_symlinks=False)


def _is_held(path: Path) -> bool:
    """Return whether whoever made a mark is alive."""
    import fcntl

    try:
        file = files.open_own(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False

"""The states of a store: one file for each different one, named by its keyed content hash."""

from __future__ import annotations

import re
import threading
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from pytest_gpumem.archive import disk, file
from pytest_gpumem.archive.disk import explained
from pytest_gpumem.errors import DamagedError, DiskError, QuotaError
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Generator, Iterable
    from pathlib import Path

    from pytest_gpumem.archive.catalogue import Catalogue, Entry

_CONTENT = re.compile("[0-9a-f]{64}")


class States:
    """Writes, reads and removes states, and knows what they take on the disk."""

    def __init__(self, folder: Path, secret: bytes, quota: int | None) -> None:
        self.folder = folder
        self.quota = quota
        self._secret = secret
        self._mutex = threading.Lock()
        self._sizes: dict[str, int] = {}
        self._sizes_at: int | None = None

    def has(self, content: str) -> bool:
        """Return whether a state is there and every byte of it is what was written.

        It is read each time: whoever puts a state may free the memory that it came from.
        """
        try:
            path = self.folder / content
            with closing(file.Reader(path, self._secret, content, direct=True)) as reader:
                reader.authenticate()
        except (FileNotFoundError, DamagedError):
            return False
        return True

    def holds(self, content: str) -> bool:
        """Return whether there is a file of a state, whatever is in it."""
        with explained("look at", self.folder):
            return (self.folder / content).exists()

    def write(self, packed: file.Packed, content: str) -> None:
        """Write a state and read it back.

        Raises:
            QuotaError: there is no room.
            InUseError: it was changed since it was hashed.
            OSError: the system would not.

        """
        used = self.used() if self.quota is not None else 0
        if self.quota is not None and used >= self.quota:
            raise self._full(used, 0)
        new = disk.NewFile(self.folder / content)
        try:
            file.write_and_read_back(new, self._secret, packed, content)
            if self.quota is not None and used + new.size > self.quota:
                raise self._full(used, new.size)
            new.publish()
        finally:
            new.close()
        if self.quota is not None:
            with self._mutex:
                self._sizes[content] = new.size
                self._sizes_at = self.folder.stat().st_mtime_ns

    def _full(self, used: int, more: int) -> QuotaError:
        return QuotaError(
            f"the store {str(self.folder.parent)!r} is full: {format_bytes(used)} used and "
            f"{format_bytes(more)} to be written, allowed are {format_bytes(self.quota or 0)}; "
            "forget() makes room"
        )

    def used(self) -> int:
        """Return the bytes of all states; others who write at this moment may be missed."""
        with self._mutex:
            changed = self.folder.stat().st_mtime_ns
            if changed != self._sizes_at:
                names = self.names()
                known = {name: size for name, size in self._sizes.items() if name in names}
                self._sizes = known | self.sizes(names - set(known))
                self._sizes_at = changed
            return sum(self._sizes.values())

    def names(self) -> set[str]:
        """Return the contents of all states."""
        return {each.name for each in disk.listed(self.folder) if _is_state(each)}

    def sizes(self, contents: Iterable[str]) -> dict[str, int]:
        """Return the bytes of the states' files; 0 for one that is missing."""
        found = {}
        with explained("look at", self.folder):
            for content in set(contents):
                try:
                    found[content] = (self.folder / content).lstat().st_size
                except FileNotFoundError:
                    found[content] = 0
        return found

    def reader(self, content: str) -> file.Reader:
        """Return what reads a state.

        Raises:
            OSError: the system would not read it, or something else is in its place.
            DamagedError: it is not what was written.

        """
        return file.Reader(self.folder / content, self._secret, content)

    def remove_all_but(self, wanted: Collection[str]) -> set[str]:
        """Remove the states that nobody wants and return them."""
        orphans = self.names() - set(wanted)
        for each in orphans:
            (self.folder / each).unlink(missing_ok=True)
        if orphans:
            disk.sync_directory(self.folder)
        return orphans

    def foreign(self) -> list[str]:
        """Return the names of what is no state."""
        return disk.foreign(self.folder, _is_state)


def _is_state(found: os.DirEntry[str]) -> bool:
    return bool(_CONTENT.fullmatch(found.name)) and found.is_file(follow_symlinks=False)


@contextmanager
def reading(
    states: States, catalogue: Catalogue, entry: Entry
) -> Generator[file.Reader, None, None]:
    """Yield a reader of the state of an entry.

    Raises:
        NotFoundError: somebody removed the entry meanwhile.
        DamagedError, DiskError: the state cannot be read; says whose it is.

    """
    try:
        with (
            explained("read", states.folder / entry.content),
            closing(states.reader(entry.content)) as reader,
        ):
            yield reader
    except DiskError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        catalogue.read(entry.id)
        raise DamagedError(f"the state of {entry.id} is missing") from None
    except DamagedError as error:
        told = f"the state {entry.id} cannot be restored: {error}"
        raise type(error)(told) from None

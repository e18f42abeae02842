"""The directory of a store, opened: its parts, and the lock of those who change them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from pytest_gpumem import files
from pytest_gpumem.archive import vault
from pytest_gpumem.archive.anchors import Anchors
from pytest_gpumem.archive.catalogue import Catalogue
from pytest_gpumem.archive.disk import explained, locked
from pytest_gpumem.archive.needs import Needs
from pytest_gpumem.archive.states import States, reading
from pytest_gpumem.errors import DamagedError

if TYPE_CHECKING:
    from collections.abc import Generator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from pytest_gpumem.archive import file, keys
    from pytest_gpumem.archive.catalogue import Entry


class Place:
    """What lies where in the directory ``path``; it is made where there is none.

    Raises:
        WrongKeyError, DamagedError: none of the keys ``roots`` opens it.
        DiskError: the directory cannot be used.

    """

    def __init__(self, path: Path, roots: keys.Keys, quota: int | None) -> None:
        self.path = path
        self.vault = vault.Vault(path, roots)
        self.secret = self._open()
        self.states = States(path / "states", self.secret, quota)
        self.catalogue = Catalogue(path / "entries", self.secret)
        self.anchors = Anchors(path, self.secret)
        self.needs = Needs(path / "asleep")

    def _open(self) -> bytes:
        with explained("open the store", self.path):
            # Without the lock first: a writer may have it for as long as its state is large.
            found = self.vault.open()
            if found is None:
                with self.locked(alone=True):
                    found = self.vault.open()
                    if found is None:
                        if any((self.path / "states").iterdir()):
                            raise DamagedError(
                                f"the store {str(self.path)!r} has lost its key files"
                            )
                        found = self.vault.begin()
        return found

    @contextlib.contextmanager
    def locked(self, *, alone: bool, wait: bool = True) -> Generator[bool, None, None]:
        """Hold the store's lock; yield whether it was to be had."""
        with locked(self.path / vault.LOCK, alone=alone, wait=wait) as had:
            make_directories(self.path)
            yield had

    def reading(self, name: str) -> AbstractContextManager[file.Reader]:
        """Return what yields a reader of the state of an id, see ``states.reading``."""
        return reading(self.states, self.catalogue, self.entry(name))

    def entry(self, name: str) -> Entry:
        """Return the entry of an id, see ``Catalogue.read``."""
        return self.catalogue.read(name)


def make_directories(path: Path) -> None:
    """Make the directories of a store, or make sure that they are its own.

    Raises:
        DiskError: they are not, or the system would not.

    """
    # Nobody else may change what lies in them, and what is removed there must be ours.
    with explained("use the store", path):
        files.own_directory(path, follow=True)
        for name in ("states", "entries", "asleep"):
            files.own_directory(path / name)

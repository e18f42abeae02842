"""The entries of a store: one small sealed file for each time that a state was put."""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pytest_gpumem import files
from pytest_gpumem.archive import arguments, disk, sealing, tree
from pytest_gpumem.archive.disk import explained
from pytest_gpumem.errors import (
    ArchiveError,
    DamagedError,
    DiskError,
    NotFoundError,
    StateRefusedError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

_ID = re.compile("[0-9a-f]{16}")
MOST: Final = 16 * 2**20
"""Bytes of an entry, its metadata included."""
_SETTLED = 50_000_000
"""Nanoseconds after which a change of a directory is sure to show in its time stamp."""


class Entry(NamedTuple):
    """One state that was put into the store."""

    id: str
    type: str
    context: str
    tags: tuple[str, ...]
    metadata: dict[str, Any]
    created: float
    """Seconds since the epoch."""
    content: str
    """Names the state: entries with the same content share it."""
    size: int
    """Bytes of the state's tensors."""
    tensors: int


class Wanted(NamedTuple):
    """What an entry must be, see ``ArchiveStore.find``; None: anything."""

    type: str | None = None
    context: str | None = None
    tag: str | None = None
    since: float | None = None
    until: float | None = None
    content: str | None = None

    def holds(self, entry: Entry) -> bool:
        """Return whether an entry is so."""
        return (
            (self.type is None or entry.type == self.type)
            and (self.context is None or entry.context == self.context)
            and (self.tag is None or self.tag in entry.tags)
            and (self.since is None or entry.created >= self.since)
            and (self.until is None or entry.created < self.until)
            and (self.content is None or entry.content == self.content)
        )


class Stats(NamedTuple):
    """What a store, or one context of it, holds; sizes in bytes."""

    entries: int
    states: int
    size: int
    """Of the different states, unpacked."""
    stored: int
    """Of the files they take."""


class Catalogue:
    """Reads and writes entries, and keeps what it has read."""

    def __init__(self, folder: Path, secret: bytes) -> None:
        self.folder = folder
        self._secret = secret
        self._mutex = threading.Lock()
        self._known: dict[str, Entry] = {}
        self.broken: dict[str, str] = {}
        """Why entries cannot be read, by id."""
        self._seen: int | None = None

    def new(self) -> tuple[str, disk.NewFile]:
        """Return the id of a new entry and the file that will be it."""
        name = secrets.token_hex(8)
        return name, disk.NewFile(self.folder / name)

    def publish(self, new: disk.NewFile, entry: Entry, metadata: Any) -> None:
        """Let everybody see an entry; ``metadata`` is the node of its own.

        Raises:
            StateRefusedError: it is too large.

        """
        text = json.dumps(entry._asdict() | {"metadata": metadata}).encode()
        sealed = sealing.close_whole(self._secret, sealing.ENTRY, text)
        if len(sealed) > MOST:
            raise StateRefusedError(
                f"cannot archive the metadata: they take {len(sealed)} bytes; allowed are {MOST}"
            )
        new.fill(sealed)
        new.finish()
        new.publish()
        with self._mutex:
            self._known[entry.id] = entry

    def read(self, name: str) -> Entry:
        """Return the entry of an id.

        Raises:
            NotFoundError: there is none.
            DamagedError: it is not what was written.
            DiskError: the system would not read it, or something else is in its place.

        """
        if not (isinstance(name, str) and _ID.fullmatch(name)):
            raise NotFoundError(
                f"{arguments.shown(name)} is not an id: those are 16 hexadecimal digits"
            )
        path = self.folder / name
        try:
            with explained("read", path):
                sealed = files.read_own(path, MOST)
        except DiskError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise NotFoundError(f"there is no {name} in {str(self.folder.parent)!r}") from None
            raise
        try:
            body = json.loads(sealing.open_whole(self._secret, sealing.ENTRY, sealed))
            body["metadata"] = tree.plain(body["metadata"])
            body["tags"] = tuple(body["tags"])
            entry = Entry(**body)
        except DamagedError as error:
            raise type(error)(f"the entry {name} cannot be read: {error}") from None
        if entry.id != name:
            raise DamagedError(f"the entry {name} is that of {entry.id}")
        return entry

    def entries(self) -> list[Entry]:
        """Return all entries, oldest first; why others cannot be read is in ``broken``."""
        with explained("list", self.folder), self._mutex:
            changed = self.folder.stat().st_mtime_ns
            if self._seen != changed:
                names = self._names()
                # A change in the same tick of the clock as this one would not show.
                settled = time.time_ns() - changed > _SETTLED
                self.broken = {}
                for gone in set(self._known) - names:
                    self._known.pop(gone, None)
                for new in names - set(self._known):
                    try:
                        self._known[new] = self.read(new)
                    except NotFoundError:
                        continue
                    except ArchiveError as error:
                        self.broken[new] = str(error)
                        # What the system would not read now it may the next time.
                        settled = settled and not isinstance(error, DiskError)
                self._seen = changed if settled else None
            return sorted(self._known.values(), key=lambda entry: (entry.created, entry.id))

    def holds(self, name: str) -> bool:
        """Return whether an entry is there now."""
        return os.path.lexists(self.folder / name)

    def remove(self, names: Iterable[str]) -> None:
        """Remove entries; what is no file there stays."""
        for each in names:
            (self.folder / each).unlink(missing_ok=True)
        disk.sync_directory(self.folder)

    def foreign(self) -> list[str]:
        """Return the names of what is no entry."""
        return disk.foreign(self.folder, _may_be_entry)

    def _names(self) -> set[str]:
        """Return the ids, also of what is no file and may stand in the place of an entry."""
        return {each.name for each in disk.listed(self.folder) if _may_be_entry(each)}


def _may_be_entry(found: os.DirEntry[str]) -> bool:
    return _ID.fullmatch(found.name) is not None


def stats_of(entries: Sequence[Entry], sizes: Mapping[str, int]) -> dict[str | None, Stats]:
    """Return what each context holds, and under ``None`` what all do.

    ``sizes`` are the bytes of the states' files, by content.
    """
    found: dict[str | None, Stats] = {}
    for context in (None, *sorted({entry.context for entry in entries})):
        mine = [entry for entry in entries if context is None or entry.context == context]
        states = {entry.content: entry.size for entry in mine}
        stored = sum(sizes[content] for content in states)
        found[context] = Stats(len(mine), len(states), sum(states.values()), stored)
    return found

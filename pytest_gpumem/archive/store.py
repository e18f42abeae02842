"""A directory of archived states that any number of processes use at once.

``key``     the store's secret, sealed under a root key; ``key-copy`` is a second one
``states/`` one file for each different state, named by its keyed content hash
``entries/`` one small file for each time a state was put: its type, context, tags and time
``asleep/`` a lock for each entry that a sleeping model will need; it ends with the process
``lock``    writers share it; who removes something has it alone

A state is written before its first entry and removed after its last, so at every moment an entry
that can be seen leads to a state that is whole. There is no catalogue that could be wrong: what
the directory holds is what there is. Every process keeps the entries it has read.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pytest_gpumem.archive import disk, file, keys, sealing, tree
from pytest_gpumem.archive.disk import TEMPORARY, explained, locked
from pytest_gpumem.errors import (
    ArchiveError,
    DamagedError,
    DiskError,
    InUseError,
    KeyRefusedError,
    NotFoundError,
    QuotaError,
    StateRefusedError,
)
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

DIRECTORY_VARIABLE: Final = "GPUMEM_ARCHIVE"
_KEYS = ("key", "key-copy")
_SETTLED = 50_000_000
"""Nanoseconds after which a change of a directory is sure to show in its time stamp."""


def default_directory() -> Path:
    """Return the store's directory: ``$GPUMEM_ARCHIVE``, or one in the user's data directory."""
    named = os.environ.get(DIRECTORY_VARIABLE)
    if named:
        return Path(named)
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "gpumem" / "archive"


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


class TensorShown(NamedTuple):
    """A tensor of a state, without its content."""

    path: str
    dtype: str
    shape: tuple[int, ...]


class Forgotten(NamedTuple):
    """What ``forget`` did."""

    decayed: int
    """Entries that the rule no longer keeps; they are gone."""
    removed: int
    """States removed with them: those that no other entry has."""
    freed: int
    """Bytes on the disk."""


class Stats(NamedTuple):
    """What a store, or one context of it, holds; sizes in bytes."""

    entries: int
    states: int
    size: int
    """Of the different states, unpacked."""
    stored: int
    """Of the files they take."""


class Problem(NamedTuple):
    """Something wrong in a store."""

    name: str
    """An id, or the name of a file."""
    what: str


class Health(NamedTuple):
    """How a store is."""

    score: float
    """1: all well. Falls to 0 as the last fifth of the quota fills, and as entries are broken."""
    fill: float
    """Part of the quota, or without one of the disk, that is used."""
    problems: tuple[Problem, ...]


class ArchiveStore:
    """Keeps states of tensors and plain values, encrypted, compressed, each different one once.

    Args:
        path: its directory, made if it is not there; None: see ``default_directory``.
        key: see ``keys.find``.
        quota: most bytes that the states' files may take; None: no limit.

    Raises:
        KeyRefusedError, WrongKeyError: there is no key that opens it.
        DiskError: the directory cannot be used.

    """

    def __init__(
        self,
        path: Path | str | None = None,
        *,
        key: bytes | str | Path | Callable[[], bytes | str] | None = None,
        quota: int | None = None,
    ) -> None:
        self.path = Path(path) if path is not None else default_directory()
        self.quota = quota
        self._states, self._entries = self.path / "states", self.path / "entries"
        self._mutex = threading.Lock()
        self._known: dict[str, Entry] = {}
        self._broken: dict[str, str] = {}
        self._seen: int | None = None
        self._sizes: dict[str, int] = {}
        self._sizes_at: int | None = None
        with explained("use the store", self.path):
            for each in (self.path, self._states, self._entries):
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.keys = keys.find(key)
        self._secret = self._open()
        self._sweep()

    def __repr__(self) -> str:
        return f"ArchiveStore({str(self.path)!r})"

    # The secret

    def _open(self) -> bytes:
        with explained("open the store", self.path):
            # Without the lock first: a writer may have it for as long as its state is large.
            sealed = self._sealed()
            if not sealed:
                with self._locked(alone=True):
                    sealed = self._sealed()
                    if not sealed:
                        return self._begin()
        failure = DamagedError("")
        for each in sealed:
            for root in self.keys.keys:
                try:
                    return sealing.open_whole(root, sealing.KEY, each)
                except DamagedError as error:
                    failure = error
        raise type(failure)(
            f"the key of {self.keys.source} does not open the store {str(self.path)!r}: {failure}"
        )

    def _sealed(self) -> list[bytes]:
        paths = [self.path / name for name in _KEYS]
        return [disk.read_small(path) for path in paths if path.is_file()]

    def _begin(self) -> bytes:
        """Make the secret of a new store."""
        if next(self._states.iterdir(), None) is not None:
            raise DamagedError(f"the store {str(self.path)!r} has lost its key files")
        secret = secrets.token_bytes(32)
        self._seal(secret, self.keys.keys[0])
        return secret

    def _seal(self, secret: bytes, root: bytes) -> None:
        for name in _KEYS:
            disk.write_small(self.path / name, sealing.close_whole(root, sealing.KEY, secret))

    def rotate(self, key: bytes | str | Path | Callable[[], bytes | str] | None = None) -> None:
        """Seal the store under another root key; archives stay as they are.

        Without ``key`` a new one is put before those of the key file in use.

        Raises:
            KeyRefusedError: the keys in use come from no file, and no new one is given.

        """
        if key is not None:
            new = keys.find(key)
        elif self.keys.file is not None:
            new = keys.add(self.keys.file)
        else:
            raise KeyRefusedError(f"the key comes from {self.keys.source}: a new one must be given")
        with explained("rotate the key of", self.path), self._locked(alone=True):
            self._seal(self._secret, new.keys[0])
        self.keys = new

    # Putting

    def put(
        self,
        state: Any,
        *,
        type: str = "state",  # noqa: A002  # the word of the plan and of the command
        context: str = "",
        tags: Iterable[str] = (),
        metadata: dict[str, Any] | None = None,
    ) -> str:
        """Archive ``state`` and return its id; it can be got by any process from here on.

        When this returns the state is on the disk and was read back. A state that the store has
        already is not written again.

        Args:
            state: dicts, lists and tuples of tensors and plain values.
            type: what kind of state it is, such as ``sentence_transformer``.
            context: what it was put for, such as the name of a test.
            tags: words to find it by.
            metadata: plain values to keep with it.

        Raises:
            StateRefusedError: part of it could not be restored bit for bit.
            QuotaError: there is no room.
            DiskError: the system would not write.

        """
        packed = file.Packed(state)
        described = file.Packed([type, context, [*tags], metadata or {}])
        if described.parts.records:
            raise StateRefusedError("cannot archive the metadata: it holds tensors")
        entry = Entry(
            id=secrets.token_hex(8),
            type=type,
            context=context,
            tags=tuple(tags),
            metadata=metadata or {},
            created=time.time(),
            content=packed.fingerprint(self._secret),
            size=packed.parts.size,
            tensors=len(packed.parts.records),
        )
        body = entry._asdict() | {"metadata": described.parts.tree[4]}
        with explained("write", self._states / entry.content), self._locked(alone=False):
            # Made first: if we die with the state written and no entry, it tells the next start.
            new = disk.NewFile(self._entries / entry.id)
            done = False
            try:
                if not self._has(entry.content):
                    self._write(packed, entry.content)
                text = json.dumps(body).encode()
                sealed = sealing.close_whole(self._secret, sealing.ENTRY, text)
                new.take(len(sealed))[:] = sealed
                new.finish()
                new.publish()
                done = True
            finally:
                # The same for an error.
                new.close(keep=not done and (self._states / entry.content).exists())
        with self._mutex:
            self._known[entry.id] = entry
        return entry.id

    def put_many(self, items: Iterable[dict[str, Any]]) -> list[str | ArchiveError]:
        """Archive each item and return, in order, its id or why it was refused.

        An item has ``data``, the state, and may have the other arguments of ``put``.
        """
        found: list[str | ArchiveError] = []
        for item in items:
            try:
                if not isinstance(item, dict) or "data" not in item:
                    raise StateRefusedError("cannot archive an item without 'data'")
                more = {name: value for name, value in item.items() if name != "data"}
                if unknown := sorted(set(more) - {"type", "context", "tags", "metadata"}):
                    raise StateRefusedError(f"cannot archive an item with {unknown[0]!r}")
                found.append(self.put(item["data"], **more))
            except ArchiveError as error:
                found.append(error)
        return found

    def _has(self, content: str) -> bool:
        """Return whether a state is there and every byte of it is what was written.

        It is read each time: whoever puts a state may free the memory it came from.
        """
        path = self._states / content
        if path.exists():
            with contextlib.suppress(DamagedError):
                self._read_back(path, content)
                return True
        return False

    def _read_back(self, path: Path, content: str) -> None:
        reader = file.Reader(path, self._secret, content, direct=True)
        try:
            reader.authenticate()
        finally:
            reader.close()

    def _write(self, packed: file.Packed, content: str) -> None:
        used = self._used() if self.quota is not None else 0
        if self.quota is not None and used >= self.quota:
            raise self._full(used, 0)
        new = disk.NewFile(self._states / content)
        try:
            file.write(new, self._secret, packed, lambda _: None, content)
            self._read_back(new.aside, content)
            if self.quota is not None and used + new.size > self.quota:
                raise self._full(used, new.size)
            new.publish()
        finally:
            new.close()
        if self.quota is not None:
            self._sizes[content] = new.size
            self._sizes_at = self._states.stat().st_mtime_ns

    def _full(self, used: int, more: int) -> QuotaError:
        return QuotaError(
            f"the store {str(self.path)!r} is full: {format_bytes(used)} used and "
            f"{format_bytes(more)} to be written, allowed are {format_bytes(self.quota or 0)}; "
            "forget() makes room"
        )

    def _used(self) -> int:
        """Return the bytes of all states; others who write at this moment may be missed."""
        changed = self._states.stat().st_mtime_ns
        if changed != self._sizes_at:
            found = {}
            for each in self._listed(self._states):
                with contextlib.suppress(FileNotFoundError):
                    known = self._sizes.get(each)
                    size = (self._states / each).stat().st_size if known is None else known
                    found[each] = size
            self._sizes, self._sizes_at = found, changed
        return sum(self._sizes.values())

    # Getting

    def get(
        self,
        id: str,  # noqa: A002  # what put returned
        into: Any = None,
        device: str = "cpu",
        at: Hashable | Sequence[Hashable] = (),
    ) -> Any:
        """Return the state of an id, in new memory on ``device`` or in the tensors of ``into``.

        Args:
            id: what ``put`` returned.
            into: something built like the state. Its tensors are filled, after everything was
                authenticated; on any error before that they stay as they were.
            device: where new tensors are made.
            at: a key, or a list of keys and indexes, that leads to the part that is wanted; only
                that is read.

        Raises:
            NotFoundError: there is no such id, or ``at`` leads nowhere.
            MismatchError: ``into`` is not built like the state.
            DamagedError: it is not what was written.
            DiskError: the system would not read.

        """
        path = at if isinstance(at, (list, tuple)) else (at,)
        reader = self._reader(self.entry(id))
        try:
            with explained("read", self._states):
                if into is None:
                    return reader.get(path, device)
                return reader.get_into(into, path)
        except KeyError as error:
            raise NotFoundError(f"the state {id} has no {error.args[0]!r} there") from None
        except DamagedError as error:
            raise DamagedError(f"the state {id} cannot be restored: {error}") from None
        finally:
            reader.close()

    def get_tensors(self, id: str, which: Sequence[int], device: str = "cpu") -> list[Any]:  # noqa: A002
        """Return some of a state's tensors, by their places in ``tensors(id)``; see ``get``."""
        reader = self._reader(self.entry(id))
        try:
            with explained("read", self._states):
                return reader.get_tensors(which, device)
        except DamagedError as error:
            raise DamagedError(f"the state {id} cannot be restored: {error}") from None
        finally:
            reader.close()

    def entry(self, id: str) -> Entry:  # noqa: A002  # what put returned
        """Return what is kept beside the state of an id.

        Raises:
            NotFoundError: there is no such id.
            DamagedError: it is not what was written.

        """
        if not (isinstance(id, str) and len(id) == 16 and set(id) <= set("0123456789abcdef")):
            raise NotFoundError(f"{id!r} is not an id: those are 16 hexadecimal digits")
        path = self._entries / id
        try:
            with explained("read", path):
                sealed = disk.read_small(path)
        except DiskError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise NotFoundError(f"there is no {id} in {str(self.path)!r}") from None
            raise
        try:
            body = json.loads(sealing.open_whole(self._secret, sealing.ENTRY, sealed))
            body["metadata"] = tree.plain(body["metadata"])
            body["tags"] = tuple(body["tags"])
            entry = Entry(**body)
        except DamagedError as error:
            raise DamagedError(f"the entry {id} cannot be read: {error}") from None
        if entry.id != id:
            raise DamagedError(f"the entry {id} is that of {entry.id}")
        return entry

    def tensors(self, id: str) -> list[TensorShown]:  # noqa: A002  # what put returned
        """Return the tensors of a state, in the order of the state, without reading them."""
        reader = self._reader(self.entry(id))
        try:
            return [TensorShown(*each) for each in tree.listing(reader.tree, reader.records)]
        finally:
            reader.close()

    def _reader(self, entry: Entry) -> file.Reader:
        path = self._states / entry.content
        try:
            with explained("read", path):
                return file.Reader(path, self._secret, entry.content)
        except DiskError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            self.entry(entry.id)  # somebody may have removed it since
            raise DamagedError(f"the state of {entry.id} is missing") from None
        except DamagedError as error:
            raise type(error)(f"the state {entry.id} cannot be restored: {error}") from None

    # Finding

    def entries(self) -> list[Entry]:
        """Return all entries, oldest first; those that cannot be read are in ``health``."""
        with explained("list", self._entries), self._mutex:
            changed = self._entries.stat().st_mtime_ns
            if self._seen != changed:
                names = set(self._listed(self._entries))
                # A change in the same tick of the clock as this one would not show.
                settled = time.time_ns() - changed > _SETTLED
                for gone in (set(self._known) | set(self._broken)) - names:
                    self._known.pop(gone, None)
                    self._broken.pop(gone, None)
                for new in names - set(self._known) - set(self._broken):
                    try:
                        self._known[new] = self.entry(new)
                    except NotFoundError:
                        continue
                    except ArchiveError as error:
                        self._broken[new] = str(error)
                self._seen = changed if settled else None
            return sorted(self._known.values(), key=lambda entry: (entry.created, entry.id))

    def find(
        self,
        *,
        type: str | None = None,  # noqa: A002  # see put
        context: str | None = None,
        tag: str | None = None,
        since: float | None = None,
        until: float | None = None,
        content: Any = None,
    ) -> list[Entry]:
        """Return the entries that all conditions hold for, oldest first.

        Args:
            type: as given to ``put``.
            context: as given to ``put``.
            tag: one of its tags.
            since: seconds since the epoch; put then or later.
            until: seconds since the epoch; put before.
            content: the ``content`` of an entry, or a state: the same bit for bit.

        """
        if content is not None and not isinstance(content, str):
            content = file.Packed(content).fingerprint(self._secret)
        return [
            entry
            for entry in self.entries()
            if (type is None or entry.type == type)
            and (context is None or entry.context == context)
            and (tag is None or tag in entry.tags)
            and (since is None or entry.created >= since)
            and (until is None or entry.created < until)
            and (content is None or entry.content == content)
        ]

    # Removing

    def delete(self, id: str) -> None:  # noqa: A002  # what put returned
        """Remove an entry, and its state if no other entry has it.

        Raises:
            NotFoundError: there is no such id.
            InUseError: a model that sleeps needs it.

        """
        with contextlib.suppress(DamagedError):  # what cannot be read can still be removed
            self.entry(id)
        if id in self._needed():
            raise InUseError(f"cannot delete {id}: a model that sleeps needs it")
        self._remove([id])

    def forget(
        self,
        *,
        older_than: float | None = None,
        keep_last: int | None = None,
        max_stored: int | None = None,
        type: str | None = None,  # noqa: A002  # see put
        context: str | None = None,
        dry_run: bool = False,
    ) -> Forgotten:
        """Remove what no rule keeps, oldest first, and return how much that was.

        What a sleeping model needs stays, whatever the rules say.

        Args:
            older_than: seconds; entries put earlier than that decay.
            keep_last: so many of the newest entries stay.
            max_stored: bytes; the oldest decay until the states' files take no more than that.
            type: only entries of that type decay.
            context: only entries of that context decay.
            dry_run: remove nothing.

        """
        everything = self.entries()
        needed = self._needed()
        found = self.find(type=type, context=context)
        candidates = [entry for entry in found if entry.id not in needed]
        kept = len(candidates) if keep_last is None else keep_last
        before = None if older_than is None else time.time() - older_than
        decayed = {
            entry.id: entry
            for at, entry in enumerate(candidates)
            if at < len(candidates) - kept or (before is not None and entry.created < before)
        }
        sizes = self._stored(everything)
        holders = Counter(entry.content for entry in everything if entry.id not in decayed)
        if max_stored is not None:
            stored = sum(sizes[content] for content in holders)
            for entry in candidates:
                if stored > max_stored and entry.id not in decayed:
                    decayed[entry.id] = entry
                    holders[entry.content] -= 1
                    stored -= sizes[entry.content] if not holders[entry.content] else 0
        orphans = {entry.content for entry in decayed.values()} - set(+holders)
        if decayed and not dry_run:
            orphans = self._remove([*decayed])
        freed = sum(sizes.get(content, 0) for content in orphans)
        return Forgotten(len(decayed), len(orphans), freed)

    def _remove(self, ids: list[str]) -> set[str]:
        """Remove entries, then the states that nobody has any more; return those."""
        with explained("remove from", self.path), self._locked(alone=True):
            # If we die in between, it tells the next start that there may be such states.
            marker = disk.NewFile(self._entries / "none")
            done = False
            try:
                for each in set(ids) - self._needed(tidy=True):
                    (self._entries / each).unlink(missing_ok=True)
                disk.sync_directory(self._entries)
                orphans = self._remove_orphans()
                done = True
                return orphans
            finally:
                marker.close(keep=not done)

    def need(self, id: str) -> Callable[[], None]:  # noqa: A002  # what put returned
        """Keep an entry from being removed until the returned function is called.

        Or until this process ends, and those that it forked meanwhile.

        Raises:
            NotFoundError: there is no such id.

        """
        folder = self.path / "asleep"
        with explained("keep", folder), self._locked(alone=False):
            self.entry(id)
            folder.mkdir(mode=0o700, exist_ok=True)
            return disk.marked(folder / f"{id}.{secrets.token_hex(4)}")

    def _needed(self, *, tidy: bool = False) -> set[str]:
        """Return the entries that sleeping models need.

        ``tidy`` removes the marks of processes that ended; for who has the store alone.
        """
        folder = self.path / "asleep"
        if not folder.is_dir():
            return set()
        found = set()
        with explained("look at", folder):
            for name in list(self._listed(folder)):
                if disk.is_marked(folder / name):
                    found.add(name.partition(".")[0])
                elif tidy:
                    (folder / name).unlink(missing_ok=True)
        return found

    def _remove_orphans(self) -> set[str]:
        wanted = {entry.content for entry in self.entries()}
        if self._broken:  # one of them may be all that leads to a state
            return set()
        orphans = set(self._listed(self._states)) - wanted
        for each in orphans:
            (self._states / each).unlink(missing_ok=True)
        if orphans:
            disk.sync_directory(self._states)
        return orphans

    def _sweep(self) -> None:
        """Remove what writers that died have left; not while somebody writes."""
        with (
            explained("tidy up", self.path),
            self._locked(alone=True, wait=False) as had,
        ):
            if not had:
                return
            for folder in (self.path, self._states, self._entries):
                stale = [each for each in folder.iterdir() if each.name.startswith(TEMPORARY)]
                if stale and folder == self._entries:
                    self._remove_orphans()
                for each in stale:
                    each.unlink(missing_ok=True)

    # Looking after it

    def stats(self) -> dict[str | None, Stats]:
        """Return what each context holds, and under ``None`` what the store does."""
        entries = self.entries()
        sizes = self._stored(entries)
        found: dict[str | None, Stats] = {}
        for context in (None, *sorted({entry.context for entry in entries})):
            mine = [entry for entry in entries if context is None or entry.context == context]
            states = {entry.content: entry.size for entry in mine}
            stored = sum(sizes[content] for content in states)
            found[context] = Stats(len(mine), len(states), sum(states.values()), stored)
        return found

    def stored(self, entry: Entry) -> int:
        """Return the bytes of the file that an entry's state is in."""
        return self._stored([entry])[entry.content]

    def _stored(self, entries: Iterable[Entry]) -> dict[str, int]:
        """Return the bytes of the states' files; 0 for one that is missing."""
        found = {}
        for content in {entry.content for entry in entries}:
            try:
                found[content] = (self._states / content).stat().st_size
            except FileNotFoundError:
                found[content] = 0
        return found

    def verify(
        self, *, read_data: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> tuple[Problem, ...]:
        """Return what is wrong; nothing, if all entries lead to states that can be restored.

        Headers and indexes are authenticated; with ``read_data`` every byte of the states is.
        ``progress`` gets how many of how many bytes are done.
        """
        problems = self._missing()
        states = {entry.content: entry for entry in self.entries()}
        total, done = sum(entry.size for entry in states.values()), 0
        for content, entry in states.items():
            if not (self._states / content).exists():
                continue
            try:
                reader = self._reader(entry)
                try:
                    if read_data:
                        reader.authenticate()
                finally:
                    reader.close()
            except NotFoundError:
                continue  # removed since
            except (ArchiveError, OSError) as error:
                problems.append(Problem(entry.id, str(error)))
            done += entry.size
            if progress is not None:
                progress(done, total)
        return tuple(problems)

    def _missing(self) -> list[Problem]:
        entries = self.entries()
        problems = [Problem(name, what) for name, what in sorted(self._broken.items())]
        there = set(self._listed(self._states))
        for entry in entries:
            # Somebody may have removed it since.
            if entry.content not in there and (self._entries / entry.id).exists():
                problems.append(Problem(entry.id, f"the state of {entry.id} is missing"))
        for name in _KEYS:
            try:
                sealing.open_whole(
                    self.keys.keys[0], sealing.KEY, disk.read_small(self.path / name)
                )
            except (OSError, DamagedError) as error:
                problems.append(Problem(name, f"the key file does not open: {error}"))
        return problems

    def health(self) -> Health:
        """Return how the store is, without reading the states."""
        with explained("look at", self.path):
            used = self._used()
            if self.quota is not None:
                fill = used / self.quota if self.quota else 1.0
            else:
                system = shutil.disk_usage(self.path)
                fill = 1 - system.free / system.total
            problems = self._missing()
        entries = len(self._known) + len(self._broken)
        sound = 1 - len({each.name for each in problems}) / max(entries, len(problems), 1)
        return Health(sound * min(1.0, max(0.0, (1 - fill) / 0.2)), fill, tuple(problems))

    # The directory

    def _locked(self, *, alone: bool, wait: bool = True) -> AbstractContextManager[bool]:
        return locked(self.path / "lock", alone=alone, wait=wait)

    def _listed(self, folder: Path) -> Iterator[str]:
        with os.scandir(folder) as found:
            yield from (each.name for each in found if not each.name.startswith("."))

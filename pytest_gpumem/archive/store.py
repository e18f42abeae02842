"""A directory of archived states that any number of processes use at once.

``key``     the store's secret, sealed under a root key; ``key-copy`` is a second one
``states/`` one file for each different state, named by its keyed content hash
``entries/`` one small file for each time a state was put: its type, context, tags and time
``asleep/`` a lock for each entry that a sleeping model needs; it ends with the process
``anchors`` by what a user knows later that the store was not put back to an older state
``lock``    writers share it; who removes something has it alone

A state is written before its first entry and removed after its last, so at every moment an entry
that can be seen leads to a state that is whole. There is no catalogue that could be wrong: what
the directory holds is what there is. Every process keeps the entries it has read.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pytest_gpumem import files
from pytest_gpumem.archive import arguments, disk, file, keys, retention, tree, vault
from pytest_gpumem.archive.anchors import Anchors
from pytest_gpumem.archive.catalogue import Catalogue, Entry, Stats, stats_of
from pytest_gpumem.archive.checkup import Checkup, Health, Problem
from pytest_gpumem.archive.disk import explained, locked
from pytest_gpumem.archive.needs import Needs
from pytest_gpumem.archive.retention import Forgotten
from pytest_gpumem.archive.states import States, reading
from pytest_gpumem.errors import (
    ArchiveError,
    DamagedError,
    InUseError,
    NotFoundError,
    StateRefusedError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Hashable, Iterable, Sequence

DIRECTORY_VARIABLE: Final = "GPUMEM_ARCHIVE"


def default_directory() -> Path:
    """Return the store's directory: ``$GPUMEM_ARCHIVE``, or one in the user's data directory."""
    named = os.environ.get(DIRECTORY_VARIABLE)
    if named:
        return Path(named)
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "gpumem" / "archive"


class TensorShown(NamedTuple):
    """A tensor of a state, without its content."""

    path: str
    dtype: str
    shape: tuple[int, ...]


class ArchiveStore:
    """Keeps states of tensors and plain values, encrypted, compressed, each different one once.

    Args:
        path: its directory; None: see ``default_directory``.
        key: see ``keys.find``.
        quota: most bytes that the states' files may take; None: no limit.
        make: whether a store, and a key, may be made where there is none.

    Raises:
        ArgumentError: one of them is not what it must be.
        KeyRefusedError, WrongKeyError: there is no key that opens it.
        NotFoundError: there is no store, and none may be made.
        DiskError: the directory cannot be used.

    """

    def __init__(
        self,
        path: Path | str | None = None,
        *,
        key: bytes | str | Path | Callable[[], bytes | str] | None = None,
        quota: int | None = None,
        make: bool = True,
    ) -> None:
        self.path = arguments.path("path", path) if path is not None else default_directory()
        self.quota = arguments.whole("quota", quota)
        if not make and not (self.path / "states").is_dir():
            raise NotFoundError(f"there is no store {str(self.path)!r}")
        self._make_directories()
        self._vault = vault.Vault(self.path, keys.find(key, make=make))
        secret = self._open()
        self._secret = secret
        self._states = States(self.path / "states", secret, self.quota)
        self._catalogue = Catalogue(self.path / "entries", secret)
        self._anchors = Anchors(self.path, secret)
        self._needs = Needs(self.path / "asleep")
        self._checkup = Checkup(
            self._vault, self._catalogue, self._states, self._anchors, self._needs
        )
        self._sweep()

    def __repr__(self) -> str:
        return f"ArchiveStore({str(self.path)!r})"

    @property
    def keys(self) -> keys.Keys:
        """The root keys in use."""
        return self._vault.keys

    def _make_directories(self) -> None:
        # Nobody else may change what lies in them, and what is removed there must be ours.
        with explained("use the store", self.path):
            files.own_directory(self.path, follow=True)
            for name in ("states", "entries", "asleep"):
                files.own_directory(self.path / name)

    def _open(self) -> bytes:
        with explained("open the store", self.path):
            # Without the lock first: a writer may have it for as long as its state is large.
            found = self._vault.open()
            if found is None:
                with self._locked(alone=True):
                    found = self._vault.open()
                    if found is None:
                        if any((self.path / "states").iterdir()):
                            raise DamagedError(
                                f"the store {str(self.path)!r} has lost its key files"
                            )
                        found = self._vault.begin()
        return found

    def rotate(self, key: bytes | str | Path | Callable[[], bytes | str] | None = None) -> None:
        """Seal the store under another root key; archives stay as they are.

        Without ``key`` a new one is put before those of the key file in use.

        Raises:
            KeyRefusedError: the keys in use come from no file, and no new one is given.
            DiskError: the system would not; the store opens with the keys that it had.

        """
        given = keys.find(key, make=False) if key is not None else None
        with explained("rotate the key of", self.path), self._locked(alone=True):
            self._vault.rotate(self._secret, given)

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
        already is read, and not written again.

        Args:
            state: dicts, lists and tuples of tensors and plain values.
            type: what kind of state it is, such as ``sentence_transformer``.
            context: what it was put for, such as the name of a test.
            tags: words to find it by.
            metadata: plain values to keep with it.

        Raises:
            ArgumentError: one of them is not what it must be.
            StateRefusedError: part of it could not be restored bit for bit.
            QuotaError: there is no room.
            DiskError: the system would not write.

        """
        beside = [
            arguments.text("type", type),
            arguments.text("context", context),
            [*arguments.words("tags", tags)],
            arguments.mapping("metadata", metadata),
        ]
        described = file.Packed(beside)
        if described.parts.records:
            raise StateRefusedError("cannot archive the metadata: it holds tensors")
        packed = file.Packed(state)
        content = packed.fingerprint(self._secret)
        with explained("write", self.path / "states" / content), self._locked(alone=False):
            # Made first: if we die with the state written and no entry, it tells the next start.
            name, new = self._catalogue.new()
            entry = Entry(
                id=name,
                type=type,
                context=context,
                tags=tuple(beside[2]),
                metadata=metadata or {},
                created=time.time(),
                content=content,
                size=packed.parts.size,
                tensors=len(packed.parts.records),
            )
            done = False
            try:
                if not self._states.has(content):
                    self._states.write(packed, content)
                self._catalogue.publish(new, entry, described.parts.tree[4])
                done = True
            finally:
                # The same for an error.
                new.close(keep=not done and self._states.holds(content))
        return name

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
                if unknown := sorted(set(more) - {"type", "context", "tags", "metadata"}, key=str):
                    raise StateRefusedError(f"cannot archive an item with {unknown[0]!r}")
                found.append(self.put(item["data"], **more))
            except ArchiveError as error:
                found.append(error)
        return found

    # Getting

    def get(
        self,
        id: str,  # noqa: A002  # what put returned
        device: str = "cpu",
        at: Hashable | Sequence[Hashable] = (),
    ) -> Any:
        """Return the state of an id, in new memory on ``device``.

        Args:
            id: what ``put`` returned.
            device: where new tensors are made.
            at: a key, or a list of keys and indexes, that leads to the part that is wanted; only
                that is read.

        Raises:
            ArgumentError: there is no such device.
            NotFoundError: there is no such id, or ``at`` leads nowhere.
            DamagedError: it is not what was written.
            DiskError: the system would not read.

        """
        where = arguments.device("device", device)
        path = at if isinstance(at, (list, tuple)) else (at,)
        with reading(self._states, self._catalogue, self.entry(id)) as reader:
            try:
                return reader.get(path, where)
            except KeyError as error:
                raise NotFoundError(f"the state {id} has no {error.args[0]!r} there") from None

    def get_tensors(self, id: str, which: Sequence[int], device: str = "cpu") -> list[Any]:  # noqa: A002
        """Return some of a state's tensors, by their places in ``tensors(id)``; see ``get``."""
        where = arguments.device("device", device)
        with reading(self._states, self._catalogue, self.entry(id)) as reader:
            return reader.get_tensors(which, where)

    def entry(self, id: str) -> Entry:  # noqa: A002  # what put returned
        """Return what is kept beside the state of an id.

        Raises:
            NotFoundError: there is no such id.
            DamagedError: it is not what was written.
            DiskError: the system would not read.

        """
        return self._catalogue.read(id)

    def tensors(self, id: str) -> list[TensorShown]:  # noqa: A002  # what put returned
        """Return the tensors of a state, in the order of the state, without reading them."""
        with reading(self._states, self._catalogue, self.entry(id)) as reader:
            return [TensorShown(*each) for each in tree.listing(reader.tree, reader.records)]

    # Finding

    def entries(self) -> list[Entry]:
        """Return all entries, oldest first; those that cannot be read are in ``health``."""
        return self._catalogue.entries()

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

        Raises:
            ArgumentError: one of them is not what it must be.

        """
        for name, value in (("type", type), ("context", context), ("tag", tag)):
            if value is not None:
                arguments.text(name, value)
        arguments.seconds("since", since)
        arguments.seconds("until", until)
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

    def need(self, id: str) -> Callable[[], None]:  # noqa: A002  # what put returned
        """Keep an entry from being removed until the returned function is called.

        Or until this process ends, and those that it forked meanwhile.

        Raises:
            NotFoundError: there is no such id.

        """
        with explained("keep", self._needs.folder), self._locked(alone=False):
            self.entry(id)
            return self._needs.mark(id)

    def delete(self, id: str) -> None:  # noqa: A002  # what put returned
        """Remove an entry, and its state if no other entry has it.

        Raises:
            NotFoundError: there is no such id.
            InUseError: a model that sleeps needs it.

        """
        with contextlib.suppress(DamagedError):  # what cannot be read can still be removed
            self.entry(id)
        if id in self._needs.names():
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

        Raises:
            ArgumentError: one of them is not what it must be.

        """
        age = arguments.seconds("older_than", older_than)
        needed = self._needs.names()
        everything = self.entries()
        sizes = self._states.sizes(entry.content for entry in everything)
        plan = retention.plan(
            everything,
            [entry for entry in self.find(type=type, context=context) if entry.id not in needed],
            sizes,
            before=None if age is None else time.time() - age,
            keep_last=arguments.whole("keep_last", keep_last),
            max_stored=arguments.whole("max_stored", max_stored),
        )
        orphans: Iterable[str] = plan.orphans
        if plan.decayed and not dry_run:
            orphans = self._remove(plan.decayed)
        freed = [sizes.get(content, 0) for content in orphans]
        return Forgotten(len(plan.decayed), len(freed), sum(freed))

    def _remove(self, ids: Sequence[str]) -> set[str]:
        """Remove entries, then the states that nobody has any more; return those."""
        with explained("remove from", self.path), self._locked(alone=True):
            # If we die in between, it tells the next start that there may be such states.
            _, marker = self._catalogue.new()
            done = False
            try:
                self._catalogue.remove(set(ids) - self._needs.names(tidy=True))
                orphans = self._remove_orphans()
                done = True
                return orphans
            finally:
                marker.close(keep=not done)

    def _remove_orphans(self) -> set[str]:
        wanted = {entry.content for entry in self.entries()}
        if self._catalogue.broken:  # one of them may be all that leads to a state
            return set()
        return self._states.remove_all_but(wanted)

    def _sweep(self) -> None:
        """Remove what writers that died have left; not while somebody writes."""
        with (
            explained("tidy up", self.path),
            self._locked(alone=True, wait=False) as had,
        ):
            if not had:
                return
            for folder in (self.path, self._states.folder, self._catalogue.folder):
                stale = disk.unfinished(folder)
                if stale and folder == self._catalogue.folder:
                    self._remove_orphans()
                for each in stale:
                    each.unlink(missing_ok=True)

    # Looking after it

    def stats(self) -> dict[str | None, Stats]:
        """Return what each context holds, and under ``None`` what the store does."""
        entries = self.entries()
        return stats_of(entries, self._states.sizes(entry.content for entry in entries))

    def anchor(self) -> str:
        """Return an anchor, which ``verify`` takes later to tell that the store was not put back.

        Keep it elsewhere. The store notes it; while nothing was put or removed it is the same.

        Raises:
            DamagedError: the anchors that were noted are not what was written.
            DiskError: the system would not read or write them.

        """
        with explained("anchor", self.path), self._locked(alone=True):
            return self._anchors.drop(self.entries())

    def stored(self, entry: Entry) -> int:
        """Return the bytes of the file that an entry's state is in."""
        return self._states.sizes([entry.content])[entry.content]

    def verify(
        self,
        *,
        read_data: bool = False,
        since: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Problem, ...]:
        """Return what is wrong; nothing, if all entries lead to states that can be restored.

        Headers and indexes are authenticated; with ``read_data`` every byte of the states is, and
        they are built without their content. ``since`` is an ``anchor``: it tells whether the
        store was put back to before that. ``progress`` gets how many of how many bytes are done.

        Raises:
            ArgumentError: ``since`` is no anchor.

        """
        problems = self._checkup.problems()
        if since is not None:
            problems += self._put_back(since)
        return (*problems, *self._checkup.states(read_data=read_data, progress=progress))

    def _put_back(self, anchor: str) -> list[Problem]:
        # Alone, for a moment: an entry that is just being put was not there at an anchor.
        with explained("read the anchors of", self.path), self._locked(alone=True):
            return self._checkup.put_back(anchor)

    def health(self) -> Health:
        """Return how the store is, without reading the states."""
        with explained("look at", self.path):
            return self._checkup.health()

    @contextlib.contextmanager
    def _locked(self, *, alone: bool, wait: bool = True) -> Generator[bool, None, None]:
        """Hold the store's lock; yield whether it was to be had."""
        with locked(self.path / vault.LOCK, alone=alone, wait=wait) as had:
            self._make_directories()
            yield had

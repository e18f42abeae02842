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

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pytest_gpumem.archive import addition, arguments, file, keys, removal, tree
from pytest_gpumem.archive.addition import Beside
from pytest_gpumem.archive.catalogue import Entry, Stats, Wanted, stats_of
from pytest_gpumem.archive.checkup import Checkup, Health, Problem
from pytest_gpumem.archive.disk import explained
from pytest_gpumem.archive.place import Place, make_directories
from pytest_gpumem.archive.retention import Forgotten, rules_of
from pytest_gpumem.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

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
        make_directories(self.path)
        self._place = Place(self.path, keys.find(key, make=make), self.quota)
        self._checkup = Checkup(self._place)
        removal.sweep(self._place)

    def __repr__(self) -> str:
        return f"ArchiveStore({str(self.path)!r})"

    @property
    def keys(self) -> keys.Keys:
        """The root keys in use."""
        return self._place.vault.keys

    def rotate(self, key: bytes | str | Path | Callable[[], bytes | str] | None = None) -> None:
        """Seal the store under another root key; archives stay as they are.

        Without ``key`` a new one is put before those of the key file in use.

        Raises:
            KeyRefusedError: the keys in use come from no file, and no new one is given.
            DiskError: the system would not; the store opens with the keys that it had.

        """
        given = keys.find(key, make=False) if key is not None else None
        with explained("rotate the key of", self.path), self._place.locked(alone=True):
            self._place.vault.rotate(self._place.secret, given)

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
            InUseError: another thread changed it meanwhile.
            QuotaError: there is no room.
            DiskError: the system would not write.

        """
        beside = Beside(
            arguments.text("type", type),
            arguments.text("context", context),
            tuple(arguments.words("tags", tags)),
            arguments.mapping("metadata", metadata),
        )
        return addition.add(self._place, state, beside)

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
        with self._place.reading(id) as reader:
            try:
                return reader.get(path, where)
            except KeyError as error:
                raise NotFoundError(f"the state {id} has no {error.args[0]!r} there") from None

    def get_tensors(self, id: str, which: Sequence[int], device: str = "cpu") -> list[Any]:  # noqa: A002
        """Return some of a state's tensors, by their places in ``tensors(id)``; see ``get``."""
        where, places = arguments.device("device", device), arguments.places("which", which)
        with self._place.reading(id) as reader:
            return reader.get_tensors(places, where)

    def entry(self, id: str) -> Entry:  # noqa: A002  # what put returned
        """Return what is kept beside the state of an id.

        Raises:
            NotFoundError: there is no such id.
            DamagedError: it is not what was written.
            DiskError: the system would not read.

        """
        return self._place.entry(id)

    def tensors(self, id: str) -> list[TensorShown]:  # noqa: A002  # what put returned
        """Return the tensors of a state, in its order, without reading them."""
        with self._place.reading(id) as reader:
            return [TensorShown(*each) for each in tree.listing(reader.tree, reader.records)]

    # Finding

    def entries(self) -> list[Entry]:
        """Return all entries, oldest first; those that cannot be read are in ``health``."""
        return self._place.catalogue.entries()

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
        if content is not None and not isinstance(content, str):
            content = file.Packed(content).fingerprint(self._place.secret)
        words = {"type": type, "context": context, "tag": tag}
        wanted = _wanted(words, since, until)._replace(content=content)
        return [entry for entry in self.entries() if wanted.holds(entry)]

    # Removing

    def need(self, id: str) -> Callable[[], None]:  # noqa: A002  # what put returned
        """Keep an entry from being removed until the returned function is called.

        Or until this process ends, and those that it forked meanwhile.

        Raises:
            NotFoundError: there is no such id.

        """
        return removal.prevent(self._place, id)

    def delete(self, id: str) -> None:  # noqa: A002  # what put returned
        """Remove an entry, and its state if no other entry has it.

        Raises:
            NotFoundError: there is no such id.
            InUseError: a model that sleeps needs it.

        """
        removal.delete(self._place, id)

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
        rules = rules_of(older_than, keep_last, max_stored)
        wanted = _wanted({"type": type, "context": context})
        return removal.forget(self._place, wanted, rules, dry_run=dry_run)

    # Looking after it

    def stats(self) -> dict[str | None, Stats]:
        """Return what each context holds, and under ``None`` what the store does."""
        entries = self.entries()
        return stats_of(entries, self._place.states.sizes(entry.content for entry in entries))

    def anchor(self) -> str:
        """Return an anchor, which ``verify`` takes later to tell that the store was not put back.

        Keep it elsewhere. The store notes it; while nothing was put or removed it is the same.

        Raises:
            DamagedError: the anchors that were noted are not what was written.
            DiskError: the system would not read or write them.

        """
        with explained("anchor", self.path), self._place.locked(alone=True):
            return self._place.anchors.drop(self.entries())

    def stored(self, entry: Entry) -> int:
        """Return the bytes of the file that an entry's state is in."""
        return self._place.states.sizes([entry.content])[entry.content]

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
            problems += self._checkup.put_back(since)
        return (*problems, *self._checkup.states(read_data=read_data, progress=progress))

    def health(self) -> Health:
        """Return how the store is, without reading the states."""
        return self._checkup.health()


def _wanted(
    words: dict[str, str | None], since: float | None = None, until: float | None = None
) -> Wanted:
    for name, value in words.items():
        if value is not None:
            arguments.text(name, value)
    arguments.seconds("since", since)
    arguments.seconds("until", until)
    return Wanted(since=since, until=until, **words)

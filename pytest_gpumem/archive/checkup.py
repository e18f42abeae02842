"""What is wrong in a store."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem.archive import anchors, disk, vault
from pytest_gpumem.archive.disk import explained
from pytest_gpumem.archive.states import reading
from pytest_gpumem.errors import ArchiveError, DamagedError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_gpumem.archive import file
    from pytest_gpumem.archive.place import Place

_OURS = {"states", "entries", "asleep", vault.LOCK, anchors.NAME, *vault.NAMES}
_FOREIGN = "is not the store's; it is left alone"


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


class Checkup:
    """Looks at the parts of a store."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def problems(self) -> list[Problem]:
        """Return what is wrong as far as it shows without reading states."""
        with explained("look at", self._place.path):
            return [*self._missing(), *self._strange()]

    def _missing(self) -> Iterator[Problem]:
        """Yield the entries that cannot be read, or whose states are not there."""
        entries = self._place.catalogue.entries()
        for name, why in sorted(self._place.catalogue.broken.items()):
            yield Problem(name, why)
        there = self._place.states.names()
        for entry in entries:
            # Somebody may have removed it since.
            if entry.content not in there and self._place.catalogue.holds(entry.id):
                yield Problem(entry.id, f"the state of {entry.id} is missing")

    def _strange(self) -> Iterator[Problem]:
        """Yield the keys that do not open, and what is not the store's."""
        for name, why in self._place.vault.problems():
            yield Problem(name, why)
        for name in self._foreign():
            yield Problem(name, _FOREIGN)

    def _foreign(self) -> list[str]:
        """Return the names of what is not the store's; a key file and its lock may lie there."""
        key = self._place.vault.keys.file
        beside = {key.name, f".{key.name}.lock", f".{key.name}.new"} if key else set()
        return [
            *disk.foreign(self._place.vault.folder, lambda each: each.name in _OURS | beside),
            *(f"states/{name}" for name in self._place.states.foreign()),
            *(f"entries/{name}" for name in self._place.catalogue.foreign()),
            *(f"asleep/{name}" for name in self._place.needs.foreign()),
        ]

    def states(
        self, *, read_data: bool, progress: Callable[[int, int], None] | None
    ) -> Iterator[Problem]:
        """Yield the entries whose states cannot be restored; see ``ArchiveStore.verify``."""
        states = {entry.content: entry for entry in self._place.catalogue.entries()}
        total, done = sum(entry.size for entry in states.values()), 0
        for content, entry in states.items():
            try:
                if not self._place.states.holds(content):
                    continue
                with reading(self._place.states, self._place.catalogue, entry) as reader:
                    if read_data:
                        _try_to_restore(reader)
            except NotFoundError:
                continue  # removed since
            except ArchiveError as error:
                yield Problem(entry.id, str(error))
            done += entry.size
            if progress is not None:
                progress(done, total)

    def put_back(self, anchor: str) -> list[Problem]:
        """Return what shows that the store was put back to before ``anchor``."""
        place = self._place
        # Alone, for a moment: an entry that is just being put was not there at an anchor.
        with explained("read the anchors of", place.path), place.locked(alone=True):
            try:
                found = place.anchors.problems(anchor, place.catalogue.entries())
                return [Problem(*each) for each in found]
            except DamagedError as error:
                return [Problem(anchors.NAME, str(error))]

    def health(self) -> Health:
        """Return how the store is, without reading the states."""
        place = self._place
        with explained("look at", place.path):
            used, quota = place.states.used(), place.states.quota
            if quota is not None:
                fill = used / quota if quota else 1.0
            else:
                system = shutil.disk_usage(place.path)
                fill = 1 - system.free / system.total
            problems = self.problems()
            entries = len(place.catalogue.entries()) + len(place.catalogue.broken)
        broken = {each.name for each in problems if each.what != _FOREIGN}
        sound = 1 - len(broken) / max(entries, len(broken), 1)
        return Health(sound * min(1.0, max(0.0, (1 - fill) / 0.2)), fill, tuple(problems))


def _try_to_restore(reader: file.Reader) -> None:
    """Read every byte of a state and build it.

    Raises:
        DamagedError: it cannot be restored.

    """
    reader.authenticate()
    try:
        reader.rehearse()
    except DamagedError:
        # Some classes look at their content when they are built.
        reader.get()

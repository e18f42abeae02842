"""How entries leave a store: they first, then the states that nobody has any more."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from pytest_gpumem.archive import disk, retention
from pytest_gpumem.archive.disk import explained
from pytest_gpumem.archive.retention import Forgotten
from pytest_gpumem.errors import DamagedError, InUseError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from pytest_gpumem.archive.catalogue import Wanted
    from pytest_gpumem.archive.place import Place


def prevent(place: Place, name: str) -> Callable[[], None]:
    """Keep an entry from being removed, see ``ArchiveStore.need``."""
    with explained("keep", place.needs.folder), place.locked(alone=False):
        place.entry(name)
        return place.needs.mark(name)


def delete(place: Place, name: str) -> None:
    """Remove one entry, see ``ArchiveStore.delete``."""
    with contextlib.suppress(DamagedError):  # what cannot be read can still be removed
        place.entry(name)
    if name in place.needs.names():
        raise InUseError(f"cannot delete {name}: a model that sleeps needs it")
    _remove(place, [name])


def forget(place: Place, wanted: Wanted, rules: retention.Rules, *, dry_run: bool) -> Forgotten:
    """Remove what no rule keeps of what is ``wanted``, see ``ArchiveStore.forget``."""
    needed = place.needs.names()
    everything = place.catalogue.entries()
    sizes = place.states.sizes(entry.content for entry in everything)
    candidates = [each for each in everything if wanted.holds(each) and each.id not in needed]
    plan = retention.plan(everything, candidates, sizes, rules)
    orphans: Collection[str] = plan.orphans
    if plan.decayed and not dry_run:
        orphans = _remove(place, plan.decayed)
    freed = [sizes.get(content, 0) for content in orphans]
    return Forgotten(len(plan.decayed), len(freed), sum(freed))


def _remove(place: Place, ids: Collection[str]) -> set[str]:
    """Remove entries, then the states that nobody has any more; return those."""
    with explained("remove from", place.path), place.locked(alone=True):
        # If we die in between, it tells the next start that there may be such states.
        _, marker = place.catalogue.new()
        done = False
        try:
            place.catalogue.remove(set(ids) - place.needs.names(tidy=True))
            orphans = _remove_orphans(place)
            done = True
            return orphans
        finally:
            marker.close(keep=not done)


def sweep(place: Place) -> None:
    """Remove what writers that died have left; not while somebody writes."""
    with explained("tidy up", place.path), place.locked(alone=True, wait=False) as had:
        if not had:
            return
        for folder in (place.path, place.states.folder, place.catalogue.folder):
            stale = disk.unfinished(folder)
            if stale and folder == place.catalogue.folder:
                _remove_orphans(place)
            for each in stale:
                each.unlink(missing_ok=True)


def _remove_orphans(place: Place) -> set[str]:
    wanted = {entry.content for entry in place.catalogue.entries()}
    if place.catalogue.broken:  # one of them may be all that leads to a state
        return set()
    return place.states.remove_all_but(wanted)

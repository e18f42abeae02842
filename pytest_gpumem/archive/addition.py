"""How a state comes into a store: its file first, then the entry that leads to it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpumem.archive import file
from pytest_gpumem.archive.catalogue import Entry
from pytest_gpumem.archive.disk import explained
from pytest_gpumem.errors import StateRefusedError

if TYPE_CHECKING:
    from pytest_gpumem.archive.place import Place


class Beside(NamedTuple):
    """What is kept beside a state; see ``ArchiveStore.put``."""

    type: str
    context: str
    tags: tuple[str, ...]
    metadata: dict[str, Any]


def add(place: Place, state: Any, beside: Beside) -> str:
    """Put a state, or another entry of one that is there, and return its id.

    Raises:
        StateRefusedError: part of it could not be restored bit for bit.
        InUseError: another thread changed it meanwhile.
        QuotaError: there is no room.
        DiskError: the system would not write.

    """
    described = file.Packed([beside.type, beside.context, [*beside.tags], beside.metadata])
    if described.parts.records:
        raise StateRefusedError("cannot archive the metadata: it holds tensors")
    packed = file.Packed(state)
    content = packed.fingerprint(place.secret)
    with explained("write", place.states.folder / content), place.locked(alone=False):
        # Made first: if we die with the state written and no entry, it tells the next start.
        name, new = place.catalogue.new()
        entry = Entry(
            id=name,
            type=beside.type,
            context=beside.context,
            tags=beside.tags,
            metadata=beside.metadata,
            created=time.time(),
            content=content,
            size=packed.parts.size,
            tensors=len(packed.parts.records),
        )
        done = False
        try:
            if not place.states.has(content):
                place.states.write(packed, content)
            place.catalogue.publish(new, entry, described.parts.tree[4])
            done = True
        finally:
            # The same for an error.
            new.close(keep=not done and place.states.holds(content))
    return name

"""Records what one test allocates, and says what was alive in it.

The stack of each allocation comes from torch's own record (``devices.Recording``), who was charged
when from the boundaries, and what torch uses memory for from looks at the heap: as the test
begins, as its call ends, and at its end. What none of these looks saw is told by its stack alone.
"""

from __future__ import annotations

import hashlib
import os
import re
from bisect import bisect_right
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpumem import devices
from pytest_gpumem.clock import clock
from pytest_gpumem.devices.notebook import note_failure
from pytest_gpumem.records import Alive, AliveGroup
from pytest_gpumem.tracking import alive
from pytest_gpumem.tracking.accounts import Fixture

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_gpumem.tracking.alive import Block, Moment, Turn
    from pytest_gpumem.tracking.meter import Meters
    from pytest_gpumem.tracking.torch_heap import Heap
    from pytest_gpumem.tracking.turns import Turns
    from pytest_gpumem.tracking.verdict import TensorLedger

MOST_EVENTS = 500_000
"""Events that are kept of one test on each card: torch keeps a few KB for each, at most."""

_BEFORE = "from before the test"


class _Look(NamedTuple):
    """What a look at the heap told, by address."""

    time: int
    kinds: dict[int, str]


class Known(NamedTuple):
    """What the tracker knows: who runs, the cards in use, whose doing each living tensor is."""

    turns: Turns
    meters: Meters
    tensors: TensorLedger
    root: Path
    """Directory from which files are named."""

    def owners(self, test: str = "") -> dict[int, str]:
        """Return by address whose doing what is known to live now is; of ``test`` it is its own."""
        words = {fixture.name: fixture.label for fixture in self.turns.wide}
        words |= {test: alive.THIS_TEST, "": _BEFORE}
        return {
            address: words.get(owner) or f"left by {_gone(owner)}"
            for address, owner in self.tensors.owners()
        }


def _gone(owner: str) -> str:
    """Return in words a test, whose name is its nodeid, or a fixture that was torn down."""
    return f"fixture {owner!r}" if owner.isidentifier() else owner


class Recorder:
    """Records one test, which begins now.

    Args:
        nodeid: the test.
        known: what is known of it and of the cards.

    """

    def __init__(self, nodeid: str, known: Known) -> None:
        self._nodeid = nodeid
        self._known = known
        self._marks: list[Turn] = []
        self._looks: list[_Look] = []
        self.look()
        self._owners = known.owners()
        """By address, whose what lived at first was."""
        self._recording = devices.Recording(MOST_EVENTS)
        self.turn()

    def turn(self) -> None:
        """Take note that from now on somebody else is charged."""
        runs = self._known.turns.charged[-1]
        owner = runs.label if isinstance(runs, Fixture) else alive.THIS_TEST
        self._marks.append(alive.Turn(_now(), owner))

    def look(self) -> None:
        """Take note of what torch uses what lives now for: a pass over the heap."""
        from pytest_gpumem.tracking import torch_heap

        with torch_heap.still_heap():
            heap = torch_heap.scan(_on_card)
            self._looks.append(_Look(_now(), torch_heap.kinds(heap) if heap.storages else {}))

    def end(self, *, felled: bool, snapshots: Path | None = None) -> tuple[Alive, ...]:
        """Stop, and return what was alive at the peak on each card that is in use.

        Args:
            felled: whether memory ran out in the test: then the moment of that counts.
            snapshots: directory into which the whole record is written.

        """
        recording = self._recording
        self.look()
        snapshot = recording.read()
        recording.end()
        if snapshot is None:
            why = recording.why_not
            return self._nothing(why) if why else ()
        try:
            path = "" if snapshots is None else _save(snapshot, self._nodeid, snapshots)
            return tuple(self._told(snapshot, path, felled=felled))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            note_failure("reading recorded allocations", error)  # of a torch that tells otherwise
            return ()

    def _nothing(self, why: str) -> tuple[Alive, ...]:
        note = f"not recorded: {why}"
        return tuple(Alive(each.card.uuid, "peak", 0, (), note=note) for each in self._known.meters)

    def _told(self, snapshot: dict[str, Any], path: str, *, felled: bool) -> Iterator[Alive]:
        cards = self._known.meters.uuids()
        for index, trace in enumerate(snapshot["device_traces"]):
            uuid = cards.get(f"cuda:{index}")
            living = [
                block
                for segment in snapshot["segments"]
                if segment.get("device", 0) == index
                for block in segment["blocks"]
                if block["state"] != "inactive"
            ]
            moment = alive.replay(trace, living, self._marks, felled=felled)
            if uuid is not None and (moment.blocks or moment.refused):
                cut = len(trace) >= MOST_EVENTS
                yield self._alive(moment, uuid, cut=cut)._replace(snapshot=path)

    def _alive(self, moment: Moment, uuid: str, *, cut: bool) -> Alive:
        refused = moment.refused
        return Alive(
            card=uuid,
            moment="peak" if refused is None else "out of memory",
            size=moment.size,
            groups=alive.grouped(
                moment.blocks,
                lambda block: self._owner(block, cut=cut),
                self._kind,
                self._known.root,
            ),
            recorded=True,
            refused=0 if refused is None else refused["size"],
            refused_at=""
            if refused is None
            else alive.line_of(refused.get("frames", ()), self._known.root),
            note=f"only the last {MOST_EVENTS:,} events were kept: an earlier peak may be higher"
            if cut
            else "",
        )

    def _owner(self, block: Block, *, cut: bool) -> str:
        """Return whose an allocation is."""
        if not block.born:
            if cut:
                return "from before what was kept"
            return self._owners.get(block.address, _BEFORE)
        place = bisect_right(self._marks, block.born, key=lambda mark: mark.time)
        return self._marks[max(0, place - 1)].owner

    def _kind(self, block: Block) -> str:
        """Return what the looks say torch used an allocation for, "" where they say nothing."""
        for look in self._looks:
            if block.born <= look.time < block.died and block.address in look.kinds:
                return look.kinds[block.address]
        return ""


def file_name(nodeid: str) -> str:
    """Return the name of the file for a test's snapshot: readable, and no other test's."""
    readable = re.sub(r"[^\w.\-\[\]]+", "-", nodeid.replace("::", "-"))[-80:].strip("-.")
    digest = hashlib.sha256(nodeid.encode("utf-8", "backslashreplace")).hexdigest()[:8]
    return f"{readable}-{digest}.pickle"


def _save(snapshot: dict[str, Any], nodeid: str, directory: Path) -> str:
    """Write a snapshot that says which test it is of; return its path, "" where it cannot be."""
    import pickle

    path = directory / file_name(nodeid)
    stamped = snapshot | {"gpumem": {"nodeid": nodeid, "pid": os.getpid()}}
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            pickle.dump(stamped, file, protocol=4)
        aside.replace(path)
    except OSError as error:
        note_failure("writing a snapshot", error)
        return ""
    return str(path)


def left(known: Known) -> tuple[Alive, ...]:
    """Return what tensors hold now, by shape and owner, see ``Recordings.left``."""
    from pytest_gpumem.tracking import torch_heap

    test, meters = known.turns.test, known.meters
    owners = known.owners("" if test is None else test.name)
    with torch_heap.still_heap():
        heap = torch_heap.scan(_on_card)
        kinds = torch_heap.kinds(heap) if heap.storages else {}
    meters.boundary()
    names = {uuid: name for name, uuid in meters.uuids().items()}
    sizes = {meter.card.uuid: meter.last.asked[0] for meter in meters}
    return tuple(
        Alive(uuid, "failed", size, _by_shape(heap, names[uuid], owners, kinds, size))
        for uuid, size in sizes.items()
        if uuid in names
    )


def _by_shape(
    heap: Heap, device: str, owners: dict[int, str], kinds: dict[int, str], allocated: int
) -> tuple[AliveGroup, ...]:
    """Return the storages on a device by shape, type, owner and kind; they sum to ``allocated``."""
    found: dict[tuple[Any, ...], AliveGroup] = {}
    for address, storage in heap.storages.items():
        if storage.device != device:
            continue
        owner = owners.get(address, alive.THIS_TEST)
        key = storage.shape, storage.dtype, owner, kinds[address]
        before = found.get(key, AliveGroup(0, owner, kinds[address], "", 0, *key[:2]))
        found[key] = before._replace(
            size=before.size + storage.size, allocations=before.allocations + 1
        )
    rest = allocated - sum(group.size for group in found.values())
    none = [AliveGroup(rest, "no Python tensor", alive.UNKNOWN, "", 0)] if rest > 0 else []
    return alive.bounded((*found.values(), *none))


def _on_card(tensor: Any) -> bool:
    return tensor.device.type not in ("cpu", "meta")


def _now() -> int:
    return clock.time_ns() // 1000

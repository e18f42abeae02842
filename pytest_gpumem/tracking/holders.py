"""Finds who holds the tensors that outlived a test, in words a person can act on."""

from __future__ import annotations

import gc
import math
import sys
import weakref
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gpumem.clock import clock
from pytest_gpumem.records import Holder
from pytest_gpumem.tracking import sentences
from pytest_gpumem.tracking.reach import ways_down
from pytest_gpumem.tracking.torch_heap import (
    Heap,
    Storage,
    namespace,
    scan,
    still_heap,
)
from pytest_gpumem.tuples import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Mapping

    from pytest_gpumem.devices import Array
    from pytest_gpumem.tracking.torch_heap import OnCard

_MAX_OBJECTS = 20_000
_MAX_CPU_SECONDS = 2.0
"""A search that found no root within these is cut, and says so.

Of this thread's CPU time: on a busy machine a leak must not lose its holders.
"""

_MANY = 150
"""From this many objects on, one look at every object's referents beats ``gc.get_referrers``."""

_NOBODY = "no Python object (probably a library or an autograd graph)"
_UNKNOWN = "unknown holder (the search was cut)"


@dataclass(frozen=True)
class Holding:
    """Storages of one device that are held at one place."""

    where: str
    fixture: str | None
    """Label of the fixture whose value holds them."""
    storages: tuple[Storage, ...]
    """Largest first."""
    lives: bool
    """Whether what holds each of them certainly lives: other roots may be garbage themselves."""
    top: Callable[[], object] | None
    """Returns the root that holds one of them, or None; None where it cannot be found again."""

    @property
    def size(self) -> int:
        """Bytes of all storages."""
        return sum(storage.size for storage in self.storages)

    def record(self) -> Holder:
        """Return the record of this group: the size of all, the shape of the largest."""
        largest = self.storages[0]
        return Holder(
            where=self.where,
            shape=largest.shape,
            dtype=largest.dtype,
            size=self.size,
            tensors=len(self.storages),
        )


def live_storages(on_card: OnCard) -> list[Storage]:
    """Return the storages of all living tensors for which ``on_card(tensor)`` is true.

    Storages that only an autograd graph holds are among them. Nothing is kept alive. One pass
    over the garbage collector's heap (about 0.1 s with torch and a model library loaded).
    """
    with still_heap():
        return list(scan(on_card).storages.values())


def find_holders(
    on_card: OnCard,
    *,
    fixtures: Mapping[int, str] | None = None,
    arrays: Callable[[], Iterable[Array]] = tuple,
    known: Container[int] = (),
    root: Path | None = None,
) -> list[Holding]:
    """Return who holds the living storages for which ``on_card(tensor)`` is true.

    Args:
        on_card: tells by its tensor whether a storage counts.
        fixtures: ``id()`` of living fixture values, and of the code of fixtures that are suspended
            in their generators, and how to name them; storages that are reached through one have
            that name as their ``fixture``.
        arrays: yields those of other frameworks that count as well; none may be kept by it.
        known: addresses of storages to leave out.
        root: directory below which files are named by their path; the working directory
            unless given. Elsewhere the dotted module name is shown.

    Returns:
        Groups, the one with most bytes first. Storages reached through the same name (a model's
        parameters, the entries of a cache) are one group.

    The search goes backwards from the tensors to the nearest name in a module, a class, a
    function, a cache or a frame, and leaves no reference behind.

    """
    with still_heap():
        heap = scan(on_card)
        _add_arrays(heap, arrays())
        wanted = [tensor for tensor, address in heap.tensors.items() if address not in known]
        search = _Search(heap, fixtures or {}, wanted)
        search.run()
        return search.groups(root or Path.cwd())


def find_below(
    tops: Iterable[object],
    addresses: set[int],
    *,
    fixtures: Mapping[int, str],
    root: Path | None = None,
) -> list[Holding]:
    """Return who of ``tops`` holds the storages at ``addresses``; nothing if they do not hold all.

    Those count that still are roots or fixtures. The way down from one is short, where
    ``find_holders`` passes over all objects once for each step up. The other arguments as there.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return []
    with still_heap(), torch._C.DisableTorchFunctionSubclass():
        search = _Search(Heap(), fixtures, [])
        left = set(addresses)
        for each in tops:
            search.descend(each, left)
        return [] if left else search.groups(root or Path.cwd())


def _add_arrays(heap: Heap, arrays: Iterable[Array]) -> None:
    """Add arrays of other frameworks; those that share their memory are one storage."""
    for thing, address, size, device, shape, dtype in arrays:
        known = heap.storages.get(address)
        if known is None or math.prod(shape) > math.prod(known.shape):
            heap.storages[address] = Storage(address, size, device, shape, dtype)
        heap.tensors[heap.add(thing)] = address


class _Search:
    """A breadth-first search from tensors back to roots; objects are named by their ids.

    No container here holds an object but ``heap.objects``, so the search never finds itself.
    """

    def __init__(self, heap: Heap, fixtures: Mapping[int, str], wanted: list[int]) -> None:
        self.heap = heap
        self.fixtures = {**fixtures}
        self.wanted = wanted
        self.holds: dict[int, dict[int, str | None]] = {}
        """What each holder holds, and how it reaches it where that is known already."""
        self.seen: set[int] = set()
        self.roots: list[int] = []
        self.cut = heap.cut
        """Whether there may be holders that were not looked for."""

    def run(self) -> None:
        """Search until every wanted storage has a root, or nothing is left to ask about."""
        for _, frame in sentences.running_frames():
            for value in sentences.local_variables(frame).values():
                self.heap.link(frame, "", value)
        self._climb([each for each in self.wanted if self._enter(each)])
        deadline = clock.thread_time() + _MAX_CPU_SECONDS
        asked: set[int] = set()
        while waiting := self._undecided() - asked:
            if clock.thread_time() >= deadline or len(self.seen) >= _MAX_OBJECTS:
                self.cut = True
                return
            # Who else holds what a known link leads through matters only if that led to no root.
            level = [each for each in waiting if each not in self.heap.links] or list(waiting)
            asked.update(level)
            self._climb(self._ask_collector(level))

    def descend(self, top: object, left: set[int]) -> None:
        """Search from the root ``top`` down for the storages ``left``, and take out what is found.

        What another root or fixture holds is not looked at: it would have that one's name.
        """
        if self._enter(self.heap.add(top)):
            return  # it was the value of a fixture that is torn down
        found, above = ways_down(top, left, self.heap, self.fixtures)
        self.wanted += found
        while found:
            each = found.pop()
            if each in above:
                holder, step = above[each]
                self.holds.setdefault(holder, {})[each] = step
                found.append(holder)

    def groups(self, root: Path) -> list[Holding]:
        """Return the wanted storages by the place that holds them."""
        above, held_by = self._trace(), self._held_by()
        members: dict[tuple[str, ...], list[_Held]] = {}
        for address, tensors in self._by_address().items():
            storage = self.heap.storages[address]
            chains = [self._chain(each, above) for each in tensors if each in above]
            chain = min(chains, key=len, default=[])
            place, fixture = self._place(chain, root) if chain else self._rootless(tensors, held_by)
            graph = ".grad_fn" if ".grad_fn" in place.steps else ""
            key = (storage.device, fixture, place.name, graph)
            lives = any(self._lives(chain[0].thing) for chain in chains)
            top = _again(chain[0].thing) if chain else None
            members.setdefault(key, []).append(_Held(place, storage, lives, top))
        groups = [_group(fixture, each) for (_, fixture, *_), each in members.items()]
        return sorted(groups, key=lambda group: -group.size)

    def _enter(self, each: int) -> bool:
        """Note that ``each`` was seen; tell whether the search goes on from it."""
        if each in self.seen:
            return False
        self.seen.add(each)
        thing = self.heap.objects[each]
        code = sentences.suspended_code(thing)
        if code is not None and id(code) in self.fixtures:
            self.fixtures[each] = self.fixtures[id(code)]
        if each in self.fixtures or sentences.is_root(thing):
            self.roots.append(each)
            return False
        return True

    def _climb(self, level: list[int]) -> None:
        """Follow the known links upwards from ``level``."""
        waiting = deque(level)
        while waiting:
            held = waiting.popleft()
            for holder, step in self.heap.links.get(held, ()):
                self.holds.setdefault(holder, {})[held] = step
                if self._enter(holder):
                    waiting.append(holder)

    def _ask_collector(self, level: list[int]) -> list[int]:
        """Return the holders of the objects in ``level`` that were not seen before."""
        new = []
        wanted = set(level)
        for holder in self._referrers(level):
            if holder is self.heap.objects or sentences.is_ours(holder):
                continue
            held = wanted.intersection(map(id, gc.get_referents(holder)))
            known = self.holds.setdefault(self.heap.add(holder), {})
            known.update((each, None) for each in held if each not in known)
            if self._enter(id(holder)):
                new.append(id(holder))
        return new

    def _referrers(self, level: list[int]) -> list[object]:
        if len(level) < _MANY:
            asked = tuple(self.heap.objects[each] for each in level)
            # From Python 3.13 on our own tuple of arguments is among the referrers.
            return [each for each in gc.get_referrers(*asked) if each is not asked]
        ids = set(level)
        return [
            each for each in gc.get_objects() if not ids.isdisjoint(map(id, gc.get_referents(each)))
        ]

    def _trace(self) -> dict[int, int]:
        """Return for everything below a root what holds it on the shortest way, itself at a root.

        Fixtures come first: what one of them holds is not somebody else's leak.
        """
        above: dict[int, int] = {}
        for of_fixture in (True, False):
            waiting = deque(each for each in self.roots if (each in self.fixtures) is of_fixture)
            above.update((each, each) for each in waiting if each not in above)
            while waiting:
                holder = waiting.popleft()
                for held in self.holds.get(holder, ()):
                    if held not in above:
                        above[held] = holder
                        waiting.append(held)
        return above

    def _by_address(self) -> dict[int, list[int]]:
        tensors: dict[int, list[int]] = {}
        for each in self.wanted:
            tensors.setdefault(self.heap.tensors[each], []).append(each)
        return tensors

    def _held_by(self) -> dict[int, list[int]]:
        held_by: dict[int, list[int]] = {}
        for holder, held in self.holds.items():
            for each in held:
                held_by.setdefault(each, []).append(holder)
        return held_by

    def _undecided(self) -> set[int]:
        """Return the tensors of storages without a root, and all that is known to hold them."""
        above = self._trace()
        held_by = self._held_by()
        waiting = [
            each
            for tensors in self._by_address().values()
            if not any(tensor in above for tensor in tensors)
            for each in tensors
        ]
        found = set(waiting)
        while waiting:
            new = [each for each in held_by.get(waiting.pop(), ()) if each not in found]
            found.update(new)
            waiting += new
        return found

    def _place(self, chain: list[sentences.Part], root: Path) -> tuple[sentences.Place, str]:
        """Return the place at the root of ``chain``, and its fixture."""
        fixture = self.fixtures.get(id(chain[0].thing), "")
        if fixture:
            return sentences.below(fixture, chain), fixture
        return sentences.place(chain, root), ""

    def _lives(self, root: object) -> bool:
        """Tell whether a root is known to be alive; what is not may be garbage."""
        return id(root) in self.fixtures or sentences.certainly_lives(root)

    def _chain(self, tensor: int, above: dict[int, int]) -> list[sentences.Part]:
        ids = [tensor]
        while above[ids[-1]] != ids[-1]:
            ids.append(above[ids[-1]])
        return self._parts(ids[::-1])

    def _parts(self, ids: list[int]) -> list[sentences.Part]:
        steps = [None, *(self.holds[holder][held] for holder, held in pairwise(ids))]
        return [
            sentences.Part(self.heap.objects[each], step)
            for each, step in zip(ids, steps, strict=True)
        ]

    def _rootless(
        self, tensors: list[int], held_by: dict[int, list[int]]
    ) -> tuple[sentences.Place, str]:
        """Return the place of a storage that no root reaches: a cycle, or a holder in C++."""
        ways = []
        for tensor in tensors:
            way = [tensor]
            while way[-1] in held_by and held_by[way[-1]][0] not in way:
                way.append(held_by[way[-1]][0])
            ways.append(way)
        way = max(ways, key=len)
        if len(way) == 1:
            return sentences.Place(_UNKNOWN if self.cut else _NOBODY), ""
        if way[-1] in held_by:
            start = way.index(held_by[way[-1]][0])
            found = sentences.cycle(self._parts([way[start], *way[start:][::-1]]))
            above = f"{_UNKNOWN} above "
            return found._replace(name=f"{above if self.cut else ''}{found.name}"), ""
        above = _UNKNOWN if self.cut else "no Python object"
        return sentences.rootless(above, self._parts(way[::-1])), ""


class _Held(NamedTuple):
    """A storage and the root that holds it, as for a ``Holding``."""

    place: sentences.Place
    storage: Storage
    lives: bool
    top: Callable[[], object] | None


def _group(fixture: str, members: list[_Held]) -> Holding:
    """Return one group of storages that have name and fixture in common."""
    storages = sorted((each.storage for each in members), key=lambda storage: -storage.size)
    where = sentences.common([each.place for each in members])
    lives = all(each.lives for each in members)
    return Holding(where, fixture or None, tuple(storages), lives, members[0].top)


def _again(root: Any) -> Callable[[], object] | None:
    """Return what finds ``root`` again, and does not keep it alive."""
    if type(root) is dict and sentences.is_root(root):
        name = str(root["__name__"])
        return lambda: namespace(sys.modules.get(name))
    try:
        return weakref.ref(root)
    except TypeError:
        return None

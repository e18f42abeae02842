"""Judges memory that stayed: who holds it, and how much of it is a leak."""

from __future__ import annotations

import gc
import os
import sys
import weakref
from collections import Counter
from types import MappingProxyType
from typing import TYPE_CHECKING

from pytest_gpumem import devices
from pytest_gpumem.tracking import release
from pytest_gpumem.tracking.last_places import LastPlaces
from pytest_gpumem.tracking.newcomers import Newcomers
from pytest_gpumem.tracking.reach import on_card
from pytest_gpumem.tuples import NamedTuple
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from pytest_gpumem.records import Holder
    from pytest_gpumem.tracking.holders import Holding

_BLOCK = 512
"""The allocator's unit: every size is rounded up to it (c10/cuda/CUDACachingAllocator.cpp)."""

_SLACK = 2**20
"""By so much a block of the large pool may be larger than asked for (ibid., ``should_split``)."""

WORKSPACES = 32 * 2**20
"""Memory that no tensor holds is a library's workspace up to this size, in bytes.

cuBLAS takes 8,519,680 bytes at its first use, 32 MiB on Hopper (``CUBLAS_WORKSPACE_CONFIG`` in
PyTorch's notes on CUDA); above that it is called a leak all the same.
"""


class Verdict(NamedTuple):
    """How much of what an owner left on a card is a leak, and who holds it."""

    leaked: int = 0
    holders: tuple[Holder, ...] = ()
    note: str = ""
    sure: bool = True
    """Whether all of it is held by what certainly lives, so that no collection would free it."""


Owned = tuple[str, str]
"""A test's or fixture's name, and a card's UUID."""

Verdicts = dict[Owned, Verdict]


class _Known(weakref.ref[object]):
    """A living storage or array: whose doing it is, and its size."""

    __slots__ = ("address", "number", "owner", "size")
    owner: str
    size: int
    """Bytes that were asked for."""
    number: int
    """In the order in which they were met."""
    address: int
    """Where a storage is; -1 for an array, which is none of torch's."""


class TensorLedger:
    """Knows whose doing each living tensor on a card is, without keeping any alive.

    Args:
        root: directory from which holders' files are named.

    """

    def __init__(self, root: Path | None = None) -> None:
        self._root = root
        self._fixtures: dict[int, str] = {}
        """Labels of living wider fixtures, by the identity of their values and code."""
        self._places = LastPlaces()
        self._known: dict[int, _Known] = {}
        """Living storages by address."""
        self._newcomers = Newcomers()
        self._leaves: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        """By identity, tensors that may have a gradient, which Python need not have met."""
        self._asked = 0
        """What the known storages asked for, in bytes."""
        self._unseen: int | None = None
        """Bytes that no tensor had asked for when all were looked at; None before that."""
        self._arrays: dict[int, _Known] = {}
        """Those of other frameworks, by identity: that of a dead one may be another's."""
        self._sure = False
        """Whether what stayed last was found to be held by what certainly lives."""
        self.newest = 0
        """Number of the storage that was met last."""
        self.freed = 0
        """Bytes of known storages that died since they were met or set aside."""
        self.late: Counter[str] = Counter()
        """By owner, the most that came back by storages which died after its teardown."""
        self.aside: frozenset[tuple[int, int]] = frozenset()
        """Address and bytes of what was there when a test left nothing and replaced something.

        Only what is as large takes its place: the allocator gives an address to others as well."""

    def add_fixture(self, label: str, value: object, function: object) -> tuple[int, ...]:
        """Note what a wider fixture holds its memory by; return the identities for its end.

        Identities only: the ledger must not be one more holder. Besides the value that is the
        code of a generator function, whose local variables live until the teardown.
        """
        code = getattr(function, "__code__", None)
        roots: tuple[int, ...] = (
            (id(value),) if gc.is_tracked(value) or isinstance(value, dict | list) else ()
        )
        roots += (id(code),) if code is not None else ()
        self._fixtures.update(dict.fromkeys(roots, label))
        return roots

    def drop_fixture(self, roots: tuple[int, ...]) -> None:
        """Forget a wider fixture whose teardown begins."""
        for root in roots:
            self._fixtures.pop(root, None)

    def remember(self, owner: str, asked: Callable[[], int]) -> None:
        """Lay all tensors that are not known yet at the door of ``owner``.

        Those that were set aside, or took the place of one, are at nobody's. ``asked`` tells
        the bytes that torch's allocators count as asked for: while the known storages do not add
        up to them, there are others to be found. To look at all objects takes a tenth of a second.
        """
        from pytest_gpumem.tracking import holders
        from pytest_gpumem.tracking.torch_heap import no_collections, scan

        def note(tensor: Tensor) -> bool:
            if on_card(tensor):
                self._note(tensor, owner)
            return False

        looks = (
            lambda: scan(note, self._newcomers.take()),
            lambda: scan(note, list(self._leaves.values())),
            lambda: holders.live_storages(note),
        )
        with no_collections():  # else what is freed meanwhile would be in only one of the sums
            all_asked = asked()
            for look in looks:
                if self._unseen is not None and self._asked + self._unseen == all_asked:
                    break
                look()
            else:
                self._unseen = all_asked - self._asked
                self._newcomers.watch()
        self._remember_arrays(owner)
        self.aside = frozenset()
        self.freed = 0

    def _note(self, tensor: Tensor, owner: str) -> None:
        """Take note of a living tensor on a card."""
        if self._find(tensor) is None:
            storage = tensor.untyped_storage()
            address, size = storage.data_ptr(), storage.nbytes()
            whose = "" if (address, size) in self.aside else owner
            self._known[address] = self._meet(storage, whose, size, address)
            self._asked += size
        if tensor.requires_grad and tensor.is_leaf:
            self._leaves[id(tensor)] = tensor

    def owners(self) -> Iterator[tuple[int, str]]:
        """Yield address and owner of what is known to live; "" of what was only set aside."""
        yield from ((address, "") for address, _ in self.aside)
        # To list the pairs would make tuples, at each of which garbage may be collected and die.
        yield from ((at, known.owner) for at, known in self._known.copy().items())

    def set_aside(self) -> None:
        """Lay what is there now, or takes its place, at no later test's door.

        What ``remember`` does exactly, at a tenth of its cost or less: for each test that trains
        a wider fixture's model, and replaces its gradients, a pass over the heap is too dear.
        """
        self.aside = devices.living_blocks()
        self.freed = 0

    def _remember_arrays(self, owner: str) -> None:
        """Lay the arrays of other frameworks that are not known yet at the door of ``owner``."""
        alive: dict[int, _Known] = {}
        for thing, _, size, *_ in devices.living_arrays():
            known = self._arrays.get(id(thing))
            alive[id(thing)] = (
                known if known is not None and known() is thing else self._meet(thing, owner, size)
            )
        self._arrays = alive

    def _meet(self, thing: object, owner: str, size: int, address: int = -1) -> _Known:
        known = _Known(thing, self._note_death)
        self.newest += 1
        known.owner, known.size, known.number, known.address = owner, size, self.newest, address
        return known

    def _note_death(self, known: _Known) -> None:
        if self._known.get(known.address) is known:
            del self._known[known.address]
            self._asked -= known.size
        size = _block(known.size)
        self.freed += size
        self.late[known.owner] += size + (_SLACK if size > _SLACK else 0)

    def second_look(
        self,
        errors: Sequence[BaseException],
        stayed: Callable[[], bool],
        judge: Callable[[], Verdicts],
    ) -> Verdicts:
        """Give back what nobody needs, and return the verdicts on what stays all the same.

        ``stayed`` says whether memory is still held; ``errors`` are what ended a test. To collect
        all garbage takes longer than to search for holders, and is needless if they are found to
        live: then it is searched first, as soon as that was so the last time.
        """
        release.give_back(errors, stayed)
        if not stayed():
            return {}
        verdicts = judge() if self._sure else {}
        if not _sure(verdicts):
            gc.collect()
            self._sure = False
            if not stayed():
                return {}
            verdicts = judge()
            self._sure = _sure(verdicts)
        return verdicts

    def judge(
        self,
        stayed: Mapping[Owned, int],
        cards: Mapping[str, str],
        keepers: Mapping[int, str],
        passing: Mapping[int, str],
        test: str,
    ) -> Verdicts:
        """Return the verdict for each owner and card; all that lives has been met.

        Args:
            stayed: bytes that came to stay.
            cards: UUIDs by torch's device (``cuda:0``).
            keepers: labels of objects, by identity; what one of them holds is a leak, as
                opposed to what a living wider fixture holds.
            passing: labels of objects that will be dropped in a moment.
            test: the owner of what swapped with as much that was there before, and was not met.

        """
        inside = f"{self._root}{os.sep}"
        stacks = {
            address: tuple(frame.removeprefix(inside) for frame in stack)
            for address, stack in devices.allocation_stacks().items()
        }
        rightful = self._rightful(passing)
        labels = {**keepers, **rightful}
        verdicts: Verdicts = {}
        for owner in {name for name, _ in stayed}:
            theirs = {each: size for each, size in stayed.items() if each[0] == owner}

            def verdict(made: list[Holding], theirs: Mapping[Owned, int] = theirs) -> Verdicts:
                return _verdicts(theirs, made, cards, set(rightful.values()), stacks)

            def mine(known: _Known | None, owner: str = owner) -> bool:
                return (known.owner if known else test) == owner

            verdicts |= self._search(mine, labels, verdict)
        return verdicts

    def judge_since(
        self,
        number: int,
        stayed: Mapping[Owned, int],
        cards: Mapping[str, str],
        passing: Mapping[int, str],
        others: Collection[str] = (),
    ) -> Verdicts:
        """Return the verdicts on what was met after the storage of this ``number``.

        All that lives has been met. What owners of the names ``others`` made is not judged. The
        other arguments as for ``judge``; all that stayed is one owner's.
        """
        rightful = self._rightful(passing)

        def verdict(made: list[Holding]) -> Verdicts:
            return _verdicts(stayed, made, cards, set(rightful.values()))

        def mine(known: _Known | None) -> bool:
            return known is not None and known.number > number and known.owner not in others

        return self._search(mine, rightful, verdict)

    def _search(
        self,
        mine: Callable[[_Known | None], bool],
        labels: Mapping[int, str],
        verdict: Callable[[list[Holding]], Verdicts],
    ) -> Verdicts:
        """Return the ``verdict`` on who holds what is ``mine``.

        It is looked first where the last was found: that is cheap, and seldom in vain.
        """
        from pytest_gpumem.tracking.holders import find_holders

        addresses = {each.address for each in self._known.copy().values() if mine(each)}
        verdicts = verdict(self._places.find(addresses, labels, self._fixtures, self._root))
        if not _sure(verdicts):
            made = find_holders(
                lambda tensor: on_card(tensor) and mine(self._find(tensor)),
                arrays=lambda: (
                    each for each in devices.living_arrays() if mine(self._find_array(each.thing))
                ),
                fixtures=labels,
                root=self._root,
            )
            self._places.note(made, self._fixtures)
            verdicts = verdict(made)
        return verdicts

    def _rightful(self, passing: Mapping[int, str]) -> dict[int, str]:
        """Return the labels of all that may hold memory."""
        rightful = self._fixtures | _last_errors()
        return rightful | {key: label for key, label in passing.items() if key not in rightful}

    def _find(self, tensor: Tensor) -> _Known | None:
        """Return what is known of the storage of ``tensor``."""
        known = self._known.get(tensor.untyped_storage().data_ptr())
        return known if known is not None and known() is not None else None

    def _find_array(self, thing: object) -> _Known | None:
        """Return what is known of an array of another framework."""
        known = self._arrays.get(id(thing))
        return known if known is not None and known() is thing else None


def _last_errors() -> dict[int, str]:
    """Return what pytest keeps of the last failure until the next test is called."""
    errors = (getattr(sys, name, None) for name in ("last_exc", "last_value"))
    return {id(each): "sys.last_value, until the next test" for each in errors if each is not None}


def _verdicts(
    stayed: Mapping[Owned, int],
    made: list[Holding],
    cards: Mapping[str, str],
    fixtures: set[str],
    stacks: Mapping[int, tuple[str, ...]] = MappingProxyType({}),
) -> Verdicts:
    verdicts = {}
    for (name, uuid), size in stayed.items():
        here = [each for each in made if cards.get(each.storages[0].device) == uuid]
        verdicts[name, uuid] = _verdict(size, here, stacks, fixtures)
    return verdicts


def _verdict(
    stayed: int, made: list[Holding], stacks: Mapping[int, tuple[str, ...]], fixtures: set[str]
) -> Verdict:
    rightful = [each for each in made if each.fixture in fixtures]
    own = [each for each in made if each not in rightful]
    notes = [f"{format_bytes(each.size)} held by {each.fixture}" for each in rightful]
    rest = max(0, stayed - _blocks(rightful))
    held = min(rest, _blocks(own) + _slack(own))
    unheld = max(0, rest - held - _slack(rightful))
    if 0 < unheld <= WORKSPACES:
        size = format_bytes(unheld)
        notes.append(f"{size} held by no Python tensor or array (probably a library's workspace)")
    leaked = held + (unheld if unheld > WORKSPACES else 0)
    holders = tuple(_within(leaked, own, stacks))
    sure = not unheld and all(each.lives for each in made)
    return Verdict(leaked, holders, "; ".join(notes), sure)


def _sure(verdicts: Verdicts) -> bool:
    return bool(verdicts) and all(each.sure for each in verdicts.values())


def _within(
    leaked: int, groups: list[Holding], stacks: Mapping[int, tuple[str, ...]]
) -> Iterator[Holder]:
    """Yield the holders of ``leaked`` bytes; they never sum to more.

    A test may make more than that which lives on, where it replaced what an earlier one leaked.
    Groups that fit are named first; of one that does not, only a part is this leak.
    """
    rest = leaked
    larger = []
    for each in groups:
        if each.size <= rest:
            rest -= each.size
            yield _holder(each, stacks)
        else:
            larger.append(each)
    if larger and rest >= _BLOCK:
        yield _holder(larger[0], stacks)._replace(size=rest, whole=larger[0].size)


def _block(size: int) -> int:
    """Return the bytes that a storage of ``size`` takes in the allocator."""
    return -(-size // _BLOCK) * _BLOCK


def _blocks(groups: list[Holding]) -> int:
    """Return the bytes that the storages of ``groups`` take in the allocator."""
    return sum(_block(storage.size) for each in groups for storage in each.storages)


def _slack(groups: list[Holding]) -> int:
    sizes = (storage.size for each in groups for storage in each.storages)
    return sum(_SLACK for size in sizes if size > _SLACK)


def _holder(held: Holding, stacks: Mapping[int, tuple[str, ...]]) -> Holder:
    return held.record()._replace(stack=stacks.get(held.storages[0].address, ()))

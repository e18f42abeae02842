"""Judges memory that stayed: who holds it, and how much of it is a leak."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem import devices
from pytest_gpumem.tracking.holders import Held, find_holders, live_storages
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    from pytest_gpumem.records import Holder

_BLOCK = 512
"""The allocator's unit: every size is rounded up to it (c10/cuda/CUDACachingAllocator.cpp)."""

_SLACK = 2**20
"""A block of the large pool may be this much larger than asked for, because a smaller rest is
not split off (ibid., ``should_split``)."""

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


Owned = tuple[str, str]
"""A test's or fixture's name, and a card's UUID."""

Verdicts = dict[Owned, Verdict]


class TensorLedger:
    """Knows whose doing each living tensor on a card is, without keeping any alive.

    Args:
        root: directory from which holders' files are named.

    """

    def __init__(self, root: Path | None = None) -> None:
        self._root = root
        self._owners: dict[int, tuple[weakref.ref[object], str]] = {}
        """By address: the storage, because an address is used again, and who made it."""

    def remember(self, owner: str) -> None:
        """Lay all tensors that are not known yet at the door of ``owner``."""
        alive: dict[int, tuple[weakref.ref[object], str]] = {}

        def note(tensor: Tensor) -> bool:
            if _on_card(tensor):
                storage = tensor.untyped_storage()
                known = self._owner(tensor)
                alive[storage.data_ptr()] = (weakref.ref(storage), known or owner)
            return False

        live_storages(note)
        self._owners = alive

    def judge(
        self,
        stayed: Mapping[Owned, int],
        cards: Mapping[str, str],
        fixture_values: Mapping[int, str],
        keepers: Mapping[int, str],
        test: str,
    ) -> Verdicts:
        """Return the verdict for each owner and card.

        Args:
            stayed: bytes that came to stay.
            cards: UUIDs by torch's device (``cuda:0``).
            fixture_values: labels of wider fixtures by the identity of their values; what one of
                them holds is no leak.
            keepers: labels of other objects, by identity; what one of them holds is a leak.
            test: the owner of all tensors that nobody is known to have made.

        """
        verdicts = {}
        stacks = devices.allocation_stacks()
        for owner in {name for name, _ in stayed}:
            made = find_holders(
                self._made_by(owner, test),
                fixtures={**keepers, **fixture_values},
                root=self._root,
            )
            for (name, uuid), size in stayed.items():
                if name == owner:
                    here = [each for each in made if cards.get(each.storages[0].device) == uuid]
                    verdicts[name, uuid] = _verdict(
                        size, here, stacks, set(fixture_values.values())
                    )
        self.remember(test)
        return verdicts

    def _made_by(self, owner: str, test: str) -> Callable[[Tensor], bool]:
        def made(tensor: Tensor) -> bool:
            return _on_card(tensor) and (self._owner(tensor) or test) == owner

        return made

    def _owner(self, tensor: Tensor) -> str:
        """Return who made the storage of ``tensor``, empty where that is not known."""
        ref, owner = self._owners.get(tensor.untyped_storage().data_ptr(), (None, ""))
        return owner if ref is not None and ref() is not None else ""


def _on_card(tensor: Tensor) -> bool:
    return tensor.device.type not in ("cpu", "meta")


def _verdict(
    stayed: int, made: list[Held], stacks: Mapping[int, tuple[str, ...]], fixtures: set[str]
) -> Verdict:
    rightful = [each for each in made if each.fixture in fixtures]
    own = [each for each in made if each not in rightful]
    notes = [f"{format_bytes(each.size)} held by {each.fixture}" for each in rightful]
    rest = max(0, stayed - _blocks(rightful))
    held = min(rest, _blocks(own) + _slack(own))
    unheld = max(0, rest - held - _slack(rightful))
    if 0 < unheld <= WORKSPACES:
        notes.append(f"{format_bytes(unheld)} held by no Python tensor (a library's workspace)")
    leaked = held + (unheld if unheld > WORKSPACES else 0)
    holders = tuple(_holder(each, stacks) for each in own) if leaked else ()
    return Verdict(leaked, holders, "; ".join(notes))


def _blocks(groups: list[Held]) -> int:
    """Return the bytes that the storages of ``groups`` take in the allocator."""
    sizes = (storage.size for each in groups for storage in each.storages)
    return sum(-(-size // _BLOCK) * _BLOCK for size in sizes)


def _slack(groups: list[Held]) -> int:
    sizes = (storage.size for each in groups for storage in each.storages)
    return sum(_SLACK for size in sizes if size > _SLACK)


def _holder(held: Held, stacks: Mapping[int, tuple[str, ...]]) -> Holder:
    return held.record()._replace(stack=stacks.get(held.storages[0].address, ()))

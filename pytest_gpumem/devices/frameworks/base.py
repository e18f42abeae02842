"""What the allocators of all frameworks beside torch have in common."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pytest_gpumem.devices.cards import find_cards
from pytest_gpumem.devices.notebook import note_failure
from pytest_gpumem.devices.reading import AllocatorReading
from pytest_gpumem.tuples import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from pytest_gpumem.records import Card


class Array(NamedTuple):
    """A living array on a card; whoever asks for it lets go of it at once."""

    thing: object
    """What a program refers to it by; it can be referred to weakly."""
    address: int
    """Which all arrays have in common that share their memory."""
    size: int
    """Bytes of that memory."""
    device: str
    """The framework's name and the index of its device: ``JAX:0``."""
    shape: tuple[int, ...]
    dtype: str


class Level(NamedTuple):
    """What a framework tells of one of its devices; bytes."""

    allocated: int
    reserved: int
    peak: int | None = None
    """The highest allocated: ever, or since its peak was set back; None where it is not told."""


class Framework(ABC):
    """An ``Allocator`` of a framework that is looked up in ``sys.modules`` and never imported.

    A framework says which of its devices are in use, without bringing any into use, and what it
    holds there. What may fail is asked here, and noted once; then the last reading is kept.
    """

    name: str
    exact_peaks = False
    """Whether it can set its peaks back. If not, what is known of a stretch of time is the highest
    ever where that has risen in it, and else the figures at its two ends."""

    def __init__(self) -> None:
        self._last: tuple[AllocatorReading, ...] = ()
        self._cards: dict[int, Card] = {}
        self._seen: dict[int, int] = {}
        """The highest ever, by device, when its peak was set back last."""
        self._highest: dict[int, int] = {}

    @abstractmethod
    def active(self) -> bool:
        """Whether it uses a card."""

    @abstractmethod
    def levels(self) -> Mapping[int, Level]:
        """Return what it holds, by its index of each device that is in use."""

    def ordinal(self, index: int) -> int:
        """Return CUDA's number of its device ``index``."""
        return index

    def uuid(self, index: int) -> str:  # noqa: ARG002  # those that tell one need it
        """Return the card's UUID where it tells one, else ""; of NVML's form, prefix and all."""
        return ""

    def things(self) -> Iterable[Any]:
        """Return what may be arrays on cards: one pass over the heap where there is no list."""
        return ()

    def array(self, thing: Any) -> Array | None:  # noqa: ARG002  # asked only of ``things``
        """Return what one of them holds of a card, None where it holds nothing."""
        return None

    def set_back(self, index: int) -> None:  # noqa: B027  # most need not
        """Set the framework's own peak of a device back, where it can."""

    def give_back(self) -> None:  # noqa: B027  # most need not
        """Give memory that is reserved but not allocated back to the driver, where it can."""

    def finish(self) -> None:  # noqa: B027  # most need not
        """Do what it put off: what is freed is to be free."""

    # As ``Allocator`` has them.

    def read(self) -> tuple[AllocatorReading, ...]:
        """Return one reading per device index; those that are not in use are empty."""
        if self.active():
            self._attempt("reading the memory statistics of", self._read)
        return self._last

    def _read(self) -> None:
        levels = self.levels()
        count = max(levels, default=-1) + 1
        self._last = tuple(self._reading(at, levels.get(at, Level(0, 0))) for at in range(count))

    def _reading(self, index: int, level: Level) -> AllocatorReading:
        allocated = max(0, level.allocated)
        ever = allocated if level.peak is None else level.peak
        self._highest[index] = ever
        risen = self.exact_peaks or ever > self._seen.get(index, 0)
        peak = max(ever if risen else 0, allocated)
        reserved = max(level.reserved, allocated)
        return AllocatorReading(allocated, peak, reserved, max(reserved, peak), 0, 0)

    def card(self, index: int) -> Card:
        """Return the card behind a device index, a nameless one where nothing tells it."""
        if index not in self._cards:
            self._cards[index] = self._find_card(index)
        return self._cards[index]

    def _find_card(self, index: int) -> Card:
        found, told = [each for each in find_cards().cards if each.kind == "cuda"], ""
        ordinal = index
        try:
            told, ordinal = self.uuid(index), self.ordinal(index)
        except Exception as error:
            note_failure(f"asking {self.name} which card its device {index} is", error)
        for card in found:
            if told and _bare(card.uuid) == _bare(told):
                return card
        # CUDA may tell a MIG slice by its GPU's UUID.
        if ordinal < len(found):
            return found[ordinal]
        from pytest_gpumem.records import Card

        return Card(f"{self.name}:{index}", f"{self.name} device {index}", 0)

    @property
    def used(self) -> Collection[int]:
        """The devices whose peaks were set back."""
        return self._seen.keys()

    def reset_peak(self, index: int) -> None:
        """Let the next peak be one of the time from now on, as far as the framework tells it."""
        self._seen[index] = self._highest.get(index, 0)
        self._attempt("setting back the peaks of", lambda: self.set_back(index))

    def release_cached(self) -> None:
        """Give memory that is reserved but not allocated back to the driver."""
        self._attempt("emptying the cache of", self.give_back)

    def settle(self) -> None:
        """Let what was freed be free, before a verdict on a leak."""
        self._attempt("finishing what was put off by", self.finish)

    def living(self) -> tuple[Array, ...]:
        """Return the living arrays; none where it cannot tell them."""
        found: list[Array] = []

        def look() -> None:
            for thing in self.things():
                # One whose making failed has not all that it should; a subclass may have slots.
                with suppress(Exception):
                    array = self.array(thing)
                    if array is not None and array.size > 0 and weakref.ref(thing):
                        found.append(array)

        self._attempt("looking for the arrays of", look)
        return tuple(found)

    def _attempt(self, what: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:
            note_failure(f"{what} {self.name}", error)


def _bare(uuid: str) -> str:
    return uuid.lower().removeprefix("gpu-").removeprefix("mig-")

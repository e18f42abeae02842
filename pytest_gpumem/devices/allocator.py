"""What this process holds on its cards, as each framework's own allocator counts it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Protocol

from pytest_gpumem.devices import frameworks, torch_private, torch_state
from pytest_gpumem.devices.cards import find_cards
from pytest_gpumem.devices.notebook import note_failure
from pytest_gpumem.devices.reading import AllocatorReading

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from pytest_gpumem.records import Card


class Allocator(Protocol):
    """One framework's view of its devices; its indexes are used by nobody else.

    No method raises into the suite: a framework that stops answering, as CUDA does after a
    sticky error, is noted once and keeps its last reading.
    """

    name: str
    exact_peaks: bool
    """Whether its peaks are those since they were set back; else it may have been higher."""

    @property
    def used(self) -> Collection[int]:
        """The devices whose peaks were set back: they may show no other trace of having been used.

        Their contexts stay all the same.
        """

    def active(self) -> bool:
        """Whether the framework has initialised its devices; about 1 us, initialises nothing."""

    def read(self) -> tuple[AllocatorReading, ...]:
        """Return one reading per device index; empty while inactive."""

    def card(self, index: int) -> Card:
        """Return the card behind a device index."""

    def reset_peak(self, index: int) -> None:
        """Make the current figures of a device its peaks."""

    def release_cached(self) -> None:
        """Give memory that is reserved but not allocated back to the driver."""

    def settle(self) -> None:
        """Wait for the devices and free library workspaces, before a verdict on a leak."""


class TorchAllocator:
    """torch's allocator, by its public statistics.

    ``face`` finds the initialised torch module, ``figures`` reads one device of it.
    """

    exact_peaks = True

    def __init__(
        self,
        name: str,
        face: Callable[[], Any | None],
        figures: Callable[[Any, int], AllocatorReading],
    ) -> None:
        self.name = name
        self.used: set[int] = set()
        self._face = face
        self._figures = figures
        self._last: tuple[AllocatorReading, ...] = ()
        self._cards: list[Card] = []

    def active(self) -> bool:
        """Whether torch has initialised the devices."""
        return self._face() is not None

    def read(self) -> tuple[AllocatorReading, ...]:
        """Return one reading per device index."""
        face = self._face()
        if face is None:
            return ()
        try:
            with torch_private.unnoticed():
                self._last = tuple([self._figures(face, at) for at in range(face.device_count())])
        except Exception as error:
            note_failure(f"reading the memory statistics of {self.name}", error)
        return self._last

    def card(self, index: int) -> Card:
        """Return the card behind a device index, a nameless one where nothing tells it."""
        if index >= len(self._cards):
            cuda = self.name == "torch.cuda"
            self._cards = [each for each in find_cards().cards if (each.kind == "cuda") is cuda]
        if index < len(self._cards):
            return self._cards[index]
        from pytest_gpumem.records import Card

        return Card(f"{self.name}:{index}", f"{self.name} device {index}", 0)

    def reset_peak(self, index: int) -> None:
        """Make the current figures of a device its peaks, unnoticed by the suite."""
        self.used.add(index)
        with torch_private.unnoticed():
            self._do("reset_peak_memory_stats", index)

    def release_cached(self) -> None:
        """Empty torch's cache."""
        self._do("empty_cache")

    def settle(self) -> None:
        """Synchronize the devices that hold memory; the others would get a context by it."""
        for index, reading in enumerate(self.read()):
            if reading.reserved:
                self._do("synchronize", index)
        self._guarded("clearing cuBLAS workspaces", torch_private.clear_workspaces)

    def _do(self, call: str, *arguments: Any) -> None:
        face = self._face()
        if face is not None:
            self._guarded(f"{self.name}.{call}", lambda: getattr(face, call)(*arguments))

    def _guarded(self, what: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:
            note_failure(what, error)


def _cuda_figures(cuda: Any, index: int) -> AllocatorReading:
    """Read the nested statistics: flattening them as ``memory_stats`` does costs 10x as much."""
    stats = cuda.memory_stats_as_nested_dict(index)
    allocated, reserved = stats["allocated_bytes"]["all"], stats["reserved_bytes"]["all"]
    requested = stats.get("requested_bytes", {}).get("all", {})  # not by every backend
    return AllocatorReading(
        allocated["current"],
        allocated["peak"],
        reserved["current"],
        reserved["peak"],
        stats["num_alloc_retries"],
        stats["num_ooms"],
        requested.get("current"),
        requested.get("peak"),
    )


def _accelerator_figures(accelerator: Any, index: int) -> AllocatorReading:
    """Read the flat statistics that every accelerator has; figures a backend lacks are zero."""
    stats = accelerator.memory_stats(index)
    return AllocatorReading(
        stats.get("allocated_bytes.all.current", 0),
        stats.get("allocated_bytes.all.peak", 0),
        stats.get("reserved_bytes.all.current", 0),
        stats.get("reserved_bytes.all.peak", 0),
        stats.get("num_alloc_retries", 0),
        stats.get("num_ooms", 0),
        stats.get("requested_bytes.all.current"),
        stats.get("requested_bytes.all.peak"),
    )


_registered: list[Allocator] = [
    TorchAllocator("torch.cuda", torch_state.cuda, _cuda_figures),
    TorchAllocator("torch.accelerator", torch_state.accelerator, _accelerator_figures),
]
_OF_TORCH = len(_registered)
_alone = -1
"""How many modules were loaded when no other framework was: until one more is, none is."""


def register(allocator: Allocator) -> None:
    """Measure another framework too; it stays for the life of the process."""
    _registered.append(allocator)


def any_loaded() -> bool:
    """Return whether a framework is loaded by which this process may come to use a card."""
    if "torch" in sys.modules or len(_registered) > _OF_TORCH:
        return True
    return len(sys.modules) != _alone and _others_loaded()


def _others_loaded() -> bool:
    """Return whether one is loaded beside torch and those that were registered."""
    global _alone  # noqa: PLW0603  # an attribute would take twice as long
    found = not sys.modules.keys().isdisjoint(frameworks.MODULES)
    _alone = -1 if found else len(sys.modules)
    return found


def allocators() -> tuple[Allocator, ...]:
    """Return the allocators whose framework is loaded and has initialised its devices."""
    every = _registered
    # Several times a test, and many a suite does not load any other.
    if len(sys.modules) != _alone and _others_loaded():
        every = [*_registered, *frameworks.loaded()]
    cuda, accelerator, *others = every
    # torch has one kind of accelerator at a time, and CUDA is the one that is asked for fastest.
    if cuda.active():
        return (cuda, *[each for each in others if each.active()]) if others else (cuda,)
    return tuple([each for each in (accelerator, *others) if each.active()])

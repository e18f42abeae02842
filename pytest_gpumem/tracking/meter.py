"""Reads the cards' allocators at each boundary, and says when their cache is worth keeping."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pytest_gpumem import devices
from pytest_gpumem.devices import Allocator, AllocatorReading
from pytest_gpumem.records import Card

ReleaseCache = Callable[[Card, AllocatorReading], bool]
"""Says whether the allocator's unused cache should go back to the driver after a test."""


SHARED_CACHE = 64 * 2**20
"""Unused cache worth the price of new segments when other processes want the card."""


def kept_cache(total: int, *, shared: bool) -> int:
    """Return the bytes of unused cache that a process may keep on a card of ``total`` bytes.

    On a shared card, cache above 64 MiB is memory that other processes cannot have; alone on
    it, only a cache above a quarter of the card is worth the new segments the next test pays.
    """
    return SHARED_CACHE if shared else total // 4


def release_when_shared(shared: bool) -> ReleaseCache:
    """Return the rule for giving back unused cache, all of it if it is too much."""

    def worth_it(card: Card, reading: AllocatorReading) -> bool:
        unused = reading.reserved - reading.allocated
        return unused > kept_cache(card.total, shared=shared)

    return worth_it


_NOTHING = AllocatorReading(
    allocated=0, allocated_peak=0, reserved=0, reserved_peak=0, retries=0, ooms=0
)


class Meter:
    """One card as one allocator sees it."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.last = _NOTHING
        self.process: int | None = None
        """This process's bytes by the driver's count."""
        self._process_read_at = -1
        """What was reserved when ``process`` was read."""

    def read_process(self) -> None:
        """Ask the driver for this process's bytes where the reserved memory has changed.

        The driver's answer costs milliseconds on a real card, and moves only with segments.
        """
        if self._process_read_at != self.last.reserved:
            self._process_read_at = self.last.reserved
            self.process = devices.own_bytes(self.card, self.last.reserved)


class Meters:
    """The cards that this process uses, as their allocators tell; read at each boundary.

    Peaks are set back there, so that each stretch of time between two has a peak of its own.

    Args:
        charge: called for each meter that moved, with its card's reading before and now.
        release_cache: decides whether an allocator's unused cache is given back.

    """

    def __init__(
        self,
        charge: Callable[[Meter, AllocatorReading, AllocatorReading], None],
        release_cache: ReleaseCache,
    ) -> None:
        self._charge = charge
        self._release_cache = release_cache
        self._meters: dict[tuple[str, int], Meter] = {}
        self.changed = 0
        """Net bytes, over all cards, since this was set to 0."""
        self._reading = False
        self._unwatch: Callable[[], None] | None = None

    def __iter__(self) -> Iterator[Meter]:
        """Return those of all cards that were used."""
        return iter(self._meters.values())

    @property
    def allocated(self) -> int:
        """Bytes allocated now, over all cards."""
        self.boundary()
        return sum(meter.last.allocated for meter in self)

    @property
    def reserved(self) -> dict[str, int]:
        """Bytes reserved at the last boundary, by card."""
        return {meter.card.uuid: meter.last.reserved for meter in self}

    def boundary(self) -> None:
        """Charge what changed since the last boundary."""
        active = devices.allocators()
        if not active or self._reading:
            return
        self._reading = True
        try:
            self.watch_peaks()
            for allocator in active:
                for index, reading in enumerate(allocator.read()):
                    meter = self._meters.get((allocator.name, index))
                    # Peaks were set back: if they are as they were, nothing was allocated.
                    if meter is None or meter.last != reading:
                        self._take(allocator, index, reading)
        finally:
            self._reading = False

    def watch_peaks(self) -> None:
        """Make a peak reset by a test end a stretch of time, as any other boundary does."""
        if self._unwatch is None:
            self._unwatch = devices.watch_peaks(self.boundary)

    def close(self) -> None:
        """Stop watching."""
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None

    def _take(self, allocator: Allocator, index: int, now: AllocatorReading) -> None:
        meter = self._meters.get((allocator.name, index))
        if meter is None:
            if not now.reserved_peak and not now.ooms:
                return  # never used: asking for the names of all cards of a big machine costs
            meter = Meter(allocator.card(index))
            self._meters[allocator.name, index] = meter
        before, meter.last = meter.last, now
        self.changed += now.allocated - before.allocated
        self._charge(meter, before, now)
        flat = now.flat()
        if now != flat:
            allocator.reset_peak(index)
            meter.last = flat

    def uuids(self) -> dict[str, str]:
        """Return the cards by the names that tensors give their devices."""
        return {
            f"{meter.card.kind}:{index}": meter.card.uuid
            for (_, index), meter in self._meters.items()
        }

    def settle(self) -> None:
        """Let what the allocators free a moment late be free."""
        for allocator in devices.allocators():
            allocator.settle()
        self.boundary()

    def release_caches(self) -> None:
        """Give back what the allocators keep unused, where that is wanted."""
        full = {
            name
            for (name, _), meter in self._meters.items()
            if self._release_cache(meter.card, meter.last)
        }
        for allocator in devices.allocators() if full else ():
            if allocator.name in full:
                allocator.release_cached()
                self.boundary()

"""Reads the cards' allocators at each boundary, and says when their cache is worth keeping."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pytest_gpumem import devices
from pytest_gpumem.devices import Allocator, AllocatorReading
from pytest_gpumem.records import Card, CardUsage
from pytest_gpumem.units import format_bytes

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


def _together(readings: list[AllocatorReading]) -> AllocatorReading:
    """Return the sum of what the allocators of one card say."""
    if len(readings) == 1:
        return readings[0]
    allocated, allocated_peak, reserved, reserved_peak, retries, ooms, *_ = map(
        sum, zip(*(each[:6] for each in readings), strict=True)
    )
    asked, asked_peak = map(sum, zip(*(each.asked for each in readings), strict=True))
    return AllocatorReading(
        allocated, allocated_peak, reserved, reserved_peak, retries, ooms, asked, asked_peak
    )


class _Part:
    """What one allocator holds of a card."""

    def __init__(self, allocator: Allocator, index: int, meter: Meter) -> None:
        self.allocator = allocator
        self.index = index
        self.meter = meter
        self.last = _NOTHING


class Meter:
    """One card as the allocators of this process see it together.

    Their figures are added. Of peaks the sum may be more than there was at any one time, where two
    allocators moved between the same two boundaries; of one that moved it is exact.
    """

    def __init__(self, card: Card) -> None:
        self.card = card
        self.parts: list[_Part] = []
        self.vague: frozenset[str] = frozenset()
        """Who moved last without telling its peak since the boundary before."""
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
            most = max((part.last.reserved for part in self.parts), default=0)
            self.process = devices.own_bytes(self.card, most)
            if self.process is not None and self.process < self.last.reserved:
                self._note_twice(self.process)

    def _note_twice(self, process: int) -> None:
        names = " and ".join(
            sorted(part.allocator.name for part in self.parts if part.last.reserved)
        )
        devices.note(
            f"{names} together say that they reserved {format_bytes(self.last.reserved)} of "
            f"{self.card.name}, of which the driver says this process uses "
            f"{format_bytes(process)}: one of them probably allocates from another one, and its "
            "memory is counted twice"
        )


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
        self._parts: dict[tuple[str, int], _Part] = {}
        self._meters: dict[str, Meter] = {}
        """By UUID."""
        self.changed = 0
        """Net bytes, over all cards, since this was set to 0."""
        self.moves = 0
        """How often anything changed at a boundary."""
        self.in_use = False
        """Whether any allocator was in use at the last boundary."""
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
    def asked_of_torch(self) -> int:
        """Bytes that torch's allocators count as asked for now, over all cards."""
        self.boundary()
        parts = self._parts.items()
        return sum(part.last.asked[0] for (name, _), part in parts if name.startswith("torch."))

    @property
    def reserved(self) -> dict[str, int]:
        """Bytes reserved at the last boundary, by card."""
        return {meter.card.uuid: meter.last.reserved for meter in self}

    def untouched(self, uuid: str) -> CardUsage:
        """Return the usage of a card on which this process did nothing."""
        held = sum(meter.last.allocated for meter in self if meter.card.uuid == uuid)
        return CardUsage(uuid, held, held, 0, 0, 0, 0, 0, None)

    def boundary(self) -> None:
        """Charge what changed since the last boundary."""
        active = devices.allocators()
        self.in_use = bool(active)
        if not active or self._reading:
            return
        self._reading = True
        moved: list[tuple[_Part, AllocatorReading]] = []
        try:
            if self._unwatch is None:
                self.watch_peaks()
            for allocator in active:
                for index, reading in enumerate(allocator.read()):
                    part = self._parts.get((allocator.name, index))
                    if part is None:
                        part = self._meet(allocator, index, reading)
                    # Peaks were set back: if they are as they were, nothing was allocated.
                    if part is not None and part.last != reading:
                        moved.append((part, reading))
            if moved:
                self._take(moved)
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

    def _meet(self, allocator: Allocator, index: int, now: AllocatorReading) -> _Part | None:
        """Return the part of a card that an allocator uses from now on, None while it does not."""
        if not now.reserved_peak and not now.ooms:
            return None  # never used: asking for the names of all cards of a big machine costs
        card = allocator.card(index)
        meter = self._meters.setdefault(card.uuid, Meter(card))
        part = self._parts[allocator.name, index] = _Part(allocator, index, meter)
        meter.parts.append(part)
        return part

    def _take(self, moved: list[tuple[_Part, AllocatorReading]]) -> None:
        """Charge what the parts of cards that moved did together, card by card."""
        self.moves += 1
        for part, now in moved:
            part.last = now
        for meter in dict.fromkeys(part.meter for part, _ in moved):
            here = [(part, now) for part, now in moved if part.meter is meter]
            vague = (part.allocator.name for part, _ in here if not part.allocator.exact_peaks)
            meter.vague = frozenset(vague)
            before, meter.last = meter.last, _together([part.last for part in meter.parts])
            self.changed += meter.last.allocated - before.allocated
            self._charge(meter, before, meter.last)
            meter.last = meter.last.flat()
            for part, now in here:
                part.last = now.flat()
                if now != part.last:
                    part.allocator.reset_peak(part.index)

    def uuids(self) -> dict[str, str]:
        """Return the cards by the names that tensors and arrays give their devices."""
        return {
            f"{part.meter.card.kind if name.startswith('torch.') else name}:{index}": (
                part.meter.card.uuid
            )
            for (name, index), part in self._parts.items()
        }

    def settle(self) -> None:
        """Let what the allocators free a moment late be free."""
        for allocator in devices.allocators():
            allocator.settle()
        self.boundary()

    def release_caches(self) -> None:
        """Give back what the allocators keep unused, where that is wanted."""
        full = {
            part.allocator.name
            for meter in self
            if self._release_cache(meter.card, meter.last)
            for part in meter.parts
            if part.last.reserved > part.last.allocated
        }
        for allocator in devices.allocators() if full else ():
            if allocator.name in full:
                allocator.release_cached()
                self.boundary()

"""How many workers there should be, and which card each of them sees first."""

from __future__ import annotations

import gc
import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pytest_gpumem import devices
from pytest_gpumem.clock import clock
from pytest_gpumem.tuples import NamedTuple
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from pytest_gpumem.devices.host import Host
    from pytest_gpumem.records import Card
    from pytest_gpumem.scheduling.history import Learned

VIEWS = "GPUMEM_WORKER_VIEWS"
"""Environment variable that tells a worker which cards the workers of its host may use; itself
comes last."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
WORKER_RAM = 2**30
"""Bytes of main memory set aside for a worker: an imported torch and its CUDA libraries take
about this much, and the suite's own data comes on top."""
_CPU_SHARE = 0.02
"""Tests without a card that take less of the time are not worth workers of their own."""


_AS_SHORT = 1.0
"""What fewer workers may cost of the shortest run."""


class WorkerCount(NamedTuple):
    """A number of workers, and in one line why."""

    workers: int
    reason: str


def worker_count(
    wanted: int,
    machine: Host,
    free: Sequence[int],
    learned: Iterable[Learned],
    *,
    context: int,
    headroom: int,
    scheduled: bool,
    each_ram: int = 0,
    packs_ram: bool = False,
) -> WorkerCount | None:
    """Return how many workers to start, None when there is nothing to reckon with.

    That is: no card of which anything was learned, and main memory neither learned nor asked for.

    Args:
        wanted: what xdist would start.
        machine: what there is.
        free: bytes free on each card.
        learned: what earlier runs taught, of any tests.
        context: bytes each process costs that uses a card.
        headroom: bytes of each card that are never given out.
        scheduled: whether the scheduler keeps idle contexts off the card. Then workers without
            a context can run tests without a card, and VRAM limits only a suite that has none.
        each_ram: bytes of main memory that a worker was seen to keep; 0 where that is not known.
        packs_ram: whether main memory was asked to be measured and shared: then it limits them also
            where nothing is known, and the scheduler keeps large tests apart.

    """
    known = list(learned)
    on_card = [test for test in known if test.gpu]
    by_card = bool(free and on_card)
    if not (by_card or each_ram or packs_ram):
        return None
    limits = [
        (max(1, wanted), "as xdist would start"),
        (machine.cpus, _plural(machine.cpus, "CPU")),
    ]
    if machine.ram is not None:
        most = min(count for count, _ in limits)
        packed = packs_ram and scheduled
        limits.append(_by_ram(machine.ram, each_ram, known, most, packed=packed))
    busy = sum(test.duration for test in on_card)
    nearly_all = busy >= (1 - _CPU_SHARE) * sum(test.duration for test in known)
    if by_card and (nearly_all or not scheduled):
        peak = max(test.peak for test in on_card)
        fit = sum(_contexts(size - headroom, peak, context) for size in free)
        text = f"{_plural(fit, 'context')} of {format_bytes(context)} beside the largest peak"
        limits.append((fit, f"VRAM holds {text} of {format_bytes(peak)}"))
    count, why = min(limits, key=lambda limit: limit[0])
    return WorkerCount(count, f"{_plural(count, 'worker')}: {why}")


def _by_ram(
    room: int, each: int, known: Sequence[Learned], most: int, *, packed: bool
) -> tuple[int, str]:
    """Return how many of ``most`` workers ``room`` bytes of main memory are for, and why.

    Where nothing keeps large tests apart, each worker may run the largest one at the same moment.
    Where the scheduler packs them, more workers make the run shorter until what these keep leaves
    too little for the tests: the fewest whose run is about as short as it can be.
    """
    from pytest_gpumem.scheduling.ram import run_time  # asked for by -n auto alone

    why = f"{format_bytes(room)} of main memory left"
    if not each:
        return max(1, room // WORKER_RAM), why
    largest = max((test.ram for test in known), default=0)
    why += f", of which a worker keeps {format_bytes(each)}"
    why += f" and the largest test takes {format_bytes(largest)}" if largest else ""
    if not packed or not largest:
        return max(1, room // (each + largest)), why
    tests = [(test.ram, test.duration) for test in known]
    counts = range(1, min(most, max(1, (room - largest) // each)) + 1)
    times = {count: run_time(tests, count, max(0, room - count * each)) for count in counts}
    shortest = min(times.values())
    return min(count for count in counts if times[count] <= _AS_SHORT * shortest), why


def _contexts(room: int, peak: int, context: int) -> int:
    """Return how many processes fit on a card while one of them runs the largest test."""
    return max(1, (room - peak) // context) if context > 0 else max(1, room // max(1, peak))


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def views(specs: Sequence[Any]) -> list[str]:
    """Return for each of xdist's gateways the text of its ``VIEWS``.

    What it and those before it on its host are given as ``CUDA_VISIBLE_DEVICES``, as far as that
    is known here: None for what they find on another host.
    """
    seen: dict[tuple[object, ...], list[str | None]] = {}
    texts = []
    for spec in specs:
        place = (spec.ssh, spec.vagrant_ssh, spec.socket, spec.via)
        found = None if any(place) else os.environ.get(VISIBLE)
        before = seen.setdefault(place, [])
        before.append(spec.env.get(VISIBLE, found))
        texts.append(json.dumps(before))
    return texts


def place(cards: Sequence[Card]) -> list[Card]:
    """Let this process see its own card first, if it is one of several workers.

    Must run before CUDA is initialised, which reads the variable once. Of ``cards``, the visible
    ones in CUDA's order, only the order is changed: tests that use two cards see two. A MIG slice
    is seen alone. Returns the cards that are visible now.
    """
    # Taken out: what a test starts is not a worker.
    told = os.environ.pop(VIEWS, "")
    if not told or any(card.kind != "cuda" for card in cards):
        return list(cards)
    mine = os.environ.get(VISIBLE)
    before: list[str | None] = json.loads(told)
    # What this one was given, or found, the others that were given as much did too.
    texts = [mine if text == before[-1] else text for text in before]
    allowed = {text: devices.cards_to_choose(text) for text in texts}
    if len(allowed[mine]) < 2:
        return list(cards)
    first = first_cards([allowed[text] for text in texts])[-1]
    seen = [first]
    if first in cards:
        at = cards.index(first)
        seen = [*cards[at:], *cards[:at]]
    os.environ[VISIBLE] = ",".join(card.uuid for card in seen)
    return seen


def first_cards(allowed: Sequence[Sequence[Card]]) -> list[Card]:
    """Return which card each worker of a host uses first, of those that it may.

    The one that fewest workers before it have; of these the largest, so that a large test has
    a worker to run it; of equal ones the first in the worker's own order. Who may use none is
    left out.
    """
    workers = Counter[str]()
    found = []
    for cards in filter(None, allowed):
        card = min(cards, key=lambda each: (workers[each.uuid], -each.total))
        workers[card.uuid] += 1
        found.append(card)
    return found


def host_name() -> str:
    """Return the name of this machine, by which its cards are told from those of others."""
    return platform.node()


def tell_cards(cards: Iterable[Card]) -> list[tuple[str, int, int]]:
    """Return what the scheduler must know of each card.

    Its UUID, and bytes: its total, what anybody uses of it.
    """
    return [(card.uuid, card.total, devices.used_bytes(card)) for card in cards]


class Holdings:
    """What this process keeps on the cards it uses.

    Args:
        context: bytes assumed for a process's context where the driver does not tell.

    """

    def __init__(self, context: int) -> None:
        self._context = context
        self._read: dict[str, tuple[int, int]] = {}
        """By card: what is kept, and what was reserved when that was found out."""

    def __call__(self) -> dict[str, int]:
        """Return the bytes that this process keeps by card, its context included."""
        for allocator in devices.allocators():
            for index, now in enumerate(allocator.read()):
                card = allocator.card(index)
                # A peak is forgotten with what it was the peak of, and a process whose first
                # request failed has none; the context stays.
                known = index in allocator.used or card.uuid in self._read
                if now.reserved_peak or now.ooms or known:
                    self._update(card, now.reserved)
        return {uuid: kept for uuid, (kept, _) in self._read.items()} if self._read else {}

    def _update(self, card: Card, reserved: int) -> None:
        # The driver takes a millisecond to answer, so it is asked only when something changed.
        if self._read.get(card.uuid, (0, -1))[1] == reserved:
            return
        told = devices.own_bytes(card, reserved)
        self._read[card.uuid] = told or self._context + reserved, reserved


class CardUse:
    """What anybody uses of the cards, looked at now and then."""

    EVERY = 1.0
    """Seconds between two looks."""

    def __init__(self, cards: Callable[[], Sequence[Card]]) -> None:
        self._cards = cards
        self.look_at = 0.0
        """When it is time to look again, by ``time.monotonic``."""

    def __call__(self) -> dict[str, int]:
        """Return the bytes in use by card; empty when it is too early to look again."""
        now = clock.monotonic()
        if now < self.look_at:
            return {}
        self.look_at = now + self.EVERY
        return {card.uuid: devices.used_bytes(card) for card in self._cards()}


class RamUse:
    """What this process keeps of main memory more than before its first test.

    Args:
        bound: bytes beyond which it is to be replaced; None: never.

    """

    STEP = 16 * 2**20
    """Bytes by which it has to change to be told again."""

    def __init__(self, bound: int | None) -> None:
        from pytest_gpumem.devices import host  # most runs do not watch their main memory

        self._resident = host.resident
        self._bound = bound
        self._first = self._resident() or 0
        self._told = 0
        self._large = False

    @property
    def problem(self) -> str:
        """In one sentence, why the bound is none; "" if it is one."""
        if self._bound is None or self._first <= self._bound:
            return ""
        return (
            f"--gpumem-worker-ram: a worker has {format_bytes(self._first)} before its first test, "
            f"more than {format_bytes(self._bound)}: none is replaced"
        )

    def __call__(self) -> tuple[int, int] | None:
        """Return the bytes, and all that it has if that is too much, else 0; None: nothing new."""
        now = self._resident() or 0
        grown = max(0, now - self._first)
        large = self._bound is not None and self._first <= self._bound < now
        if abs(grown - self._told) < self.STEP and large <= self._large:
            return None
        self._told, self._large = grown, large
        return grown, now if large else 0


def give_back() -> None:
    """Give what torn-down fixtures leave behind back to the driver."""
    active = devices.allocators()
    if active:
        gc.collect()
    for allocator in active:
        allocator.release_cached()

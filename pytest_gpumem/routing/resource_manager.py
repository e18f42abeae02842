"""Decides whether a task runs on a card or on the CPU, and sets aside what it was promised.

A reading of free memory alone would be stale before it is used: two workers that read the same
free bytes would both take them. So a task that is sent to a card holds a lease of its bytes.
"""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem import devices
from pytest_gpumem.clock import clock
from pytest_gpumem.errors import LeaseError
from pytest_gpumem.leases.api import store
from pytest_gpumem.leases.request import Want
from pytest_gpumem.records import Route
from pytest_gpumem.routing import thresholds as limits
from pytest_gpumem.scheduling.workers import Holdings
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.leases.store import Lease
    from pytest_gpumem.records import Card
    from pytest_gpumem.routing.thresholds import Thresholds

GPU_TASKS = frozenset({"math", "quantum", "tensor"})
"""Kinds of task that are worth a card, by the plan."""
CPU, GPU = "cpu", "cuda"
MIB = 2**20
_STATUS_EVERY = 0.005
"""Seconds that a status is good for."""
_log = logging.getLogger("pytest_gpumem")


class CardStatus(NamedTuple):
    """One card, in bytes, every process counted."""

    card: Card
    used: int
    free: int
    total: int

    @property
    def percent(self) -> float:
        """What is in use, 0 to 100."""
        return 100 * self.used / self.total if self.total else 0.0


class SystemStatus(NamedTuple):
    """How busy the machine is: percents are 0 to 100, None where the system does not tell."""

    cpu_percent: float | None
    ram_percent: float | None
    cards: tuple[CardStatus, ...]
    """Without those whose driver does not tell."""

    @property
    def vram_percent(self) -> float:
        """Of the fullest card; 0 without one."""
        return max((card.percent for card in self.cards), default=0.0)


class _Promise(NamedTuple):
    """Bytes that a task may take and may not have taken yet."""

    card: str
    size: int
    kept: int
    """What the process kept on the card when it was promised."""
    lease: Lease | None
    thread: threading.Thread


class Shared:
    """What all managers of a process have in common: the run's journal, promises, a ban."""

    def __init__(self) -> None:
        self.routes: list[Route] = []
        """Decisions since they were last taken away."""
        self.banned = ""
        """Why nothing may go to a card now, if so."""
        self.mutex = threading.RLock()
        self.promises: list[_Promise] = []

    def take_routes(self) -> list[Route]:
        """Return the decisions since the last call."""
        with self.mutex:
            routes, self.routes = self.routes, []
        return routes

    def give_back(self) -> None:
        """End every promise of this process: what was taken is by now kept, or given back."""
        with self.mutex:
            promises, self.promises = self.promises, []
        for promise in promises:
            if promise.lease is not None:
                try:
                    promise.lease.release()
                except LeaseError as error:
                    _log.warning("a reservation was lost: %s", error)

    @contextmanager
    def ban(self, reason: str) -> Iterator[None]:
        """Send everything to the CPU meanwhile."""
        self.banned = reason
        try:
            yield
        finally:
            self.banned = ""


shared = Shared()
"""This process's."""


class HybridResourceManager:
    """Sends tasks to the card or to the CPU; any thread may use it.

    Args:
        thresholds: from which on a task goes to the CPU; None: those of the run.
        device: CUDA's index of the card.

    """

    def __init__(self, thresholds: Thresholds | None = None, device: int = 0) -> None:
        self._thresholds = thresholds
        self._device = device
        self._status: tuple[float, SystemStatus] | None = None

    @property
    def thresholds(self) -> Thresholds:
        """From which on a task goes to the CPU."""
        return self._thresholds or limits.in_force

    def get_system_status(self) -> SystemStatus:
        """Return how busy the machine is; a figure may be some milliseconds old."""
        now = clock.monotonic()
        if self._status is None or now - self._status[0] > _STATUS_EVERY:
            self._status = now, _system_status()
        return self._status[1]

    def allocate_task(self, task_type: str, estimated_size_mb: float = 0) -> str:
        """Return where a task should run, ``"cuda"`` or ``"cpu"``, and set its memory aside.

        ``estimated_size_mb`` is in MiB. What is set aside stays so until ``release``, or until
        the test ends; ``task`` gives it back by itself.

        Raises:
            ValueError: when the size is negative.

        """
        if estimated_size_mb < 0:
            raise ValueError(f"estimated_size_mb={estimated_size_mb!r}; allowed is 0 or more")
        return self.route(task_type, int(estimated_size_mb * MIB)).device

    @contextmanager
    def task(self, task_type: str, estimated_size_mb: float = 0) -> Iterator[str]:
        """Yield where a task should run; what was set aside for it ends with the block."""
        with shared.mutex:
            before = len(shared.promises)
            device = self.allocate_task(task_type, estimated_size_mb)
            mine = shared.promises[before:]
        try:
            yield device
        finally:
            for promise in mine:
                with shared.mutex:
                    if promise in shared.promises:
                        shared.promises.remove(promise)
                if promise.lease is not None:
                    promise.lease.release()

    def release(self) -> None:
        """Give back all that was set aside in this process."""
        shared.give_back()

    def route(self, task_type: str, size: int = 0, *, gpu: bool | None = None) -> Route:
        """Decide where a task of ``size`` bytes runs, and note it.

        ``gpu`` says whether the task is worth a card; None: by its kind.
        """
        worth = task_type in GPU_TASKS if gpu is None else gpu
        device, reason = self._decide(task_type, size, worth=worth)
        route = Route(task_type, size, device, reason, fell_back=worth and device == CPU)
        with shared.mutex:
            shared.routes.append(route)
        return route

    def _decide(self, task_type: str, size: int, *, worth: bool) -> tuple[str, str]:
        if shared.banned:
            return CPU, shared.banned
        card = self._card()
        if card is None:
            return CPU, "there is no card"
        limits, reading = self.thresholds, devices.driver_reading(card)
        if reading is not None:
            if _part(reading) > limits.full:
                for allocator in devices.allocators():
                    allocator.release_cached()
                reading = devices.driver_reading(card) or reading
            if _part(reading) > limits.full:
                reason = f"{_part(reading):.0%} of the card are in use, above {limits.full:.0%}"
                _log.warning("%s goes to the CPU: %s", task_type, reason)
                return CPU, reason
            if size > limits.large and _part(reading) > limits.busy:
                return CPU, (
                    f"{format_bytes(size)} wanted, and {_part(reading):.0%} of the card are in "
                    f"use, above {limits.busy:.0%}"
                )
        if not worth:
            return CPU, f"{task_type!r} is not worth a card"
        if reading is not None and size > reading.free + _cached(card):
            free = format_bytes(reading.free)
            return CPU, f"{format_bytes(size)} wanted, {free} of the card are free"
        refusal = self._promise(card, size)
        if refusal:
            return CPU, refusal
        return GPU, "there is room"

    def _card(self) -> Card | None:
        cards = devices.find_cards().cards
        if self._device < len(cards) and cards[self._device].kind == GPU:
            return cards[self._device]
        return None

    def _promise(self, card: Card, size: int) -> str:
        """Set ``size`` bytes of ``card`` aside; return why not, if not."""
        if not size:
            return ""
        leases, uuid = store(), card.uuid
        with shared.mutex:
            kept = Holdings(limits.context)().get(uuid, 0)
            try:
                if not kept:
                    size += limits.context
                granted = leases.granted_here(uuid)
                lease = None
                if granted is not None:  # otherwise the whole card is this thread's
                    if not granted:
                        leases.set_resident(uuid, kept)
                    missing = size - (granted - self._taken(leases.resident(uuid), uuid, kept))
                    if missing > 0:
                        wants = {uuid: Want(missing)}
                        label = "a routed task"
                        lease = leases.acquire(wants, {uuid: card.total}, label, timeout=0)
            except LeaseError as error:
                return f"{format_bytes(size)} cannot be set aside: {error}"
            thread = threading.current_thread()
            shared.promises.append(_Promise(uuid, size, kept, lease, thread))
        return ""

    def _taken(self, resident: int, uuid: str, kept: int) -> int:
        """Return the bytes of this thread's leases that are in use or promised to somebody."""
        here = threading.current_thread()
        promises = [each for each in shared.promises if each.card == uuid and each.thread is here]
        open_ = sum(promise.size for promise in promises)
        if promises:  # as far as they have not been taken yet
            open_ = max(0, open_ - max(0, kept - promises[0].kept))
        return max(0, kept - resident) + open_


def get_resource_manager() -> HybridResourceManager:
    """Return the process's manager of the first card; under pytest it follows the settings."""
    return _the_one


_the_one = HybridResourceManager()


def get_sentence_transformer_device(size: int = 0) -> str:
    """Return ``"cuda"`` or ``"cpu"`` for a sentence transformer of ``size`` bytes.

    The CPU, with a warning in the log, when more than 80 % of the card is reserved by this
    process, when the model does not fit, or when that cannot be found out. The thresholds of
    other tasks hold too.
    """
    try:
        part = _reserved_part()
        limit = limits.in_force.transformers
        if part > limit:
            reason = f"{part:.0%} of the card are reserved, above {limit:.0%}"
            return _kept_off(size, reason)
        return _the_one.route("sentence_transformer", size, gpu=True).device
    except Exception as error:  # whatever it is, the CPU works
        return _kept_off(size, f"the card cannot be read: {error}")


def _kept_off(size: int, reason: str) -> str:
    with shared.mutex:
        shared.routes.append(Route("sentence_transformer", size, CPU, reason, fell_back=True))
    _log.warning("a sentence transformer goes to the CPU: %s", reason)
    return CPU


def _reserved_part() -> float:
    cards = {card.uuid: card.total for card in devices.find_cards().cards[:1]}
    for allocator in devices.allocators():
        for index, reading in enumerate(allocator.read()):
            total = cards.get(allocator.card(index).uuid)
            if total:
                return reading.reserved / total
    return 0.0


def _part(reading: devices.DriverReading) -> float:
    usable = reading.total - reading.reserved
    return 1 - reading.free / usable if usable else 0.0


def _cached(card: Card) -> int:
    """Return the bytes that this process's allocator holds and does not use."""
    held = devices.held(card)
    return held.reserved - held.allocated


def _system_status() -> SystemStatus:
    import psutil

    found = []
    for card in devices.find_cards().cards:
        reading = devices.driver_reading(card)
        if reading is not None:
            total = reading.total - reading.reserved
            found.append(CardStatus(card, total - reading.free, reading.free, total))
    return SystemStatus(psutil.cpu_percent(), psutil.virtual_memory().percent, tuple(found))

"""Taking model state off the card: archive it, free its VRAM, bring it back bit for bit.

A consolidated model sleeps: its parameters are empty until it is used again. Calling it, asking
for its state, or ``restore`` wakes it. Its VRAM is freed only after the archive is on the disk and
was read back; on any failure before that it stays as it was.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpumem import devices
from pytest_gpumem.errors import ArchiveError, NotFoundError, StateRefusedError
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pytest_gpumem.archive.store import ArchiveStore

ABOVE = 0.85
"""Part of a card in use from which on state should go: the plan's threshold for falling back."""
_log = logging.getLogger("pytest_gpumem")


class Consolidation(NamedTuple):
    """What ``consolidate_gpu_memory`` did; sizes in bytes."""

    context: str
    ids: tuple[str, ...]
    """Of the items that were archived, in order."""
    refused: tuple[str, ...]
    """Why items were not; they are as they were."""
    items: int
    bytes_before: int
    """Of the items' tensors."""
    bytes_after: int
    """Of the files they are in."""
    seconds: float
    freed_allocator: int
    """By which allocated memory fell in this process."""
    freed_driver: int | None
    """By which the cards' used memory fell, None where the driver does not tell."""

    @property
    def ratio(self) -> float:
        """Bytes after as a part of those before."""
        return self.bytes_after / self.bytes_before if self.bytes_before else 1.0

    def __str__(self) -> str:
        driver = (
            ""
            if self.freed_driver is None
            else f", {format_bytes(self.freed_driver)} by the driver"
        )
        return (
            f"consolidated {self.items} items{f' of {self.context}' if self.context else ''}: "
            f"{format_bytes(self.bytes_before)} to {format_bytes(self.bytes_after)} in "
            f"{self.seconds:.2f} s, freed {format_bytes(self.freed_allocator)}{driver}"
            + "".join(f"; refused: {each}" for each in self.refused)
        )


class _Sleeper(NamedTuple):
    """An item whose tensors are empty."""

    id: str
    data: Callable[[], Any]
    """Returns the item's data, None once nobody else has it."""
    handles: list[Any]
    """Of the hooks that wake it."""


class GpuConsolidator:
    """Archives the state that lies on cards when they fill up.

    Args:
        store: where to; None: ``ArchiveStore()``, opened when it is first needed.
        above: part of a card in use, 0 to 1, from which on ``should_consolidate`` says so.

    """

    def __init__(
        self, store: ArchiveStore | Callable[[], ArchiveStore] | None = None, above: float = ABOVE
    ) -> None:
        self.above = above
        self._given = store
        self._mutex = threading.RLock()
        self._registered: dict[int, tuple[Callable[[], Any], dict[str, Any]]] = {}
        self._asleep: dict[int, _Sleeper] = {}
        self._waking: set[int] = set()

    @functools.cached_property
    def store(self) -> ArchiveStore:
        """The store in use."""
        from pytest_gpumem.archive.store import ArchiveStore

        given = self._given
        if given is None:
            return ArchiveStore()
        return given if isinstance(given, ArchiveStore) else given()

    @property
    def idle(self) -> bool:
        """Whether nothing is registered that could be consolidated now."""
        return self._registered.keys() <= self._asleep.keys()

    def register(
        self,
        data: Any,
        type: str = "state",  # noqa: A002  # the word of the plan
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Let ``data`` be consolidated whenever a card fills up; the same each time it is awake.

        ``data`` is what an item's ``data`` is. Modules and optimizers are not kept alive by this.
        """
        with self._mutex:
            item = {"type": type, "metadata": metadata or {}}
            self._registered[id(data)] = (self._reference(data), item)

    def forget(self, data: Any) -> None:
        """Do not consolidate ``data`` of your own accord any more; one that sleeps sleeps on."""
        with self._mutex:
            self._registered.pop(id(data), None)

    def sleeping_bytes(self, data: Any) -> int:
        """Return the bytes that waking ``data`` takes; 0 if it is awake."""
        with self._mutex:
            sleeper = self._asleep.get(id(data))
            return self.store.entry(sleeper.id).size if sleeper is not None else 0

    def _reference(self, data: Any) -> Callable[[], Any]:
        try:
            return weakref.ref(data, functools.partial(self._forget, id(data)))
        except TypeError:  # plain containers
            return lambda: data

    def _forget(self, key: int, _: object = None) -> None:
        self._registered.pop(key, None)
        self._asleep.pop(key, None)

    def should_consolidate(self) -> bool:
        """Return whether a card is used beyond ``above``; False where there is none.

        What this process only caches does not count: it is there to be used again.
        """
        cached: Counter[str] = Counter()
        for allocator in devices.allocators():
            for index, held in enumerate(allocator.read()):
                cached[allocator.card(index).uuid] += held.reserved - held.allocated
        for card in devices.find_cards().cards:
            reading = devices.driver_reading(card)
            if reading and reading.used - cached[card.uuid] > self.above * reading.total:
                return True
        return False

    def consolidate_gpu_memory(
        self, items: Iterable[dict[str, Any]] | None = None, process_context: str = ""
    ) -> Consolidation:
        """Archive each item, then free its VRAM.

        Args:
            items: each with ``data``, ``type`` and ``metadata``. ``data`` is a module, an
                optimizer, or a nested state of tensors and plain values. None: what is registered
                and awake.
            process_context: what for, such as ``test_x``; entries are found by it.

        An item that cannot be archived is named in ``refused`` and stays as it was, and so does
        every item if the store cannot be used. The VRAM of a nested state is freed if nobody else
        refers to it: a ``state_dict()`` shares that of its model.

        """
        start = time.perf_counter()
        before = _readings()
        ids: list[str] = []
        refused: list[str] = []
        sizes: dict[str, tuple[int, int]] = {}
        with self._mutex:
            wanted = self._awake() if items is None else list(items)
            for item in wanted:
                try:
                    name = self._consolidate(item, process_context)
                    entry = self.store.entry(name)
                    sizes[entry.content] = entry.size, self.store.stored(entry)
                    ids.append(name)
                except ArchiveError as error:
                    refused.append(str(error))
        for allocator in devices.allocators():
            allocator.release_cached()
        after = _readings()
        told = None not in {before[1], after[1]}
        found = Consolidation(
            context=process_context,
            ids=tuple(ids),
            refused=tuple(refused),
            items=len(wanted),
            bytes_before=sum(size for size, _ in sizes.values()),
            bytes_after=sum(stored for _, stored in sizes.values()),
            seconds=time.perf_counter() - start,
            freed_allocator=before[0] - after[0],
            freed_driver=(before[1] or 0) - (after[1] or 0) if told else None,
        )
        _log.info("%s", found)
        return found

    def _awake(self) -> list[dict[str, Any]]:
        found = []
        for key, (data, item) in list(self._registered.items()):
            living = data()
            if living is not None and key not in self._asleep:
                found.append(item | {"data": living})
        return found

    def _consolidate(self, item: Any, context: str) -> str:
        if not isinstance(item, dict) or "data" not in item:
            raise StateRefusedError("cannot consolidate an item without 'data'")
        data = item["data"]
        if id(data) in self._asleep:
            return self._asleep[id(data)].id
        on_card = {str(each.device): each for each in _tensors(_live(data)) if _is_on_card(each)}
        if len(on_card) > 1:
            raise StateRefusedError(
                f"cannot consolidate an item that lies on {' and '.join(sorted(on_card))}; "
                "give one item for each"
            )
        name = self.store.put(
            _state(data),
            type=item.get("type", "state"),
            context=context,
            metadata=item.get("metadata") or {},
        )
        # From here on it is on the disk and was read back.
        for tensor in _tensors(_live(data)):
            if _is_on_card(tensor):
                _empty(tensor)
        if on_card:
            wake = functools.partial(self._wake, id(data))
            sleeper = _Sleeper(name, self._reference(data), _hooks(data, wake))
            self._asleep[id(data)] = sleeper
        return name

    def restore(self, what: Any = None) -> None:
        """Wake ``what``, an item's data; None: all that sleeps. Nothing, if it is awake.

        Raises:
            ArchiveError: it cannot be restored; it sleeps on.

        """
        with self._mutex:
            for key in [id(what)] if what is not None else list(self._asleep):
                self._wake(key)

    def _wake(self, key: int, *_: object, **__: object) -> None:
        with self._mutex:
            sleeper = self._asleep.get(key)
            data = sleeper.data() if sleeper is not None else None
            if sleeper is None or data is None or key in self._waking:
                return
            # Filling a model asks it for its state, which would wake it.
            self._waking.add(key)
            try:
                self._fill(sleeper, data)
            finally:
                self._waking.discard(key)
            del self._asleep[key]

    def _fill(self, sleeper: _Sleeper, data: Any) -> None:
        live = list(_tensors(_live(data)))
        empty = [tensor for tensor in live if _is_on_card(tensor) or not tensor.numel()]
        device = str(empty[0].device) if empty else "cpu"
        restored = list(_tensors(self.store.get(sleeper.id, device=device)))
        if len(restored) != len(live):
            raise NotFoundError(f"the state {sleeper.id} is no longer built like its model")
        for tensor, content in zip(live, restored, strict=True):
            if tensor.shape != content.shape:
                _refill(tensor, content)
        for handle in sleeper.handles:
            handle.remove()


def _state(data: Any) -> Any:
    """Return what is archived of an item's data."""
    return data.state_dict() if hasattr(data, "state_dict") else data


def _live(data: Any) -> Any:
    """Return the state with the very tensors that ``data`` has, in the same order."""
    import torch

    if isinstance(data, torch.nn.Module):
        return data.state_dict(keep_vars=True)
    return _state(data)


def _tensors(value: Any) -> Iterator[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _is_on_card(tensor: Any) -> bool:
    return tensor.device.type not in {"cpu", "meta"} and tensor.numel() > 0


def _empty(tensor: Any) -> None:
    """Take the content off a tensor, which keeps its identity, dtype and device."""
    import torch

    tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def _refill(tensor: Any, content: Any) -> None:
    # The model may have been moved or cast while it slept.
    tensor.data = content.detach().to(device=tensor.device, dtype=tensor.dtype)


def _hooks(data: Any, wake: Callable[..., None]) -> list[Any]:
    """Have ``data`` woken by whatever needs its tensors."""
    import torch

    if isinstance(data, torch.nn.Module):
        found: list[Any] = []
        for module in data.modules():
            found.append(module.register_forward_pre_hook(wake))
            hook: Any = module.register_state_dict_pre_hook  # untyped
            found.append(hook(wake))
        return found
    if isinstance(data, torch.optim.Optimizer):
        return [data.register_step_pre_hook(wake), data.register_state_dict_pre_hook(wake)]
    return []


def _readings() -> tuple[int, int | None]:
    """Return bytes allocated in this process and used on all cards, None if a card is silent."""
    allocated = sum(
        reading.allocated for allocator in devices.allocators() for reading in allocator.read()
    )
    used = [devices.driver_reading(card) for card in devices.find_cards().cards]
    if not used or None in used:
        return allocated, None
    return allocated, sum(reading.used for reading in used if reading is not None)


_the_one: GpuConsolidator | None = None
_options: dict[str, Any] = {}
_mutex = threading.Lock()


def get_gpu_consolidator() -> GpuConsolidator:
    """Return this process's consolidator; under pytest it follows the suite's settings."""
    global _the_one  # noqa: PLW0603  # the plan's name is a function, and one is enough
    with _mutex:
        if _the_one is None:
            _the_one = GpuConsolidator(**_options)
        return _the_one


def configure(**options: Any) -> None:
    """Set the arguments of the process's consolidator, which begins anew."""
    global _the_one  # noqa: PLW0603  # see above
    with _mutex:
        _options.clear()
        _options.update(options)
        _the_one = None

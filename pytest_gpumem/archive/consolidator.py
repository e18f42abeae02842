"""Taking model state off the card: archive it, free its VRAM, bring it back bit for bit.

A consolidated model sleeps: its tensors have no content until one of them is used, or ``restore``
is called; see ``sleep``. Its VRAM is freed only after the archive is on the disk and was read
back; on any failure before that it stays as it was.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import weakref
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any

from pytest_gpumem import devices
from pytest_gpumem.clock import clock
from pytest_gpumem.errors import ArchiveError, InUseError, StateRefusedError
from pytest_gpumem.tuples import NamedTuple
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pytest_gpumem.archive.sleep import Nap
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
        self._last: dict[int, Nap] = {}
        """The last nap of what is registered, by the id of its data."""
        self._naps: weakref.WeakSet[Nap] = weakref.WeakSet()

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
        return not self._registered or all(map(self._sleeps, list(self._registered)))

    def _sleeps(self, key: int) -> bool:
        last = self._last.get(key)
        return last is not None and not last.awake

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
        return sum(nap.size for nap in _naps_of(data) if not nap.awake)

    def _reference(self, data: Any) -> Callable[[], Any]:
        try:
            return weakref.ref(data, functools.partial(self._forget, id(data)))
        except TypeError:  # plain containers
            return lambda: data

    def _forget(self, key: int, _: object = None) -> None:
        self._registered.pop(key, None)
        self._last.pop(key, None)

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
        start = clock.monotonic()
        before = devices.totals()
        ids: list[str] = []
        refused: list[str] = []
        sizes: dict[str, tuple[int, int]] = {}
        with self._mutex:
            wanted = self._awake() if items is None else list(items)
            for item in wanted:
                try:
                    ids.append(self._consolidate(item, process_context))
                except ArchiveError as error:
                    refused.append(str(error))
                except Exception as error:  # a model's own code may fail in any way
                    refused.append(_foreign(item, error))
            for name in ids:
                with contextlib.suppress(ArchiveError):  # it is asleep, whatever it takes there
                    entry = self.store.entry(name)
                    sizes[entry.content] = entry.size, self.store.stored(entry)
        for allocator in devices.allocators():
            allocator.release_cached()
        after = devices.totals()
        told = None not in {before[1], after[1]}
        found = Consolidation(
            context=process_context,
            ids=tuple(ids),
            refused=tuple(refused),
            items=len(wanted),
            bytes_before=sum(size for size, _ in sizes.values()),
            bytes_after=sum(stored for _, stored in sizes.values()),
            seconds=clock.monotonic() - start,
            freed_allocator=before[0] - after[0],
            freed_driver=(before[1] or 0) - (after[1] or 0) if told else None,
        )
        _log.info("%s", found)
        return found

    def _awake(self) -> list[dict[str, Any]]:
        found = []
        for key, (data, item) in list(self._registered.items()):
            living = data()
            if living is not None and not self._sleeps(key):
                found.append(item | {"data": living})
        return found

    def _consolidate(self, item: Any, context: str) -> str:
        if not isinstance(item, dict) or "data" not in item:
            raise StateRefusedError("cannot consolidate an item without 'data'")
        from pytest_gpumem.archive import sleep

        return str(sleep.apart(self._take, item, context, threading.get_ident()))

    def _take(self, item: dict[str, Any], context: str, caller: int) -> str:
        """Archive an item, let what can sleep of it do so, and return the archive's id."""
        from pytest_gpumem.archive import sleep
        from pytest_gpumem.archive.asleep import nap_of

        data = item["data"]
        state = _state(data)
        live = list({id(each): each for each in _tensors(state)}.values())
        awake = [each for each in live if sleep.can_sleep(each)]
        asleep = [nap for nap in map(nap_of, live) if nap is not None and nap.id]
        if asleep and not awake:
            self._note(data, asleep[0])
            return str(asleep[0].id)
        nap = None
        try:
            nap = sleep.Nap(awake, _users(data), (caller, threading.get_ident()))
            name = self._put(nap, state, item, context)
        except InUseError as error:
            raise InUseError(f"cannot consolidate a {type(data).__name__} now: {error}") from None
        finally:
            if nap is not None and not nap.id:
                nap.wake()
        if nap.id:
            self._naps.add(nap)
            self._note(data, nap)
        return name

    def _put(self, nap: Nap, state: Any, item: dict[str, Any], context: str) -> str:
        contents = nap.contents
        nap.check()  # after that: a use empties them
        archived = _replaced(state, contents)
        kind, metadata = item.get("type", "state"), item.get("metadata") or {}
        name = self.store.put(archived, type=kind, context=context, metadata=metadata)
        if contents:
            tensors = {id(content): tensor for tensor, content in contents.items()}
            places = {
                tensors[id(each)]: place
                for place, each in enumerate(_tensors(archived))
                if id(each) in tensors
            }
            try:
                nap.begin(self.store, name, places)
            except ArchiveError:
                with contextlib.suppress(ArchiveError):
                    self.store.delete(name)
                raise
        return name

    def _note(self, data: Any, nap: Nap) -> None:
        if id(data) in self._registered:
            self._last[id(data)] = nap

    def restore(self, what: Any = None, device: str = "") -> None:
        """Wake ``what``, an item's data; None: all that sleeps. Nothing, if it is awake.

        Those that share tensors with it wake as far as they fell asleep with those. ``device`` is
        where to; without, where they were.

        Raises:
            ArchiveError: some cannot be restored, which sleep on; the others are awake.

        """
        naps = list(self._naps) if what is None else _naps_of(what)
        failed: list[Exception] = []
        for nap in naps:
            try:
                nap.wake(device)
            except Exception as error:  # the others first
                failed.append(error)
        if failed:
            first, *others = failed
            for each in others:
                first.add_note(f"and {each}")
            raise first


def _foreign(item: dict[str, Any], error: Exception) -> str:
    kind = type(item["data"]).__name__
    reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    return f"cannot consolidate a {kind}: {reason}"


def _naps_of(data: Any) -> list[Nap]:
    """Return the naps of an item's tensors, each once."""
    from pytest_gpumem.archive.asleep import nap_of

    naps = [nap_of(each) for each in _tensors(_state(data))]
    return list({id(nap): nap for nap in naps if nap is not None}.values())


def _state(data: Any) -> Any:
    """Return the tensors of an item, themselves, in the nesting in which they are archived.

    A module's by their names, whatever it has made of ``state_dict``.
    """
    import torch

    if isinstance(data, torch.nn.Module):
        parameters = data.named_parameters(remove_duplicate=False)
        return dict([*parameters, *data.named_buffers(remove_duplicate=False)])
    return data.state_dict() if hasattr(data, "state_dict") else data


def _users(data: Any) -> list[Any]:
    """Return what computes with an item's tensors."""
    import torch

    return list(data.modules()) if isinstance(data, torch.nn.Module) else [data]


def _tensors(value: Any) -> Iterator[Any]:
    """Yield tensors in the order of ``tree.leaves``."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _replaced(value: Any, contents: dict[int, Any]) -> Any:
    """Return a state with the content in the place of each tensor that is falling asleep.

    One that sleeps already is named by the archive that has it.
    """
    import torch

    from pytest_gpumem.archive.asleep import nap_of

    if isinstance(value, torch.Tensor):
        content = contents.get(id(value))
        nap = nap_of(value)
        return content if content is not None else nap.id if nap is not None else value
    if type(value) in {dict, OrderedDict}:
        made = type(value)((key, _replaced(each, contents)) for key, each in value.items())
        if isinstance(value, OrderedDict):  # state_dict() keeps the versions of its modules there
            vars(made).update(vars(value))
        return made
    if type(value) in {list, tuple}:
        return type(value)(_replaced(each, contents) for each in value)
    return value

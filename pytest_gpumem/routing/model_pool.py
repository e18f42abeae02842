"""Models that are loaded once per process and shared; those not in use sleep under pressure."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpumem import devices
from pytest_gpumem.archive.shared import get_gpu_consolidator
from pytest_gpumem.routing import placement
from pytest_gpumem.routing.pool_entries import Entries, PooledModel, is_module
from pytest_gpumem.routing.resource_manager import CPU, shared
from pytest_gpumem.tracking import release

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_gpumem.archive.consolidator import GpuConsolidator

_log = logging.getLogger("pytest_gpumem")


class Freed(NamedTuple):
    """By how many bytes the figures fell."""

    allocated: int
    """Of this process's allocator."""
    driver: int | None
    """Of the cards, every process counted; None where the driver does not tell."""


class _Framework(NamedTuple):
    """How objects that are no torch modules are taken apart and put together."""

    kind: type
    save: Callable[[Any], Any]
    load: Callable[[Any], Any]


class LazyModel:
    """Stands for a model of a pool; whatever is asked of it is asked of the model."""

    def __init__(self, pool: ModelPool, name: str, load: Callable[[], Any] | None) -> None:
        object.__setattr__(self, "_gpumem", (pool, name, load))

    def __getattr__(self, attribute: str) -> Any:
        return getattr(_model_of(self), attribute)

    def __setattr__(self, attribute: str, value: Any) -> None:
        setattr(_model_of(self), attribute, value)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call the model."""
        return _model_of(self)(*arguments, **options)

    def __repr__(self) -> str:
        return f"<shared model {object.__getattribute__(self, '_gpumem')[1]!r}>"


def _model_of(lazy: LazyModel) -> Any:
    pool, name, load = object.__getattribute__(lazy, "_gpumem")
    return pool.get(name, load)  # it may have been unloaded


class ModelPool:
    """Loads each model once and lends it to whoever asks; any thread may.

    A model that nobody pinned may be consolidated when the card fills up: by another model of
    this pool that needs room (least recently used first), after a test, or when the scheduler
    needs the memory for another worker. It comes back when it is used, where there is room.

    Args:
        consolidator: takes models off the card; None: the process's own.

    """

    def __init__(self, consolidator: GpuConsolidator | None = None) -> None:
        self._consolidator = consolidator
        self._entries = Entries(_sentence_transformer)
        self._frameworks: list[_Framework] = []

    @property
    def consolidator(self) -> GpuConsolidator:
        """What takes models off the card."""
        return self._consolidator or get_gpu_consolidator()

    def register_framework(
        self, kind: type, *, save: Callable[[Any], Any], load: Callable[[Any], Any]
    ) -> None:
        """Let objects of ``kind``, which are no torch modules, be consolidated too.

        ``save`` returns an object's state (nested dicts, lists and tuples of tensors and plain
        values) and lets go of its memory; ``load`` returns an object made from such a state.
        """
        self._frameworks.insert(0, _Framework(kind, save, load))

    def get(self, name: str, load: Callable[[], Any] | None = None, *, weak: bool = False) -> Any:
        """Return the model ``name``, awake; loaded by ``load`` when it is first asked for.

        Args:
            name: of the model; for the pool any text will do if ``load`` is given.
            load: returns the model, on the CPU; None: a sentence transformer of that name.
            weak: keep the model only as long as somebody else does.

        Raises:
            RuntimeError: its loader asks for it, or waits for a loader that does.

        """
        with self._entries.locked(name, load, weak=weak) as entry:
            return self._ready(entry)

    @contextmanager
    def use(self, name: str, load: Callable[[], Any] | None = None) -> Iterator[Any]:
        """Yield the model ``name``, which is not consolidated meanwhile."""
        user = threading.get_ident()
        with self._entries.locked(name, load, using=True) as entry:
            self._pin(entry)  # first: what is awake might be consolidated before it is pinned
            try:
                model = self._ready(entry)
            except BaseException:
                self._end_use(entry, user)
                raise
        try:
            yield model
        finally:
            del model
            self._end_use(entry, user)

    def _end_use(self, entry: PooledModel, user: int) -> None:
        self._unpin(entry)
        self._entries.end_use(entry, user)

    def pin(self, name: str) -> None:
        """Keep a model where it is until ``unpin``, which has to be called as often.

        Raises:
            KeyError: when the pool has no such model.

        """
        self._pin(self._entries[name])

    def unpin(self, name: str) -> None:
        """Let a model be consolidated again.

        Raises:
            KeyError: when the pool has no such model.

        """
        self._unpin(self._entries[name])

    def attach(
        self,
        target: Any,
        attribute: str,
        name: str,
        load: Callable[[], Any] | None = None,
    ) -> Any:
        """Give ``target``, an object or a class, the model ``name`` as an attribute; return it.

        The model is loaded when it is first used. An attribute that is there and not None stays.

        Raises:
            AttributeError: when ``target`` takes no such attribute.

        """
        if getattr(target, attribute, None) is None:
            if load is not None:
                self._entries.set_default(name, load)
            setattr(target, attribute, LazyModel(self, name, load))
        return target

    def consolidate(self, wanted: int = 0) -> int:
        """Take models off the card, least recently used first; return the bytes that freed.

        ``wanted`` bytes suffice; 0: all that can go.
        """
        freed = 0
        entries = sorted(self._entries.all(), key=lambda entry: entry.used)
        for entry in entries:
            # Whoever holds it is loading or waking it just now.
            if not entry.mutex.acquire(blocking=False):
                continue
            try:
                freed += self._consolidate(entry)
            finally:
                entry.mutex.release()
            if wanted and freed >= wanted:
                break
        return freed

    def unload(self, name: str) -> Freed:
        """Let go of a model and free its VRAM; once more is harmless.

        First other threads come to the end of their ``use`` of it. If somebody still refers to it
        then, it moves to the CPU; if the pool has it by another name, too, it stays.

        Raises:
            RuntimeError: a thread that uses it waits for this one.

        """
        entry = self._entries.take_out(name)
        before = devices.totals()
        if entry is not None:
            with entry.mutex:
                self._let_go(entry)
        for allocator in devices.allocators():
            allocator.release_cached()
        after = devices.totals()
        driver = None if before[1] is None or after[1] is None else before[1] - after[1]
        return Freed(before[0] - after[0], driver)

    def _let_go(self, entry: PooledModel) -> None:
        model = entry.held()
        reference = _weakly(model) if is_module(model) else lambda: None
        if entry.archived is not None:
            entry.archived[2]()
        entry.model, entry.archived, entry.reference = None, None, lambda: None
        if model is None or any(each.held() is model for each in self._entries.all()):
            return
        self.consolidator.forget(model)
        del model
        gc.collect()
        model = reference()
        if model is not None:
            placement.take_back(self._entries.with_kin(model))

    def clear(self) -> None:
        """Unload every model."""
        for name in list(self):
            self.unload(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries.names())

    def __len__(self) -> int:
        return len(self._entries.names())

    def __contains__(self, name: object) -> bool:
        return name in self._entries.names()

    def _pin(self, entry: PooledModel) -> None:
        with entry.mutex:
            entry.pins += 1
            for each in self._entries.kin(entry.held()):
                self.consolidator.forget(each.held())

    def _unpin(self, entry: PooledModel) -> None:
        with entry.mutex:
            entry.pins = max(0, entry.pins - 1)
            for each in self._entries.kin(entry.held()):
                self._register(each, each.held())

    def _ready(self, entry: PooledModel) -> Any:
        """Return the model of an entry that is this thread's, loaded and awake."""
        model = entry.held()
        return self._load(entry) if model is None else self._wake(entry, model)

    def _load(self, entry: PooledModel) -> Any:
        if entry.archived is not None:
            name, put_together, end = entry.archived
            entry.model = put_together(self.consolidator.store.get(name))
            entry.archived = None
            end()
            return entry.model
        entry.loading = True
        try:
            model = entry.load()
        finally:
            entry.loading = False
        if is_module(model):
            self._place(entry, model)
        entry.reference = _weakly(model)
        if not entry.weak:
            entry.model = model
        self._register(entry, model)
        return model

    def _wake(self, entry: PooledModel, model: Any) -> Any:
        if not is_module(model):
            return model
        asleep = self.consolidator.sleeping_bytes(model)
        if shared.banned and not entry.banned:
            placement.take_back(self._entries.with_kin(model))
            entry.banned = True
        elif asleep:
            if placement.room_for(asleep, "model", self._make_room_for(entry)) == CPU:
                placement.take_back(self._entries.with_kin(model))
            self._restore(model)
        elif entry.banned and not shared.banned:
            entry.banned = False
            self._place(entry, model)
        return model

    def _restore(self, model: Any) -> None:
        try:
            self.consolidator.restore(model)
        except Exception as error:
            if not release.oom_sentence(error):
                raise
            release.clear_frames(error)
            placement.take_back(self._entries.with_kin(model))

    def _place(self, entry: PooledModel, model: Any) -> None:
        entry.banned = bool(shared.banned)
        model = self._entries.with_kin(model)
        if placement.is_all_on_card(model) and not shared.banned:
            return
        make_room = self._make_room_for(entry)
        device = placement.room_for(placement.size_of(model), "model", make_room)
        placement.place(model, device, lambda: make_room(0))

    def _make_room_for(self, entry: PooledModel) -> Callable[[int], bool]:
        def make_room(size: int) -> bool:
            entry.pins += 1  # its lock is this thread's, and would let it in again
            try:
                return self.consolidate(size) > 0
            finally:
                entry.pins -= 1

        return make_room

    def _register(self, entry: PooledModel, model: Any) -> None:
        if is_module(model) and not self._entries.is_pinned(model):
            self.consolidator.register(model, type="model", metadata={"model_name": entry.name})

    def _consolidate(self, entry: PooledModel) -> int:
        model = entry.held()
        if model is None or entry.pins or self._entries.is_pinned(model):
            return 0
        framework = self._framework(model)
        if framework is not None:
            del model  # whose memory would not go otherwise
            return _take_apart(entry, framework, self.consolidator)
        if not is_module(model):
            return 0
        item = {"data": model, "type": "model", "metadata": {"model_name": entry.name}}
        if not placement.is_on_card(model):
            return 0
        done = self.consolidator.consolidate_gpu_memory([item], process_context="model pool")
        for refusal in done.refused:
            _log.warning("%s stays on the card: %s", entry.name, refusal)
        return max(0, done.freed_allocator)

    def _framework(self, model: Any) -> _Framework | None:
        return next((each for each in self._frameworks if isinstance(model, each.kind)), None)


def _take_apart(entry: PooledModel, framework: _Framework, consolidator: GpuConsolidator) -> int:
    """Archive the state of an object that is no torch module; return the bytes that freed."""
    if entry.model is None:  # others keep it, and its memory with it
        return 0
    before = devices.totals()[0]
    try:
        state = framework.save(entry.model)
    except Exception as error:  # others' code may fail in any way
        _log.warning("%s stays on the card: %s: %s", entry.name, type(error).__name__, error)
        return 0
    try:
        name = consolidator.store.put(
            state, type="model", context="model pool", metadata={"model_name": entry.name}
        )
        end = consolidator.store.need(name)
    except BaseException as error:
        entry.model = framework.load(state)  # the old one has let go of its memory
        if not isinstance(error, Exception):
            raise
        _log.warning("%s stays on the card: %s", entry.name, error)
        return 0
    entry.archived = name, framework.load, end
    entry.model, entry.reference = None, lambda: None
    del state
    gc.collect()
    for allocator in devices.allocators():
        allocator.release_cached()
    return max(0, before - devices.totals()[0])


def _sentence_transformer(name: str) -> Any:
    return placement.load_sentence_transformer(name, device=CPU)


def _weakly(model: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(model)
    except TypeError:
        return lambda: model

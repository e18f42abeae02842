"""The models of a pool by their names: who has which, whose turn it is, which belong together."""

from __future__ import annotations

import functools
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pytest_gpumem.routing.waits import Waits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class PooledModel:
    """One model of the pool."""

    def __init__(self, name: str, load: Callable[[], Any], *, weak: bool) -> None:
        self.name = name
        self.load = load
        self.weak = weak
        self.mutex = threading.RLock()
        self.owner: int | None = None
        """The thread that has the mutex, as far as others may have to wait for it."""
        self.loading = False
        self.users: list[int] = []
        """Threads that are in ``use``."""
        self.model: Any = None
        self.reference: Callable[[], Any] = lambda: None
        self.used = 0
        self.pins = 0
        self.archived: tuple[str, Callable[[Any], Any], Callable[[], None]] | None = None
        """Of an object of another framework that was taken apart: its state, how it is made of
        that, and what ends the state's being needed."""
        self.banned = False
        """Whether it is on the CPU only because nothing might go to the card."""

    def held(self) -> Any:
        """Return the model, None if it is not loaded or nobody keeps it."""
        return self.model if self.model is not None else self.reference()


class Entries:
    """The entries of a pool; any thread may use them.

    Args:
        default: loads the model of a name that came without a loader.

    """

    def __init__(self, default: Callable[[str], Any]) -> None:
        self._default = default
        self._by_name: dict[str, PooledModel] = {}
        self._mutex = threading.RLock()
        self._waits = Waits()
        self._unused = threading.Condition()
        self._clock = 0

    def names(self) -> list[str]:
        """Return the names of all entries."""
        with self._mutex:
            return list(self._by_name)

    def set_default(self, name: str, load: Callable[[], Any]) -> None:
        """Make an entry, if there is none of that name."""
        with self._mutex:
            self._by_name.setdefault(name, PooledModel(name, load, weak=False))

    def __getitem__(self, name: str) -> PooledModel:
        """Return the entry of a name.

        Raises:
            KeyError: there is none; says which there are.

        """
        try:
            return self._by_name[name]
        except KeyError:
            known = ", ".join(self.names()) or "none"
            raise KeyError(f"the pool has no model {name!r}; it has {known}") from None

    @contextmanager
    def locked(
        self,
        name: str,
        load: Callable[[], Any] | None,
        *,
        weak: bool = False,
        using: bool = False,
    ) -> Iterator[PooledModel]:
        """Yield the entry of a model, which is there then, and this thread's alone.

        With ``using`` it is not taken out until ``end_use`` is called as well.
        """
        while True:
            with self._mutex:
                entry = self._by_name.get(name)
                if entry is None:
                    entry = PooledModel(
                        name, load or functools.partial(self._default, name), weak=weak
                    )
                    self._by_name[name] = entry
                self._clock += 1
                entry.used = self._clock
            if entry.loading and entry.owner == threading.get_ident():
                raise RuntimeError(f"the loader of the model {name!r} asks for that model")
            with self._owned(entry):
                if not self._begin(entry, using=using):  # somebody unloaded it meanwhile
                    continue
                entry.load = load or entry.load
                try:
                    yield entry
                except BaseException:
                    with self._mutex:  # a load that failed leaves nothing
                        nothing = entry.held() is None and entry.archived is None
                        if nothing and self._by_name.get(name) is entry:
                            del self._by_name[name]
                    raise
                return

    @contextmanager
    def _owned(self, entry: PooledModel) -> Iterator[None]:
        """Have an entry for this thread alone, within."""
        here, before = threading.get_ident(), entry.owner
        refusal = f"the loaders of models ask for one another, {entry.name!r} among them"
        if before == here:
            yield
            return

        def owner() -> set[int]:
            now = entry.owner
            return {now} if now is not None else set()

        with self._waits.waiting(owner, refusal):
            entry.mutex.acquire()
        entry.owner = here
        try:
            yield
        finally:
            entry.owner = None
            entry.mutex.release()

    def all(self) -> list[PooledModel]:
        """Return all entries."""
        with self._mutex:
            return list(self._by_name.values())

    def kin(self, model: Any) -> list[PooledModel]:
        """Return the entries whose modules share tensors with a module, itself included."""
        if not is_module(model):
            return [each for each in self.all() if each.held() is model]
        found: list[PooledModel] = []
        wanted, waiting = tensors_of(model), self.all()
        while True:
            new = [each for each in waiting if wanted & tensors_of(each.held())]
            if not new:
                return found
            found += new
            waiting = [each for each in waiting if each not in new]
            wanted = wanted.union(*(tensors_of(each.held()) for each in new))

    def with_kin(self, model: Any) -> Any:
        """Return a module of all those that have to be on one device with this one."""
        import torch

        kin = {id(each): each for each in [model, *(entry.held() for entry in self.kin(model))]}
        return model if len(kin) == 1 else torch.nn.ModuleList(kin.values())

    def is_pinned(self, model: Any) -> bool:
        """Return whether a module, or one that shares tensors with it, is pinned."""
        return any(each.pins for each in self.kin(model))

    def _begin(self, entry: PooledModel, *, using: bool) -> bool:
        """Return whether an entry is still there; note that this thread uses it, if it does."""
        with self._unused:  # in one step: else it could be taken out in between
            there = self._by_name.get(entry.name) is entry
            if there and using:
                entry.users.append(threading.get_ident())
            return there

    def end_use(self, entry: PooledModel, user: int) -> None:
        """Say that the thread ``user`` does not use a model any longer."""
        with self._unused:
            entry.users.remove(user)
            self._unused.notify_all()

    def take_out(self, name: str) -> PooledModel | None:
        """Wait until no other thread uses a model, and take its entry out; None: there is none.

        Raises:
            RuntimeError: one of those waits for this thread.

        """
        while (entry := self._by_name.get(name)) is not None:
            if self._taken_out(entry):
                return entry
        return None

    def _taken_out(self, entry: PooledModel) -> bool:
        here = threading.get_ident()

        def others() -> set[int]:
            return {*entry.users} - {here}

        refusal = f"cannot unload {entry.name!r}: a thread that uses it waits for this one"
        with self._waits.waiting(others, refusal), self._unused:
            self._unused.wait_for(lambda: not others())
            with self._mutex:
                if self._by_name.get(entry.name) is not entry:
                    return False
                del self._by_name[entry.name]
                return True


def is_module(model: Any) -> bool:
    """Return whether a model is a torch module, or like one."""
    return hasattr(model, "parameters") and hasattr(model, "to")


def tensors_of(model: Any) -> set[int]:
    """Return the ids of a module's tensors; those of a module that is not there are none."""
    if not is_module(model):
        return set()
    return {id(each) for each in (*model.parameters(), *model.buffers())}

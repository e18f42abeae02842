"""Tensors that sleep: their content is in an archive, and any use of one brings it back.

How a use of one is noticed is in ``asleep``. Those that fell asleep together wake together, as a
``Nap``. The way down is such that nobody ever sees a tensor without its content, whatever other
threads do meanwhile:

1. Tensors whose memory somebody else has, too, are left alone: a graph, a view, a call in another
   thread. Their use could not be noticed, and their memory would not be freed.
2. The others get the class. From now on any use of one ends the nap at once, before it began.
3. Other threads are seen to be through with calls that had begun before, and so are the cards.
4. The content is archived, and read back.
5. If nobody used a tensor meanwhile, all of them lose their content in one step under the lock
   that a use would need.

C++ that asks nobody comes too late to begin a graph. So Python on the ways of torch there is told
to wake first (``torch_private.before_c``), a user's modules that have the tensors get a hook, and
so do optimizers, and tensors to which the graph of an earlier call will bring gradients. No hook
and no class is there while a tensor is awake.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.archive import asleep, bystanders, torch_private
from pytest_gpumem.archive.asleep import nap_of
from pytest_gpumem.errors import ArchiveError, InUseError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from pytest_gpumem.archive.store import ArchiveStore


class Nap:
    """Tensors that fall asleep and wake together; any thread may do either.

    Marks those of ``tensors`` that nobody else has in hand; ``tensors`` are those then.

    Args:
        tensors: those that ``can_sleep``, each once.
        users: what computes with them: modules, or an optimizer.
        but: the idents of the threads that ask.

    Raises:
        InUseError: another thread computes with them.

    """

    def __init__(self, tensors: Sequence[Any], users: Sequence[Any], but: Collection[int]) -> None:
        torch_private.before_c(asleep.wake)
        self.id = ""
        """Of the archive."""
        self.size = 0
        """Bytes that waking takes."""
        self.homes: dict[int, str] = {}
        """To which device each sleeping tensor will wake, by its id."""
        self._lock = threading.RLock()
        self._filling = threading.Lock()
        self._state = "marked"
        self._end: Callable[[], object] = lambda: None
        self._hooks: list[tuple[set[int], Any]] = []
        """Each with the ids of the tensors that it is for."""
        with _marking:
            if not all(type(each) in asleep.KINDS for each in tensors):
                raise InUseError("another thread consolidates it")
            self.tensors = [weakref.ref(each) for each in tensors]
            self.contents = {id(each): each.data for each in tensors}
            """What is archived of each tensor, by its id, until they sleep."""
            self._versions = [each._version for each in tensors]
            _naps.add(self)
            self._hooks += self._gradient_hooks(tensors)
            self._hooked = {key for keys, _ in self._hooks for key in keys}
            """Ids of tensors that are woken before they get a gradient."""
            for each in tensors:
                asleep.mark(each, self)
        if not tensors:
            return
        try:
            self._hooks += _hooks(users, {*map(id, tensors)}, self._wake_first)
            backward = bystanders.refuse({*map(id, users), *map(id, tensors)}, but)
            _finish({str(each.device) for each in self.contents.values()})
            with self._lock:
                self.check()
                self._leave_out(self._held(backward=backward))
        except BaseException:
            self.wake()
            raise
        if not self.tensors:
            self.wake()
            raise InUseError("its memory is in use: a graph, a view or a call has it, too")

    @property
    def awake(self) -> bool:
        """Whether it is over."""
        return self._state == "awake"

    def _living(self) -> list[Any]:
        return [each for each in (ref() for ref in self.tensors) if each is not None]

    def _held(self, *, backward: bool = False) -> set[int]:
        """Return the ids of tensors whose memory somebody else holds, too.

        A graph that will compute with them, a view, ``tensor.data``, a call in another thread; or
        a graph that brings them gradients, unless a hook wakes them first: there is none if a call
        has made it that had begun when they were marked, and with ``backward`` it may be too late.
        """
        with torch_private.plainly():
            living = self._living()
            found = {id(each) for each in living if torch_private.holders(each)}
            for each in living:
                if (backward or id(each) not in self._hooked) and torch_private.gathers(each):
                    found.add(id(each))
            lying: dict[int, list[int]] = {}
            for each in living:
                lying.setdefault(each.untyped_storage()._cdata, []).append(id(each))
            for each in living:
                storage = each.untyped_storage()
                mine = lying[storage._cdata]
                if torch_private.storage_holders(storage) != 2 * len(mine) or _shown(storage):
                    found.update(mine)  # each tensor and its content here, and nobody else
        return found

    def _leave_out(self, held: set[int]) -> None:
        kept = []
        with _marking:
            for ref, version in zip(self.tensors, self._versions, strict=True):
                tensor = ref()
                if tensor is not None and id(tensor) in held:
                    asleep.unmark(tensor, self)
                    self.contents.pop(id(tensor), None)
                elif tensor is not None:
                    kept.append((ref, version))
        self.tensors = [ref for ref, _ in kept]
        self._versions = [version for _, version in kept]
        for hook in (hook for own, hook in self._hooks if own <= held):
            hook.remove()

    def check(self, *, alone: bool = False) -> None:
        """Make sure that none of the tensors was used since they were marked.

        ``alone``: and that nobody else has their memory since.

        Raises:
            InUseError: one was. All are awake.

        """
        if self._state != "marked" or self._changed() or (alone and self._held()):
            self.wake()
            raise InUseError("it was used while it was archived")

    def begin(self, store: ArchiveStore, name: str, places: dict[int, int]) -> None:
        """Let the tensors go to sleep: their content is in the archive ``name``.

        ``places`` says where, by their ids; see ``ArchiveStore.get_tensors``.

        Raises:
            InUseError: one was used since it was marked. All are awake.
            NotFoundError: somebody removed the archive. All are awake.

        """
        try:
            end = store.need(name)
        except BaseException:
            self.wake()
            raise
        with self._lock, torch_private.plainly():
            try:
                self.check(alone=True)
                living = self._living()
                homes = {id(each): str(each.device) for each in living}
                storages = {each.untyped_storage()._cdata: each for each in living}
                size = sum(each.untyped_storage().nbytes() for each in storages.values())
                del storages
                stand_ins = asleep.exchange(living)
            except BaseException:
                end()
                self.wake()
                raise
            self.id, self._store, self.size = name, store, size
            self._end = weakref.finalize(self, end)
            self.tensors = [weakref.ref(each) for each in living]
            self._places = [places[id(each)] for each in living]
            self.homes, self._stand_ins = homes, stand_ins
            self._state = "asleep"
            self.contents = {}
            for each in stand_ins:
                asleep.empty(each)

    def _changed(self) -> bool:
        with torch_private.plainly():
            now = [getattr(ref(), "_version", None) for ref in self.tensors]
        return now != self._versions

    def wake(self, device: str = "") -> None:
        """Bring the content back, to ``device`` or where it was.

        Raises:
            ArchiveError: it cannot be had; all sleep on. The archive is named.

        """
        with self._lock:
            if self._state == "asleep":
                apart(self._fill, device)
            else:  # once more is harmless: the first time may have been interrupted
                self._over()

    def _wake_first(self, *_: object) -> None:
        self.wake()

    def _fill(self, device: str) -> None:
        wanted: dict[str, dict[int, int]] = {}
        for at, (place, home) in enumerate(zip(self._places, self.homes.values(), strict=True)):
            if self.tensors[at]() is not None:
                wanted.setdefault(device or home, {})[at] = place
        contents: dict[int, Any] = {}
        try:
            for where, places in wanted.items():
                found = self._store.get_tensors(self.id, list(places.values()), where)
                contents.update(zip(places, found, strict=True))
            _finish(wanted)  # the caller may be on another stream
        except ArchiveError as error:
            raise type(error)(
                f"a model that sleeps in the archive {self.id} cannot be woken: {error}"
            ) from error
        with self._filling, torch_private.plainly():
            if self._state != "asleep":  # who waited for this one was interrupted, and woke it
                return
            for at, content in contents.items():
                tensor = self.tensors[at]()
                if tensor is not None:
                    asleep.fill(tensor, self._stand_ins[at], content)
            self._over()

    def _over(self) -> None:
        self._state = "awake"
        self.contents = {}
        with _marking:
            for tensor in self._living():
                asleep.unmark(tensor, self)
        for _, hook in self._hooks:
            hook.remove()
        self._end()
        self.tensors = []  # no weak reference is left on one, which swapping it would refuse
        self._stand_ins = []

    def _gradient_hooks(self, tensors: Sequence[Any]) -> Iterator[tuple[set[int], Any]]:
        """Have tensors woken before they get the gradients of a graph that is there already.

        What torch has made in C++ for the first hook of a tensor stays there, without a hook. To
        take that away, too, would free it under another thread that is about to call the hook.
        """
        nap = weakref.ref(self)  # while one sleeps it keeps its nap

        def wake_first(_: Any) -> None:
            living = nap()
            if living is not None:
                living.wake()

        for each in tensors:
            if torch_private.gathers(each):
                yield {id(each)}, each.register_hook(wake_first)

    def after_fork(self) -> None:
        """Go on in a child: the thread that held the lock is not there."""
        self._lock, self._filling = threading.RLock(), threading.Lock()
        if self._state != "asleep":
            self._over()


_naps: weakref.WeakSet[Nap] = weakref.WeakSet()
_marking = threading.RLock()
"""Held by who marks tensors as those of a nap, or takes that back."""


def _after_fork() -> None:
    global _marking  # noqa: PLW0603  # the thread that held it is not there
    _marking = threading.RLock()
    for nap in list(_naps):
        nap.after_fork()


os.register_at_fork(after_in_child=_after_fork)


def can_sleep(tensor: Any) -> bool:
    """Return whether a tensor lies on a card and its use could be noticed.

    Those of other classes, layouts and states stay as they are, and so do single numbers, whose
    memory is not worth it.
    """
    return (
        type(tensor) in asleep.KINDS
        and is_on_card(tensor)
        and tensor.numel() > 1
        and tensor.layout is torch.strided
        and tensor.is_leaf
        and not (tensor.is_quantized or tensor.is_inference() or tensor.is_nested)
    )


def is_on_card(tensor: Any) -> bool:
    """Return whether a tensor lies on a card, or will when it wakes; wakes nothing."""
    return device_type(tensor) not in {"cpu", "meta"}


def device_type(tensor: Any) -> str:
    """Return the type of the device of a tensor, now or when it wakes; wakes nothing."""
    nap = nap_of(tensor)
    if nap is not None and id(tensor) in nap.homes:
        return str(nap.homes[id(tensor)]).partition(":")[0]
    with torch_private.plainly():
        return str(tensor.device.type)


def _finish(devices: Iterable[str]) -> None:
    """Wait for what was begun on cards, on any stream: a call returns before it is done."""
    for each in devices:
        if each.startswith("cuda"):
            torch.cuda.synchronize(each)


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """Return what ``function`` returns, called in a thread of its own.

    There none of the caller's modes holds: inference, autocast, transforms, fake tensors, a
    default device, no gradients. What one of them would make of a content could not be trained.
    """
    done: list[Any] = []

    def run() -> None:
        try:
            done.extend((function(*args), None))
        except BaseException as error:  # the caller's to judge
            done.extend((None, error))

    thread = threading.Thread(target=run, name="gpumem")
    thread.start()
    thread.join()
    result, error = done
    if error is not None:
        try:
            raise error
        finally:
            del error, done, run  # else its traceback would be a cycle, which keeps tensors
    return result


def _hooks(
    users: Iterable[Any], sleeping: set[int], wake: Callable[..., None]
) -> Iterator[tuple[set[int], Any]]:
    """Have ``wake`` called before ``users`` compute, and before their other hooks.

    Yields each with the ids of what it is for. A module gets one if some of that is its own: it is
    what copying and pickling touch first, and it wakes, so that no copy ever has the hook. Torch's
    own get none: they ask the class, and its transformer layers compute otherwise beside hooks.
    """
    for user in users:
        if isinstance(user, torch.nn.Module):
            if type(user).__module__.startswith("torch.nn.modules."):
                continue
            tensors = [*user._parameters.values(), *user._buffers.values()]
            if own := sleeping.intersection(map(id, tensors)):
                yield own, user.register_forward_pre_hook(wake, prepend=True)
        elif sleeping and isinstance(user, torch.optim.Optimizer):
            yield sleeping, user.register_step_pre_hook(wake)


def _shown(storage: Any) -> bool:
    """Return whether Python code other than the caller has the storage itself."""
    return _references(storage) > _references_to_own()


def _references(storage: Any) -> int:
    return sys.getrefcount(storage)


@functools.cache
def _references_to_own() -> int:
    tensor = torch.empty(1)
    storage = tensor.untyped_storage()

    def shown(storage: Any) -> int:
        return _references(storage)

    return shown(storage)

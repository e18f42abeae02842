"""What torch keeps alive in this process: storages, and links that the collector cannot see.

The garbage collector knows which Python object refers to which, but not what C++ holds: a leaf's
gradient and everything an autograd graph saved. These links, and those inside ``nn.Module`` trees
(known without a search), are collected here for the search in ``holders``.
"""

from __future__ import annotations

import contextlib
import gc
import math
import sys
import types
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpumem.devices.heap import instances

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import Tensor

    OnCard = Callable[[Tensor], bool]

_MAX_LINKS = 50_000
"""A heap with more links is not walked to its end: naming a leak must not take seconds."""


@dataclass(frozen=True)
class Storage:
    """Memory of a tensor, and of all its views."""

    address: int
    size: int
    """Bytes."""
    device: str
    """As torch writes it: ``cuda:0``."""
    shape: tuple[int, ...]
    """Of the largest tensor that uses it."""
    dtype: str


class Link(NamedTuple):
    """A holder that the collector need not be asked for, and how it reaches what it holds."""

    holder: int
    """Its id in ``Heap.objects``."""
    step: str
    """``.weight``, ``[0]``, ``.grad``."""


@dataclass
class Heap:
    """Storages on a card and links to their tensors.

    Everywhere but in ``objects``, objects are named by their id, so that ``objects`` is the only
    container of ours that a search for referrers meets.
    """

    objects: dict[int, object] = field(default_factory=dict)
    storages: dict[int, Storage] = field(default_factory=dict)
    """By address."""
    tensors: dict[int, int] = field(default_factory=dict)
    """Id of each tensor on a card, and the address of its storage."""
    links: dict[int, list[Link]] = field(default_factory=dict)
    """By id of what is held."""
    cut: bool = False
    """Whether an autograd graph was not walked to its end."""

    def add(self, thing: object) -> int:
        """Keep ``thing`` alive for the time of the search and return its id."""
        self.objects[id(thing)] = thing
        return id(thing)

    def link(self, holder: object, step: str, held: object) -> None:
        """Note that ``holder`` reaches ``held`` by ``step``."""
        self.links.setdefault(self.add(held), []).append(Link(self.add(holder), step))


def scan(on_card: OnCard, among: Iterable[Tensor] | None = None) -> Heap:
    """Return the storages of living tensors for which ``on_card`` is true, and their links.

    Of those ``among`` which to look; else of all, in one pass over the objects that the garbage
    collector knows. Tensors that cannot be asked for their storage (fake, sparse and wrapper
    tensors) are left out.
    """
    heap = Heap()
    torch = sys.modules.get("torch")
    if torch is None:
        return heap
    # User classes that overload torch's functions are not to notice that they are looked at.
    with torch._C.DisableTorchFunctionSubclass():
        every = instances(torch.nn.Module, torch.Tensor) if among is None else among
        for each in every:
            if is_a(each, torch.Tensor):
                add_tensor(heap, each, on_card)
            else:
                _link_module(heap, each)
    return heap


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Keep the collector from running by itself."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def still_heap() -> Iterator[None]:
    """Keep the collector from running, and show it objects that were frozen out of its sight.

    They are not frozen again: that would freeze garbage of the meantime as well, for good.
    """
    with no_collections():
        gc.unfreeze()
        yield


def kinds(heap: Heap) -> dict[int, str]:
    """Return by address what torch uses each storage of ``heap`` for, as ``AliveGroup.kind``.

    A storage without a word is not known to be anything: where an autograd graph was not walked
    to its end, it may be saved there.
    """
    torch = sys.modules["torch"]
    found = dict.fromkeys(heap.storages, "unknown" if heap.cut else "other")
    words: dict[str, set[int]] = {word: set() for word in KINDS}
    for tensor, address in heap.tensors.items():
        if is_a(heap.objects[tensor], torch.nn.Parameter):
            words["parameter"].add(address)
        for holder, step in heap.links.get(tensor, ()):
            if step in _OF_STEPS:
                words[_OF_STEPS[step]].add(address)
            elif is_a(heap.objects[holder], torch.nn.Module):
                words["parameter"].add(address)
    for optimizer in instances(torch.optim.Optimizer) if "torch.optim" in sys.modules else ():
        kept = namespace(optimizer).get("state")
        for states in list(kept.values()) if isinstance(kept, dict) else ():
            for value in list(states.values()) if isinstance(states, dict) else ():
                if id(value) in heap.tensors:
                    words["optimizer state"].add(heap.tensors[id(value)])
    for word in reversed(KINDS):  # a parameter that a graph saved is a parameter
        found.update(dict.fromkeys(words[word], word))
    return found


KINDS = ("parameter", "gradient", "optimizer state", "activation")
"""The first that holds is the one."""
_OF_STEPS = {".grad": "gradient", ".grad_fn": "activation"}


def namespace(thing: object) -> dict[str, object]:
    """Return the attributes in ``thing.__dict__`` without running code of its class."""
    for kind in mro(type(thing)):
        slot = class_namespace(kind).get("__dict__")
        if slot is not None:
            if type(slot) not in (types.GetSetDescriptorType, types.MemberDescriptorType):
                return {}  # a property: a proxy that would load what it stands for
            found = slot.__get__(thing)
            return found if isinstance(found, dict) else {}
    return {}


mro: Callable[[type], tuple[type, ...]] = type.__dict__["__mro__"].__get__
"""``cls.__mro__``, without asking the metaclass."""

class_namespace: Callable[[type], Mapping[str, Any]] = type.__dict__["__dict__"].__get__
"""``cls.__dict__``, without asking the metaclass."""


def is_a(thing: object, base: type) -> bool:
    """Tell whether ``thing`` is an instance of ``base``: ``isinstance`` would wake lazy proxies."""
    return any(kind is base for kind in mro(type(thing)))


def _link_module(heap: Heap, module: object) -> None:
    """Link the parameters, buffers and submodules of an ``nn.Module`` to it."""
    for step, held in parts(module):
        heap.link(module, step, held)


def parts(module: object) -> Iterator[tuple[str, object]]:
    """Yield the parameters, buffers and submodules of an ``nn.Module``, and their names in it."""
    attributes = namespace(module)
    for part in ("_parameters", "_buffers", "_modules"):
        entries = attributes.get(part)
        if not isinstance(entries, dict):  # scripted modules keep them in C++
            continue
        for name, held in list(entries.items()):
            if held is not None:
                yield f"[{name}]" if name.isdigit() else f".{name}", held


def add_tensor(heap: Heap, tensor: Tensor, on_card: OnCard) -> None:
    """Add the storage of ``tensor``, and what ``tensor`` holds in C++."""
    _add_storage(heap, tensor, on_card)
    _link_hidden(heap, tensor, on_card)


def _add_storage(heap: Heap, tensor: Tensor, on_card: OnCard) -> None:
    """Add the storage of ``tensor`` if it has one on a card."""
    with contextlib.suppress(Exception):  # tensor subclasses may refuse any of these questions
        if not on_card(tensor):
            return
        memory = tensor.untyped_storage()
        if memory.device.type == "meta" or not memory.nbytes():
            return
        address = memory.data_ptr()
        known = heap.storages.get(address)
        if known is None or tensor.numel() > math.prod(known.shape):
            heap.storages[address] = Storage(
                address=address,
                size=memory.nbytes(),
                device=str(tensor.device),
                shape=tuple(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
            )
        heap.tensors[heap.add(tensor)] = address


def _link_hidden(heap: Heap, tensor: Tensor, on_card: OnCard) -> None:
    """Link what ``tensor`` holds in C++ to it: its gradient, or what its autograd graph saved."""
    with contextlib.suppress(Exception):
        if tensor.is_leaf:
            _link_held(heap, tensor, ".grad", tensor.grad, on_card)
        else:
            _link_graph(heap, tensor, on_card)


def _link_graph(heap: Heap, tensor: Tensor, on_card: OnCard) -> None:
    """Link the nodes of the graph behind ``tensor`` and what they saved to ``tensor``.

    A node that an earlier tensor's graph contained is not visited again.
    """
    waiting = [tensor.grad_fn]
    while waiting:
        if len(heap.links) >= _MAX_LINKS:
            heap.cut = True
            return
        node = waiting.pop()
        if node is None or id(node) in heap.links:
            continue
        heap.link(tensor, ".grad_fn", node)
        waiting += [following for following, _ in node.next_functions]
        for held in _saved(node):
            _link_held(heap, tensor, ".grad_fn", held, on_card)


def _saved(node: Any) -> Iterator[object]:
    """Yield what an autograd node keeps for the backward pass."""
    yield getattr(node, "variable", None)
    for name in dir(type(node)):
        if name.startswith("_raw_saved"):
            # Saved as packed: unpacking would run user hooks, such as a checkpoint's second
            # forward pass. Raises when the backward pass has freed it.
            with contextlib.suppress(Exception):
                saved = getattr(node, name)
                for each in saved if isinstance(saved, (list, tuple)) else [saved]:
                    yield each.data


def _link_held(heap: Heap, holder: Tensor, step: str, held: Any, on_card: OnCard) -> None:
    """Link ``held`` to ``holder``; C++ may have held it without any Python object so far."""
    if held is None or held is holder:
        return
    heap.link(holder, step, held)
    if is_a(held, sys.modules["torch"].Tensor):
        _add_storage(heap, held, on_card)

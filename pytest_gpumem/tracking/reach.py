"""What a value leads to: the way down, where ``holders`` goes up from a tensor to who holds it."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections import deque
from itertools import islice
from types import FrameType, FunctionType, ModuleType
from typing import TYPE_CHECKING, cast

from pytest_gpumem import devices

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

    from torch import Tensor

    from pytest_gpumem.tracking.torch_heap import Heap

    _Steps = Iterator[tuple[str | None, object]]

_LOOKED_AT = 50_000
_LOOKED_DOWN_AT = 5_000
"""A search that did not find all within so many objects is in vain; all are searched then."""


def on_card(tensor: Tensor) -> bool:
    """Tell whether a tensor's memory may be that of a card."""
    return tensor.device.type not in ("cpu", "meta")


def holds_memory(value: object, behind: tuple[type, ...] = ()) -> bool | None:
    """Tell whether ``value`` leads to a tensor or array on a card within some ten thousand objects.

    Not by way of the kinds ``behind``, behind which lies all of the program. None: there is no
    tensor on this side of one of them, to which the way leads.
    """
    arrays = {id(each.thing) for each in devices.living_arrays()}
    torch = sys.modules.get("torch")
    if torch is None and not arrays:
        return False
    from pytest_gpumem.tracking.torch_heap import is_a

    found: bool | None = False
    for each in _reached(value, behind):
        if issubclass(type(each), behind):
            found = None
        elif id(each) in arrays:
            return True
        elif torch is not None and is_a(each, torch.Tensor):
            with torch._C.DisableTorchFunctionSubclass():  # one that sleeps is not to wake by it
                if on_card(cast("Tensor", each)):
                    return True
    return found


def ways_down(
    top: object, left: set[int], heap: Heap, stops: Container[int]
) -> tuple[list[int], dict[int, tuple[int, str | None]]]:
    """Find the storages ``left`` below ``top``, and take out those that are found.

    Returns their tensors, which are in ``heap`` then, and by each object its holder and how it
    reaches it, by their ids. The way does not go through what is named by itself, nor ``stops``.
    Of modules only the parts are looked at before all else is, and what came last to a list or
    dict first: the newest model of many is found soon, the newest tensor of a list at once.
    """
    from pytest_gpumem.tracking.sentences import is_root
    from pytest_gpumem.tracking.torch_heap import parts

    found: list[int] = []
    above: dict[int, tuple[int, str | None]] = {}
    kinds: dict[type, tuple[bool, bool, bool]] = {}
    waiting: deque[tuple[object, _Steps]] = deque([(top, _referents(top))])
    later: deque[tuple[object, _Steps]] = deque()
    while left and (waiting or later) and len(heap.objects) < _LOOKED_DOWN_AT:
        holder, steps = (waiting or later).popleft()
        for step, held in steps:
            each, kind = id(held), type(held)
            if kind not in kinds or kind is dict:  # of dicts, those of modules are named
                kinds[kind] = is_root(held), *_torch_kind(held)
            named, is_tensor, is_module = kinds[kind]
            if named or each in heap.objects or each in stops:
                continue
            above[heap.add(held)] = id(holder), step
            if is_tensor:
                for new in _look_at(cast("Tensor", held), left, heap):
                    if new != each:  # the tensor holds it in C++
                        above[new] = heap.links[new][0]
                    left.discard(heap.tensors[new])
                    found.append(new)
            else:
                if is_module:
                    waiting.append((held, parts(held)))
                (later if is_module else waiting).append((held, _referents(held)))
            if not left or len(heap.objects) >= _LOOKED_DOWN_AT:
                break
    return found, above


def _torch_kind(thing: object) -> tuple[bool, bool]:
    """Tell whether ``thing`` is a tensor, and whether a module."""
    from pytest_gpumem.tracking.torch_heap import is_a

    torch = sys.modules["torch"]
    return is_a(thing, torch.Tensor), is_a(thing, torch.nn.Module)


def _look_at(tensor: Tensor, left: Container[int], heap: Heap) -> list[int]:
    """Return those of the storages ``left`` that ``tensor`` has or holds in C++, by tensors."""
    from pytest_gpumem.tracking.torch_heap import add_tensor

    known = len(heap.tensors)
    with contextlib.suppress(Exception):  # tensor subclasses may refuse any of these questions
        if tensor.requires_grad or tensor.untyped_storage().data_ptr() in left:
            add_tensor(heap, tensor, on_card)
    new = list(islice(heap.tensors.items(), known, None))
    return [each for each, address in new if address in left]


def _referents(holder: object) -> _Steps:
    """Yield what ``holder`` refers to, the newest of a list or dict first.

    Numbers and texts lead nowhere and are left out: a tokenizer has tens of thousands of them.
    """
    found = gc.get_referents(holder)  # of lists and tuples the last is the first of these
    if type(holder) not in (list, tuple):
        found.reverse()
    return ((None, each) for each in found if gc.is_tracked(each))


def _reached(value: object, behind: tuple[type, ...] = ()) -> Iterator[object]:
    """Yield what ``value`` leads to, the nearest first, each once.

    The way goes through what functions close over, but not into modules, frames and classes, nor
    what is ``behind``; a class may be where it starts.
    """
    seen: set[int] = set()
    waiting = deque([value, *(vars(value).values() if isinstance(value, type) else ())])
    while waiting and len(seen) < _LOOKED_AT:
        each = waiting.popleft()
        # By type: isinstance would wake lazy proxies.
        if id(each) in seen or issubclass(type(each), ModuleType | FrameType | type):
            continue
        seen.add(id(each))
        yield each
        if issubclass(type(each), behind):
            continue
        if type(each) is FunctionType:
            waiting.extend((each.__closure__, each.__defaults__))
        else:
            # Numbers and texts lead nowhere: a tokenizer has tens of thousands of them.
            waiting.extend(filter(gc.is_tracked, gc.get_referents(each)))

"""What a value leads to: the way down, where ``holders`` goes up from a tensor to who holds it."""

from __future__ import annotations

import gc
import sys
from collections import deque
from types import FrameType, FunctionType, ModuleType
from typing import TYPE_CHECKING, cast

from pytest_gpumem import devices

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from torch import Tensor

    from pytest_gpumem.tracking.torch_heap import Storage

_LOOKED_AT = 50_000


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


def storages_below(value: object, addresses: Collection[int]) -> dict[int, Storage]:
    """Return by address those of some storages to which ``value`` leads, as ``holds_memory`` does.

    The way ends where all are found.
    """
    from pytest_gpumem.tracking.torch_heap import is_a, scan

    found: dict[int, Storage] = {}
    torch = sys.modules["torch"]
    for each in _reached(value):
        if len(found) == len(addresses):
            break
        if is_a(each, torch.Tensor):
            storages = scan(on_card, [cast("Tensor", each)]).storages
            found.update((at, storages[at]) for at in storages.keys() & addresses)
    return found


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

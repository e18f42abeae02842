"""A real card that is full from one operation of torch on.

A real card tells nobody before it allocates, and a memory fraction stops segments, not allocations:
what torch has cached is handed out all the same. So torch's operations are watched, each from
before it runs; torch's own counters say afterwards which of them allocated, and how much. One that
an undisturbed run has seen allocate is refused before it does anything, as torch undoes what an
operation had begun when memory ran out. One that nobody foresaw, as the program goes other ways
from then on, has run when it is refused, and its result is dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from pytest_gpumem.simulator.exhaustion import Refusing

__tracebackhide__ = True  # pytest shows the test's line last, none of these


_Counted = tuple[int, int]
"""Bytes that were ever allocated on a device, and those that are now."""


class Operation(NamedTuple):
    """An operation that allocated on a card."""

    place: int
    """Among all operations, from 0."""
    name: str
    device: int
    size: int
    """Bytes of all blocks that it took, those that it gave back included."""


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's has no types
    """Within it, ``refusing`` is asked for each operation of torch that allocates on a card.

    Those of other threads are not seen, but for autograd's own.

    Args:
        refusing: says which of them fails.
        foreseen: the one that is to fail, as an undisturbed run saw it.

    """

    def __init__(self, refusing: Refusing, foreseen: Operation | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no types
        self._refusing = refusing
        self._foreseen = foreseen
        self._place = -1
        self.seen: list[Operation] = []
        """Those that allocated, in their order."""

    def __torch_dispatch__(  # torch's name
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if not self._refusing.on:
            return func(*args, **(kwargs or {}))
        self._place += 1
        before, result = _counters(), None
        refused = self._is_due(before, str(func))
        if refused is None:
            result = func(*args, **(kwargs or {}))
            refused = self._judged(before, str(func))
        if refused is None:
            return result
        del result, args, kwargs, types, func  # whoever keeps the error keeps no tensors by it
        raise torch.OutOfMemoryError(
            f"CUDA out of memory. Tried to allocate {format_bytes(refused.size)}. GPU "
            f"{refused.device} was made full by --gpumem-oom-at"
        )

    def _is_due(self, before: dict[int, _Counted], name: str) -> Operation | None:
        """Return what the operation that begins would take, if it is the one that is to fail."""
        one, refusing = self._foreseen, self._refusing
        if one is None or (one.place, one.name) != (self._place, name):
            return None
        if refusing.counted + 1 != refusing.at:  # it went another way before
            return None
        allocated = before.get(one.device, (0, 0))[1]
        return one if refusing.refuses(one.device, allocated, one.size) else None

    def _judged(self, before: dict[int, _Counted], name: str) -> Operation | None:
        """Return what the operation that has run took, if there was no room for that."""
        refused = None
        for device, (taken, _) in _counters().items():
            taken_before, allocated = before.get(device, (0, 0))
            if taken > taken_before:
                one = Operation(self._place, name, device, taken - taken_before)
                self.seen.append(one)
                if self._refusing.refuses(device, allocated, one.size):
                    refused = one
        return refused


def _counters() -> dict[int, _Counted]:
    """Return what torch has counted, by device; nothing before CUDA is initialised."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch's has no types
        return {}
    found = {}
    for device in range(torch.cuda.device_count()):
        stats = torch.cuda.memory_stats_as_nested_dict(device)
        if stats:
            figure = stats["allocated_bytes"]["all"]
            found[device] = figure["allocated"], figure["current"]
    return found

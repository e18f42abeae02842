"""The tensors that have come since they were asked for last, without a pass over the heap.

Every object begins in the collector's youngest generation, and only collections take it from the
two younger ones. Whoever looks at these now, and before each such collection, has met all of them.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import weakref
from typing import TYPE_CHECKING, Any

from pytest_gpumem.devices.heap import instances

if TYPE_CHECKING:
    from torch import Tensor

_Met = weakref.WeakValueDictionary[int, Any]
"""By identity: a tensor's own hash may be its class's business."""


class Newcomers:
    """Meets tensors as they come, from ``watch`` on, and keeps none of them alive.

    Tensors that the suite freezes (``gc.freeze``) before they were met are missed, and so is what
    comes while somebody keeps others' functions from ``gc.callbacks``.
    """

    def __init__(self) -> None:
        self._met: _Met = weakref.WeakValueDictionary()
        self.watched = False

    def watch(self) -> None:
        """Begin, for as long as this object lives."""
        if self.watched:
            return
        self.watched = True
        met = self._met  # with the object itself, the callback would keep it alive

        def before_collection(phase: str, info: dict[str, int]) -> None:
            if phase == "start" and info["generation"] > 0:
                with contextlib.suppress(Exception):  # nobody could be told but the suite
                    _meet(met)

        gc.callbacks.append(before_collection)
        weakref.finalize(self, _forget, before_collection)

    def take(self) -> list[Tensor]:
        """Return those that live of all that came since the last call, or a little before."""
        _meet(self._met)
        found = list(self._met.values())
        self._met.clear()
        return found


def _meet(met: _Met) -> None:
    torch = sys.modules.get("torch")
    for each in () if torch is None else instances(torch.Tensor, young=True):
        met[id(each)] = each


def _forget(callback: object) -> None:
    # The suite may have emptied the list; by identity, for others' functions may compare anyhow.
    gc.callbacks[:] = [each for each in gc.callbacks if each is not callback]

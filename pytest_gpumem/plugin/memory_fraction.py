"""Caps what torch's allocator may reserve in each process, where the user asks for it."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpumem.devices import torch_private, torch_state

if TYPE_CHECKING:
    from pytest_gpumem.plugin.state import State

SMALLEST = 0.01
"""Part of a card that a process gets in any case."""


def even_share(total: int, workers: int, context: int, headroom: int) -> float:
    """Return the part of a card for each of ``workers`` processes, beside their contexts.

    The formula of PyTorch's own tests, ``(total - workers * context) / workers / total``, falls
    below zero with many workers on a small card; here it stops at ``SMALLEST``.
    """
    return max(SMALLEST, (total - headroom - workers * context) / workers / total)


class Capping:
    """Sets the fraction on each card that the process uses, and again where a test changed it."""

    NAME = "gpumem-capping"

    def __init__(self, state: State) -> None:
        self._settings = state.settings
        self._cards = state.found.cards
        self._notes = state.notes
        self._capped: set[int] = set()
        self._waiting = False
        self._last = ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Cap before the test what it may reserve."""
        cuda = torch_state.cuda()
        if cuda is not None:
            for index in range(cuda.device_count()):
                if torch_private.has_context(index):
                    self._cap(cuda, index)
        elif "torch" in sys.modules and not self._waiting:
            # The test that initialises CUDA is to be capped too.
            self._waiting = torch_private.when_initialised(self._cap_first)
        self._last = item.nodeid

    def _cap_first(self) -> None:
        # Called within the initialisation, which is not complete before we return.
        cuda = sys.modules["torch"].cuda
        self._cap(cuda, cuda.current_device())

    def _cap(self, cuda: Any, index: int) -> None:
        wanted = self._fraction(index)
        # Older versions of torch can set it, but not tell it.
        tell = getattr(cuda, "get_per_process_memory_fraction", None)
        found = None if tell is None else tell(index)
        if found == wanted:
            return
        cuda.set_per_process_memory_fraction(wanted, index)
        if index in self._capped and found is not None:
            self._notes.append(
                f"{self._last} changed the memory fraction to {found:g}; "
                f"it was set to {wanted:g} again"
            )
        self._capped.add(index)

    def _fraction(self, index: int) -> float:
        """Return the part of a card that this process may have."""
        asked = self._settings.fraction
        if asked or index >= len(self._cards):
            return asked or 1.0
        processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        sharing = -(-processes // len(self._cards))
        settings = self._settings
        total = self._cards[index].total
        return even_share(total, sharing, settings.context_cost, settings.headroom)

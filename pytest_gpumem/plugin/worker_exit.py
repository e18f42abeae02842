"""Looks if the CUDA context is lost, and ends a worker that lost it, so that xdist replaces it.

After an illegal address or a failed device assertion every CUDA call of the process fails: one
such test would fail all that its worker runs later.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pytest_gpumem.devices import torch_state
from pytest_gpumem.records import properties
from pytest_gpumem.tracking import release

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

EXIT = 70
"""Exit status of a worker that ends itself."""


class Replacing:
    """Looks at what ends a test's phases in a worker.

    Args:
        leave: tells the controller, where it listens, that the end of this process is no crash.
        ends: whether this process may end, because another one takes its place.

    """

    def __init__(self, leave: Callable[[], None] = lambda: None, *, ends: bool = True) -> None:
        self._leave = leave
        self._ends = ends
        self._broke = ""

    @property
    def is_lost(self) -> bool:
        """Whether the card does not answer any more."""
        return bool(self._broke)

    def note(self, item: pytest.Item, error: BaseException) -> None:
        """Look at the card after a phase that failed of a CUDA error, and tell if it is lost."""
        if self._broke:
            return
        sentence = cuda_sentence(error)
        # A card that is too full for a context is not a context that is lost.
        full = release.oom_sentence(error)
        if sentence and not full and not torch_state.cuda_answers():
            self._broke = sentence
            properties.tell_broke(item.user_properties, sentence)

    def test_ended(self) -> None:
        """End the process if the card is lost, now that all of the test's reports were sent."""
        if self._broke and self._ends:
            self._leave()
            os._exit(EXIT)


def cuda_sentence(error: BaseException) -> str:
    """Return the first line of a CUDA or HIP error in the chain of ``error``, "" without one."""
    for each in release.chain(error):
        line = str(each).partition("\n")[0]
        if isinstance(each, RuntimeError) and line.startswith(("CUDA error", "HIP error")):
            return line
    return ""

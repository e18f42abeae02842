"""Ends a worker whose CUDA context is broken, so that xdist replaces it.

After an illegal address or a failed device assertion every CUDA call of the process fails: one
such test would fail all that its worker runs later.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpumem.devices import torch_state
from pytest_gpumem.tracking import release

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

EXIT = 70
"""Exit status of a worker that ends itself."""


class Replacing:
    """The hooks in a worker.

    Args:
        leave: tells the controller, where it listens, that the end of this process is no crash.

    """

    NAME = "gpumem-replacing"

    def __init__(self, leave: Callable[[], None] = lambda: None) -> None:
        self._leave = leave
        self._broke = ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, call: pytest.CallInfo[Any]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Look at the card after a test that failed of a CUDA error, and tell if it is lost."""
        report = yield
        if call.excinfo is not None and not self._broke:
            sentence = cuda_sentence(call.excinfo.value)
            # A card that is too full for a context is not a context that is lost.
            full = release.oom_sentence(call.excinfo.value)
            if sentence and not full and not torch_state.cuda_answers():
                self._broke = sentence
        if self._broke:
            report.gpumem_broke = self._broke  # type: ignore[attr-defined]  # travels with it
        return report

    # First of all: a plugin that runs a failed test again does so within, and reports at last.
    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        """End the process, now that all of the test's reports have been sent."""
        result = yield
        if self._broke:
            self._leave()
            os._exit(EXIT)
        return result


def cuda_sentence(error: BaseException) -> str:
    """Return the first line of a CUDA or HIP error in the chain of ``error``, "" without one."""
    for each in release.chain(error):
        line = str(each).partition("\n")[0]
        if isinstance(each, RuntimeError) and line.startswith(("CUDA error", "HIP error")):
            return line
    return ""

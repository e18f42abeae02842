"""The hooks that tell a monitor which test this process runs, and what torch holds meanwhile."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from pytest_gpumem import devices
from pytest_gpumem.clock import clock
from pytest_gpumem.errors import LeaseError
from pytest_gpumem.leases.glimpses import Glimpse, Teller, is_watched
from pytest_gpumem.leases.place import run_directory

if TYPE_CHECKING:
    from pathlib import Path


_EVERY = 0.05
"""Seconds between two looks for a monitor: each takes 20 us on some machines, a test of a large
suite of short ones not much more."""


class Watched:
    """Looks for a monitor when a test begins; while there is one, ``Telling`` is registered.

    Nothing else is done without one.
    """

    def __init__(self, manager: pytest.PytestPluginManager) -> None:
        self._manager = manager
        self._directory: Path | None = None
        self.due = 0.0
        """When to look again, by the monotonic clock."""
        with suppress(LeaseError):  # whoever takes leases says so
            self._directory = run_directory()

    def look(self, nodeid: str) -> None:
        """Look for a monitor, and let it know of the test."""
        if self._directory is None:
            self.due = math.inf
            return
        telling: Telling | None = self._manager.get_plugin(Telling.NAME)
        if not is_watched(self._directory):
            self.due = clock.monotonic() + _EVERY
            if telling is not None:
                telling.end()
            return
        if telling is None:
            try:
                telling = Telling(self._manager, Teller(self._directory))
            except OSError:  # a monitor may not see everything; a test must not fail by it
                self._directory = None
                return
            self._manager.register(telling, Telling.NAME)
        telling.begin(nodeid)


class Telling:
    """Tells at the beginning of each phase of a test what is held."""

    NAME = "gpumem-telling"

    def __init__(self, manager: pytest.PytestPluginManager, teller: Teller) -> None:
        self._manager = manager
        self._teller = teller
        self._test = ""

    def begin(self, nodeid: str) -> None:
        """Tell that a test begins."""
        self._test = nodeid
        self._tell("setup")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self) -> None:
        """Tell what is held once the test is set up."""
        self._tell("call")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self) -> None:
        """Tell what is held when the test itself is over."""
        self._tell("teardown")

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        """Tell what is kept between tests."""
        self._tell("")

    def pytest_sessionfinish(self) -> None:
        """Leave nothing behind."""
        self.end()

    def _tell(self, phase: str) -> None:
        worker = os.environ.get("PYTEST_XDIST_WORKER", "")
        try:
            self._teller.tell(Glimpse(os.getpid(), worker, self._test, phase, _held()))
        except OSError:
            self.end()

    def end(self) -> None:
        """Tell nothing any more."""
        self._manager.unregister(self)
        with suppress(OSError):  # what was told is void once this process ends
            self._teller.close()


def _held() -> dict[str, tuple[int, int]]:
    """Return the bytes allocated and reserved by card, of frameworks that are in use."""
    return {
        allocator.card(index).uuid: (reading.allocated, reading.reserved)
        for allocator in devices.allocators()
        for index, reading in enumerate(allocator.read())
    }

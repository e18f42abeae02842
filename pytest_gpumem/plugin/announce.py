"""The hooks that tell a monitor which test this process runs, and what torch holds meanwhile."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from pytest_gpumem import devices
from pytest_gpumem.errors import LeaseError
from pytest_gpumem.leases.place import run_directory
from pytest_gpumem.leases.watching import Glimpse, Teller, is_watched

if TYPE_CHECKING:
    from pathlib import Path


class Watched:
    """Tells at the beginning of each phase of a test, if a monitor looked when the test began."""

    NAME = "gpumem-watched"

    def __init__(self) -> None:
        self._directory: Path | None = None
        self._teller: Teller | None = None
        self._test = ""
        try:
            self._directory = run_directory()
        except LeaseError:  # whoever takes leases says so
            return

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Look for a monitor once a test; nothing else is done without one."""
        if self._directory is None:
            return
        if not is_watched(self._directory):
            self._close()
            return
        self._test = nodeid
        try:
            self._teller = self._teller or Teller(self._directory)
        except OSError:  # a monitor may not see everything; a test must not fail by it
            self._directory = None
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
        self._close()

    def _tell(self, phase: str) -> None:
        if self._teller is None:
            return
        worker = os.environ.get("PYTEST_XDIST_WORKER", "")
        try:
            self._teller.tell(Glimpse(os.getpid(), worker, self._test, phase, _held()))
        except OSError:
            self._close()

    def _close(self) -> None:
        teller, self._teller = self._teller, None
        if teller is not None:
            try:
                teller.close()
            except OSError:
                return  # it is void once this process ends


def _held() -> dict[str, tuple[int, int]]:
    """Return the bytes allocated and reserved by card, of frameworks that are in use."""
    return {
        allocator.card(index).uuid: (reading.allocated, reading.reserved)
        for allocator in devices.allocators()
        for index, reading in enumerate(allocator.read())
    }

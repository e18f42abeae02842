"""Calls of a test before the one whose leak counts; only in a run that asked for some."""

from __future__ import annotations

import unittest
from typing import TYPE_CHECKING

import pytest

from pytest_gpumem.plugin.state import marks_of

if TYPE_CHECKING:
    from pytest_gpumem.tracking.tracker import Tracker


class WarmingUp:
    """Calls each test function a number of times more, so that caches which fill once are full."""

    NAME = "gpumem-warmups"

    def __init__(self, tracker: Tracker, times: int) -> None:
        self._tracker = tracker
        self._times = times

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> None:
        """Call the test; an error of such a call is the test's."""
        # unittest's test cases set themselves up and report by themselves in each call.
        case = isinstance(getattr(item, "cls", None), type) and issubclass(
            item.cls,  # type: ignore[attr-defined]
            unittest.TestCase,
        )
        if not isinstance(item, pytest.Function) or case or marks_of(item).off:
            return
        with self._tracker.scopes.warming_up():
            for _ in range(self._times):
                item.runtest()

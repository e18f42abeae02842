"""The hooks that measure main memory; only in a run that asks for it, with or without a card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpumem.devices import host
from pytest_gpumem.plugin.state import NOTES, RAM, ItemMarks, State, is_worker, marks_of
from pytest_gpumem.records import properties
from pytest_gpumem.tracking.ram import RamMeter
from pytest_gpumem.tracking.sampler import Sampler

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

WORTH_TELLING = 2**20
"""Bytes below which nothing is told of a test: the interpreter's own arenas move by that much."""
UNKNOWN = (
    "--gpumem-ram does nothing here: the system does not tell what a process has of main memory"
)
INEXACT = (
    "peaks of main memory may be too low: nobody may reset the high-water mark of a process here, "
    "so of tests that did not raise it only what they began and ended with is known"
)


class MeasuringRam:
    """Measures the main memory of the tests that this process runs."""

    NAME = "gpumem-ram"

    def __init__(self, state: State) -> None:
        self._state = state
        self._meter = RamMeter()
        settings = state.settings
        self._sampler = Sampler(
            self._meter.look, self._meter.worth_a_look, settings.sample_interval
        )
        self._looks = settings.children == "watch" and settings.sample_interval > 0
        self._exact = True
        self.beginning: Callable[[pytest.Item, ItemMarks], None] = lambda _item, _marks: None
        """Takes the lease of a test as its set-up begins, where nobody does who measures VRAM."""
        self.noting: Callable[[pytest.CallInfo[Any]], None] = lambda _call: None
        """Called with its set-up, before the report is made: to have waited is not its time."""

    def pytest_runtestloop(self) -> None:
        """Begin to look at children."""
        if self._looks:
            self._sampler.start()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Begin before any fixture of the test is set up."""
        marked = marks_of(item)
        self.beginning(item, marked)
        if not marked.off:
            self._meter.begin()
            self._exact &= self._meter.exact

    def pytest_runtest_makereport(self, call: pytest.CallInfo[Any]) -> None:
        """Let the set-up of a test last as long as it did without others."""
        if call.when == "setup":
            self.noting(call)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        """Tell what the test took and kept, when all of its teardown is over."""
        try:
            return (yield)
        finally:
            if not marks_of(item).off:
                usage = self._meter.end()
                if max(usage.own_peak, abs(usage.kept)) >= WORTH_TELLING:
                    properties.tell_ram(item.user_properties, usage)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Tell what this process kept; before the report is made, and a worker ends."""
        if self._looks:
            self._sampler.stop()
        kept, notes = self._meter.kept(), self._state.notes
        if not self._exact:
            notes.append(INEXACT)
        if is_worker(session.config):
            output = session.config.workeroutput  # type: ignore[attr-defined]
            output[RAM] = kept
            output.setdefault(NOTES, notes)  # what measures VRAM tells them as well
        else:
            self._state.worker_ram = kept


def begin(config: pytest.Config, state: State, *, runs_tests: bool) -> None:
    """Measure the main memory of this process's tests, if it runs any and the system tells it."""
    if host.resident() is None:
        state.notes.append(UNKNOWN)
    elif runs_tests:
        config.pluginmanager.register(MeasuringRam(state), MeasuringRam.NAME)

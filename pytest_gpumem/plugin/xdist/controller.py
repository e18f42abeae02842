"""The hooks of an xdist run in the controller: by them xdist gets our scheduler."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpumem import devices
from pytest_gpumem.plugin.learned import load_history
from pytest_gpumem.plugin.report import Reporting
from pytest_gpumem.plugin.state import HISTORY
from pytest_gpumem.plugin.xdist import worker as xdist_worker
from pytest_gpumem.plugin.xdist.scheduler import GpumemScheduling, SchedulerSettings
from pytest_gpumem.scheduling import workers

if TYPE_CHECKING:
    from pytest_gpumem.plugin.state import State
    from pytest_gpumem.scheduling.history import Expectation, History


class Controller:
    """The hooks that put the scheduler into an xdist run.

    Args:
        config: pytest's configuration in the controller.
        expect: as for ``GpumemScheduling``.
        settings: as for ``GpumemScheduling``.
        reporting: shows each report's outcome, which the scheduler has to settle before.
        why_not: why another scheduler than ours shall decide; looked for if not given.

    """

    def __init__(
        self,
        config: pytest.Config,
        expect: Callable[[str, int | None], Expectation],
        settings: SchedulerSettings,
        reporting: Reporting,
        why_not: str | None = None,
    ) -> None:
        self.config = config
        self._expect = expect
        self._settings = settings
        self._reporting = reporting
        self._expected_workers = 0
        self._scheduler: GpumemScheduling | None = None
        self._why_not = why_not

    @property
    def why_not(self) -> str:
        """Why another scheduler than ours decides, "" when ours does."""
        if self._why_not is None:
            self._why_not = self._find_why_not()
        return self._why_not

    def _find_why_not(self) -> str:
        dist = self.config.getoption("dist")
        if dist != "load":
            return f"--dist {dist} has its own order"
        hook = self.config.hook.pytest_xdist_make_scheduler
        strangers = [
            each.plugin_name
            for each in hook.get_hookimpls()
            if each.plugin is not self and each.plugin_name != "dsession"
        ]
        if strangers:
            return f"{strangers[0]} brings its own scheduler"
        return xdist_worker.why_not()

    def pytest_xdist_setupnodes(self, specs: Sequence[Any]) -> None:
        """Tell the workers of each host of one another, so that they spread over its cards.

        In the gateway's environment, because the worker's conftests are loaded before it reads
        ``workerinput``; a replacement inherits its predecessor's.
        """
        self._expected_workers = len(specs)
        for spec, views in zip(specs, workers.views(specs), strict=True):
            spec.env.setdefault(workers.VIEWS, views)

    @pytest.hookimpl(tryfirst=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config) -> GpumemScheduling | None:
        """Take the place of ``--dist load``."""
        if self.why_not:
            return None
        self._scheduler = GpumemScheduling(
            config, self._expect, self._settings, expected_workers=self._expected_workers
        )
        self._reporting.settling = self._scheduler.take_report
        return self._scheduler

    # First, so that everybody who writes results sees them.
    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Report failures that were called reruns although the run ended before these."""
        owed = self._scheduler is not None and self._scheduler.publish_owed()
        if owed and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


class Sharing:
    """Tells the workers what is known, and the user who decides."""

    NAME = "gpumem-sharing"

    def __init__(self, state: State, controller: Controller, history: History) -> None:
        self._state = state
        self._controller = controller
        self._history = history

    def pytest_sessionstart(self) -> None:
        """Say what nobody does who does not schedule."""
        why_not = self._controller.why_not
        if why_not and self._state.settings.worker_ram is not None:
            self._state.notes.append(f"--gpumem-worker-ram replaces no worker: {why_not}")

    def pytest_report_header(self) -> list[str]:
        """Say how many workers there are and why, who schedules, and how many peaks are known."""
        lines = [self._state.worker_reason] if self._state.worker_reason else []
        if self._state.found.cards:
            known = self._history.peaks_known
            lines.append(f"{known or 'no'} peak{'s' * (known != 1)} known from earlier runs")
        if self._controller.why_not:
            lines.append(f"xdist schedules, tests wait for leases: {self._controller.why_not}")
        return [f"gpumem: {line}" for line in lines]

    def pytest_configure_node(self, node: Any) -> None:
        """Ask a worker to obey the scheduler, or else tell it what is known of the tests."""
        if self._controller.why_not:
            node.workerinput[HISTORY] = self._history.text()
        else:
            node.workerinput[xdist_worker.ASKED] = True


def share(config: pytest.Config, state: State) -> None:
    """Let xdist's workers share the cards."""
    settings, history = state.settings, load_history(config, state)
    controller = Controller(
        config,
        history.expect,
        SchedulerSettings(
            context=settings.context_cost,
            headroom=settings.headroom,
            skip_too_large=settings.too_large == "skip",
        ),
        config.pluginmanager.getplugin(Reporting.NAME),
        why_not="--gpumem-schedule=off" if settings.schedule == "off" else None,
    )
    config.pluginmanager.register(controller, "gpumem-scheduler")
    config.pluginmanager.register(Sharing(state, controller, history), Sharing.NAME)


def worker_count(config: pytest.Config, state: State, wanted: int) -> int:
    """Return how many workers ``-n auto`` starts where xdist would start ``wanted``."""
    from pytest_gpumem.devices import host

    settings = state.settings
    state.ask_driver()
    # Workers spread over the slices of a card, of which each process sees one.
    cards = devices.cards_to_choose(os.environ.get(workers.VISIBLE)) or state.found.cards
    readings = map(devices.driver_reading, cards)
    free = [reading.free for reading in readings if reading is not None]
    history = load_history(config, state)
    count = workers.worker_count(
        wanted,
        host.host(),
        free,
        (learned for _, learned in history),
        context=settings.context_cost,
        headroom=settings.headroom,
        scheduled=settings.schedule != "off" and config.getoption("dist") in ("no", "load"),
        each_ram=history.worker_ram,
        packs_ram=settings.ram,
    )
    if count is None:
        return wanted
    state.worker_reason = count.reason
    return count.workers

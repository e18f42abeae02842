"""The hooks of an xdist run in the controller: by them xdist gets our scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpumem.plugin.xdist import worker as xdist_worker
from pytest_gpumem.plugin.xdist.scheduler import GpumemScheduling, SchedulerSettings
from pytest_gpumem.scheduling import workers

if TYPE_CHECKING:
    from pytest_gpumem.scheduling.history import Expectation


class Controller:
    """The hooks that put the scheduler into an xdist run.

    Args:
        config: pytest's configuration in the controller.
        expect: as for ``GpumemScheduling``.
        settings: as for ``GpumemScheduling``.
        why_not: why another scheduler than ours shall decide; looked for if not given.

    """

    def __init__(
        self,
        config: pytest.Config,
        expect: Callable[[str, int | None], Expectation],
        settings: SchedulerSettings,
        why_not: str | None = None,
    ) -> None:
        self.config = config
        self._expect = expect
        self._settings = settings
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
        return self._scheduler

    def take_report(self, report: pytest.TestReport) -> None:
        """Read what a test took, and settle its outcome, before anybody else sees the report."""
        if self._scheduler is not None:
            self._scheduler.take_report(report)

    # First, so that everybody who writes results sees them.
    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Report failures that were called reruns although the run ended before these."""
        owed = self._scheduler is not None and self._scheduler.publish_owed()
        if owed and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

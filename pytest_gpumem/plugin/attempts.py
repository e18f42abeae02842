"""What becomes of a test that ran out of memory: a failure, unless another attempt comes.

A failure is called a rerun only where its report is published, by the process that makes the next
attempt: whoever made the report may be a child that runs this one attempt and ends.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    import pluggy

# Attributes of reports. They travel with them to other processes.
UNDECIDED = "gpumem_undecided"
"""Whether the controller of xdist decides if the test runs again."""
OWED = "gpumem_owed"
"""Whether this attempt was reported before, as a rerun."""
CRASHED = "gpumem_crashed"
"""Whether the test ended the process that it had of its own."""


def leave_undecided(report: pytest.TestReport) -> None:
    """Leave it to the controller whether a failure of its worker is one.

    Not a failure until then: under ``-x`` the worker would stop.
    """
    setattr(report, UNDECIDED, True)
    report.outcome = "rerun"  # type: ignore[assignment]  # as rerunfailures calls it


class Owed:
    """Failures that were called reruns, until the next attempt of their tests has ended.

    An attempt that never comes must not take the failure with it: the run is interrupted, the
    last worker crashed, or another plugin that runs the test does not run it a second time.
    """

    def __init__(self) -> None:
        self.failures: dict[str, pytest.TestReport] = {}

    def promise(self, report: pytest.TestReport) -> None:
        """Call a failure a rerun, because another attempt of the test follows."""
        self.failures[report.nodeid] = failure = copy.copy(report)
        vars(failure).pop(UNDECIDED, None)
        report.outcome = "rerun"  # type: ignore[assignment]  # as rerunfailures calls it

    def settle(self, report: pytest.TestReport) -> None:
        """Forget the failure of a test whose next attempt has an outcome of its own."""
        if report.failed or report.skipped or (report.passed and report.when == "call"):
            self.failures.pop(report.nodeid, None)

    def publish(self, hook: pluggy.HookRelay) -> bool:
        """Report the failures whose next attempt did not come; return whether there were any."""
        failures, self.failures = list(self.failures.values()), {}
        for report in failures:
            setattr(report, OWED, True)
            hook.pytest_runtest_logreport(report=report)
            if report.when != "teardown":  # with which a test is complete
                end = copy.copy(report)
                end.when, end.outcome, end.longrepr = "teardown", "passed", None
                end.sections, end.duration = [], 0.0
                hook.pytest_runtest_logreport(report=end)
        return bool(failures)


class Settling:
    """Settles reports before anybody sees them; in a run in which a test may have failed.

    Not when they are made: that may be in a child that runs this attempt and ends, or this be one
    of several of which another plugin publishes the last.
    """

    NAME = "gpumem-settling"

    def __init__(self, settle: Callable[[pytest.TestReport], None]) -> None:
        self._settle = settle

    # A wrapper and first: who counts failures, pytest itself for -x, sees the settled outcome.
    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_logreport(
        self, report: pytest.TestReport
    ) -> Generator[None, object, object]:
        """Settle a report, and let it be seen."""
        self._settle(report)
        return (yield)

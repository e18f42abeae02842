"""The hooks around each test: its lease, and further attempts if it ran out of memory."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from pytest_gpumem import devices
from pytest_gpumem.archive.shared import registered
from pytest_gpumem.leases import notices
from pytest_gpumem.plugin import attempts, retry
from pytest_gpumem.plugin.lease import Leases
from pytest_gpumem.plugin.route import may_fall_back
from pytest_gpumem.plugin.state import USAGE, ItemMarks, State, is_isolated, stashed
from pytest_gpumem.records import properties
from pytest_gpumem.scheduling.history import DURATION
from pytest_gpumem.scheduling.workers import VISIBLE
from pytest_gpumem.tracking import release

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from pytest_gpumem.leases.ask import Need
    from pytest_gpumem.plugin.worker_exit import Replacing
    from pytest_gpumem.scheduling.history import History
    from pytest_gpumem.tracking.tracker import Tracker


class Scheduler(Protocol):
    """Who hands out the tests of this process, in another one."""

    @property
    def hears_all(self) -> bool:
        """Whether it is told when a test has ended that moved nothing."""

    def granted(self) -> Need | None:
        """Return what was set aside for the test that begins, None if nothing was."""

    def undecided(self, *, spoiled: bool) -> None:
        """Take note that a test may run again elsewhere, and whether its set-up failed."""

    def test_ended(self) -> None:
        """Take note that a test has ended, before its lease is given back."""

    def used_card(self) -> None:
        """Take note that it used a card."""


class Ladder:
    """Has leases taken and given back, and tries a test that ran out of memory again, alone.

    Args:
        config: pytest's configuration.
        state: the plugin's.
        history: what is known of the tests.
        tracker: knows what wider fixtures hold, and what tests and fixtures started.
        scheduler: who hands out the tests of this process; None where it decides by itself.
        replacing: ends this process where its card is lost.

    """

    NAME = "gpumem-ladder"

    def __init__(
        self,
        config: pytest.Config,
        state: State,
        history: History,
        tracker: Tracker | None,
        *,
        scheduler: Scheduler | None = None,
        replacing: Replacing | None = None,
    ) -> None:
        self._tells = _keep_terminal(config)
        self._plugins = config.pluginmanager
        self._settings = state.settings
        self._state = state
        self._history = history
        self._tracker = tracker
        self._scheduler = scheduler
        self._replacing = replacing
        self._isolates = state.settings.isolate == "failed"
        """Whether tests may be run again in a fresh process."""
        granted = None if scheduler is None else scheduler.granted
        self.leases = Leases(state, history, tracker, granted)
        self._next = ""
        """Of the ladder, the step to take with a test that ran out of memory: a further attempt,
        see ``RecordedTest.step``."""
        self._step = ""
        """The step that is being taken."""
        self._running: pytest.Item | None = None
        """The test whose attempt this process makes, or lets a child make."""
        self._owed = attempts.Owed()
        self.spoiled = False
        """Whether a set-up failed in this attempt: what pytest remembers of it would fail the next
        one as well."""
        self._tried: list[str] = []
        """How the attempts before this one ended."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self) -> None:
        """Look at the cards again, if a conftest chose others, before the scheduler is told."""
        state = self._state
        if os.environ.get(VISIBLE) != state.visible:
            state.ask_driver()
            state.found = devices.find_cards()

    @property
    def step(self) -> str:
        """The step that is being taken, see ``retry``; "" at first."""
        return self._step

    @property
    def is_lost(self) -> bool:
        """Whether CUDA does not work any more in this process, where that was looked for."""
        return self._replacing is not None and self._replacing.is_lost

    def pytest_runtestloop(self) -> None:
        """Let what tests start find this process, whether or not these ever take a lease."""
        protocol = self._plugins.hook.pytest_runtest_protocol
        if any(
            not impl.function.__module__.startswith(("_pytest.", "pytest_gpumem."))
            for impl in protocol.get_hookimpls()
        ):
            self.watch_reports()  # whose plugin may have reports made in a child
        self.leases.join()

    def pytest_unconfigure(self) -> None:
        """Leave the terminal to others."""
        if self._tells:
            notices.drop()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Generator[None, object, object]:
        """Give the test's lease back; run the test again if it ran out of memory."""
        self.spoiled = self.leases.beside = False
        self._next = ""
        try:
            self._running = item
            try:
                result = yield
                # Outermost: a plugin that runs a failed test again does so within.
                if self._replacing is not None and not self._next:
                    self._replacing.test_ended()
            finally:
                self._running = None
                moved, scheduler = self.leases.moved, self._scheduler
                if scheduler is not None and (moved or scheduler.hears_all):
                    scheduler.test_ended()
                if moved:
                    self.leases.give_back()
            if moved or scheduler is None or self._state.isolates:
                self._learn(item)
            if self._next:
                before, self._step = self._step, self._next
                try:
                    self._climb(item, nextitem)
                finally:
                    self._step = before
                    self._tried.clear()
        finally:
            if self._owed.failures:
                self._owed.publish(item.ihook)
        return result

    def _climb(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        """Run a test again, on the next step of the ladder."""
        # A fresh process has its own wide fixtures: these make room for them, if they still can.
        if not self.is_lost and (self.spoiled or self._step == retry.FRESH):
            from pytest_gpumem.plugin.xdist.worker import tear_down

            report = tear_down(item, None)
            if report is not None:
                item.ihook.pytest_runtest_logreport(report=report)
        consolidator = registered()
        if consolidator is not None:
            done = consolidator.consolidate_gpu_memory(process_context=item.name)
            properties.tell_consolidated(item.user_properties, done)
        properties.tell_step(item.user_properties, self._step)
        manager = sys.modules.get("pytest_gpumem.routing.resource_manager")
        banned = nullcontext()
        if self._step != retry.CPU and self._tracker is not None:
            self._tracker.recordings.record_next(item.nodeid)  # to say what fills the card
        if self._step == retry.CPU and manager is not None:
            banned = manager.shared.ban("it ran out of memory on the card")
        with banned:
            item.ihook.pytest_runtest_protocol(item=item, nextitem=nextitem)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let a test run outside of pytest's protocol, alone on the card by its lease."""
        before, self._step = self._step, retry.ALONE
        try:
            yield
        finally:
            self._step = before
            if self.leases.moved:
                self.leases.give_back()

    def begin(self, item: pytest.Item, marked: ItemMarks, *, apart: bool = False) -> None:
        """Take a lease as the set-up of a test begins; fail or skip a test that can have none.

        ``apart`` says that it will run in a process of its own.
        """
        refusal = self.leases.take(item, marked, self._step, apart=apart)
        if refusal and self._settings.too_large == "skip":
            pytest.skip(refusal)
        if refusal:
            pytest.fail(refusal, pytrace=False)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any]
    ) -> Generator[None, object, object]:
        """Note what a fixture leases, and that a wider one failed.

        Which a test may have asked for as late as it ran.
        """
        before, standing = self.leases.held_here(), self.leases.standing
        around, standing.setting_up = standing.setting_up, fixturedef
        try:
            return (yield)
        except BaseException:
            self.spoiled |= fixturedef.scope != "function"
            raise
        finally:
            standing.setting_up = around
            self.leases.note_fixture(fixturedef, before)

    def note(self, item: pytest.Item, call: pytest.CallInfo[Any]) -> None:
        """Let the report of a test that ran out of memory say so, before it is made.

        Who was beside the test is asked now: making a report can take longer than they stay.
        """
        if call.when == "setup":
            if self.leases.waited:
                self.uncount(call)
            if self.leases.standing.new:
                self.leases.standing.test_begins(self.leases.keep)
        if call.excinfo is None:
            return
        self.watch_reports()
        if tell_why(item, call, self._replacing, self._tracker):
            self.leases.note_others()

    def uncount(self, call: pytest.CallInfo[Any]) -> None:
        """Take what others made a test wait out of the time of its set-up."""
        call.duration -= self.leases.waited
        call.start += self.leases.waited
        self.leases.waited = 0.0

    def watch_reports(self) -> None:
        """Settle reports from now on."""
        if not self._plugins.hasplugin(attempts.Settling.NAME):
            self._plugins.register(attempts.Settling(self.settle), attempts.Settling.NAME)

    def settle(self, report: pytest.TestReport) -> None:
        """Call running out of memory an attempt, and no failure, if there is a next step."""
        item = self._running
        # A subtest, which has a context, is not run again: the tests around it have gone on.
        if item is None or report.nodeid != item.nodeid or hasattr(report, "context"):
            return
        if not self._next:
            self._owed.settle(report)
        if not report.failed:
            return
        if report.when == "teardown":
            if self._next and self.is_lost:  # of a lost context, fixtures cannot be torn down
                report.outcome = "rerun"  # type: ignore[assignment]  # as of the attempt's failure
            return
        self.spoiled |= report.when == "setup"
        text = properties.read_oom(report.user_properties)
        broke = properties.read_broke(report.user_properties)
        step = retry.next_step(self._situation(item, report)) if text or broke else ""
        if step == retry.ELSEWHERE:
            if self._scheduler is not None:
                self._scheduler.undecided(spoiled=self.spoiled)
            attempts.leave_undecided(report)
        elif step:
            self._next = step
            self._tried.append(f"{self._step or 'at first'}: {broke or text}")
            self._owed.promise(report)
        elif self._tried:
            report.sections.append(("GPU memory of earlier attempts", "\n".join(self._tried)))

    def _situation(self, item: pytest.Item, report: pytest.TestReport) -> retry.Situation:
        told = report.user_properties
        text = properties.read_oom(told)
        alone = self.leases.alone
        first = not self._step and not alone
        if first:
            self.leases.note_others()  # a child may have run the test
        return retry.Situation(
            answer=self._settings.oom if self._settings.oom_at is None else "fail",
            step=self._step,
            may_fall_back=may_fall_back(item, routed=properties.is_routed(told)),
            fits_nowhere=release.fits_nowhere(
                text, max((card.total for card in self._state.found.cards), default=0)
            ),
            was_alone=alone,
            is_shared=first and self.leases.beside,
            can_release=registered() is not None,
            may_isolate=self._isolates and not is_isolated(item, self._settings.isolate),
            is_lost=bool(properties.read_broke(told)),
            is_scheduled=self._scheduler is not None,
        )

    def _learn(self, item: pytest.Item) -> None:
        """Expect of the test's relatives in this process what it took.

        A test that took nothing, as expected, teaches nothing, nor does one without a framework.
        """
        usage = stashed(item, USAGE)
        if usage is None or self._settings.oom_at is not None:
            return
        if not (usage.cards or self._history or "torch" in sys.modules):
            return  # as each test of a suite that uses no card
        if self._scheduler is None:
            # Of a test without a mark, this was asked when it began.
            expected = self.leases.needs.expected or self._history.expect(item.nodeid)
            if usage.cards or expected.gpu or expected.source == "guess":
                self._history.note_usage(item.nodeid, usage.cards, DURATION)
        elif any(card.extra or card.fixture_bytes or card.ooms for card in usage.cards):
            self._scheduler.used_card()


def tell_why(
    item: pytest.Item,
    call: pytest.CallInfo[Any],
    replacing: Replacing | None,
    tracker: Tracker | None,
) -> str:
    """Let the report of a phase that failed say if the context was lost or memory ran out.

    Returns what the card said when memory ran out, "" if it did not.
    """
    assert call.excinfo is not None  # noqa: S101  # callers have looked
    error = call.excinfo.value
    if replacing is not None:
        replacing.note(item, error)
    if call.when == "teardown":
        return ""
    text = release.oom_text(error)
    if not text and tracker is not None and not isinstance(error, pytest.skip.Exception):
        text = tracker.child_oom()
    properties.tell_oom(item.user_properties, text)
    return text


def _keep_terminal(config: pytest.Config) -> bool:
    """Let it be told in the terminal what is waited for, whatever captures meanwhile."""
    capture = config.pluginmanager.getplugin("capturemanager")
    with nullcontext() if capture is None else capture.global_and_fixture_disabled():
        return notices.keep()

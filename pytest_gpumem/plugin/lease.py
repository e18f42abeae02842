"""The hooks that take a lease for each test that uses a card, in each process that runs some."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpumem import admission, devices
from pytest_gpumem.errors import LeaseError, LeaseTimeout, TooLarge
from pytest_gpumem.leases import telling
from pytest_gpumem.leases.api import store
from pytest_gpumem.leases.ask import SOMETHING, Need, Place, want_of
from pytest_gpumem.leases.request import HOPE, Want
from pytest_gpumem.plugin import attempts, marks, retry
from pytest_gpumem.plugin.route import may_fall_back
from pytest_gpumem.plugin.state import GRANT, USAGE, State, marks_of, stashed
from pytest_gpumem.plugin.xdist.worker import tear_down
from pytest_gpumem.records import Grant, properties
from pytest_gpumem.scheduling.history import DURATION
from pytest_gpumem.scheduling.workers import VISIBLE, Holdings
from pytest_gpumem.tracking import release
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

    from pytest_gpumem.archive.consolidator import GpuConsolidator
    from pytest_gpumem.leases.store import Lease, LeaseStore
    from pytest_gpumem.plugin.worker_exit import Replacing
    from pytest_gpumem.records import Card
    from pytest_gpumem.scheduling.history import Expectation, History
    from pytest_gpumem.tracking.tracker import Tracker

ANY = marks.Need(vram=None, cards=1, exclusive=False)
"""What a test without a mark asks for."""


class Leasing:
    """Takes leases, gives them back, and tries a test that ran out of memory again, alone.

    Args:
        config: pytest's configuration.
        state: the plugin's.
        history: what is known of the tests.
        tracker: knows what wider fixtures hold, and what tests and fixtures started.
        granted: returns what xdist's controller has set aside for the test that begins, None if
            nothing; not given where this process decides by itself.
        used_card: called after a test that used a card.
        replacing: ends this process where its card is lost.

    """

    NAME = "gpumem-leasing"

    def __init__(
        self,
        config: pytest.Config,
        state: State,
        history: History,
        tracker: Tracker | None,
        *,
        granted: Callable[[], Need | None] | None = None,
        used_card: Callable[[], None] = lambda: None,
        replacing: Replacing | None = None,
    ) -> None:
        self._tells = _keep_terminal(config)
        self._plugins = config.pluginmanager
        self._settings = state.settings
        self._state = state
        self._history = history
        self._tracker = tracker
        self._granted = granted
        self._used_card = used_card
        self._replacing = replacing
        self._holdings = Holdings(state.settings.context_cost)
        self._notes = state.notes
        self._without = False
        """Whether there are no leases on this machine."""
        self._stuck = False
        """Whether what could be consolidated was not when another process wanted its room."""
        self._lease: Lease | None = None
        self._fixtures: dict[str, str] = {}
        """The fixtures whose set-up took leases, by the lease."""
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
        self.undecided = False
        """Whether it is left to the controller if this attempt is the last."""
        self._expected: Expectation | None = None
        """Of the test that runs, if it has no mark."""
        self._waited = 0.0
        """Seconds that the test which is set up waited for its lease."""
        self._beside = False
        """Whether somebody else was seen on the cards while this attempt ran."""
        self._tried: list[str] = []
        """How the attempts before this one ended."""

    @property
    def _cards(self) -> tuple[Card, ...]:
        return self._state.found.cards

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self) -> None:
        """Look at the cards again, if a conftest chose others, before the scheduler is told."""
        state = self._state
        if state.simulation is None and os.environ.get(VISIBLE) != state.visible:
            state.found = devices.find_cards()

    def pytest_runtestloop(self) -> None:
        """Let what tests start find this process, whether or not these ever take a lease."""
        protocol = self._plugins.hook.pytest_runtest_protocol
        if any(
            not impl.function.__module__.startswith(("_pytest.", "pytest_gpumem."))
            for impl in protocol.get_hookimpls()
        ):
            self._watch_reports()  # whose plugin may have reports made in a child
        with suppress(LeaseError):  # whoever takes one says so
            opened = self._open()
            opened.join()
            if strange := opened.strange_files():
                self._notes.append(f"left alone, for they are no leases: {', '.join(strange[:3])}")

    def pytest_unconfigure(self) -> None:
        """Leave the terminal to others."""
        if self._tells:
            telling.drop()

    # Around a test

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Generator[None, object, object]:
        """Give the test's lease back; run the test again if it ran out of memory."""
        self.spoiled = self.undecided = self._beside = False
        self._next = ""
        try:
            self._running = item
            try:
                result = yield
                # Outermost: a plugin that runs a failed test again does so within.
                if self._replacing is not None:
                    self._replacing.test_ended()
            finally:
                self._running = None
                self._give_back()
            self._learn(item)
            if self._next:
                before, self._step = self._step, self._next
                try:
                    self._climb(item, nextitem)
                finally:
                    self._step = before
                    self._tried.clear()
        finally:
            if self._owed:
                self._owed.publish(item.ihook)
        return result

    def _climb(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        """Run a test again, on the next step of the ladder."""
        report = tear_down(item, None) if self.spoiled else None
        if report is not None:
            item.ihook.pytest_runtest_logreport(report=report)
        consolidator = _consolidator()
        if consolidator is not None:
            done = consolidator.consolidate_gpu_memory(process_context=item.name)
            properties.tell_consolidated(item.user_properties, done)
        properties.tell_step(item.user_properties, self._step)
        manager = sys.modules.get("pytest_gpumem.routing.resource_manager")
        banned = nullcontext()
        if self._step == retry.CPU and manager is not None:
            banned = manager.shared.ban("it ran out of memory on the card")
        with banned:
            item.ihook.pytest_runtest_protocol(item=item, nextitem=nextitem)

    # A phase of the test, so that whatever ends a test ends its wait, and a report is made.
    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Take a lease; fail or skip a test that can have none."""
        refusal = self._take(item)
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
        before = self._leases_here()
        try:
            return (yield)
        except BaseException:
            self.spoiled |= fixturedef.scope != "function"
            raise
        finally:
            for lease in self._leases_here() - before:
                self._fixtures.setdefault(lease, fixturedef.argname)

    def note(self, item: pytest.Item, call: pytest.CallInfo[Any]) -> None:
        """Let the report of a test that ran out of memory say so, before it is made.

        Who was beside the test is asked now: making a report can take longer than they stay.
        """
        if call.when == "setup" and self._waited:
            # What others made it wait is not the test's time.
            call.duration -= self._waited
            call.start += self._waited
            self._waited = 0.0
        if call.excinfo is None:
            return
        self._watch_reports()
        if self._replacing is not None:
            self._replacing.note(item, call.excinfo.value)
        if call.when == "teardown":
            return
        text = release.oom_text(call.excinfo.value)
        skipped = isinstance(call.excinfo.value, pytest.skip.Exception)
        if not text and self._tracker is not None and not skipped:
            text = self._tracker.child_oom()
        properties.tell_oom(item.user_properties, text)
        if text:
            self._note_others()

    def _watch_reports(self) -> None:
        if not self._plugins.hasplugin(attempts.Settling.NAME):
            self._plugins.register(attempts.Settling(self.settle), attempts.Settling.NAME)

    def _note_others(self) -> None:
        self._beside = self._beside or any(map(self._is_shared, self._cards))

    def settle(self, report: pytest.TestReport) -> None:
        """Call running out of memory an attempt, and no failure, if there is a next step."""
        item = self._running
        # A subtest, which has a context, is not run again: the tests around it have gone on.
        if item is None or report.nodeid != item.nodeid or hasattr(report, "context"):
            return
        if not self._next:
            self._owed.settle(report)
        if not report.failed or report.when == "teardown":
            return
        self.spoiled |= report.when == "setup"
        text = properties.read_oom(report.user_properties)
        step = retry.next_step(self._situation(item, text)) if text else ""
        if step == retry.ELSEWHERE:
            self.undecided = True
            attempts.leave_undecided(report)
        elif step:
            self._next = step
            self._tried.append(f"{self._step or 'at first'}: {text}")
            self._owed.promise(report)
        elif self._tried:
            report.sections.append(("GPU memory of earlier attempts", "\n".join(self._tried)))

    def _situation(self, item: pytest.Item, text: str) -> retry.Situation:
        lease, consolidator = self._lease, _consolidator()
        # What others keep or use all the same left one with less than it asked for: it had the
        # card to itself, and would get no more of it.
        alone = lease is not None and (lease.exclusive or lease.short > 0)
        first = not self._step and not alone
        if first:
            self._note_others()  # a child may have run the test
        return retry.Situation(
            answer=self._settings.oom,
            step=self._step,
            may_fall_back=may_fall_back(item),
            fits_nowhere=release.fits_nowhere(
                text, max((card.total for card in self._cards), default=0)
            ),
            was_alone=alone,
            is_shared=first and self._beside,
            can_release=consolidator is not None,
            is_scheduled=self._granted is not None,
        )

    def _is_shared(self, card: Card) -> bool:
        if self._without:
            return devices.used_by_others(card)
        try:
            opened = self._open()
            return opened.is_shared(card.uuid) or opened.foreign(card.uuid, card.total) > 0
        except LeaseError as error:
            self._do_without(error)
            return False

    def _learn(self, item: pytest.Item) -> None:
        """Expect of the test's relatives in this process what it took.

        A test that took nothing, as expected, teaches nothing.
        """
        usage = stashed(item, USAGE)
        if usage is None:
            return
        if self._granted is None:
            # Of a test without a mark, this was asked when it began.
            expected = self._expected or self._history.expect(item.nodeid)
            if usage.cards or expected.gpu or expected.source == "guess":
                self._history.note_usage(item.nodeid, usage.cards, DURATION)
        elif any(card.extra or card.ooms for card in usage.cards):
            self._used_card()

    # Leases

    def _take(self, item: pytest.Item) -> str:
        """Take a lease for the test; return why it can have none, "" otherwise."""
        if self._lease is not None:  # the attempt before, of a plugin that runs tests again
            return ""
        if GRANT in item.stash:  # an earlier attempt's
            del item.stash[GRANT]
        need = self._need(item)
        if need is None or self._without:
            return ""
        try:
            if self._is_within(item):
                return ""
            refusal = self._too_large(item, need)
            if not refusal:
                self._acquire(item, need)
            return refusal
        except (LeaseTimeout, TooLarge) as error:
            return str(error)
        except LeaseError as error:
            self._do_without(error)
            return ""

    def _is_within(self, item: pytest.Item) -> bool:
        """Return whether a test runs within a lease of the suite's own.

        One of a fixture is for the tests that use the fixture, any other is for all of them; and
        what a test runs in this process is within that test's.
        """
        fixtures = (self._fixtures.get(lease) for lease in self._leases_here())
        names = getattr(item, "fixturenames", ())
        return self._open().has_test() or any(name is None or name in names for name in fixtures)

    def _leases_here(self) -> set[str]:
        try:
            return set() if self._without else self._open().held_here()
        except LeaseError as error:
            self._do_without(error)
            return set()

    def _acquire(self, item: pytest.Item, need: Need) -> None:
        cards = self._cards[: need.cards]
        held = self._kept()
        wants = {}
        for card in cards:
            there = self._there(item, need).get(card.uuid, 0)
            # One byte is what is asked for of whom nothing is known.
            rest = need if not there else need._replace(size=max(2, (need.size or 0) - there))
            wants[card.uuid] = self._want(rest, card, held)
        begun = time.monotonic()
        with telling.Waiting(item.nodeid, self._open().ancestors) as waiting:

            def on_wait(text: str) -> None:
                waiting.note(text)
                if self._spare():
                    self.keep()

            try:
                self._lease = self._wait(item, wants, on_wait)
            except BaseException:
                self._waited = time.monotonic() - begun
                if waiting.what:  # pytest-timeout's, or Ctrl-C
                    item.add_report_section("setup", "GPU memory", f"waited for {waiting.what}")
                raise
            else:
                self._waited = self._lease.waited
        size = min(wants[card.uuid].size or card.total for card in cards)
        item.stash[GRANT] = Grant(tuple(wants), size, self._lease.exclusive, self._waited)
        self._beside = any(self._open().is_shared(uuid) for uuid in wants)

    def _wait(
        self, item: pytest.Item, wants: Mapping[str, Want], on_wait: Callable[[str], None]
    ) -> Lease:
        """Return a lease.

        A test that the scheduler sent does not hope for models to be spared: idle workers are the
        scheduler's to ask, and do not look themselves.
        """
        totals = {card.uuid: card.total for card in self._cards}
        hope = HOPE if self._granted is None else 0.0
        timeout = self._settings.lease_timeout
        return self._open().acquire(
            wants, totals, item.nodeid, timeout, on_wait, hope=hope, test=True
        )

    def _give_back(self) -> None:
        """Tell what the process keeps, and let others have the rest."""
        self._spare()
        self.keep()
        if self._lease is not None:
            try:
                self._lease.release()
            except LeaseError as error:
                self._do_without(error)
        self._lease = None

    def keep(self) -> dict[str, tuple[int, int]]:
        """Tell others what the process keeps on each card; return these bytes.

        With them, as the second of each pair, come the bytes of them that wider fixtures hold.
        """
        held = self._kept()
        if not held:
            return {}
        standing = self._standing()
        try:
            for uuid, resident in () if self._without else held.items():
                self._open().set_resident(uuid, resident, spare=self._can_spare())
        except LeaseError as error:
            self._do_without(error)
        return {uuid: (kept, standing.get(uuid, 0)) for uuid, kept in held.items()}

    def _kept(self) -> dict[str, int]:
        """Return by card what this process keeps, and what those keep that it started."""
        children = None if self._tracker is None else self._tracker.children
        if children is None:
            return self._holdings()
        return dict(Counter(self._holdings()) + Counter(children.living()))

    def _standing(self) -> Mapping[str, int]:
        """Return by card what wider fixtures hold, and what they started."""
        return {} if self._tracker is None else self._tracker.standing()

    def _there(self, item: pytest.Item, need: Need) -> Mapping[str, int]:
        """Return by card what is there already of the bytes that a test's mark asks for.

        A mark is for all that the test works with, and its fixtures' engines stand.
        """
        asked = marks_of(item).need
        if self._tracker is None or asked is None or asked.vram is None or need.size != asked.vram:
            return {}
        return self._tracker.engines(getattr(item, "fixturenames", ()))

    def _can_spare(self) -> bool:
        return not self._stuck and _consolidator() is not None

    def _spare(self) -> bool:
        """Consolidate what is registered if another process waits for its room; return whether."""
        consolidator = _consolidator()
        if consolidator is None or self._stuck or self._without:
            return False
        try:
            if not any(self._open().is_wanted(card.uuid, card.total) for card in self._cards):
                return False
        except LeaseError as error:
            self._do_without(error)
            return False
        done = consolidator.consolidate_gpu_memory(process_context="wanted by another process")
        self._stuck = bool(done.refused)
        return True

    def _do_without(self, error: LeaseError) -> None:
        self._without = True
        self._notes.append(f"tests ran without leases: {error}")

    def _open(self) -> LeaseStore:
        opened = store()
        opened.headroom = self._settings.headroom
        return opened

    def _need(self, item: pytest.Item) -> Need | None:
        """Return what a test is to be granted, None for one that uses no card."""
        self._expected, marked = None, marks_of(item)
        if marked.off:
            return None
        asked = marked.need or ANY
        if self._step == retry.CPU:
            return None
        if self._step:
            return Need(None, asked.cards)
        if self._granted is not None:
            return self._granted()
        expected = self._history.expect(item.nodeid, asked.vram)
        self._expected = expected if asked.vram is None else None
        if expected.peak is not None:
            return Need(expected.peak, asked.cards, asked.exclusive, expected.fixtures)
        if expected.gpu or marked.need is not None:
            careful = asked.exclusive or self._settings.schedule != "optimistic"
            return Need(None if careful else SOMETHING, asked.cards)
        unknown = expected.source == "guess" and "torch" in sys.modules
        return Need(SOMETHING) if unknown else None

    def _want(self, need: Need, card: Card, held: Mapping[str, int]) -> Want:
        if self._step and self._granted is None:
            # Others are to spare what they keep, if they can.
            kept = held.get(card.uuid, 0)
            most = self._open().capacity(card.uuid, card.total) - kept
            return Want(max(SOMETHING, most), exclusive=True)
        place = Place(
            card.total,
            self._settings.headroom,
            self._settings.context_cost,
            held.get(card.uuid, 0),
            self._standing().get(card.uuid, 0),
        )
        return want_of(need, place)

    def _too_large(self, item: pytest.Item, need: Need) -> str:
        """Return in one sentence why no card can ever grant what a test's mark asks for."""
        if need.cards > len(self._cards):
            return admission.why_too_many(item.nodeid, need.cards, len(self._cards))
        asked = marks_of(item).need
        vram = asked.vram if asked is not None else None
        besides = self._settings.context_cost + self._settings.headroom
        for card in self._cards[: need.cards]:
            if vram is not None and vram + besides > card.total:
                return admission.why_too_large(
                    item.nodeid,
                    vram,
                    need.cards,
                    f"{card.name} has {format_bytes(card.total)}",
                    context=self._settings.context_cost,
                    headroom=self._settings.headroom,
                )
        return ""


def _consolidator() -> GpuConsolidator | None:
    """Return the process's consolidator, if anything is registered that it could consolidate."""
    module = sys.modules.get("pytest_gpumem.archive.consolidator")
    here = module.get_gpu_consolidator() if module is not None else None
    return None if here is None or here.idle else here


def _keep_terminal(config: pytest.Config) -> bool:
    """Let it be told in the terminal what is waited for, whatever captures meanwhile."""
    capture = config.pluginmanager.getplugin("capturemanager")
    with nullcontext() if capture is None else capture.global_and_fixture_disabled():
        return telling.keep()

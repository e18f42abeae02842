"""The hooks that take a lease for each test that uses a card, in each process that runs some."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from pytest_gpumem import devices, marks
from pytest_gpumem.measuring import oom_sentence
from pytest_gpumem.records import Grant
from pytest_gpumem.sharing.history import DURATION
from pytest_gpumem.sharing.lease import (
    Lease,
    LeaseError,
    LeaseStore,
    LeaseTimeout,
    TooLarge,
    Want,
    store,
)
from pytest_gpumem.sharing.workers import Holdings
from pytest_gpumem.sharing.xdist_private import tear_down
from pytest_gpumem.state import GRANT, ITEM_MARKS, NO_MARKS, USAGE, State
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

    from pytest_gpumem.records import Card
    from pytest_gpumem.sharing.history import History

TELL_AFTER = 10.0
"""Seconds that a test waits before the terminal is told what for."""
ANY = marks.Need(vram=None, cards=1, exclusive=False)
"""What a test without a mark asks for."""
_SOMETHING = 1
"""Bytes for a test that may use a card and of which nothing is known: it shares the card with
anybody, but not with a test that has to be alone."""


class Need(NamedTuple):
    """What one test is to be granted on each of its cards."""

    size: int | None
    """Bytes beyond what its process keeps; None when unknown: then it has to be alone."""
    cards: int = 1
    alone: bool = False
    fixtures: int = 0
    """Bytes more, as far as the process does not keep the test's wider fixtures already."""


class Leasing:
    """Takes leases, gives them back, and tries a test that ran out of memory again, alone.

    Args:
        config: pytest's configuration.
        state: the plugin's.
        history: what is known of the tests.
        granted: returns what xdist's controller has set aside for the test that begins, None if
            nothing; not given where this process decides by itself.

    """

    NAME = "gpumem-leasing"

    def __init__(
        self,
        config: pytest.Config,
        state: State,
        history: History,
        granted: Callable[[], Need | None] | None = None,
    ) -> None:
        self._capture = config.pluginmanager.getplugin("capturemanager")
        self._settings = state.settings
        self._cards = state.found.cards
        self._history = history
        self._granted = granted
        self._holdings = Holdings(state.settings.context_cost)
        self._notes = state.notes
        self._without = False
        """Whether there are no leases on this machine."""
        self._lease: Lease | None = None
        self._refusal = ""
        self._lacked_room = False
        """Whether the test ran out of memory on a card that it shared."""
        self._spoiled = False
        """Whether its set-up did: wider fixtures that failed would fail it again."""
        self._alone = False
        """Whether it runs again because of that."""

    # Around a test

    # First of all, so that waiting is not on the clock of pytest-timeout.
    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Generator[None, object, object]:
        """Hold a lease while the test runs; run it again, alone, if it lacked room."""
        self._take(item)
        try:
            result = yield
        finally:
            self._give_back()
        if self._granted is None:
            self._learn(item)
        if self._lacked_room:
            self._lacked_room, self._alone = False, True
            try:
                report = tear_down(item, None) if self._spoiled else None
                if report is not None:
                    item.ihook.pytest_runtest_logreport(report=report)
                item.ihook.pytest_runtest_protocol(item=item, nextitem=nextitem)
            finally:
                self._alone = False
        return result

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        """Fail or skip a test that can have no lease."""
        refusal, self._refusal = self._refusal, ""
        if refusal and self._settings.too_large == "skip":
            pytest.skip(refusal)
        if refusal:
            pytest.fail(refusal, pytrace=False)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, call: pytest.CallInfo[Any]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Call running out of memory beside others an attempt, and no failure.

        Where the controller schedules, it decides.
        """
        report = yield
        if self._granted is not None or not report.failed or call.excinfo is None:
            return report
        if oom_sentence(call.excinfo.value) and self._may_try_again():
            self._lacked_room, self._spoiled = True, report.when == "setup"
            report.outcome = "rerun"  # type: ignore[assignment]  # as rerunfailures calls it
        return report

    def _may_try_again(self) -> bool:
        """Return whether others are on the card, so that being alone would help."""
        if self._alone or self._settings.oom != "retry":
            return False
        if self._lease is not None and self._lease.exclusive:
            return False
        return any(map(self._is_shared, self._cards))

    def _is_shared(self, card: Card) -> bool:
        if set(devices.process_bytes(card)) - {os.getpid()}:
            return True
        try:
            return not self._without and self._open().is_shared(card.uuid)
        except LeaseError as error:
            self._do_without(error)
            return False

    def _learn(self, item: pytest.Item) -> None:
        """Expect of the test's relatives in this process what it took."""
        usage = item.stash.get(USAGE, None)
        if usage is not None:
            self._history.note_usage(item.nodeid, usage.cards, DURATION)

    # Leases

    def _take(self, item: pytest.Item) -> None:
        if GRANT in item.stash:  # an earlier attempt's
            del item.stash[GRANT]
        need = self._need(item)
        if need is None or self._without:
            return
        try:
            if self._open().held_here():
                return  # the test runs within a lease of the suite's own
            self._refusal = self._too_large(item, need)
            if not self._refusal:
                self._acquire(item, need)
        except (LeaseTimeout, TooLarge) as error:
            self._refusal = str(error)
        except LeaseError as error:
            self._do_without(error)

    def _acquire(self, item: pytest.Item, need: Need) -> None:
        cards = self._cards[: need.cards]
        held = self._holdings()
        wants = {card.uuid: self._want(need, card, held) for card in cards}
        begun = time.monotonic()
        with _Telling(lambda text: self._say(f"{item.nodeid} waits for {text}")) as telling:
            self._lease = self._open().acquire(
                wants,
                {card.uuid: card.total for card in cards},
                item.nodeid,
                self._settings.lease_timeout,
                telling.on_wait,
            )
        size = min(wants[card.uuid].size or card.total for card in cards)
        waited = time.monotonic() - begun
        item.stash[GRANT] = Grant(tuple(wants), size, self._lease.exclusive, waited)

    def _give_back(self) -> None:
        """Tell what the process keeps, and let others have the rest."""
        self._refusal = ""
        try:
            held = self._holdings()
            if held and not self._without:
                for uuid, resident in held.items():
                    self._open().set_resident(uuid, resident)
            if self._lease is not None:
                self._lease.release()
        except LeaseError as error:
            self._do_without(error)
        self._lease = None

    def _do_without(self, error: LeaseError) -> None:
        self._without = True
        self._notes.append(f"tests ran without leases: {error}")

    def _open(self) -> LeaseStore:
        opened = store()
        opened.headroom = self._settings.headroom
        return opened

    def _need(self, item: pytest.Item) -> Need | None:
        """Return what a test is to be granted, None for one that uses no card."""
        marked = item.stash.get(ITEM_MARKS, NO_MARKS)
        if marked.off:
            return None
        if self._granted is not None:
            return self._granted()
        asked = marked.need or ANY
        if self._alone:
            return Need(None, asked.cards)
        expected = self._history.expect(item.nodeid, asked.vram)
        if expected.peak is not None:
            return Need(expected.peak, asked.cards, asked.exclusive, expected.fixtures)
        if expected.gpu or marked.need is not None:
            careful = asked.exclusive or self._settings.schedule != "optimistic"
            return Need(None if careful else _SOMETHING, asked.cards)
        unknown = expected.source == "guess" and "torch" in sys.modules
        return Need(_SOMETHING) if unknown else None

    def _want(self, need: Need, card: Card, held: Mapping[str, int]) -> Want:
        if need.size is None:
            return Want(None)
        if need.size == _SOMETHING:
            return Want(_SOMETHING)
        kept = held.get(card.uuid, 0)
        missing = max(0, self._settings.context_cost + need.fixtures - kept)
        # What was learned has a margin, which the card need not have.
        most = max(_SOMETHING, card.total - self._settings.headroom - kept)
        return Want(min(need.size + missing, most), need.alone)

    def _too_large(self, item: pytest.Item, need: Need) -> str:
        """Return in one sentence why no card can ever grant what a test's mark asks for."""
        if need.cards > len(self._cards):
            return f"{item.nodeid} asks for {need.cards} cards; there are {len(self._cards)}"
        asked = item.stash.get(ITEM_MARKS, NO_MARKS).need
        vram = asked.vram if asked is not None else None
        besides = self._settings.context_cost + self._settings.headroom
        for card in self._cards[: need.cards]:
            if vram is not None and vram + besides > card.total:
                return (
                    f"{item.nodeid} asks for {format_bytes(vram)} of {card.name}, which has "
                    f"{format_bytes(card.total)}; of that a process costs "
                    f"{format_bytes(self._settings.context_cost)} and "
                    f"{format_bytes(self._settings.headroom)} are never given out"
                )
        return ""

    def _say(self, text: str) -> None:
        """Write a line to the terminal; from a worker of xdist too, whose stderr is the same."""
        shown = (
            nullcontext() if self._capture is None else self._capture.global_and_fixture_disabled()
        )
        with shown:
            sys.stderr.write(f"\ngpumem: {text}\n")
            sys.stderr.flush()


class _Telling:
    """Says what a test waits for, once it has waited for a while."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._text = ""
        self._timer: threading.Timer | None = None

    def on_wait(self, text: str) -> None:
        """Take note of what is waited for and who has it."""
        self._text = text
        if self._timer is None:
            self._timer = threading.Timer(TELL_AFTER, lambda: self._say(self._text))
            self._timer.daemon = True
            self._timer.start()

    def __enter__(self) -> _Telling:
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

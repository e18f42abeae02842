"""The hooks that measure tests, in each process that runs some."""

from __future__ import annotations

import os
import platform
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpumem import devices, records
from pytest_gpumem.clock import clock
from pytest_gpumem.devices.processes import others
from pytest_gpumem.plugin import children, limits, scopes
from pytest_gpumem.plugin.announce import Watched
from pytest_gpumem.plugin.keepers import drop_arguments, keepers
from pytest_gpumem.plugin.state import (
    CARDS,
    GRANT,
    HOST,
    LATE,
    NO_MARKS,
    NOTES,
    PID,
    USAGE,
    ItemMarks,
    State,
    marks_of,
    stashed,
)
from pytest_gpumem.plugin.wide_fixtures import called, identity
from pytest_gpumem.records import properties
from pytest_gpumem.tracking import release
from pytest_gpumem.tracking.accounts import NOTHING_USED, Fixture, Scope, Usage
from pytest_gpumem.tracking.meter import release_when_shared
from pytest_gpumem.tracking.process_changes import ProcessChanges
from pytest_gpumem.tracking.tracker import Tracker

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from pytest_gpumem.tracking.sampler import Sampler

BESIDE: pytest.StashKey[list[records.Process]] = pytest.StashKey()
"""Who else was on the cards when a test ran out of memory."""

_BETWEEN = (
    "pytest_runtest_protocol",
    "pytest_runtest_logstart",
    "pytest_runtest_setup",
    "pytest_runtest_teardown",
    "pytest_runtest_makereport",
    "pytest_runtest_logreport",
    "pytest_runtest_logfinish",
    "pytest_report_teststatus",
)
"""Hooks of which some run after the teardown of one test and before the set-up of the next."""
_KNOWN = ("_pytest.", "pytest_gpumem.", "xdist.", "__channelexec__")
"""Modules whose hooks touch no card; by the last name xdist's worker runs its own."""


class Measuring:
    """Measures the tests that this process runs.

    A test that begins before any framework is loaded, and of which nothing is asked, is passed by:
    it is measured only once something happens in it. Nothing is lost by that, for no framework has
    used a card before it is loaded.
    """

    NAME = "gpumem-measuring"

    def __init__(self, config: pytest.Config, state: State) -> None:
        self._settings = state.settings
        self._cards = state.found.cards
        self._pdb = bool(config.getoption("usepdb", False))
        on, settings = state.settings.mode == "on", state.settings
        rules = (release_when_shared(_shared(self._cards)),) if on else ()
        # Where the plugin caps it, the memory fraction is the cap's business.
        left = ProcessChanges(put_back=on, fractions=settings.fraction is None)
        self.tracker = Tracker(*rules, left=left, stacks=settings.stacks, root=config.rootpath)
        self.item: pytest.Item | None = None
        """The test that is measured."""
        self._passed_by: pytest.Item | None = None
        """The test that runs and is not measured as long as nothing happens in it."""
        self._asks_all = False
        """Whether it is asked of each test what it takes: then none is passed by."""
        self.setting_up: list[SettingUp] = []
        """The fixtures that are being set up, each within the one before."""
        self._next: pytest.Item | None = None
        """The test that begins at once after the last one, with nobody else's hooks between."""
        self._only_known = False
        """Whether all hooks that run between two tests are known, and touch no card."""
        self.tearing_down = False
        self._errors: list[BaseException] = []
        self._oom = ""
        """What the first of them that ran out of memory says."""
        self._keepers: dict[int, str] = {}
        self._alive: tuple[records.Alive, ...] = ()
        """What was alive when it ran out of memory, where it is not recorded."""
        self._state = state
        self.sampler: Sampler | None = None
        # Now, because modules of tests keep copies of the environment.
        watched = children.watch(state)
        if watched is not None:
            self.tracker.children, self.sampler = watched
        self._plugins = config.pluginmanager
        self._monitors = Watched(config.pluginmanager)
        self.beginning: Callable[[pytest.Item, ItemMarks], None] = lambda _item, _marks: None
        """Called as the set-up of a test begins: whatever ends a test then ends its wait for a
        lease, and a report is made. It fails or skips a test that can have none."""
        self.noting: Callable[[pytest.Item, pytest.CallInfo[Any]], None] = lambda _item, _call: None
        """Called with each phase that failed and with each set-up, before its report is made: a
        hook more would cost every test that passes."""
        self.judging: scopes.Judging | None = None
        """Judges what is left by modules and the run, where that is wanted. Told from here: a
        wrapper of each set-up would cost every test."""
        self._late: list[tuple[str, Any, Any, Any, dict[str, int]]] = []
        config.pluginmanager.register(MeasuringFixtures(self), MeasuringFixtures.NAME)

    def pytest_unconfigure(self) -> None:
        """Leave nothing of that behind."""
        if self.sampler is not None:
            self.sampler.stop()
        if self.tracker.children is not None:
            self.tracker.children.close()
            self.tracker.children = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        """See to the limits of peaks, and to calls that do not count, if there are any."""
        self._only_known = not any(map(self._is_foreign, _BETWEEN))
        suite, times = self._settings.vram_limit, self._settings.leak_warmups
        self._asks_all = suite is not None or times > 0
        if suite is not None or any(
            marks_of(item).vram_limit is not None for item in session.items
        ):
            limiting = limits.Limiting(self.tracker, suite)
            self._plugins.register(limiting, limits.Limiting.NAME)
        if times:
            from pytest_gpumem.plugin.warmups import WarmingUp

            self._plugins.register(WarmingUp(self.tracker, times), WarmingUp.NAME)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Begin before any fixture of the test is set up."""
        judging = self.judging
        if judging is not None and judging.last is not item.parent:
            judging.ask(item)
        if clock.monotonic() >= self._monitors.due:
            self._monitors.look(item.nodeid)
        at_once, self._next, self._passed_by = item is self._next, None, None
        marked = marks_of(item)
        self.beginning(item, marked)
        if marked.off:
            return
        asked = self._asks_all or marked is not NO_MARKS or GRANT in item.stash
        if asked or self.tracker.recordings.wanted or devices.any_loaded():
            self._measure(item, at_once=at_once)
        else:
            self._passed_by = item
            self.tracker.passed_by.begin(item.nodeid, self.tracker.children, at_once=at_once)

    @property
    def passes_by(self) -> bool:
        """Whether a test runs that is not measured as long as nothing happens in it."""
        return self._passed_by is not None

    def look(self) -> None:
        """Measure the running test from now on if a framework is loaded."""
        if self._passed_by is not None and devices.any_loaded():
            self.attend()

    def attend(self) -> None:
        """Measure the running test from now on."""
        if self._passed_by is not None:
            self._measure(self._passed_by)
            for fixture in self.setting_up:
                fixture.begin(late=True)

    def _measure(self, item: pytest.Item, *, at_once: bool = False) -> None:
        self._passed_by = None
        self._errors.clear()
        self._oom = ""
        self._alive = ()
        self.item = item
        self.tracker.begin_test(item.nodeid, at_once=at_once)

    def _is_foreign(self, hook: str) -> bool:
        """Whether somebody implements ``hook`` of whom it is not known what he does."""
        modules = (
            getattr(impl.function, "__module__", None) or ""
            for impl in getattr(self._plugins.hook, hook).get_hookimpls()
        )
        return not all(each.startswith(_KNOWN) for each in modules)

    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[Any]) -> None:
        """Keep what ended a phase until the test is over, and hand its numbers to the report."""
        when = call.when
        if when == "setup" and self.judging is not None and self.judging.asking is not None:
            self.judging.asked(item, self.judging.asking, set_up=call.excinfo is None)
        if call.excinfo is not None:
            self.attend()
            self.noting(item, call)
            if when != "teardown" and self.item is not None:  # gpumem_off
                self._note(call.excinfo.value)
                if self._oom:
                    item.stash[BESIDE] = [each for card in self._cards for each in others(card)]
        elif when == "setup":
            self.noting(item, call)
        if when != "call" or (self.item or self._passed_by) is None:
            return
        if type(item.parent) is not pytest.Module:  # as most: no question to ask of pytest
            self._keepers = keepers(item)
        if self.tracker.recordings.running:
            self.tracker.recordings.look()
        if call.excinfo is not None:  # its report may be the last one
            cards = self.tracker.usage(ask=False)
            _attach(item, Usage(cards) if cards else NOTHING_USED, self._oom, self._alive)

    def _note(self, error: BaseException) -> None:
        """Keep what ended a phase.

        Now, not after the teardown, it is seen if the card was full: for weak words that decides.
        """
        self._errors.append(error)
        if not self._oom:
            self._oom = release.oom_sentence(error)
            if self._oom:  # the frames of the error still hold what the test made
                self._alive = self.tracker.recordings.left()
        if not isinstance(error, pytest.skip.Exception):
            self._oom = self._oom or self.tracker.child_oom()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Generator[None, object, object]:
        """Judge the test when all of its teardown is over."""
        self.tearing_down = True
        at_once = self._only_known and (self.item or self._passed_by) is not None
        try:
            result = yield
        except BaseException as error:
            self.attend()
            self._note(error)
            self._end(item)
            raise
        if self._passed_by is not None:
            self._let_pass(item)
        usage = self._end(item)
        if usage is NOTHING_USED:  # as most tests
            self._next = nextitem if at_once else None
        else:
            limits.enforce_leaks(item, usage, self._settings.vram_leak_limit)
        return result

    def _let_pass(self, item: pytest.Item) -> None:
        """End a test that was passed by, or measure it if anything happened in it."""
        # What an earlier attempt told of itself is to be taken back.
        happened = bool(item.user_properties) or devices.any_loaded()
        if happened or not self.tracker.passed_by.end(self.tracker.children):
            self.attend()
            return
        self._passed_by = None
        self._keepers, item.stash[USAGE] = {}, NOTHING_USED

    def _end(self, item: pytest.Item) -> Usage:
        self.tearing_down = False
        if self.item is None:  # nothing happened, or gpumem_off, or its set-up never came to us
            return NOTHING_USED
        usage = self.tracker.end_test(
            self._errors,
            judge=not (self._pdb and self._errors),
            let_go=lambda: drop_arguments(item),
            keepers=self._keepers,
            fixtures=getattr(item, "fixturenames", ()),
        )
        if self.tracker.recordings.running:
            self._alive = self.tracker.recordings.end(
                felled=bool(self._oom), snapshots=self._settings.snapshots
            )
        item.stash[USAGE] = usage
        _attach(item, usage, self._oom, self._alive)
        self._errors.clear()
        self._keepers = {}
        self.item = None
        return usage

    def end_scope(self, scope: Scope) -> None:
        """Judge a module or the session; fail the teardown of a module that left too much."""
        self.look()
        item = self.item if self.tearing_down else None
        errors = self._errors if not self._pdb else ()
        left = self.tracker.scopes.end(
            scope, errors, lambda: {} if item is None else drop_arguments(item)
        )
        limit = self._settings.module_leak_limit
        if limit is not None and scope.scope == "module":
            limits.enforce_of_module(scope.name, left, limit)

    @contextmanager
    def late_teardowns(self, nodeid: str) -> Iterator[None]:
        """Measure teardowns of wider fixtures after the report of the test ``nodeid`` was made."""
        self.tracker.begin_test(nodeid)
        before = self.tracker.meters.reserved
        self.tearing_down = True
        try:
            yield
        finally:
            self.tearing_down = False
            usage = self.tracker.end_test()
            told = usage.fixtures, usage.children, usage.scopes
            if any(told) or self.tracker.meters.reserved != before:
                plain = map(records.to_plain, told)
                self._late.append((nodeid, *plain, self.tracker.meters.reserved))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Tell the controller what no report told; this worker may be on another machine."""
        self.tracker.meters.close()
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            cards = self._cards or devices.find_cards().cards
            output[CARDS] = [records.to_plain(card) for card in cards]
            output[HOST] = platform.node()
            output[PID] = os.getpid()
            output[NOTES] = [*self._state.notes, *devices.notes()]
            output[LATE] = self._late


class SettingUp:
    """A fixture that is being set up; it is charged from when its test is measured."""

    def __init__(
        self,
        tracker: Tracker,
        definition: pytest.FixtureDef[Any],
        request: pytest.FixtureRequest,
    ) -> None:
        self._tracker = tracker
        self._definition = definition
        self._request = request
        self.fixture: Fixture | None = None
        """None until then."""

    def begin(self, *, late: bool = False) -> None:
        """Charge what is done from now on; if ``late`` all since the last boundary."""
        definition = self._definition
        name, own = called(definition, self._request), identity(definition)
        self.fixture = self._tracker.begin_fixture(name, definition.scope, own, late=late)


class MeasuringFixtures:
    """Measures the fixtures that this process sets up."""

    NAME = "gpumem-measuring-fixtures"

    def __init__(self, measuring: Measuring) -> None:
        self._measuring = measuring
        self._tracker = measuring.tracker

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, object, object]:
        """Charge a fixture's set-up to the fixture."""
        if fixturedef.argname in scopes.NAMES:  # they take nothing
            return (yield)
        measuring = self._measuring
        if fixturedef.scope == "function":
            measuring.look()
        else:
            measuring.attend()
        setting_up = SettingUp(self._tracker, fixturedef, request)
        if not measuring.passes_by:
            setting_up.begin()
        measuring.setting_up.append(setting_up)
        try:
            value = yield
            measuring.look()
        except BaseException:
            if setting_up.fixture is not None:
                self._tracker.fail_fixture(setting_up.fixture)
            raise
        finally:
            measuring.setting_up.pop()
        fixture = setting_up.fixture
        if fixture is None:
            return value
        self._tracker.end_fixture(fixture, value, fixturedef.func)
        if fixture.wide:
            # Finalisers run last in, first out: this one marks the start of the teardown.
            fixturedef.addfinalizer(lambda: self._begin_teardown(fixture))
        return value

    def _begin_teardown(self, fixture: Fixture) -> None:
        measuring = self._measuring
        measuring.attend()
        item = measuring.item if measuring.tearing_down else None
        # All of the test's own teardown is over when a wider fixture's begins. Not so during
        # set-up, where the old instance of a parametrised fixture makes way for the new.
        if item is not None and self._tracker.anything_stayed():
            drop_arguments(item)
        self._tracker.begin_teardown(fixture)


def _shared(cards: Sequence[records.Card]) -> bool:
    """Return whether other processes use the cards: other workers, or strangers."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return workers > 1 or any(map(devices.used_by_others, cards))


def _attach(item: pytest.Item, usage: Usage, oom: str, alive: tuple[records.Alive, ...]) -> None:
    """Let the test's next report carry its numbers: JUnit shows them, xdist brings them home."""
    if usage is NOTHING_USED and not (oom or item.user_properties or GRANT in item.stash):
        return  # as for most
    grant = stashed(item, GRANT)
    beside = item.stash.get(BESIDE, []) if oom else []
    told = properties.OwnProperties(
        usage.cards,
        usage.fixtures,
        oom,
        grant,
        usage.left,
        usage.children,
        tuple(beside),
        usage.scopes,
        alive=alive,
    )
    properties.tell_usage(item.user_properties, told)

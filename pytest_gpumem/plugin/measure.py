"""The hooks that measure tests, in each process that runs some."""

from __future__ import annotations

import os
import platform
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpumem import devices, records
from pytest_gpumem.devices.processes import others
from pytest_gpumem.plugin import children, scopes
from pytest_gpumem.plugin.announce import Watched
from pytest_gpumem.plugin.state import (
    CARDS,
    GRANT,
    HOST,
    LATE,
    NOTES,
    PID,
    STATE,
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
from pytest_gpumem.tracking.verdict import holds_memory
from pytest_gpumem.units import format_bytes

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
_RUN = (pytest.FixtureRequest, pytest.Config, pytest.Item, pytest.Collector)
"""What leads to all of the run: a model of the session, by way of another test."""


class Limiting:
    """Fails tests that peak above their limit; only in a run in which some have one."""

    NAME = "gpumem-limiting"

    def __init__(self, tracker: Tracker, limit: int | None) -> None:
        self._tracker = tracker
        self._limit = limit
        """Of tests without a mark."""

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_call(self, item: pytest.Item) -> None:
        """Fail a test that passed but peaked above its limit; not called for one that failed."""
        limit = _limit(marks_of(item).vram_limit, self._limit)
        if limit is not None:
            took = [(card, card.peak - card.baseline) for card in self._tracker.usage()]
            _enforce(item, "call", "allowed {}, took {} at its peak", limit, took)


class Measuring:
    """Measures the tests that this process runs."""

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
        self._item: pytest.Item | None = None
        """The test that is measured."""
        self._marks = ItemMarks()
        """Its marks."""
        self._next: pytest.Item | None = None
        """The test that begins at once after the last one, with nobody else's hooks between."""
        self._only_known = False
        """Whether all hooks that run between two tests are known, and touch no card."""
        self._tearing_down = False
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
        suite = self._settings.vram_limit
        if suite is not None or any(
            marks_of(item).vram_limit is not None for item in session.items
        ):
            self._plugins.register(Limiting(self.tracker, suite), Limiting.NAME)
        if times := self._settings.leak_warmups:
            from pytest_gpumem.plugin.warmups import WarmingUp

            self._plugins.register(WarmingUp(self.tracker, times), WarmingUp.NAME)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Begin before any fixture of the test is set up."""
        judging = self.judging
        if judging is not None and judging.last is not item.parent:
            judging.ask(item)
        self._monitors.look(item.nodeid)
        self._marks = marked = marks_of(item)
        self.beginning(item, marked)
        if not marked.off:
            self._errors.clear()
            self._oom = ""
            self._alive = ()
            self._item = item
            self.tracker.begin_test(item.nodeid, at_once=item is self._next)
        self._next = None

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
        judging = self.judging
        if when == "setup" and judging is not None and judging.asking is not None:
            judging.asked(item, judging.asking, set_up=call.excinfo is None)
        if call.excinfo is not None:
            self.noting(item, call)
            if when != "teardown" and self._item is not None:  # gpumem_off
                self._note(call.excinfo.value)
                if self._oom:
                    item.stash[BESIDE] = [each for card in self._cards for each in others(card)]
        elif when == "setup":
            self.noting(item, call)
        if when == "call" and self._item is not None:
            if type(item.parent) is not pytest.Module:  # as most: no question to ask of pytest
                self._keepers = _keepers(item)
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
        self._tearing_down = True
        at_once = self._only_known and self._item is not None
        try:
            result = yield
        except BaseException as error:
            self._note(error)
            self._end(item)
            raise
        usage = self._end(item)
        if usage is NOTHING_USED:  # as most tests
            self._next = nextitem if at_once else None
            return result
        limit = _limit(self._marks.vram_leak_limit, self._settings.vram_leak_limit)
        if limit is not None:
            leaked = [(card, card.leaked) for card in usage.cards]
            _enforce(item, "teardown", "allowed to leak {}, leaked {}", limit, leaked)
            _enforce_of_fixtures(usage, limit)
        return result

    def _end(self, item: pytest.Item) -> Usage:
        self._tearing_down = False
        if self._item is None:  # gpumem_off, or its set-up never came to us
            return NOTHING_USED
        usage = self.tracker.end_test(
            self._errors,
            judge=not (self._pdb and self._errors),
            let_go=lambda: _drop_arguments(item),
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
        self._item = None
        return usage

    # Fixtures

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, object, object]:
        """Charge a fixture's set-up to the fixture."""
        if fixturedef.argname in scopes.NAMES:  # they take nothing
            return (yield)
        fixture = self.tracker.begin_fixture(
            called(fixturedef, request), fixturedef.scope, identity(fixturedef)
        )
        try:
            value = yield
        except BaseException:
            self.tracker.fail_fixture(fixture)
            raise
        self.tracker.end_fixture(fixture, value, fixturedef.func)
        if fixture.wide:
            # Finalisers run last in, first out: this one marks the start of the teardown.
            fixturedef.addfinalizer(lambda: self._begin_teardown(fixture))
        return value

    def _begin_teardown(self, fixture: Fixture) -> None:
        item = self._item if self._tearing_down else None
        # All of the test's own teardown is over when a wider fixture's begins. Not so during
        # set-up, where the old instance of a parametrised fixture makes way for the new.
        if item is not None and self.tracker.anything_stayed():
            _drop_arguments(item)
        self.tracker.begin_teardown(fixture)

    def end_scope(self, scope: Scope) -> None:
        """Judge a module or the session; fail the teardown of a module that left too much."""
        item = self._item if self._tearing_down else None
        errors = self._errors if not self._pdb else ()
        left = self.tracker.scopes.end(
            scope, errors, lambda: {} if item is None else _drop_arguments(item)
        )
        limit = self._settings.module_leak_limit
        for each in left if limit is not None and scope.scope == "module" else ():
            if each.left > (limit or 0):
                allowed = f"module {scope.name} is allowed to leave {format_bytes(limit or 0)}"
                held = f", held by {each.holders[0].where}" if each.holders else ""
                pytest.fail(f"{allowed}, left {format_bytes(each.left)}{held}", pytrace=False)

    @contextmanager
    def late_teardowns(self, nodeid: str) -> Iterator[None]:
        """Measure teardowns of wider fixtures after the report of the test ``nodeid`` was made."""
        self.tracker.begin_test(nodeid)
        before = self.tracker.meters.reserved
        self._tearing_down = True
        try:
            yield
        finally:
            self._tearing_down = False
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


def _shared(cards: Sequence[records.Card]) -> bool:
    """Return whether other processes use the cards: other workers, or strangers."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return workers > 1 or any(map(devices.used_by_others, cards))


def _keepers(item: pytest.Item) -> dict[int, str]:
    """Return what pytest itself keeps of a test that ran: the instance of its class."""
    instance = getattr(item, "instance", None)
    if instance is None:
        return {}
    return {id(instance): f"pytest's {type(instance).__name__} instance: self"}


def _drop_arguments(item: pytest.Item) -> dict[int, str]:
    """Let go of the test's fixture values, which pytest would drop right after the teardown.

    Judged a moment earlier than that, they would look like a leftover. Only those that hold
    memory of a card are let go, and their names stay: other plugins read values, a browser's
    page say, when they make the teardown's report. ``request``, and what has it, leads to all of
    the run, which goes on. Returns the identities of all else that is left.
    """
    arguments = getattr(item, "funcargs", None)
    if not isinstance(arguments, dict):
        return {}
    found = {name: holds_memory(value, _RUN) for name, value in arguments.items()}
    arguments.update((name, None) for name, holds in found.items() if holds)
    left = (arguments[name] for name, holds in found.items() if holds is False)
    return {id(value): "the test's arguments" for value in left}


def _limit(marked: int | None, suite: int | None) -> int | None:
    return suite if marked is None else marked


def _enforce(
    item: pytest.Item,
    when: str,
    sentence: str,
    limit: int,
    sizes: Sequence[tuple[records.CardUsage, int]],
) -> None:
    """Fail the test with ``sentence`` where a size is above ``limit``."""
    for card, size in sizes:
        if size > limit:
            from pytest_gpumem.reports import terminal

            cards = item.config.stash[STATE].found.cards
            names = (each.called(cards) for each in cards if each.uuid == card.card)
            name = next(names, card.card)
            item.add_report_section(when, "GPU memory", "\n".join(terminal.usage_lines(card, name)))
            # Without the traceback, which would show this plugin's lines and not the test's.
            pytest.fail(sentence.format(format_bytes(limit), format_bytes(size)), pytrace=False)


def _enforce_of_fixtures(usage: Usage, limit: int) -> None:
    """Fail the test after which a wider fixture left processes that hold more than ``limit``."""
    for fixture in usage.fixtures:
        if fixture.orphaned > limit:
            size = f"{format_bytes(fixture.orphaned)} of {fixture.name!r} ({fixture.scope})"
            text = f"allowed to leak {format_bytes(limit)}, processes of a fixture hold {size}"
            pytest.fail(text, pytrace=False)


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

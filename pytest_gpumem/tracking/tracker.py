"""Attributes every change of a card's allocator to the test or fixture that was running.

The tracker knows nothing of pytest: it is told when tests and fixtures begin and end. At each of
these boundaries ``meter`` reads the allocators once, and what changed since the last one is charged
to the owner that was running, see ``turns``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpumem.tracking import release
from pytest_gpumem.tracking.accounts import (
    NOTHING_USED,
    Fixture,
    Test,
    Usage,
    asked_for,
    card_usages,
    fixture_usages,
)
from pytest_gpumem.tracking.meter import Meters, ReleaseCache
from pytest_gpumem.tracking.passed_by import PassedBy
from pytest_gpumem.tracking.process_changes import ProcessChanges
from pytest_gpumem.tracking.recordings import Recordings
from pytest_gpumem.tracking.scopes import Scopes
from pytest_gpumem.tracking.turns import Turns
from pytest_gpumem.tracking.verdict import TensorLedger, Verdicts

if TYPE_CHECKING:
    from collections import Counter

    from pytest_gpumem.records import CardUsage, ChildUsage
    from pytest_gpumem.tracking.children import Children


class Tracker:
    """Measures the tests of this process, one at a time.

    Args:
        release_cache: decides after each test whether the allocator's unused cache is given back.
        stacks: whether to record where tensors are allocated.
        root: directory from which holders' files are named; the working directory unless given.
        left: watches what tests set for the whole process.

    """

    def __init__(
        self,
        release_cache: ReleaseCache = lambda _card, _reading: False,
        *,
        left: ProcessChanges | None = None,
        stacks: bool = False,
        root: Path | None = None,
    ) -> None:
        self._turns = Turns()
        self.setting_up = self._turns.setting_up
        self.meters = Meters(self._turns.charge, release_cache)
        self.boundary = self.meters.boundary
        self._tensors = TensorLedger(root)
        self._left = left or ProcessChanges()
        self.passed_by = PassedBy(self._left)
        self.children: Children | None = None
        """What tests start; whoever has a place for their book gives it before the first test."""
        known = self._turns, self.meters, self._tensors
        self.recordings = Recordings(*known, root or Path.cwd(), stacks=stacks)
        self.scopes = Scopes(*known, self._end_teardowns, self._remember)

    def standing(self) -> dict[str, Counter[str]]:
        """Return what wider fixtures that are set up hold, by card and identity."""
        return self._turns.held(self.children)

    def kept_since(self) -> int:
        """Return what stays the same while this process keeps what it keeps; -1: unknown."""
        return -1 if self.children is not None and self.children.met else self.meters.moves

    def child_oom(self) -> str:
        """Return in one sentence which child of the running test ran out of memory, or ""."""
        return "" if self.children is None else self.children.oom()

    def _look(self) -> None:
        """Charge what is set for the process to who was running."""
        self._left.look(by_test=self._turns.charged[-1] is self._turns.test)

    @property
    def _unaccounted(self) -> int:
        """Bytes that changed otherwise than by known tensors that died; 0: nothing is new."""
        return self.meters.changed + self._tensors.freed

    def _remember(self) -> None:
        """Lay the tensors that are new, if more changed than known ones died, at who ran's door."""
        if self._unaccounted or self._tensors.aside:
            self._tensors.remember(self._turns.charged[-1].name, lambda: self.meters.asked_of_torch)
            self.meters.changed = 0

    def _set_aside(self, test: Test) -> None:
        """Set aside what is there if the test that ends may have replaced something."""
        touched = any(
            account.peak > test.baselines.get(uuid, 0) for uuid, account in test.accounts.items()
        )
        if self._unaccounted or (touched and self._tensors.aside):
            self._tensors.set_aside()
            self.meters.changed = 0

    # Tests

    def begin_test(self, nodeid: str, *, at_once: bool = False) -> None:
        """Start measuring the test ``nodeid``; its fixtures are not set up yet.

        ``at_once`` says that nobody ran since the last one ended: what was read then still holds.
        Of one that was passed by till now, all is its own that happened since it began.
        """
        if self.passed_by.number < 0:
            if not at_once:
                self.boundary()
            self.passed_by.begin(nodeid, self.children, at_once=at_once)
        if not self.meters.in_use and "torch" in sys.modules:
            # Before the card is in use: the first test that uses it may reset its peak as well.
            self.meters.watch_peaks()
        # Taken at import or between tests: not to be laid at a later test's door.
        if self.meters.in_use and self._unaccounted:
            self._remember()
        test = self._turns.begin_test(nodeid, self.meters if self.meters.in_use else ())
        test.number, self.passed_by.number = self.passed_by.number, -1
        if self.recordings.wanted:
            self.recordings.begin(nodeid)

    def usage(self, *, ask: bool = True) -> tuple[CardUsage, ...]:
        """Return what the running test did so far; of its children, unless ``ask``, as known."""
        self.boundary()
        test, here = self._turns.test, self.children
        if test is None:
            return ()
        if here is not None and (here.met or (ask and here.stirred())):
            here.look()
        return self._card_usages(test, {}, ())

    def anything_stayed(self) -> bool:
        """Whether the running test, or a fixture torn down in it, keeps memory at this moment."""
        self.boundary()
        return self._anything_stayed()

    def _anything_stayed(self) -> bool:
        """Whether anything stayed at the last boundary."""
        test = self._turns.test
        if test is None or not (test.accounts or test.fixtures):
            return False
        self._turns.pay_back(self._tensors.late)
        return bool(test.stayed())

    def end_test(
        self,
        errors: Sequence[BaseException] = (),
        *,
        judge: bool = True,
        let_go: Callable[[], Mapping[int, str]] = dict,
        keepers: Mapping[int, str] | None = None,
        fixtures: Collection[str] = (),
    ) -> Usage:
        """Stop measuring, find out what stayed, and return the test's usage.

        Args:
            errors: exceptions that ended the test's phases. When memory stayed, the frames of
                their tracebacks are cleared, because they pin what the test's variables held.
            judge: False leaves frames and garbage alone and finds no leak (under a debugger).
            let_go: called when memory stayed: lets go of what would be dropped in a moment, as
                far as it holds memory, and returns the identities of the rest, and what to call
                it; what that holds is no leak.
            keepers: identities of objects that keep the test's memory, and what to call them;
                where something below them is a leak, that is more use than their own holders.
            fixtures: names of the fixtures that the test uses.

        """
        test = self._turns.test
        if test is None:
            return NOTHING_USED
        self.boundary()
        here, used = self.children, NOTHING_USED
        stirred = self.passed_by.stirred or (here is not None and here.stirred())
        engines = here is not None and here.known
        # As after most tests nothing is to be judged.
        moved = self.meters.changed + self._tensors.freed
        if errors or stirred or engines or moved or not self._turns.quiet:
            passing: Mapping[int, str] = {}
            if self._anything_stayed():
                passing = let_go()
                self.boundary()
            self._leave_teardowns()
            verdicts = self._second_look(test, errors, keepers or {}, passing) if judge else {}
            used = self._settle(test, verdicts, fixtures, stirred=stirred)
        left = self._left.settle()
        self._turns.end_test()
        scopes = self.scopes.report() if self.scopes.told else ()
        return used._replace(left=left, scopes=scopes) if left or scopes else used

    def _second_look(
        self,
        test: Test,
        errors: Sequence[BaseException],
        keepers: Mapping[int, str],
        passing: Mapping[int, str],
    ) -> Verdicts:
        """Give back what nobody needs, and find out what stays all the same."""
        if self._anything_stayed():

            def judge() -> Verdicts:
                self.meters.settle()
                self._turns.pay_back(self._tensors.late)
                self._remember()
                stayed, cards = test.stayed(), self.meters.uuids()
                return self._tensors.judge(stayed, cards, keepers, passing, test.name)

            return self._tensors.second_look(errors, self.anything_stayed, judge)
        if self._turns.standing:
            # They may pin a wider fixture's value beyond its teardown.
            for error in errors:
                release.clear_frames(error)
        return {}

    def _settle(
        self, test: Test, verdicts: Verdicts, fixtures: Collection[str], *, stirred: bool
    ) -> Usage:
        """Return what the test did, once all that it pinned is given back."""
        self._set_aside(test)
        self.meters.release_caches()
        for meter in self.meters:
            meter.read_process()
        over = [test, *(each for each in self._turns.moved if each.torn_down)]
        here = self.children if stirred else None
        if here is not None:
            here.settle(over)
        cards = self._card_usages(test, verdicts, fixtures)
        told = fixture_usages(test, verdicts)
        children: tuple[ChildUsage, ...] = ()
        if here is not None:
            told = here.widen_fixtures(told, self._turns.moved)
            children = here.report()
            here.forget(over)
        return Usage(cards, told, (), children) if cards or told or children else NOTHING_USED

    def _card_usages(
        self, test: Test, verdicts: Verdicts, fixtures: Collection[str]
    ) -> tuple[CardUsage, ...]:
        """Return what a test did to each card, and what its children did."""
        touched = test.accounts or test.fixtures
        usages = card_usages(test, self.meters, verdicts, fixtures) if touched else ()
        if self.children is None or not self.children.known:
            return usages
        used = asked_for({*self._turns.wide, *self._turns.moved}, fixtures)
        return self.children.widen(usages, test, used, self.meters.untouched)

    # Fixtures

    def begin_fixture(
        self, name: str, scope: str, identity: str = "", *, late: bool = False
    ) -> Fixture:
        """Start charging a fixture's set-up to it; fixtures may nest.

        ``late`` says that it began before: what happened since the last boundary is its own.
        """
        if not late:
            self._end_teardowns()
        fixture = Fixture(name, scope, identity)
        if fixture.wide:
            self._remember()
            self._look()
            if self.children is not None:
                fixture.number = self.children.enter(fixture.label)
        self._turns.begin_set_up(fixture)
        if self.recordings.running:
            self.recordings.turn()
        return fixture

    def fail_fixture(self, fixture: Fixture) -> None:
        """End charging a set-up that failed: what it took is the test's, to be given back.

        Its frames are kept, by the exception that pytest raises again for each test that asks
        for the fixture.
        """
        self.boundary()
        if fixture.wide:
            self._look()
        self._turns.leave(fixture)
        test = self._turns.test
        if test is not None and fixture.wide:
            for uuid, account in fixture.accounts.items():
                test.account(uuid).add(account)
            if self.children is not None:
                self.children.hand_over(fixture, test)
            self._resume()

    def _resume(self) -> None:
        """Let what is started from now on belong to who runs."""
        if self.children is not None:
            self.children.starters.resume(self._turns.number)
        self.recordings.turn()

    def end_fixture(self, fixture: Fixture, value: object = None, function: object = None) -> None:
        """End charging the set-up of ``fixture``, where ``function`` made ``value``."""
        self.boundary()
        if fixture.wide:
            self._remember()
            self._look()
        self._turns.leave(fixture)
        self._turns.stand(fixture, self.meters)
        if fixture.wide:
            fixture.roots = self._tensors.add_fixture(fixture.label, value, function)
            self._resume()

    def begin_teardown(self, fixture: Fixture) -> None:
        """Start charging the teardown of ``fixture`` to it.

        It ends when the next one begins or the test ends, not when its finaliser returns:
        pytest lets go of a fixture's value only after that.
        """
        self._end_teardowns()
        self._look()
        self._turns.pay_back(self._tensors.late)
        self._turns.begin_teardown(fixture)
        self._resume()
        self._tensors.drop_fixture(fixture.roots)

    def _end_teardowns(self) -> None:
        self.boundary()
        self._leave_teardowns()

    def _leave_teardowns(self) -> None:
        """Let nothing more be charged to fixtures whose teardown has begun."""
        if self._turns.torn_down():
            self._look()
            self._turns.leave_teardowns()
            self._tensors.late.clear()  # what died until now was credited
            self.recordings.turn()

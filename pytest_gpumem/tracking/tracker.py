"""Attributes every change of a card's allocator to the test or fixture that was running.

The tracker knows nothing of pytest: it is told when tests and fixtures begin and end. At each of
these boundaries it reads the allocators once, charges what changed since the last boundary to the
owner that was running, and resets the peak, so that each stretch of time has a peak of its own.

The owner is a fixture while a fixture is set up or torn down, otherwise the test. A function
fixture lives and dies with its test, so its changes are charged to the test as well; what a wider
fixture holds is not.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpumem import devices
from pytest_gpumem.records import CardUsage, ChildUsage
from pytest_gpumem.tracking import release
from pytest_gpumem.tracking.accounts import (
    NOTHING_USED,
    Fixture,
    Owner,
    Test,
    Usage,
    card_usages,
    fixture_usages,
    held,
)
from pytest_gpumem.tracking.left_behind import LeftBehind
from pytest_gpumem.tracking.meter import Meter, ReleaseCache
from pytest_gpumem.tracking.verdict import TensorLedger, Verdicts

if TYPE_CHECKING:
    from pytest_gpumem.devices import Allocator, AllocatorReading
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
        left: LeftBehind | None = None,
        stacks: bool = False,
        root: Path | None = None,
    ) -> None:
        self._release_cache = release_cache
        self._meters: dict[tuple[str, int], Meter] = {}
        self._outside = Owner("outside of tests", "session")
        self._owners: list[Owner] = [self._outside]
        self._test: Test | None = None
        self._standing: list[Fixture] = []
        """Wider fixtures that are set up."""
        self._tensors = TensorLedger(root)
        self._left = left or LeftBehind()
        self.children: Children | None = None
        """What tests start; whoever has a place for their book gives it before the first test."""
        self._wide: list[Fixture] = []
        """Wider fixtures that are set up, whether or not they hold anything."""
        self._moved: list[Fixture] = []
        """Those that were set up or torn down since the last test ended."""
        self._changed = 0
        """Net bytes, over all cards, since the ledger met what lives on them."""
        self._reading = False
        self._stacks_wanted = stacks
        self._unwatch: Callable[[], None] | None = None

    @property
    def active(self) -> bool:
        """Whether any framework has initialised a card in this process."""
        return bool(devices.allocators())

    @property
    def allocated(self) -> int:
        """Bytes allocated now, over all cards."""
        self.boundary()
        return sum(meter.last.allocated for meter in self._meters.values())

    @property
    def reserved(self) -> dict[str, int]:
        """Bytes reserved at the last boundary, by card."""
        return {meter.card.uuid: meter.last.reserved for meter in self._meters.values()}

    def standing(self) -> dict[str, int]:
        """Return the bytes that the wider fixtures hold which are set up now, by card."""
        cards = {uuid for fixture in self._standing for uuid in fixture.set_up}
        sizes = Counter({uuid: held(self._standing, uuid) for uuid in cards})
        if self.children is not None:
            sizes.update(self.children.held_by(self._wide))
        return sizes

    def child_oom(self) -> str:
        """Return in one sentence which child of the running test ran out of memory, or ""."""
        return "" if self.children is None else self.children.oom()

    def engines(self, names: Collection[str]) -> Mapping[str, int]:
        """Return what that holds, by card, which the wider fixtures among ``names`` started."""
        if self.children is None:
            return {}
        return self.children.held_by(each for each in self._wide if each.name in names)

    def close(self) -> None:
        """Stop watching."""
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None

    # Boundaries

    def boundary(self) -> None:
        """Charge what changed since the last boundary to the owner that was running."""
        active = devices.allocators()
        if not active or self._reading:
            return
        self._reading = True
        try:
            self._watch_peaks()
            for allocator in active:
                for index, reading in enumerate(allocator.read()):
                    meter = self._meters.get((allocator.name, index))
                    # Peaks were set back: if they are as they were, nothing was allocated.
                    if meter is None or meter.last != reading:
                        self._charge(allocator, index, reading)
        finally:
            self._reading = False

    def _watch_peaks(self) -> None:
        """Make a peak reset by a test end a stretch of time, as any other boundary does."""
        if self._unwatch is None:
            self._unwatch = devices.watch_peaks(self.boundary)

    def _charge(self, allocator: Allocator, index: int, now: AllocatorReading) -> None:
        meter = self._meters.get((allocator.name, index))
        if meter is None:
            if not now.reserved_peak and not now.ooms:
                return  # never used: asking for the names of all cards of a big machine costs
            meter = Meter(allocator.card(index))
            self._meters[allocator.name, index] = meter
        before, meter.last = meter.last, now
        self._changed += now.allocated - before.allocated
        for owner in self._charged_owners():
            account = owner.account(meter.card.uuid)
            account.delta += now.allocated - before.allocated
            account.peak = max(account.peak, now.allocated_peak)
            account.reserved_peak = max(account.reserved_peak, now.reserved_peak)
            # The suite may set these counters back.
            account.retries += max(0, now.retries - before.retries)
            account.ooms += max(0, now.ooms - before.ooms)
        if self._test is not None:
            highest, uuid = self._test.reserved_peak, meter.card.uuid
            highest[uuid] = max(highest.get(uuid, 0), now.reserved_peak)
        if now.allocated_peak > now.allocated or now.reserved_peak > now.reserved:
            allocator.reset_peak(index)
            meter.last = now._replace(allocated_peak=now.allocated, reserved_peak=now.reserved)

    def _look(self) -> None:
        """Charge what is set for the process to who was running."""
        self._left.look(by_test=self._charged_owners()[-1] is self._test)

    @property
    def _unaccounted(self) -> int:
        """Bytes that changed otherwise than by known tensors that died; 0: nothing is new."""
        return self._changed + self._tensors.freed

    def _remember(self) -> None:
        """Lay the tensors that are new at the door of who was running: a pass over the heap.

        Needless where nothing changed but by known tensors that died.
        """
        if self._unaccounted or self._tensors.aside:
            self._tensors.remember(self._charged_owners()[-1].name)
            self._changed = 0

    def _set_aside(self, test: Test) -> None:
        """Set aside what is there if the test that ends may have replaced something."""
        touched = any(
            account.peak > test.baselines.get(uuid, 0) for uuid, account in test.accounts.items()
        )
        if self._unaccounted or (touched and self._tensors.aside):
            self._tensors.set_aside()
            self._changed = 0

    def _charged_owners(self) -> tuple[Owner, ...]:
        owner = self._owners[-1]
        if isinstance(owner, Fixture) and not owner.wide and self._test is not None:
            return (owner, self._test)
        return (owner,)

    # Tests

    def begin_test(self, nodeid: str) -> None:
        """Start measuring the test ``nodeid``; its fixtures are not set up yet."""
        if self._stacks_wanted and "torch" in sys.modules:
            self._stacks_wanted = False
            devices.record_stacks()
        if "torch" in sys.modules:
            # Before the card is in use: the first test that uses it may reset its peak as well.
            self._watch_peaks()
        self.boundary()
        # Taken at import or between tests: not to be laid at a later test's door.
        if self._unaccounted:
            self._remember()
        self._look()
        self._outside.accounts.clear()
        self._test = Test(nodeid, tuple(self._standing))
        if self.children is not None:
            self._test.number = self.children.enter(nodeid)
        self._owners = [self._test]
        for meter in self._meters.values():
            self._test.baselines[meter.card.uuid] = meter.last.allocated
            self._test.reserved_before[meter.card.uuid] = meter.last.reserved

    def usage(self) -> tuple[CardUsage, ...]:
        """Return what the running test did so far; nothing is judged or cleaned."""
        self.boundary()
        if self._test is None:
            return ()
        if self.children is not None and self.children.stirred():
            self.children.look()
        return self._card_usages(self._test, {}, ())

    def anything_stayed(self) -> bool:
        """Whether the running test, or a fixture torn down in it, keeps memory at this moment."""
        self.boundary()
        return self._anything_stayed()

    def _anything_stayed(self) -> bool:
        """Whether anything stayed at the last boundary."""
        test = self._test
        if test is None or not (test.accounts or test.fixtures):
            return False
        test.pay_back()
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
        test = self._test
        if test is None:
            return NOTHING_USED
        passing: Mapping[int, str] = {}
        if self.anything_stayed():
            passing = let_go()
            self.boundary()
        self._leave_teardowns()
        verdicts: Verdicts = {}
        if judge and self._anything_stayed():
            self._give_back(errors)
            if self.anything_stayed():
                verdicts = self._judge(test, keepers or {}, passing)
                self._remember()
        elif judge and self._standing:
            # They may pin a wider fixture's value beyond its teardown.
            for error in errors:
                release.clear_frames(error)
        self._set_aside(test)
        self._release_caches()
        for meter in self._meters.values():
            meter.read_process()
        over = [test, *(fixture for fixture in self._moved if fixture.torn_down)]
        stirred = self.children is not None and self.children.stirred()
        if self.children is not None and stirred:
            self.children.settle(over)
        cards = self._card_usages(test, verdicts, fixtures)
        self._look()
        left = self._left.settle()
        told = fixture_usages(test, verdicts)
        children: tuple[ChildUsage, ...] = ()
        if self.children is not None and stirred:
            told = self.children.widen_fixtures(told, self._moved)
            children = self.children.report()
            self.children.forget(over)
        self._moved.clear()
        self._test = None
        self._owners = [self._outside]
        if not (cards or told or left or children):
            return NOTHING_USED
        return Usage(cards, told, left, children)

    def _card_usages(
        self, test: Test, verdicts: Verdicts, fixtures: Collection[str]
    ) -> tuple[CardUsage, ...]:
        """Return what a test did to each card, and what its children did."""
        usages = card_usages(test, self._meters.values(), verdicts, fixtures)
        if self.children is None or not self.children.known:
            return usages
        used = [each for each in {*self._wide, *self._moved} if each.name in fixtures]
        return self.children.widen(usages, test, used, self._untouched)

    def _untouched(self, uuid: str) -> CardUsage:
        """Return the usage of a card on which this process did nothing."""
        held = sum(each.last.allocated for each in self._meters.values() if each.card.uuid == uuid)
        return CardUsage(uuid, held, held, 0, 0, 0, 0, 0, None)

    def _give_back(self, errors: Sequence[BaseException]) -> None:
        """Drop what only tracebacks and reference cycles keep alive, by the cheapest means."""
        for error in errors:
            release.clear_frames(error)
        release.forget_last_error()
        release.collect(self.anything_stayed)
        if errors and self.anything_stayed():
            release.clear_living_errors()
            release.drop_tracebacks(errors)
            release.collect(self.anything_stayed)

    def _judge(
        self, test: Test, keepers: Mapping[int, str], passing: Mapping[int, str]
    ) -> Verdicts:
        """Take the second look at what stayed."""
        for allocator in devices.allocators():
            allocator.settle()
        self.boundary()
        test.pay_back()
        cards = {
            f"{meter.card.kind}:{index}": meter.card.uuid
            for (_, index), meter in self._meters.items()
        }
        return self._tensors.judge(test.stayed(), cards, keepers, passing, test.name)

    def _release_caches(self) -> None:
        full = {
            name
            for (name, _), meter in self._meters.items()
            if self._release_cache(meter.card, meter.last)
        }
        for allocator in devices.allocators() if full else ():
            if allocator.name in full:
                allocator.release_cached()
                self.boundary()

    # Fixtures

    def begin_fixture(self, name: str, scope: str) -> Fixture:
        """Start charging a fixture's set-up to it; fixtures may nest."""
        self._end_teardowns()
        fixture = Fixture(name, scope)
        if fixture.wide:
            self._remember()
            self._look()
            if self.children is not None:
                fixture.number = self.children.enter(fixture.label)
        self._owners.append(fixture)
        return fixture

    def fail_fixture(self, fixture: Fixture) -> None:
        """End charging a set-up that failed: what it took is the test's, to be given back.

        Its frames are kept, by the exception that pytest raises again for each test that asks
        for the fixture.
        """
        self.boundary()
        if fixture.wide:
            self._look()
        self._owners.remove(fixture)
        if self._test is not None and fixture.wide:
            for uuid, account in fixture.accounts.items():
                self._test.account(uuid).add(account)
            if self.children is not None:
                self.children.hand_over(fixture, self._test)
            self._resume()

    def _resume(self) -> None:
        """Let what is started from now on belong to who runs, of function fixtures the test."""
        if self.children is not None:
            owner = self._owners[-1].number
            self.children.starters.resume(owner or (0 if self._test is None else self._test.number))

    def end_fixture(self, fixture: Fixture, value: object = None, function: object = None) -> None:
        """End charging the set-up of ``fixture``, where ``function`` made ``value``."""
        self.boundary()
        if fixture.wide:
            self._remember()
            self._look()
        self._owners.remove(fixture)
        # Of each card in use, also if the set-up did nothing to it: the teardown may.
        uuids = [meter.card.uuid for meter in self._meters.values()]
        fixture.set_up = {uuid: copy.copy(fixture.account(uuid)) for uuid in uuids}
        if fixture.wide:
            fixture.roots = self._tensors.add_fixture(fixture.label, value, function)
            self._wide.append(fixture)
            self._moved.append(fixture)
            self._resume()
        holds = any(account.delta > 0 for account in fixture.set_up.values())
        if fixture.wide and holds:
            self._standing.append(fixture)
        test = self._test
        if test is None:
            return
        if any(account.delta for account in fixture.set_up.values()):
            test.fixtures.append(fixture)
        if fixture.wide and holds:
            test.set_up.append(fixture)
        if fixture.wide:
            # What is there and is not the test's own is what it starts from.
            for meter in self._meters.values():
                uuid = meter.card.uuid
                test.baselines[uuid] = meter.last.allocated - test.account(uuid).delta

    def begin_teardown(self, fixture: Fixture) -> None:
        """Start charging the teardown of ``fixture`` to it.

        It ends when the next one begins or the test ends, not when its finaliser returns:
        pytest lets go of a fixture's value only after that.
        """
        self._end_teardowns()
        self._look()
        fixture.torn_down = True
        if fixture in self._standing:
            self._standing.remove(fixture)
        self._owners.append(fixture)
        if fixture in self._wide:
            self._wide.remove(fixture)
            self._moved = [*(each for each in self._moved if each is not fixture), fixture]
        self._resume()
        self._tensors.drop_fixture(fixture.roots)
        if self._test is not None and fixture not in self._test.fixtures and fixture.set_up:
            self._test.fixtures.append(fixture)

    def _end_teardowns(self) -> None:
        self.boundary()
        self._leave_teardowns()

    def _leave_teardowns(self) -> None:
        """Let nothing more be charged to fixtures whose teardown has begun."""
        rest = [
            owner for owner in self._owners if not (isinstance(owner, Fixture) and owner.torn_down)
        ]
        if len(rest) < len(self._owners):
            self._look()
            self._owners = rest

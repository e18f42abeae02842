"""Attributes every change of a card's allocator to the test or fixture that was running.

The tracker knows nothing of pytest: it is told when tests and fixtures begin and end. At each of
these boundaries it reads the allocators once, charges what changed since the last boundary to the
owner that was running, and resets the peak, so that each stretch of time has a peak of its own.

The owner is a fixture while a fixture is set up or torn down, otherwise the test. A function
fixture lives and dies with its test, so its changes are charged to the test as well; what a wider
fixture holds is not.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpumem import devices
from pytest_gpumem.devices import Allocator, AllocatorReading
from pytest_gpumem.records import Card, CardUsage, ChildUsage, FixtureUsage, Left
from pytest_gpumem.tracking import release
from pytest_gpumem.tracking.left_behind import LeftBehind
from pytest_gpumem.tracking.verdict import TensorLedger, Verdict, Verdicts

if TYPE_CHECKING:
    from pytest_gpumem.tracking.children import Children

ReleaseCache = Callable[[Card, AllocatorReading], bool]
"""Says whether the allocator's unused cache should go back to the driver after a test."""


_SHARED_CACHE = 64 * 2**20
"""Unused cache worth the price of new segments when other processes want the card."""


def release_when_shared(shared: bool) -> ReleaseCache:
    """Return the rule for giving back unused cache.

    On a shared card, cache above 64 MiB is memory that other processes cannot have; alone on
    it, only a cache above a quarter of the card is worth the new segments the next test pays.
    """

    def worth_it(card: Card, reading: AllocatorReading) -> bool:
        unused = reading.reserved - reading.allocated
        return unused > (_SHARED_CACHE if shared else card.total // 4)

    return worth_it


@dataclass
class Account:
    """What one owner did to one card: net change, highest allocated, and the allocator's woes."""

    delta: int = 0
    peak: int = 0
    reserved_peak: int = 0
    retries: int = 0
    ooms: int = 0

    def add(self, other: Account) -> None:
        """Take over what ``other`` did."""
        self.delta += other.delta
        self.peak = max(self.peak, other.peak)
        self.reserved_peak = max(self.reserved_peak, other.reserved_peak)
        self.retries += other.retries
        self.ooms += other.ooms


@dataclass(eq=False)
class Owner:
    """A test or a fixture, and its accounts by card UUID."""

    name: str
    scope: str = "function"
    accounts: dict[str, Account] = field(default_factory=dict)
    number: int = 0
    """By which its children know it."""

    def account(self, uuid: str) -> Account:
        """Return this owner's account on the card ``uuid``."""
        return self.accounts.setdefault(uuid, Account())

    def kept(self) -> dict[tuple[str, str], int]:
        """Return, by this owner's name and card, the bytes it took and did not give back."""
        return {
            (self.name, uuid): account.delta
            for uuid, account in self.accounts.items()
            if account.delta > 0
        }


@dataclass(eq=False)
class Fixture(Owner):
    """A fixture between its set-up and its teardown."""

    set_up: dict[str, Account] = field(default_factory=dict)
    """The accounts as they stood at the end of its set-up."""
    roots: tuple[int, ...] = ()
    """Identities of what it holds its memory by."""
    torn_down: bool = False

    @property
    def wide(self) -> bool:
        """Whether it may outlive a test."""
        return self.scope != "function"

    @property
    def label(self) -> str:
        """How holders name it."""
        return f"fixture {self.name!r} ({self.scope})"


@dataclass(eq=False)
class Test(Owner):
    """A running test: its baselines by card, and the fixtures set up or torn down in it."""

    __test__ = False  # not for pytest to collect

    baselines: dict[str, int] = field(default_factory=dict)
    fixtures: list[Fixture] = field(default_factory=list)
    reserved_before: dict[str, int] = field(default_factory=dict)
    reserved_peak: dict[str, int] = field(default_factory=dict)
    """By card, whoever was charged."""
    found: list[Fixture] = field(default_factory=list)
    """Wider fixtures that were set up when it began."""
    set_up: list[Fixture] = field(default_factory=list)
    """Wider fixtures that were set up in it."""

    def to_set_aside(self, uuid: str) -> int:
        """Return the bytes to set aside for the test: what it made its process reserve.

        What wider fixtures keep from now on is not the test's. A test that lives on cached blocks
        reserves nothing, and would without them: so it is no less than what it allocated.
        """
        taken = self.reserved_peak.get(uuid, 0) - self.reserved_before.get(uuid, 0)
        account = self.accounts.get(uuid, Account())
        allocated = account.peak - self.baselines.get(uuid, 0)
        return max(0, allocated, taken - _held(self.set_up, uuid))

    def fixture_bytes(self, uuid: str, names: Collection[str]) -> int:
        """Return what the wider fixtures among ``names`` hold."""
        used = [fixture for fixture in (*self.found, *self.set_up) if fixture.name in names]
        return _held(used, uuid)

    def pay_back(self) -> None:
        """Credit the fixtures torn down in the test with what came back after their teardown.

        A reference cycle is collected only when the test is charged again.
        """
        for uuid, account in self.accounts.items():
            for fixture in self.fixtures:
                owed = fixture.account(uuid)
                late = min(-account.delta, owed.delta)
                if fixture.wide and fixture.torn_down and late > 0:
                    account.delta += late
                    owed.delta -= late

    def stayed(self) -> dict[tuple[str, str], int]:
        """Return what the test kept, and what the wider fixtures torn down in it kept."""
        found = self.kept()
        for fixture in self.fixtures:
            if fixture.wide and fixture.torn_down:
                found |= fixture.kept()
        return found


def _held(fixtures: Iterable[Fixture], uuid: str) -> int:
    """Return what the set-ups of ``fixtures`` took of a card."""
    accounts = (fixture.set_up.get(uuid) for fixture in fixtures)
    return sum(max(0, account.delta) for account in accounts if account is not None)


@dataclass(frozen=True)
class Usage:
    """What a test did: to each card and fixture that moved, and to its process."""

    cards: tuple[CardUsage, ...] = ()
    fixtures: tuple[FixtureUsage, ...] = ()
    left: tuple[Left, ...] = ()
    children: tuple[ChildUsage, ...] = ()


@dataclass
class _Meter:
    """One card as one allocator sees it."""

    card: Card
    last: AllocatorReading
    process: int | None = None
    """This process's bytes by the driver's count."""
    process_read_at: int = -1
    """What was reserved when ``process`` was read."""


_NOTHING = AllocatorReading(
    allocated=0, allocated_peak=0, reserved=0, reserved_peak=0, retries=0, ooms=0
)


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
        self._meters: dict[tuple[str, int], _Meter] = {}
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
        held = Counter({uuid: _held(self._standing, uuid) for uuid in cards})
        if self.children is not None:
            held.update(self.children.held_by(self._wide))
        return held

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
            meter = _Meter(allocator.card(index), _NOTHING)
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
        self._test = Test(nodeid, found=list(self._standing))
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
        self._look_at_children()
        return self._card_usages(self._test, {}, ())

    def anything_stayed(self) -> bool:
        """Whether the running test, or a fixture torn down in it, keeps memory at this moment."""
        self.boundary()
        return self._anything_stayed()

    def _anything_stayed(self) -> bool:
        """Whether anything stayed at the last boundary."""
        if self._test is None:
            return False
        self._test.pay_back()
        return bool(self._test.stayed())

    def end_test(
        self,
        errors: Sequence[BaseException] = (),
        *,
        judge: bool = True,
        keepers: Mapping[int, str] | None = None,
        passing: Mapping[int, str] | None = None,
        fixtures: Collection[str] = (),
    ) -> Usage:
        """Stop measuring, find out what stayed, and return the test's usage.

        Args:
            errors: exceptions that ended the test's phases. When memory stayed, the frames of
                their tracebacks are cleared, because they pin what the test's variables held.
            judge: False leaves frames and garbage alone and finds no leak (under a debugger).
            keepers: identities of objects that keep the test's memory, and what to call them;
                where something below them is a leak, that is more use than their own holders.
            passing: identities of objects that will be dropped in a moment, and what to call
                them; what they hold is no leak.
            fixtures: names of the fixtures that the test uses.

        """
        test = self._test
        if test is None:
            return Usage()
        self._end_teardowns()
        verdicts: Verdicts = {}
        if judge and self._anything_stayed():
            self._give_back(errors)
            if self.anything_stayed():
                verdicts = self._judge(test, keepers or {}, passing or {})
                self._remember()
        elif judge and self._standing:
            # They may pin a wider fixture's value beyond its teardown.
            for error in errors:
                release.clear_frames(error)
        self._set_aside(test)
        self._release_caches()
        self._read_processes()
        over = [test, *(fixture for fixture in self._moved if fixture.torn_down)]
        stirred = self.children is not None and self.children.stirred()
        if self.children is not None and stirred:
            self.children.settle(over)
        cards = self._card_usages(test, verdicts, fixtures)
        self._look()
        usage = Usage(cards, _fixture_usages(test, verdicts), self._left.settle())
        if self.children is not None and stirred:
            told = self.children.widen_fixtures(usage.fixtures, self._moved)
            usage = replace(usage, fixtures=told, children=self.children.report())
            self.children.forget(over)
        self._moved.clear()
        self._test = None
        self._owners = [self._outside]
        return usage

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

    def _card_usages(
        self, test: Test, verdicts: Verdicts, fixtures: Collection[str]
    ) -> tuple[CardUsage, ...]:
        usages = []
        for meter in self._meters.values():
            uuid = meter.card.uuid
            account = test.accounts.get(uuid)
            baseline = test.baselines.get(uuid, 0)
            if account is None or not (
                account.delta or account.ooms or account.peak > baseline or test.fixtures
            ):
                continue
            verdict = verdicts.get((test.name, uuid), Verdict())
            usages.append(
                CardUsage(
                    card=uuid,
                    baseline=baseline,
                    peak=max(account.peak, baseline),
                    leftover=max(account.delta, 0),
                    reserved=meter.last.reserved,
                    reserved_peak=account.reserved_peak,
                    retries=account.retries,
                    ooms=account.ooms,
                    process=meter.process,
                    leaked=verdict.leaked,
                    holders=verdict.holders,
                    note=verdict.note,
                    extra=test.to_set_aside(uuid),
                    fixture_bytes=test.fixture_bytes(uuid, fixtures),
                )
            )
        if self.children is None or not self.children.known:
            return tuple(usages)
        used = [each for each in {*self._wide, *self._moved} if each.name in fixtures]
        return self.children.widen(usages, test, used, self._untouched)

    def _untouched(self, uuid: str) -> CardUsage:
        """Return the usage of a card on which this process did nothing."""
        held = sum(each.last.allocated for each in self._meters.values() if each.card.uuid == uuid)
        return CardUsage(uuid, held, held, 0, 0, 0, 0, 0, None)

    def _look_at_children(self) -> None:
        if self.children is not None and self.children.stirred():
            self.children.look()

    def _read_processes(self) -> None:
        """Ask the driver for this process's bytes where the reserved memory has changed.

        The driver's answer costs milliseconds on a real card, and moves only with segments.
        """
        for meter in self._meters.values():
            if meter.process_read_at != meter.last.reserved:
                meter.process_read_at = meter.last.reserved
                meter.process = devices.own_bytes(meter.card, meter.last.reserved)

    def _release_caches(self) -> None:
        for allocator in devices.allocators() if self._meters else ():
            meters = [meter for (name, _), meter in self._meters.items() if name == allocator.name]
            if any(self._release_cache(meter.card, meter.last) for meter in meters):
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
        fixture.set_up = {uuid: replace(account) for uuid, account in fixture.accounts.items()}
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
        if any(isinstance(owner, Fixture) and owner.torn_down for owner in self._owners):
            self._look()
        self._owners = [
            owner for owner in self._owners if not (isinstance(owner, Fixture) and owner.torn_down)
        ]


def _fixture_usages(test: Test, verdicts: Verdicts) -> tuple[FixtureUsage, ...]:
    usages = []
    for fixture in test.fixtures:
        for uuid, account in fixture.set_up.items():
            verdict = verdicts.get((fixture.name, uuid), Verdict())
            usage = FixtureUsage(
                name=fixture.name,
                scope=fixture.scope,
                card=uuid,
                allocated=account.delta,
                peak=account.peak,
                released=_released(fixture, test, uuid),
                leaked=verdict.leaked,
                holders=verdict.holders,
            )
            usages.append(usage)
    return tuple(usage for usage in usages if usage.allocated or usage.released)


def _released(fixture: Fixture, test: Test, uuid: str) -> int | None:
    """Return what came back of a fixture's memory, None while it is set up.

    A function fixture's value lives until its test is over, so it is judged with the test:
    what the test as a whole did not leave behind came back.
    """
    allocated = fixture.set_up[uuid].delta
    if fixture.wide:
        return allocated - fixture.accounts[uuid].delta if fixture.torn_down else None
    return max(allocated - max(test.account(uuid).delta, 0), 0)

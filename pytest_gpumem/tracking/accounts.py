"""Who is charged for what happens to a card: tests and fixtures, with an account for each card."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from pytest_gpumem.records import CardUsage, ChildUsage, FixtureUsage, Left, ScopeUsage
from pytest_gpumem.tracking.verdict import Verdict, Verdicts
from pytest_gpumem.tuples import NamedTuple

if TYPE_CHECKING:
    from collections import Counter

    from pytest_gpumem.devices import AllocatorReading
    from pytest_gpumem.tracking.meter import Meter


# Plain classes: each data class takes half a millisecond of every run's start.


class Account:
    """What one owner did to one card: net change, highest allocated, and the allocator's woes."""

    delta = 0
    peak = 0
    asked = 0
    """Net bytes asked for, as ``delta`` is of those allocated."""
    asked_peak = 0
    """The highest that was, whatever others had at that moment."""
    reserved_peak = 0
    retries = 0
    ooms = 0
    vague: frozenset[str] = frozenset()
    """Who took part and does not tell its peaks: there may have been more between boundaries."""

    def charge(self, meter: Meter, before: AllocatorReading, now: AllocatorReading) -> None:
        """Take over what happened to a card between two readings."""
        self.vague |= meter.vague
        self.delta += now.allocated - before.allocated
        self.peak = max(self.peak, now.allocated_peak)
        (had, _), (has, most) = before.asked, now.asked
        self.asked_peak = max(self.asked_peak, most - had + self.asked)
        self.asked += has - had
        self.reserved_peak = max(self.reserved_peak, now.reserved_peak)
        # The suite may set these counters back.
        self.retries += max(0, now.retries - before.retries)
        self.ooms += max(0, now.ooms - before.ooms)

    def add(self, other: Account) -> None:
        """Take over what ``other`` did."""
        self.vague |= other.vague
        self.delta += other.delta
        self.peak = max(self.peak, other.peak)
        self.asked_peak = max(self.asked_peak, self.asked + other.asked_peak)
        self.asked += other.asked
        self.reserved_peak = max(self.reserved_peak, other.reserved_peak)
        self.retries += other.retries
        self.ooms += other.ooms


class Owner:
    """A test or a fixture, and its accounts by card UUID."""

    def __init__(self, name: str, scope: str = "function") -> None:
        self.name = name
        self.scope = scope
        self.accounts: dict[str, Account] = {}
        self.number = 0
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


_WIDTH = {"function": 0, "class": 1, "module": 2, "package": 3, "session": 4}


class Scope(Owner):
    """A module (its name is its nodeid) or the session (which has none) while it is set up.

    It is charged for its tests and for the fixtures that end with it.
    """

    since = 0
    """Number of the newest tensor that was there when it began."""

    def outlives(self, owner: Owner) -> bool:
        """Whether the fixtures of ``owner`` are gone before it ends."""
        return _WIDTH[owner.scope] <= _WIDTH[self.scope]


class Fixture(Owner):
    """A fixture between its set-up and its teardown."""

    def __init__(self, name: str, scope: str, identity: str = "") -> None:
        super().__init__(name, scope)
        self.identity = identity or name
        """What tells it from others of its name; it ends in the name that pytest has for it."""
        self.after_set_up: dict[str, Account] = {}
        """The accounts as they stood at the end of its set-up."""
        self.roots: tuple[int, ...] = ()
        """Identities of what it holds its memory by."""
        self.torn_down = False

    @property
    def wide(self) -> bool:
        """Whether it may outlive a test."""
        return self.scope != "function"

    @property
    def label(self) -> str:
        """How holders name it."""
        return f"fixture {self.name!r} ({self.scope})"


class Test(Owner):
    """A running test: its baselines by card, and the fixtures set up or torn down in it.

    ``found`` are the wider fixtures that were set up when it began.
    """

    __test__ = False  # not for pytest to collect

    def __init__(self, name: str, found: Sequence[Fixture]) -> None:
        super().__init__(name)
        self.found = found
        self.set_up: list[Fixture] = []
        """Wider fixtures that were set up in it."""
        self.fixtures: list[Fixture] = []
        self.baselines: dict[str, int] = {}
        self.reserved_before: dict[str, int] = {}
        self.reserved_peak: dict[str, int] = {}
        """By card, whoever was charged."""

    def to_set_aside(self, uuid: str) -> int:
        """Return the bytes to set aside for the test: what it made its process reserve.

        What wider fixtures keep from now on is not the test's. A test that lives on cached blocks
        reserves nothing, and would without them: so it is no less than what it allocated.
        """
        taken = self.reserved_peak.get(uuid, 0) - self.reserved_before.get(uuid, 0)
        account = self.accounts.get(uuid, Account())
        allocated = account.peak - self.baselines.get(uuid, 0)
        return max(0, allocated, taken - held(self.set_up, uuid))

    def fixture_bytes(self, uuid: str, names: Collection[str]) -> int:
        """Return what the wider fixtures among ``names`` hold."""
        return held(asked_for((*self.found, *self.set_up), names), uuid)

    def pay_back(self, seen: Counter[str]) -> Iterator[tuple[Fixture, str, int]]:
        """Credit the fixtures torn down in the test with what came back after their teardown.

        A reference cycle is collected only when the test is charged again. What was ``seen`` to
        die, by owner, is credited also where the test kept as much as came back, and then taken
        off. Yields each of them with the card and the bytes.
        """
        for uuid, account in self.accounts.items():
            for fixture in self.fixtures:
                owed = fixture.account(uuid)
                late = min(max(-account.delta, seen[fixture.name]), owed.delta)
                if fixture.wide and fixture.torn_down and late > 0:
                    seen[fixture.name] -= late
                    account.delta += late
                    owed.delta -= late
                    yield fixture, uuid, late

    def stayed(self) -> dict[tuple[str, str], int]:
        """Return what the test kept, and what the wider fixtures torn down in it kept."""
        found = self.kept()
        for fixture in self.fixtures:
            if fixture.wide and fixture.torn_down:
                found |= fixture.kept()
        return found


def asked_for(fixtures: Iterable[Fixture], names: Collection[str]) -> list[Fixture]:
    """Return those of which pytest's names, which reports need not show, are among ``names``."""
    return [each for each in fixtures if each.identity.rpartition("::")[2] in names]


def held(fixtures: Iterable[Fixture], uuid: str) -> int:
    """Return what the set-ups of ``fixtures`` took of a card."""
    accounts = (fixture.after_set_up.get(uuid) for fixture in fixtures)
    return sum(max(0, account.delta) for account in accounts if account is not None)


class Usage(NamedTuple):
    """What a test did: to each card and fixture that moved, and to its process."""

    cards: tuple[CardUsage, ...] = ()
    fixtures: tuple[FixtureUsage, ...] = ()
    left: tuple[Left, ...] = ()
    children: tuple[ChildUsage, ...] = ()
    scopes: tuple[ScopeUsage, ...] = ()


NOTHING_USED = Usage()


def card_usages(
    test: Test, meters: Iterable[Meter], verdicts: Verdicts, fixtures: Collection[str]
) -> tuple[CardUsage, ...]:
    """Return what the test did to each card that it, or a fixture in it, used."""
    usages = []
    for meter in meters:
        uuid = meter.card.uuid
        account = test.accounts.get(uuid)
        if account is None and not test.fixtures:
            continue
        account, baseline = account or Account(), test.baselines.get(uuid, 0)
        if not (account.delta or account.ooms or account.peak > baseline or test.fixtures):
            continue
        verdict = verdicts.get((test.name, uuid), Verdict())
        usages.append(
            CardUsage(
                card=uuid,
                baseline=baseline,
                peak=max(account.peak, baseline),
                leftover=max(account.delta, 0),
                reserved=meter.last.reserved,
                reserved_peak=max(account.reserved_peak, meter.last.reserved),
                retries=account.retries,
                ooms=account.ooms,
                process=meter.process,
                leaked=verdict.leaked,
                holders=verdict.holders,
                note=verdict.note,
                extra=test.to_set_aside(uuid),
                fixture_bytes=test.fixture_bytes(uuid, fixtures),
                own=account.asked_peak,
                own_left=max(account.asked, 0),
                vague=tuple(sorted(account.vague)),
            )
        )
    return tuple(usages)


def fixture_usages(test: Test, verdicts: Verdicts) -> tuple[FixtureUsage, ...]:
    """Return what the fixtures that were set up or torn down in the test did."""
    usages = []
    for fixture in test.fixtures:
        for uuid, account in fixture.after_set_up.items():
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
    allocated = fixture.after_set_up[uuid].delta
    if fixture.wide:
        return allocated - fixture.accounts[uuid].delta if fixture.torn_down else None
    return max(allocated - max(test.account(uuid).delta, 0), 0)

"""Who runs: a fixture while it is set up or torn down, otherwise the test; and what stands.

A function fixture lives and dies with its test, so what it does is the test's as well; what a wider
fixture holds is not.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import TYPE_CHECKING

from pytest_gpumem.tracking.accounts import Fixture, Owner, Scope, Test, held

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_gpumem.devices import AllocatorReading
    from pytest_gpumem.tracking.children import Children
    from pytest_gpumem.tracking.meter import Meter


class Turns:
    """The owners that run, each within the one before, and the wider fixtures that are set up."""

    def __init__(self) -> None:
        self._outside = Owner("outside of tests", "session")
        self._owners: list[Owner] = [self._outside]
        self.test: Test | None = None
        self.wide: list[Fixture] = []
        """Wider fixtures that are set up, whether or not they hold anything."""
        self.standing: list[Fixture] = []
        """Those that hold something."""
        self.scopes: list[Scope] = []
        """The session and the module that are set up."""
        self.moved: list[Fixture] = []
        """Those that were set up or torn down since the last test ended."""

    @property
    def charged(self) -> tuple[Owner, ...]:
        """Who is charged now; the first is who runs."""
        owner = self._owners[-1]
        if isinstance(owner, Fixture) and not owner.wide and self.test is not None:
            return (owner, self.test)
        return (owner,)

    def setting_up(self) -> Fixture | None:
        """Return the wide fixture that is set up now, None if none is."""
        owner = self._owners[-1]
        if not isinstance(owner, Fixture) or owner.torn_down:
            return None
        return owner if owner.wide else None

    def charge(self, meter: Meter, before: AllocatorReading, now: AllocatorReading) -> None:
        """Charge what an allocator did between two boundaries."""
        for owner in self.charged:
            owner.account(meter.card.uuid).charge(meter, before, now)
        runs = self._owners[-1]
        if runs is not self._outside:
            for scope in self.scopes:
                if scope.outlives(runs):
                    scope.account(meter.card.uuid).charge(meter, before, now)
        if self.test is not None:
            highest, uuid = self.test.reserved_peak, meter.card.uuid
            highest[uuid] = max(highest.get(uuid, 0), now.reserved_peak)

    def pay_back(self, seen: Counter[str]) -> None:
        """Credit fixtures that were torn down in the test with what came back late of them."""
        for fixture, uuid, late in () if self.test is None else self.test.pay_back(seen):
            for scope in self.scopes:
                if not scope.outlives(fixture):  # it was credited with what is not its own
                    scope.account(uuid).delta += late

    def held(self, children: Children | None) -> dict[str, Counter[str]]:
        """Return what wider fixtures that are set up hold, by card and identity."""
        sizes: dict[str, Counter[str]] = {}
        for fixture in self.wide:
            found = Counter({uuid: held((fixture,), uuid) for uuid in fixture.after_set_up})
            if children is not None:
                found.update(children.held_by((fixture,)))
            for uuid, size in (+found).items():
                sizes.setdefault(uuid, Counter())[fixture.identity] += size
        return sizes

    @property
    def number(self) -> int:
        """By which the children know who runs: of function fixtures it is the test."""
        return self._owners[-1].number or (0 if self.test is None else self.test.number)

    @property
    def quiet(self) -> bool:
        """Whether nothing was charged to the test, and no fixture came or went."""
        test = self.test
        if len(self._owners) > 1 or self.moved or test is None:
            return False
        return not (test.accounts or test.fixtures)

    def begin_test(self, nodeid: str, meters: Iterable[Meter]) -> Test:
        """Let a test run; ``meters`` are of the cards that are in use."""
        self._outside.accounts.clear()
        self.test = test = Test(nodeid, tuple(self.standing))
        self._owners = [test]
        for meter in meters:
            test.baselines[meter.card.uuid] = meter.last.allocated
            test.reserved_before[meter.card.uuid] = meter.last.reserved
        return test

    def end_test(self) -> None:
        """Let nobody run."""
        self.moved.clear()
        self.test = None
        self._owners = [self._outside]

    def begin_set_up(self, fixture: Fixture) -> None:
        """Let a fixture run, which is set up."""
        self._owners.append(fixture)

    def leave(self, fixture: Fixture) -> None:
        """Let the one go on within which a fixture was set up."""
        self._owners.remove(fixture)

    def stand(self, fixture: Fixture, meters: Iterable[Meter]) -> None:
        """Take note of a fixture that is set up."""
        # Of each card in use, also if the set-up did nothing to it: the teardown may.
        uuids = [meter.card.uuid for meter in meters]
        fixture.after_set_up = {uuid: copy.copy(fixture.account(uuid)) for uuid in uuids}
        holds = any(account.delta > 0 for account in fixture.after_set_up.values())
        if fixture.wide:
            self.wide.append(fixture)
            self.moved.append(fixture)
            if holds:
                self.standing.append(fixture)
        test = self.test
        if test is None:
            return
        if any(account.delta for account in fixture.after_set_up.values()):
            test.fixtures.append(fixture)
        if fixture.wide and holds:
            test.set_up.append(fixture)
        if fixture.wide:
            self.rebase(meters)

    def rebase(self, meters: Iterable[Meter]) -> None:
        """Let what is there and is not the test's own be what it starts from."""
        if self.test is not None:
            for meter in meters:
                uuid = meter.card.uuid
                self.test.baselines[uuid] = meter.last.allocated - self.test.account(uuid).delta

    def begin_teardown(self, fixture: Fixture) -> None:
        """Let a fixture run, which is torn down."""
        fixture.torn_down = True
        if fixture in self.standing:
            self.standing.remove(fixture)
        self._owners.append(fixture)
        if fixture in self.wide:
            self.wide.remove(fixture)
            self.moved = [*(each for each in self.moved if each is not fixture), fixture]
        test = self.test
        if test is not None and fixture not in test.fixtures and fixture.after_set_up:
            test.fixtures.append(fixture)

    def torn_down(self) -> bool:
        """Whether a fixture is charged whose teardown has begun."""
        return any(isinstance(owner, Fixture) and owner.torn_down for owner in self._owners)

    def leave_teardowns(self) -> None:
        """Let nothing more be charged to fixtures whose teardown has begun."""
        self._owners = [
            owner for owner in self._owners if not (isinstance(owner, Fixture) and owner.torn_down)
        ]

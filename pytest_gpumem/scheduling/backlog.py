"""Tests that wait, in lanes; what all of them take follows from what is added and taken."""

from __future__ import annotations

import bisect
import enum
from collections import deque
from typing import TYPE_CHECKING

from pytest_gpumem.scheduling.piles import Pile, Portion

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pytest_gpumem.scheduling.estimates import Estimates, PlannedTest


class Lane(enum.Enum):
    """How a test has to run."""

    CPU = enum.auto()
    """Without a card."""
    RAM = enum.auto()
    """Without a card, where there is main memory for it."""
    SHARED = enum.auto()
    """Beside others on one card."""
    WIDE = enum.auto()
    """Beside others on several cards."""
    LARGE = enum.auto()
    """Beside others, but not beside all the contexts that there are to be."""
    ALONE = enum.auto()
    """Alone on its cards."""
    LAST = enum.auto()
    """Alone, and while no test runs that may use the card unexpectedly."""


class Backlog:
    """All tests that wait for a worker; those that a card is kept for are with the card.

    Args:
        tests: all tests; they are known by their index here.
        seen: what to expect of them.
        late: modules to begin after the others, and in which order.

    """

    def __init__(
        self, tests: Sequence[PlannedTest], seen: Estimates, late: Mapping[str, int]
    ) -> None:
        self._tests = tests
        self._seen = seen
        on_gpu = {test.group for test in tests if test.gpu}
        # Modules with GPU tests come last: their CPU tests may find the fixtures set up.
        self.cpu = Pile(tests, late, last=on_gpu)
        self.ram = Portion()
        """Largest first."""
        self.shared = Pile(tests, late)
        self.wide = Portion()
        self.large = Portion()
        """Largest peak first."""
        self.alone = Portion()
        self.last = Portion()
        self._lanes: dict[Lane, Pile | Portion] = {
            Lane.CPU: self.cpu,
            Lane.RAM: self.ram,
            Lane.SHARED: self.shared,
            Lane.WIDE: self.wide,
            Lane.LARGE: self.large,
            Lane.ALONE: self.alone,
            Lane.LAST: self.last,
        }
        self.tallest = 0
        """Largest expected peak in the shared lane, ever."""
        self.work = 0.0
        self.area = 0.0
        """Seconds and byte-seconds of the waiting GPU tests that may share a card."""
        self._followers: dict[str, deque[int]] = {}
        """By family of unknown peak of which a scout was sent: tests that wait for its peak."""
        self.followers_work = 0.0

    @property
    def gpu_waits(self) -> bool:
        """Whether a GPU test waits that may run now; those in the last lane wait for the others."""
        lanes = self.alone.tests or self.wide.tests or self.large.tests
        return bool(len(self.shared) or lanes)

    @property
    def scouting(self) -> bool:
        """Whether a scout is to run."""
        return bool(self._followers)

    def add(self, test: int, lane: Lane) -> None:
        """Let ``test`` wait in ``lane``."""
        place = self._lanes[lane]
        if lane in {Lane.SHARED, Lane.WIDE}:
            self._count(test)
        if lane is Lane.SHARED:
            self.tallest = max(self.tallest, self._seen.whole(test))
        if isinstance(place, Pile):
            place.add(test)
        elif lane is Lane.RAM:
            place.add(test, self._tests[test].duration, self.first_within(self._tests[test].ram))
        else:
            place.add(test, self._tests[test].duration)

    def take(self, portion: Portion, test: int) -> int:
        """Remove ``test``, one of the first few of ``portion``, which is not the CPU tests'."""
        duration = self._tests[test].duration
        if portion is self.alone or portion is self.last or portion is self.ram:
            return portion.take(test, duration)
        self.work = max(0.0, self.work - duration)
        self.area = max(0.0, self.area - self._seen.whole(test) * duration)
        if portion is self.wide or portion is self.large:
            return portion.take(test, duration)
        return self.shared.take(portion, test)

    def _count(self, test: int) -> None:
        duration = self._tests[test].duration
        self.work += duration
        self.area += self._seen.whole(test) * duration

    # At the start

    def expect(self, sharing: Sequence[int]) -> None:
        """Take note of tests that will share a card: how many contexts there are follows."""
        for test in sharing:
            self._count(test)

    def first_within(self, room: int | None) -> int:
        """Return the place in the lane for main memory from which on tests need ``room`` or less.

        None is room for any.
        """
        if room is None:
            return 0
        return bisect.bisect_left(self.ram.tests, -room, key=lambda test: -self._tests[test].ram)

    def fill_shared(self, tests: Sequence[int], long: float, room: int) -> None:
        """Let all expected tests wait: in the large lane if they need more than ``room`` bytes."""
        need = {test: self._seen.whole(test) for test in tests}
        for test in sorted(tests, key=lambda test: -need[test]):
            if need[test] <= room:
                self.tallest = need[test]
                break
            self.large.add(test, self._tests[test].duration)
        self.shared.fill([test for test in tests if need[test] <= room], long)

    # Scouts

    def scouts(self, kin: str) -> None:
        """Take note that a test was sent ahead whose peak the others of ``kin`` will have."""
        self._followers.setdefault(kin, deque())

    def has_scout(self, kin: str) -> bool:
        """Return whether a scout of family ``kin`` was sent."""
        return kin in self._followers

    def follow(self, test: int, kin: str) -> bool:
        """Let ``test`` wait for the scout of its family; return False if there is none."""
        if kin not in self._followers:
            return False
        self._followers[kin].append(test)
        self.followers_work += self._tests[test].duration
        return True

    def next_scout(self, kin: str) -> bool:
        """Send the next test of a family whose scout told nothing; return False if none waits."""
        waiting = self._followers.get(kin)
        if not waiting:
            return False
        test = waiting.popleft()
        self.followers_work -= self._tests[test].duration
        self.add(test, Lane.ALONE)
        return True

    def released(self, kin: str) -> Iterator[int]:
        """Yield the tests that waited for a scout of family ``kin``; they wait for none now."""
        for test in self._followers.pop(kin, ()):
            self.followers_work -= self._tests[test].duration
            yield test

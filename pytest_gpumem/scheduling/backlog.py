"""Tests that wait, in lanes; what all of them take follows from what is added and taken."""

from __future__ import annotations

import bisect
import enum
from collections import deque
from typing import TYPE_CHECKING

from pytest_gpumem.scheduling.piles import Pile, Portion

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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


class Followers:
    """Tests that wait for what another one, the scout of their kind, is about to tell.

    Args:
        tests: all tests; they are known by their index here.

    """

    def __init__(self, tests: Sequence[PlannedTest]) -> None:
        self._tests = tests
        self.scouts: dict[str, int] = {}
        """By kind."""
        self._waiting: dict[str, deque[int]] = {}
        self.work = 0.0
        """Seconds of those that wait."""

    def send(self, kind: str, test: int) -> None:
        """Take note that ``test`` is the scout of ``kind``."""
        self.scouts[kind] = test
        self._waiting.setdefault(kind, deque())

    def follow(self, kind: str, test: int) -> bool:
        """Let ``test`` wait for the scout of ``kind``; return False if there is no other test."""
        if self.scouts.get(kind, test) == test:
            return False
        self._waiting[kind].append(test)
        self.work += self._tests[test].duration
        return True

    def next(self, kind: str) -> int | None:
        """Make the first that waits the scout of ``kind``, and return it; None if none waits."""
        if not self._waiting.get(kind):
            return None
        test = self._waiting[kind].popleft()
        self.scouts[kind] = test
        self.work -= self._tests[test].duration
        return test

    def release(self, kind: str) -> deque[int]:
        """Return the tests that waited for the scout of ``kind``; they wait for none now."""
        self.scouts.pop(kind, None)
        released = self._waiting.pop(kind, deque())
        self.work -= sum(self._tests[test].duration for test in released)
        return released


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
        on_gpu = {test.group for index, test in enumerate(tests) if seen.on_card(index)}
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
        self.families = Followers(tests)
        """By family: tests that wait for the peak of one that runs alone."""
        self.holders = Followers(tests)
        """By wide fixture: tests that wait for what it holds, which one of them sets up."""

    @property
    def gpu_waits(self) -> bool:
        """Whether a GPU test waits that may run now; those in the last lane wait for the others."""
        lanes = self.alone.tests or self.wide.tests or self.large.tests
        return bool(len(self.shared) or lanes)

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

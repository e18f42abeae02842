"""Tests that wait for a worker, in an order that spares fixture set-ups."""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from pytest_gpumem.scheduling.estimates import PlannedTest

BRINGS = 10
"""A test that brings a wide fixture has to last this many times as long as others to go before its
module. One of a late module would keep its worker from earlier modules, see ``fixtures``. One that
holds VRAM makes those of other modules give way, and may have lasted long only to be set up."""


class Portion:
    """Tests in order; of one module where they belong to a worker."""

    __slots__ = ("group", "owned", "tests", "work")

    def __init__(self, group: str = "") -> None:
        self.group = group
        self.tests: deque[int] = deque()
        self.work = 0.0
        self.owned = False

    def add(self, test: int, duration: float, place: int | None = None) -> None:
        """Insert ``test``, which lasts ``duration`` seconds, at ``place``; None: at the end."""
        self.tests.insert(len(self.tests) if place is None else place, test)
        self.work += duration

    def take(self, test: int, duration: float) -> int:
        """Remove ``test``, which is one of the first few."""
        self.tests.remove(test)
        self.work = max(0.0, self.work - duration) if self.tests else 0.0
        return test


class Pile:
    """Tests that wait: the long ones by duration, the others in portions of one module.

    Args:
        tests: all tests of the run; they are known by their index here.
        late: modules to begin after the others, and in which order.
        last: modules to begin last among those.

    """

    def __init__(
        self, tests: Sequence[PlannedTest], late: Mapping[str, int], last: Collection[str] = ()
    ) -> None:
        self.long = Portion()
        self._tests = tests
        self._late = late
        self._last = last
        self._first: dict[str, Portion] = {}
        self._halves: dict[str, list[Portion]] = {}
        """By module, what was split off for another worker."""
        self._free: list[tuple[int, bool, float, int, Portion]] = []
        self._owned: list[tuple[float, int, Portion]] = []
        self._number = itertools.count()
        self._count = 0
        self.time = 0.0

    def __len__(self) -> int:
        return self._count

    def fill(self, tests: Sequence[int], long: float) -> None:
        """Add all ``tests``; those that last longer than ``long`` seconds are long."""
        ahead: list[int] = []
        for test in tests:
            group = self._tests[test].group
            portion = self._first.setdefault(group, Portion(group))
            brings = group in self._late or self._tests[test].fixtures > 0
            if self._tests[test].duration > long * (BRINGS if brings else 1):
                ahead.append(test)
            else:
                self._put(portion, test)
        for test in sorted(ahead, key=lambda test: -self._tests[test].duration):
            self._put(self.long, test)
        for portion in self._first.values():
            self.release(portion)

    def add(self, test: int) -> None:
        """Add one test, to the portion of its module, where it stands in the collection.

        It may have been taken before: tests of a module run in their order where they can.
        """
        group = self._tests[test].group
        portion = self._first.setdefault(group, Portion(group))
        was_empty = not portion.tests
        self._put(portion, test, bisect.bisect(portion.tests, test))
        if not portion.owned:
            self.release(portion)
        elif was_empty:  # and so may be forgotten as one of which others can have half
            self._own(portion)

    def _put(self, portion: Portion, test: int, place: int | None = None) -> None:
        portion.add(test, self._tests[test].duration, place)
        self._count += 1
        self.time += self._tests[test].duration

    def take(self, portion: Portion, test: int) -> int:
        """Remove ``test``, one of the first few of ``portion``."""
        self._count -= 1
        duration = self._tests[test].duration
        self.time = max(0.0, self.time - duration) if self._count else 0.0
        return portion.take(test, duration)

    def extract(self, groups: Iterable[str], suits: Callable[[int], bool]) -> list[int]:
        """Remove what waits of modules ``groups`` and suits; return it in the collection's order.

        No other module is looked at: each may have a fixture for which this is asked.
        """
        portions = [self.long]
        for group in groups:
            portions += [self._first[group]] if group in self._first else []
            portions += self._halves.get(group, ())
        found = [(portion, test) for portion in portions for test in portion.tests if suits(test)]
        return sorted(self.take(portion, test) for portion, test in found)

    def release(self, portion: Portion | None) -> None:
        """Let any worker take ``portion``."""
        if portion is not None:
            portion.owned = False
            if portion.tests:
                group, number = portion.group, next(self._number)
                begins = self._late.get(group, -1), group in self._last
                heapq.heappush(self._free, (*begins, self._size(portion), number, portion))

    def _size(self, portion: Portion) -> float:
        """Return what puts the portion to begin with first: the largest, which may end last.

        Of tests that nobody has seen, the smallest: many modules are begun early so, and what uses
        a card is found while CPU tests are left to fill the waits. A large one can be shared.
        """
        first = self._tests[portion.tests[0]]
        return -portion.work if first.seen or first.gpu else portion.work

    def free(self, group: str) -> bool:
        """Return whether tests of module ``group`` wait that belong to no worker."""
        own = self._first.get(group)
        return own is not None and bool(own.tests) and not own.owned

    def begins(self, suits: Callable[[int], bool]) -> bool:
        """Return whether a module that is not late and belongs to no worker is to be begun.

        With a test that ``suits``.
        """
        while self._free:
            late, *_, portion = self._free[0]
            if portion.tests and not portion.owned:
                return late < 0 and suits(portion.tests[0])
            heapq.heappop(self._free)
        return False

    def adopt(
        self, group: str, left: Portion | None, suits: Callable[[int], bool]
    ) -> Portion | None:
        """Return a portion that belongs to the caller from now on, in place of ``left``.

        That of module ``group`` if nobody has it, else ``left`` while it lasts, else the largest
        that nobody has, else half of the largest. None whose first test does not suit.
        """
        if self.free(group) and suits(self._first[group].tests[0]):
            self.release(left)
            return self._own(self._first[group])
        if left is not None and left.tests and suits(left.tests[0]):
            return left
        self.release(left)
        return self._largest(suits) or self._half(suits)

    def _largest(self, suits: Callable[[int], bool]) -> Portion | None:
        passed, found = [], None
        while self._free and found is None:
            entry = heapq.heappop(self._free)
            portion = entry[-1]
            if portion.tests and not portion.owned:
                if suits(portion.tests[0]):
                    found = self._own(portion)
                else:
                    passed.append(entry)
        for entry in passed:
            heapq.heappush(self._free, entry)
        return found

    def _own(self, portion: Portion) -> Portion:
        portion.owned = True
        heapq.heappush(self._owned, (-portion.work, next(self._number), portion))
        return portion

    def _half(self, suits: Callable[[int], bool]) -> Portion | None:
        while self._owned:
            work, _, portion = self._owned[0]
            if not portion.owned or not portion.tests:
                heapq.heappop(self._owned)
            elif -work != portion.work:
                heapq.heapreplace(self._owned, (-portion.work, next(self._number), portion))
            else:
                second = portion.tests[len(portion.tests) // 2]
                return self._own(self._split(portion)) if suits(second) else None
        return None

    def _split(self, portion: Portion) -> Portion:
        """Return the latter half of ``portion`` as one of its own."""
        half = Portion(portion.group)
        self._halves.setdefault(portion.group, []).append(half)
        moved = [portion.tests.pop() for _ in range((len(portion.tests) + 1) // 2)]
        for test in reversed(moved):
            half.add(test, self._tests[test].duration)
        portion.work = max(0.0, portion.work - half.work) if portion.tests else 0.0
        return half

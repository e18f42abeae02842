"""What a run has seen of its tests so far, and what that makes of those still to come."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pytest_gpumem.scheduling.fixtures import WideFixture
from pytest_gpumem.scheduling.history import FAMILY_MARGIN, family, with_margin
from pytest_gpumem.tuples import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from pytest_gpumem.scheduling.history import Expectation

TRUST = 8
"""Tests' worth of weight that durations learned earlier have against observed ones."""
GUESS = 0.1
"""The same where nothing was learned: the first tests that end are to correct it."""


class PlannedTest(NamedTuple):
    """One test to run, known by its index; sizes in bytes, durations in seconds."""

    nodeid: str
    gpu: bool
    """Whether it is expected to use a card."""
    peak: int | None
    """Expected beyond what its process keeps, on each of its cards; None when unknown."""
    duration: float
    group: str
    """Its module, whose fixtures tests share."""
    cards: int = 1
    """The first so many of those that its worker sees."""
    exclusive: bool = False
    seen: bool = True
    """Whether it ran before. If not, it may use a card although that is not expected."""
    marked: bool = False
    """Whether its peak is a mark's, which is for all that it works with."""
    fixtures: int = 0
    """What its wider fixtures hold: a process in which they are not set up needs this on top of the
    peak, of which it is a part where that is a mark's."""
    wide: tuple[WideFixture, ...] = ()
    """The wide fixtures that it is known to use, and its worker sets up."""
    apart: int = 0
    """What it costs in addition that it runs in a process of its own: a context."""
    ram: int = 0
    """Bytes of main memory that it takes beyond what its process keeps; 0: not known."""


def planned_tests(
    collection: Sequence[str],
    needs: Iterable[tuple[int, int | None, int, bool]],
    expect: Callable[[str, int | None], Expectation],
    *,
    most: int,
    any_card: bool,
    wide: tuple[Sequence[Sequence[tuple[str, str, int | None]]], Sequence[int]] = ((), ()),
    apart: Collection[int] = (),
    context: int = 0,
    rams: Iterable[tuple[int, int]] = (),
) -> list[PlannedTest]:
    """Return the collected tests with what is expected of them.

    ``needs`` are the marked tests: index, bytes (None: not said), cards, exclusive. Without any
    card they are tests like others, which find out for themselves. ``most`` are the bytes that a
    test can have: only a mark may ask for more, an estimate with its margin may not. ``wide`` are
    the wide fixtures: sets of (node, name, parameter), and by test which of them it uses. Tests
    ``apart`` run in processes of their own, which set their wide fixtures up anew and cost a
    ``context`` each. ``rams`` are the tests whose mark says what they take of main memory: index,
    bytes.
    """
    alone = set(apart)
    sets = [tuple(WideFixture(*each) for each in told) for told in wide[0]]
    wide_of = dict(enumerate(sets[place] for place in wide[1]))
    marked = {need[0]: need for need in needs}
    in_ram = dict(rams)
    planned = []
    for index, nodeid in enumerate(collection):
        _, vram, cards, exclusive = marked.get(index, (index, None, 1, False))
        expected = expect(nodeid, vram)
        peak, held = expected.peak, expected.fixtures
        own = index in alone
        if own:
            peak, held = None if peak is None else peak + held, 0
        if peak is not None and expected.source != "mark":
            room = max(0, most - context) if own else max(0, most)
            peak = min(peak, room)
            held = min(held, room - peak)
        planned.append(
            PlannedTest(
                nodeid=nodeid,
                gpu=any_card and (expected.gpu or index in marked),
                peak=peak,
                duration=expected.duration,
                group=nodeid.split("::")[0],
                cards=cards,
                exclusive=exclusive,
                seen=expected.source == "learned",
                marked=expected.source == "mark",
                fixtures=held,
                wide=() if own else wide_of.get(index, ()),
                apart=context if own else 0,
                ram=to_set_aside(in_ram.get(index), expected),
            )
        )
    return planned


def to_set_aside(mark: int | None, expected: Expectation) -> int:
    """Return the bytes of main memory that a test is taken to need; ``mark`` is what it says.

    No less than it was seen to take: of a mark that has become too small others would be killed.
    """
    return expected.ram if mark is None else max(mark, expected.ram_seen)


class Estimates:
    """What to expect of the tests of one run.

    Args:
        tests: all tests; they are known by their index here.
        most: bytes that a test can have; no estimate is larger.
        leasing: identities of wide fixtures that take a lease, as their code says.

    """

    def __init__(
        self,
        tests: Sequence[PlannedTest],
        *,
        most: int,
        leasing: Collection[str] = (),
    ) -> None:
        self._tests = tests
        self._most = most
        self._family_peaks: dict[str, int] = {}
        self._family_fixtures: dict[str, int] = {}
        self._sizes: dict[WideFixture, int] = {}
        """What wide fixtures held at most that were seen to stand..."""
        self._largest: dict[str, int] = {}
        """... and the largest of those by identity, for modules in which none stood so far: the
        same fixture may hold as much there, or, of a module's own model, something else."""
        self._leasing = set(leasing)
        """Wide fixtures that take leases, which their tests run within."""
        self._untold = set(leasing)
        """Wide fixtures that hold something of a card; nobody knows how much before they stand."""
        self._surprising: set[str] = set()
        """Families and modules of tests that used a card although that was not expected."""
        self._harmless: set[str] = set()
        """Families of which a test has used no card..."""
        self._used_none: list[int] = []
        """... and further tests that have used none: most runs never ask for their families."""
        self.ooms: Counter[int] = Counter()
        """How often tests ran out of memory and were to be tried again."""
        trust = sum(test.duration * (TRUST if test.seen else GUESS) for test in tests)
        trust /= max(1, len(tests))
        self._observed = [trust, trust]
        self._expected = [trust, trust]
        """Seconds that tests took and were expected to take: CPU tests, GPU tests."""

    def need(self, test: int) -> int | None:
        """Return the bytes expected of a GPU test; None when it has to run alone."""
        planned = self._tests[test]
        if test in self.ooms:
            return None
        if planned.peak is not None:
            own = planned.peak - self.fixtures(test) if planned.marked else planned.peak
            return own + planned.apart
        if self._leasing and any(each.name in self._leasing for each in planned.wide):
            return planned.apart
        kin = self._family_peaks.get(family(planned.nodeid))
        if kin is None:
            return None
        most = max(0, self._most - planned.apart)
        return min(most, with_margin(kin, FAMILY_MARGIN)) + planned.apart

    def fixtures(self, test: int) -> int:
        """Return the bytes that the wider fixtures of ``test`` hold, where they are set up."""
        planned = self._tests[test]
        if planned.peak is not None and not planned.marked:
            return planned.fixtures
        seen = sum(self._sizes.get(each, self._largest.get(each.name, 0)) for each in planned.wide)
        if planned.peak is not None:
            return min(max(planned.fixtures, seen), planned.peak)
        held = max(self._family_fixtures.get(family(planned.nodeid), 0), seen)
        need = self.need(test)
        return min(held, max(0, self._most - (planned.apart if need is None else need)))

    def whole(self, test: int) -> int:
        """Return the bytes for ``test`` in a process that keeps nothing but its context."""
        return (self.need(test) or 0) + self.fixtures(test)

    def on_card(self, test: int) -> bool:
        """Return whether ``test`` uses a card, as far as is known."""
        return self._tests[test].gpu or test in self.ooms or self.surprises(test)

    def surprises(self, test: int) -> bool:
        """Return whether ``test`` uses a card, by its family or by its fixtures."""
        planned = self._tests[test]
        if self._surprising and family(planned.nodeid) in self._surprising:
            return True
        if planned.seen or not planned.wide:
            return False
        return any(self.is_on_card(each.name) for each in planned.wide)

    def is_on_card(self, fixture: str) -> bool:
        """Return whether a wide fixture holds something of a card."""
        return self._largest.get(fixture, 0) > 0 or fixture in self._untold

    def untold(self, test: int) -> str:
        """Return the fixture of ``test`` that has to stand before its need is known; "" if none."""
        planned = self._tests[test]
        known = not self._untold or planned.peak is not None or test in self.ooms
        if known or not self.on_card(test):
            return ""
        return next((each.name for each in planned.wide if each.name in self._untold), "")

    def suspect(self, test: int) -> bool:
        """Return whether all that is known of ``test`` is that others of its module use a card."""
        planned = self._tests[test]
        if planned.seen or planned.group not in self._surprising:
            return False
        self._harmless.update(family(self._tests[each].nodeid) for each in self._used_none)
        self._used_none.clear()
        return family(planned.nodeid) not in self._harmless

    def scouted(self, kin: str) -> bool:
        """Return whether the peak of a test of family ``kin`` was seen."""
        return kin in self._family_peaks

    def took(self, test: int, duration: float, *, gpu: bool, nothing: bool = False) -> None:
        """Take note of the seconds that ``test`` took, as a GPU test or not, and if that is all."""
        self._observed[gpu] += duration
        self._expected[gpu] += self._tests[test].duration
        if nothing:
            self._used_none.append(test)

    def used_card(self, test: int, peak: int | None, fixtures: int = 0) -> None:
        """Take note that ``test`` used a card, and expect the same of its relatives."""
        planned = self._tests[test]
        kin = family(planned.nodeid)
        if (peak != 0 or fixtures) and not self.on_card(test):
            self._surprising |= {kin, planned.group}
        if peak is not None:
            self._family_peaks[kin] = max(peak, self._family_peaks.get(kin, 0))
            self._family_fixtures[kin] = max(fixtures, self._family_fixtures.get(kin, 0))

    def stands(self, fixtures: Mapping[str, int], there: Sequence[WideFixture]) -> None:
        """Take note of what wide fixtures that are set up hold, by identity; of those ``there``."""
        for name, size in fixtures.items():
            self._largest[name] = max(size, self._largest.get(name, 0))
            if each := next((each for each in there if each.name == name), None):
                self._sizes[each] = max(size, self._sizes.get(each, 0))

    def begins(self, fixture: str) -> None:
        """Take note that a wide fixture whose size is not known begins to hold something."""
        if fixture not in self._largest:
            self._untold.add(fixture)

    def told(self, fixture: str, *, leases: bool) -> None:
        """Take note that all is known of what a wide fixture holds, and if that is by a lease."""
        self._untold.discard(fixture)
        if leases:
            self._leasing.add(fixture)
        else:
            self._leasing.discard(fixture)

    def pace(self, *, gpu: bool) -> float:
        """Return how long tests take, as a ratio to what was expected."""
        return self._observed[gpu] / self._expected[gpu] if self._expected[gpu] else 1.0

"""Which wide fixtures a worker may set up beside those that it has.

What sets a fixture up may wait for something of which there is one, such as a lock, until another
worker's fixture is torn down. If two workers set the same two up in opposite orders, both wait for
ever. Plain xdist hands tests out in the order of the collection. A suite that ends there, however
its tests are spread, therefore has an order in which nobody sets them up backwards; and here it
ends too if no worker sets up a fixture beside one that it would never find beside it there.

A worker of plain xdist sets up G while it has F if a test that uses G comes after one that uses F,
and F is not torn down between them. So F must give way to G where the first test that uses F does
not come before the last one that uses G within the module, class or package to which F belongs.
Nor where that is the same test, the first there, which sets G up before F, and others follow it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Protocol

from pytest_gpumem.tuples import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class WideFixture(NamedTuple):
    """A fixture of a wider scope than one test, as each process sets it up for itself."""

    node: str
    """The class, module or package with which it is torn down; "" is the session."""
    name: str
    """What tells it from others, of the same name too."""
    param: int | None = None
    """Setting it up with another parameter tears it down first."""


class Test(Protocol):
    """What is to be known of a test."""

    @property
    def nodeid(self) -> str:
        """Its name."""

    @property
    def group(self) -> str:
        """Its module."""

    @property
    def wide(self) -> tuple[WideFixture, ...]:
        """The wide fixtures that it is known to use."""


SetUp = frozenset[WideFixture]
"""The wide fixtures that a worker has."""
NOTHING = SetUp()


class SetUpOrder:
    """Tells which test may follow which in one worker.

    Args:
        tests: all tests in the order of the collection; they are known by their index here.

    """

    def __init__(self, tests: Sequence[Test]) -> None:
        self._tests = tests
        self._first: dict[WideFixture, int] = {}
        """The first test that uses it."""
        for index, test in enumerate(tests):
            for fixture in test.wide:
                self._first.setdefault(fixture, index)
        self._spans = self._find_spans()
        self._late = self._find_late()
        self._early = self._find_early()
        """By fixture that no test within its node comes before: those that it must give way to."""
        self._held = self._late.union(self._early)
        self.late_modules = self._find_late_modules()
        """By module with late fixtures that outlive it: the first test that uses the last of them.

        In this order each worker finds them set up without being kept from modules before."""
        self._last: dict[tuple[str, WideFixture], int] = {}
        """By node of late fixtures: the last test within it that uses a fixture."""
        nodes = {fixture.node for fixture in self._late}
        for index, test in enumerate(tests) if nodes else ():
            for node in nodes.intersection(nodes_of(test.nodeid) if test.wide else ()):
                self._last.update(((node, fixture), index) for fixture in test.wide)

    def _find_spans(self) -> dict[str, tuple[int, int]]:
        """Return the first and the last test of each node that has wide fixtures."""
        spans: dict[str, tuple[int, int]] = {}
        nodes = {fixture.node for fixture in self._first}
        for index, test in enumerate(self._tests) if nodes else ():
            for node in nodes.intersection(nodes_of(test.nodeid)):
                spans[node] = spans.get(node, (index, index))[0], index
        return spans

    def _find_late(self) -> SetUp:
        """Return the fixtures that a test within their node comes before."""
        return SetUp(
            each for each, first in self._first.items() if first > self._spans[each.node][0]
        )

    def _find_early(self) -> dict[WideFixture, SetUp]:
        """Return the others that give way, and to which: of their first test, used by no later."""
        alone: dict[WideFixture, set[WideFixture]] = {}
        for fixture, first in self._first.items():
            begins, ends = self._spans[fixture.node]
            wide = self._tests[first].wide
            if first == begins < ends and (before := wide[: wide.index(fixture)]):
                alone[fixture] = set(before)
        by_node: dict[str, list[WideFixture]] = {}
        for fixture in alone:
            by_node.setdefault(fixture.node, []).append(fixture)
        for index, test in enumerate(self._tests) if alone else ():
            for node in by_node.keys() & set(nodes_of(test.nodeid)) if test.wide else ():
                for fixture in by_node[node]:
                    if index > self._first[fixture]:
                        alone[fixture].difference_update(test.wide)
        return {fixture: SetUp(others) for fixture, others in alone.items() if others}

    def _find_late_modules(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for test in self._tests if self._late else ():
            for fixture in self._late.intersection(test.wide):
                if outlives(fixture, test):
                    found[test.group] = max(found.get(test.group, 0), self._first[fixture])
        return found

    def after(self, test: int, before: SetUp) -> SetUp:
        """Return what a worker has set up after ``test`` if it had ``before``."""
        if not self._held:
            return NOTHING
        planned = self._tests[test]
        new = {(each.node, each.name) for each in planned.wide}
        nodes = set(nodes_of(planned.nodeid))
        stay = (each for each in before if each.node in nodes and each[:2] not in new)
        return SetUp(planned.wide).union(stay)

    def permits(self, test: int, before: SetUp) -> bool:
        """Return whether a worker that has set up ``before`` may run ``test`` next."""
        if not before:
            return True
        held = before & self._held
        planned = self._tests[test]
        nodes = set(nodes_of(planned.nodeid))
        return not any(
            each[:2] != new[:2] and self._gives_way(each, new)
            for each in held
            if each.node in nodes
            for new in planned.wide
            if new not in before
        )

    def _gives_way(self, each: WideFixture, new: WideFixture) -> bool:
        """Return whether a worker of plain xdist would never set up ``new`` beside ``each``."""
        if each in self._late:
            return self._last[each.node, new] <= self._first[each]
        return new in self._early[each]

    def unless_late(self, suits: Callable[[int], bool]) -> Callable[[int], bool]:
        """Return what tells whether a test ``suits`` and is of no late module."""
        return lambda test: self._tests[test].group not in self.late_modules and suits(test)

    def suits(self, before: SetUp) -> Callable[[int], bool]:
        """Return what tells whether a test may follow in a worker that has set up ``before``."""
        return functools.partial(self.permits, before=before) if before else _any_test


def _any_test(_: int) -> bool:
    return True


def outlives(fixture: WideFixture, test: Test) -> bool:
    """Return whether a fixture of ``test`` outlives its module."""
    return not fixture.node.startswith(test.group)


def of_session(fixtures: SetUp) -> SetUp:
    """Return those that outlive every module."""
    return SetUp(each for each in fixtures if not each.node)


def nodes_of(nodeid: str) -> Iterator[str]:
    """Yield the nodes around a test, from the session inwards."""
    yield ""
    path, _, inner = nodeid.partition("::")
    for place, letter in enumerate(path):
        if letter == "/":
            yield path[:place]
    yield path
    for part in inner.partition("[")[0].split("::")[:-1]:
        path = f"{path}::{part}"
        yield path

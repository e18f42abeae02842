"""What a report counts and groups, once, whatever shows it: a terminal, Markdown, annotations.

A test counts once, by its nodeid, however often it ran: of its attempts the one that took most is
shown. What is a list of culprits (leaks, tests felled) is grouped by what they have in common, the
largest group first: two hundred leaks of one global are one entry.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem.reports import children
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from pytest_gpumem.records import (
        CardUsage,
        FixtureUsage,
        Holder,
        RecordedTest,
        RunRecord,
        ScopeUsage,
    )


class Leak(NamedTuple):
    """What one test, or one instance of a fixture, left on one card."""

    size: int
    by: str
    test: RecordedTest
    """Which it was, or after which the fixture was torn down."""
    holders: tuple[Holder, ...]
    orphans: tuple[str, ...] = ()
    """The processes that hold some of it."""

    @property
    def kind(self) -> str:
        """Return what leaks of one kind share: where they are held, whatever the index or key."""
        return re.sub(r"\[[^\]]*\]", "[]", self.holders[0].where) if self.holders else ""


class Counted(NamedTuple):
    """What is to be told of a run."""

    touched: tuple[RecordedTest, ...]
    """The tests of which there is anything to tell."""
    leaks: tuple[Leak, ...]
    """The largest first."""
    felled: tuple[RecordedTest, ...]
    """Those that failed because memory ran out, and were not tried again."""
    headline: str


def count_up(run: RunRecord) -> Counted:
    """Return what is to be told of a run."""
    touched = tuple(
        test
        for test in run.tests
        if test.cards
        or test.fixtures
        or test.oom
        or test.broke
        or test.left
        or test.children
        or test.scopes
        or test.alive
    )
    leaks = tuple(sorted(_leaks(touched), key=lambda leak: -leak.size))
    felled = tuple(test for test in touched if test.oom and test.outcome in ("failed", "error"))
    used = _users(touched)
    everything = {test.nodeid for test in run.tests}
    highest = max((own(card) for test in touched for card in test.cards), default=0)
    of_size = f" ({format_bytes(sum(leak.size for leak in leaks))})" if leaks else ""
    return Counted(
        touched,
        leaks,
        felled,
        f"{len(used)} of {plural(len(everything), 'test')} used VRAM, "
        f"highest own peak {format_bytes(highest)}, {plural(len(leaks), 'leak')}{of_size}, "
        f"{plural(len(felled), 'failure')} out of memory",
    )


def own(usage: CardUsage) -> int:
    """Return the own peak: the highest above what was there when the test began, in bytes."""
    return usage.peak - usage.baseline


def plural(count: int, noun: str) -> str:
    """Return a number with its noun: ``1 leak``, ``2 leaks``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


_LIKEWISE_NAMED = 3


def likewise(number: str, others: Sequence[str], *, verbose: bool) -> Iterator[str]:
    """Yield the ``number`` of those that came off as the one above them; a few also by name."""
    if not others:
        return
    named = verbose or len(others) <= _LIKEWISE_NAMED
    yield f"      likewise {number}{'' if named else '; -v shows all'}"
    yield from (f"          {other}" for other in others if named)


def place(test: RecordedTest) -> str:
    """Return a test's nodeid, with its worker where it has one."""
    return f"{test.nodeid} [{test.worker}]" if test.worker else test.nodeid


def _users(tests: Sequence[RecordedTest]) -> set[str]:
    """Return the tests that used VRAM: they, or the set-up of a fixture for them, took some.

    Not those after which a fixture was torn down that had been set up for an earlier one.
    """
    used: set[str] = set()
    standing: set[tuple[str, ...]] = set()
    for test in tests:
        if any(own(card) > 0 or card.leftover > 0 for card in test.cards):
            used.add(test.nodeid)
        for each in test.fixtures:
            key = _instance(test, each)
            if key not in standing and (each.allocated > 0 or each.leaked):
                used.add(test.nodeid)
            (standing.add if each.released is None else standing.discard)(key)
    return used


def _instance(test: RecordedTest, fixture: FixtureUsage) -> tuple[str, ...]:
    """Return what the reports of one instance of a fixture have in common, while it stands."""
    return test.host, test.worker, fixture.name, fixture.scope, fixture.card


class Row(NamedTuple):
    """What one test took of one card."""

    usage: CardUsage
    test: RecordedTest
    part: str
    """The part of the card, where its size is known: ``12%``."""


def peaks(run: RunRecord) -> list[Row]:
    """Return who took most of a card, the highest own peak first."""
    totals = {(card.host, card.uuid): card.total for card in run.cards}
    most: dict[tuple[str, str, str], Row] = {}
    for test in run.tests:
        for card in test.cards:
            key = (test.nodeid, test.host, card.card)
            if (own(card) > 0 or card.leftover > 0) and (
                key not in most or own(card) > own(most[key].usage)
            ):
                total = totals.get((test.host, card.card), 0)
                most[key] = Row(card, test, _part(own(card), total) if total else "")
    return sorted(most.values(), key=lambda row: -own(row.usage))


class Column(NamedTuple):
    """A figure of the table of own peaks."""

    title: str
    width: int
    cell: Callable[[Row], str]


PEAK_COLUMNS = (
    Column("own peak", 11, lambda row: format_bytes(own(row.usage))),
    Column("of card", 8, lambda row: row.part),
    Column("peak", 11, lambda row: format_bytes(row.usage.peak)),
    Column("leftover", 11, lambda row: format_bytes(row.usage.leftover)),
)


def _part(size: int, total: int) -> str:
    return "<1%" if 0 < size < total / 100 else f"{size / total:.0%}"


def instances(tests: Sequence[RecordedTest]) -> list[FixtureUsage]:
    """Return each instance of a wider fixture once, with its teardown's figures where it has any.

    A fixture is set up again for other parameters, in each module, and in each worker.
    """
    rows: list[FixtureUsage] = []
    standing: dict[tuple[str, ...], int] = {}
    for test in tests:
        for each in test.fixtures:
            if each.scope == "function":
                continue
            key = _instance(test, each)
            if each.released is None:
                standing[key] = len(rows)
                rows.append(each)
            elif key in standing:
                rows[standing.pop(key)] = each
            else:
                rows.append(each)
    return rows


def _leaks(tests: Sequence[RecordedTest]) -> Iterator[Leak]:
    ended = children.ends(tests)
    for test in tests:
        for card in test.cards:
            if card.leaked:
                left = children.orphans(test, card.card, test.nodeid, ended)
                yield Leak(card.leaked, place(test), test, card.holders, left)
        for fixture in test.fixtures:
            if fixture.leaked:
                by = f"fixture {fixture.name} ({fixture.scope}), torn down after {place(test)}"
                name = f"fixture {fixture.name!r} ({fixture.scope})"
                left = children.orphans(test, fixture.card, name, ended)
                yield Leak(fixture.leaked, by, test, fixture.holders, left)


class LeftByScope(NamedTuple):
    """What all passes through a module, in all processes, left on the cards; or all of the run."""

    name: str
    """The module's nodeid; ``the whole run``."""
    size: int
    where: str
    """Who holds most of it, in words, without the module's name; empty where that is not known."""

    @property
    def whole(self) -> bool:
        """Whether it is the run's."""
        return self.name == _WHOLE


_WHOLE = "the whole run"


def left_by_scopes(run: RunRecord) -> list[LeftByScope]:
    """Return what modules left, the most first, and at last what the run left as a whole.

    The run is left out where one module left all of that.
    """
    found: dict[tuple[str, str], list[ScopeUsage]] = {}
    for test in run.tests:
        for each in test.scopes:
            found.setdefault((each.scope, each.name), []).append(each)
    rows = [
        LeftByScope(
            name or _WHOLE,
            sum(each.left for each in several),
            _of_most([holder for each in several for holder in each.holders], name),
        )
        for (_, name), several in found.items()
    ]
    modules = [row.size for row in rows if not row.whole]
    told = [row for row in rows if not row.whole or modules != [row.size]]
    return sorted(told, key=lambda row: (row.whole, -row.size))


def _of_most(holders: list[Holder], module: str) -> str:
    most = max(holders, key=lambda each: each.size).where if holders else ""
    return most.removeprefix(f"{module}: ") if module else most


def by_kind(leaks: Iterable[Leak]) -> list[list[Leak]]:
    """Return the leaks grouped by where they are held."""
    kinds: dict[str, list[Leak]] = {}
    for leak in leaks:
        # Where nobody is known to hold them, nothing says that two are of one kind.
        kinds.setdefault(leak.kind or leak.by, []).append(leak)
    return sorted(kinds.values(), key=lambda group: -sum(leak.size for leak in group))


def likewise_leaks(others: Sequence[Leak]) -> str:
    """Return how much the further leaks of a kind are: ``36.00 KiB in 9 leaks``."""
    size = format_bytes(sum(leak.size for leak in others))
    return f"{size} in {plural(len(others), 'leak')}" if others else ""


def by_cause(counted: Counted) -> list[tuple[list[str], list[RecordedTest]]]:
    """Return the tests felled, grouped by what the card said, and who had set limits for them.

    And by whether a stranger was there: another worker of the run is or is not by chance.
    """
    culprits = _limits(counted.touched)
    causes: dict[tuple[object, ...], list[RecordedTest]] = {}
    for test in counted.felled:
        stranger = any(not each.worker for each in test.beside)
        cause = (
            re.sub(r"\d[\d.]*( ?[KMGT]i?B\b)?", "N", test.oom),
            *culprits.get(test, ()),
            stranger,
        )
        causes.setdefault(cause, []).append(test)
    groups = sorted(causes.values(), key=lambda group: -len(group))
    return [(culprits.get(group[0], []), group) for group in groups]


def _limits(tests: Iterable[RecordedTest]) -> dict[RecordedTest, list[str]]:
    """Return, for each test that a limit felled, who had set the limits of its process."""
    found: dict[RecordedTest, list[str]] = {}
    limits: dict[tuple[str, str], dict[str, str]] = {}
    """By process and limit: the last test that left one."""
    for test in tests:
        standing = limits.setdefault((test.host, test.worker), {})
        if test.oom.endswith(" allowed)"):
            found[test] = list(standing.values())
        for left in test.left:
            if left.what.startswith("memory fraction"):
                sentence = f"{left.what} is {left.after}: {test.nodeid} left it so"
                if left.put_back:
                    standing.pop(left.what, None)
                else:
                    standing[left.what] = sentence
    return found

"""Whatever wide fixtures exclude one another, a run that ends under plain xdist ends here.

Modelled are fixtures of session, module and class scope that each hold something of which there is
one, or a lease of most of the card, workers that block while they set one up or wait for the lease
of a test, and the clock, which strikes when nobody goes on. The suites are such that they end in
whatever order plain xdist hands their tests out, where tests take no lease.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from random import Random
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem.admission import Claim
from pytest_gpumem.leases.entries import HELD, WAITING, Entry, entry_of
from pytest_gpumem.leases.loans import may_lend
from pytest_gpumem.leases.page import Page
from pytest_gpumem.leases.view import Known, View
from pytest_gpumem.scheduling.commands import Allotment, Command, Fail, Flush, Reset, Run, Stop
from pytest_gpumem.scheduling.estimates import PlannedTest
from pytest_gpumem.scheduling.fixtures import WideFixture, nodes_of
from pytest_gpumem.scheduling.planner import Planner

CONTEXT, HEADROOM, TOTAL = 10, 5, 100
LEASE = 60
"""Bytes that a fixture leases."""
THINGS = ("lock", "port", "lease", "database")


class Uses(NamedTuple):
    """A test, and what its wide fixtures hold, in the order in which they are set up."""

    planned: PlannedTest
    held: dict[WideFixture, str]
    """What each excludes others from; "" where it holds nothing."""


@st.composite
def suites(draw) -> list[Uses]:
    """Draw suites that end in plain xdist, however it spreads their tests."""

    def some(scope: str, node: str, most: int) -> dict[WideFixture, str]:
        names = [f"{scope}{number}" for number in range(draw(st.integers(0, most)))]
        return {WideFixture(node, name): draw(st.sampled_from(THINGS)) for name in names}

    found = []
    of_session = some("session", "", 3)
    for module in range(draw(st.integers(1, 4))):
        group = f"m{module}.py"
        of_module = some("module", group, 2)
        for cls in range(draw(st.integers(1, 2))):
            wide = [*of_session.items(), *of_module.items()]
            wide += some("class", f"{group}::T{cls}", 1).items()
            for number in range(draw(st.integers(1, 3))):
                held = {fixture: what for fixture, what in wide if draw(st.booleans())}
                on_gpu = draw(st.booleans())
                planned = PlannedTest(
                    f"{group}::T{cls}::t[{number}]",
                    on_gpu,
                    draw(st.sampled_from([None, 0, 20, 45, 80])) if on_gpu else None,
                    draw(st.sampled_from([0.001, 1.0, 30.0])),
                    group,
                    seen=draw(st.booleans()),
                    wide=tuple(held),
                )
                found.append(Uses(planned, held))
    return without_deadlocks(found)


def without_deadlocks(suite: list[Uses]) -> list[Uses]:
    """Return a suite with fewer things to wait for, in which no worker's order is another's.

    Who has a thing and may set up what holds another one comes before it. Workers of plain xdist
    cannot wait for one another in a circle if nothing comes before itself.
    """
    before = {
        (mine, other)
        for place, first in enumerate(suite)
        for second in suite[place:]
        for at, (fixture, mine) in enumerate(first.held.items())
        if fixture.node in nodes_of(second.planned.nodeid)
        for further, (new, other) in enumerate(second.held.items())
        if mine and other and (first is not second or at < further) and fixture != new
    }
    for middle in THINGS:
        for start in THINGS:
            if (start, middle) in before:
                before |= {(start, end) for end in THINGS if (middle, end) in before}
    circular = [what for what in THINGS if (what, what) in before]
    if not circular:
        return suite
    gone = circular[0]
    return without_deadlocks(
        [
            each._replace(
                held={fixture: what * (what != gone) for fixture, what in each.held.items()}
            )
            for each in suite
        ]
    )


class Leases:
    """The leases of a run's workers, without a clock: who does not go on sleeps."""

    def __init__(self, names: list[str]) -> None:
        self.process = {name: f"{number}.{number}" for number, name in enumerate(names, 1)}
        self.entries: dict[str, dict[WideFixture | None, Entry]] = {name: {} for name in names}
        """By worker and fixture; None is its test."""
        self.number = 0
        self.lent = 0

    def request(self, name: str, owner: WideFixture | None, claim: Claim) -> Entry:
        if owner not in self.entries[name]:
            self.number += 1
            entry = entry_of(
                WAITING, self.number, self.process[name], {"card": claim}, test=owner is None
            )
            self.entries[name][owner] = entry
        return self.entries[name][owner]

    def admits(self, request: Entry, asleep: Collection[str] = ()) -> bool:
        """Return whether a request may start now, if the workers ``asleep`` sleep."""
        page = Page([e.name for mine in self.entries.values() for e in mine.values()])
        view = View(page, {"card": Known("card", TOTAL)}, HEADROOM)
        lent = [
            entry.name
            for entry in page.taken
            if entry.process in {self.process[name] for name in asleep}
            and may_lend(entry, request, page, sibling=request.test)
        ]
        if not asleep:
            return view.admits(request)
        return bool(lent) and view.lent(request, lent).admits(request)


class Workers:
    """Does what a planner says, as far as no other worker holds what a fixture needs."""

    def __init__(self, suite: list[Uses], planner: Planner, names: list[str]) -> None:
        self.suite = suite
        self.planner = planner
        self.queues: dict[str, deque[int | Flush | Reset]] = {name: deque() for name in names}
        self.held: dict[str, dict[WideFixture, str]] = {name: {} for name in names}
        self.grants: dict[int, Allotment | None] = {}
        self.leases = Leases(names)
        self.passed: list[int] = []
        self.strikes = 0
        """Of the clock since anything was done."""
        self.obey()

    def obey(self) -> None:
        while commands := self.planner.commands():
            for command in commands:
                self.do(command)

    def do(self, command: Command) -> None:
        assert not isinstance(command, Fail)
        if isinstance(command, Run):
            self.queues[command.worker].append(command.test)
            self.grants[command.test] = command.grant
        elif isinstance(command, Stop):
            assert not self.queues.pop(command.worker)
            self.keep(command.worker, [])
            self.planner.remove_worker(command.worker)
        else:
            self.queues[command.worker].append(command)

    def keep(self, name: str, nodes: Collection[str]) -> None:
        """Tear down the fixtures of all other nodes."""
        held, entries = self.held[name], self.leases.entries
        self.held[name] = {each: what for each, what in held.items() if each.node in nodes}
        entries[name] = {
            owner: entry
            for owner, entry in entries[name].items()
            if owner is None or owner.node in nodes
        }

    def lacks(self, name: str) -> Entry | WideFixture | None:
        """Return the lease or the fixture that a worker needs next, None if it has them all."""
        work = self.queues[name][0]
        if isinstance(work, Flush | Reset):
            return None
        uses, grant, mine = self.suite[work], self.grants[work], self.leases.entries[name]
        self.keep(name, [*nodes_of(uses.planned.nodeid)])
        within = any(uses.held.get(each) == "lease" for each in self.held[name])
        if grant is not None and not within and not self.has_lease(name):
            size = 0 if grant.size is None else grant.size + CONTEXT
            claim = Claim(0, size, exclusive=grant.alone or grant.size is None)
            return self.leases.request(name, None, claim)
        fixture = next((fixture for fixture in uses.held if fixture not in self.held[name]), None)
        if fixture is None or uses.held[fixture] != "lease":
            return fixture
        entry = mine.get(fixture)
        if entry is not None and entry.state == HELD:
            return fixture
        return self.leases.request(name, fixture, Claim(0, LEASE, exclusive=False))

    def has_lease(self, name: str) -> bool:
        """Return whether the test that a worker runs has its lease."""
        entry = self.leases.entries[name].get(None)
        return entry is not None and entry.state == HELD

    def ready(self) -> list[str]:
        """Return who can go on."""
        lacking = {name: self.lacks(name) for name, queue in self.queues.items() if queue}
        taken = {what for each in self.held.values() for what in each.values()} - {"", "lease"}
        asleep = [name for name, need in lacking.items() if not self.is_free(name, need, taken)]
        return [
            name
            for name, need in lacking.items()
            if name not in asleep
            or (isinstance(need, Entry) and self.leases.admits(need, {*asleep} - {name}))
        ]

    def is_free(self, name: str, need: Entry | WideFixture | None, taken: set[str]) -> bool:
        if need is None:
            return True
        if isinstance(need, Entry):
            return self.leases.admits(need)
        work = self.queues[name][0]
        assert isinstance(work, int)
        return self.suite[work].held[need] not in taken

    def go_on(self, name: str, *, oom: bool) -> None:
        need, work = self.lacks(name), self.queues[name][0]
        self.strikes = 0
        if isinstance(need, Entry):
            mine = self.leases.entries[name]
            owner = next(each for each, entry in mine.items() if entry == need)
            mine[owner] = need.turned(HELD)
        elif isinstance(work, Flush | Reset):
            self.queues[name].popleft()
            self.keep(name, [""] if isinstance(work, Flush) else [])
            self.planner.flushed(name)
        elif need is not None:
            self.held[name][need] = self.suite[work].held[need]
        else:
            self.queues[name].popleft()
            self.leases.entries[name].pop(None, None)
            planned = self.suite[work].planned
            if planned.gpu:
                self.planner.resident(name, CONTEXT)
            oom = oom and self.planner.retries(work)
            self.planner.finished(name, work, duration=planned.duration, peak=planned.peak, oom=oom)
            if not oom:
                self.passed.append(work)
        self.obey()

    def strike(self, name: str) -> None:
        self.strikes += 1
        assert self.strikes < 10, "nobody gives anything back"
        self.planner.stalled(name)
        self.obey()


def uses(nodeid: str, peak: int | None, *locks: WideFixture, duration: float = 1.0) -> Uses:
    """Return a test, with what each fixture holds: that of its name, such as a lock or a lease."""
    group = nodeid.partition("::")[0]
    planned = PlannedTest(nodeid, peak is not None, peak, duration, group, wide=locks)
    return Uses(planned, {lock: lock.name for lock in locks})


def workers_of(suite: list[Uses], count: int) -> Workers:
    planner = Planner(
        [uses.planned for uses in suite], {"card": TOTAL}, context=CONTEXT, headroom=HEADROOM
    )
    names = [f"w{number}" for number in range(count)]
    for name in names:
        planner.add_worker(name, ["card"])
    return Workers(suite, planner, names)


@given(suite=suites(), count=st.integers(1, 4), random=st.randoms(use_true_random=False))
def test_a_run_ends_whatever_wide_fixtures_exclude_one_another(suite, count, random) -> None:
    workers = workers_of(suite, count)
    while not workers.planner.done:
        ready, keeping = workers.ready(), workers.planner.keeping()
        assert ready or keeping, f"all wait: {workers.queues}, holding {workers.held}"
        # The clock strikes when nobody goes on, and sometimes because a test is merely slow.
        if ready and (not keeping or random.random() < 0.9):
            workers.go_on(random.choice(ready), oom=random.random() < 0.1)
        else:
            workers.strike(random.choice(keeping))
    assert sorted(workers.passed) == list(range(len(suite)))


LOCK, LEASED = WideFixture("", "lock"), WideFixture("b.py", "lease")


@pytest.mark.parametrize(
    "suite",
    [
        # Whose fixture waits for the card has the lock that the set-up of a test on it waits for.
        [uses("a.py::a", 60, LOCK), uses("b.py::b", None, LOCK, LEASED)],
        # Whose fixture has the card waits for the lock of whom a test waits for the card.
        [
            uses("b.py::b", None, LEASED, LOCK),
            uses("a.py::a", 20, LOCK),
            uses("a.py::c", 60, LOCK),
        ],
    ],
)
def test_a_test_keeps_the_card_from_nobody_while_it_sleeps(suite) -> None:
    for seed in range(30):
        workers = workers_of(suite, 2)
        random = Random(seed)  # noqa: S311  # not for secrets
        while not workers.planner.done:
            ready, keeping = workers.ready(), workers.planner.keeping()
            if ready:
                workers.go_on(random.choice(ready), oom=False)
            else:
                workers.strike(random.choice(keeping))
        assert sorted(workers.passed) == [*range(len(suite))]


@pytest.mark.parametrize("scope", ["", "a.py", "a.py::T"])
def test_an_idle_worker_gives_up_what_a_test_beside_it_waits_for(scope) -> None:
    # The first two do not fit together: the one waits for the card, the other for the lock.
    lock = WideFixture(scope, "lock")
    suite = [uses("a.py::T::a", 10, lock), uses("a.py::T::b", 60, lock)]
    suite += [uses("b.py::T::c", 60, WideFixture("b.py", "lock"))]
    workers = workers_of(suite, 2)
    while not workers.planner.done:
        ready = workers.ready()
        if ready:
            workers.go_on(ready[0], oom=False)
        else:
            workers.strike(workers.planner.keeping()[0])
    assert sorted(workers.passed) == [0, 1, 2]


def test_a_worker_is_stopped_as_soon_as_no_test_waits() -> None:
    suite = [uses(f"{path}::t", None, WideFixture(path, "lock")) for path in ("a.py", "b.py")]
    workers = workers_of(suite, 2)
    first, second = workers.queues
    workers.go_on(first, oom=False)
    assert workers.ready() == [first]
    workers.go_on(first, oom=False)
    assert workers.ready() == [second]


def test_nothing_is_set_up_twice_where_every_module_can_follow_what_a_worker_has() -> None:
    # Modules have fixtures of their own; those with longer tests use a model from the fifth on.
    model = WideFixture("", "model")
    suite = []
    for module in range(12):
        path, late = f"m{module}.py", module > 4 and module % 2
        held = [WideFixture(path, "data"), *[model] * late]
        suite += [uses(f"{path}::t{n}", None, *held, duration=1.0 + late) for n in range(4)]
    suite = [each._replace(held=dict.fromkeys(each.held, "")) for each in suite]
    workers, steps = workers_of(suite, 2), 0
    while not workers.planner.done:
        steps += 1
        workers.go_on(workers.ready()[steps % len(workers.ready())], oom=False)
    # One for each test, one for each module's fixture but for the last, which is shared, and one
    # in each worker for the model. To give a fixture back is a step, too.
    assert steps <= len(suite) + 12 + 1 + 2

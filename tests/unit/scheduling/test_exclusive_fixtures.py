"""Whatever wide fixtures exclude one another, a run that ends under plain xdist ends here.

Modelled are fixtures of session, module and class scope that each hold something of which there is
one, workers that block while they set one up, and the clock, which strikes when nobody goes on.
The suites are such that they end in whatever order plain xdist hands their tests out.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem.scheduling.estimates import PlannedTest
from pytest_gpumem.scheduling.planner import Command, Fail, Flush, Planner, Reset, Run, Stop

CONTEXT, HEADROOM, TOTAL = 10, 5, 100


class Uses(NamedTuple):
    """A test, and what its wide fixtures hold: their nodes and what each excludes others from."""

    planned: PlannedTest
    held: dict[str, str]


@st.composite
def suites(draw) -> list[Uses]:
    """Draw suites in which nobody waits for a wider fixture while it holds a narrower one."""
    found = []
    for module in range(draw(st.integers(1, 4))):
        group = f"m{module}.py"
        wide: dict[str, str] = {}
        if draw(st.booleans()):
            wide["session"] = "database"
        if draw(st.booleans()):
            wide[group] = draw(st.sampled_from(["lock", "port"]))
        for cls in range(draw(st.integers(1, 3))):
            held = dict(wide)
            if draw(st.booleans()):
                held[f"{group}::T{cls}"] = draw(st.sampled_from(["device", "lease"]))
            for number in range(draw(st.integers(1, 4))):
                on_gpu = draw(st.booleans())
                planned = PlannedTest(
                    f"{group}::T{cls}::t[{number}]",
                    on_gpu,
                    draw(st.sampled_from([None, 0, 20, 45, 80])) if on_gpu else None,
                    draw(st.sampled_from([0.001, 1.0, 30.0])),
                    group,
                    seen=draw(st.booleans()),
                )
                found.append(Uses(planned, held))
    return found


class Workers:
    """Does what a planner says, as far as no other worker holds what a fixture needs."""

    def __init__(self, suite: list[Uses], planner: Planner, names: list[str]) -> None:
        self.suite = suite
        self.planner = planner
        self.queues: dict[str, deque[int | Flush | Reset]] = {name: deque() for name in names}
        self.held: dict[str, dict[str, str]] = {name: {} for name in names}
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
        elif isinstance(command, Stop):
            assert not self.queues.pop(command.worker)
            self.held[command.worker].clear()
            self.planner.remove_worker(command.worker)
        else:
            self.queues[command.worker].append(command)

    def keep(self, name: str, nodes: tuple[str, ...]) -> None:
        """Tear down the fixtures of all other nodes."""
        self.held[name] = {node: what for node, what in self.held[name].items() if node in nodes}

    def lacks(self, name: str) -> str | None:
        """Return the first node whose fixtures the worker has to set up next, None if all stand."""
        work = self.queues[name][0]
        if isinstance(work, Flush | Reset):
            return None
        uses = self.suite[work]
        parts = uses.planned.nodeid.split("::")
        self.keep(name, ("session", parts[0], "::".join(parts[:2])))
        return next((node for node in uses.held if node not in self.held[name]), None)

    def ready(self) -> list[str]:
        """Return who can go on."""
        found = []
        lacking = {name: self.lacks(name) for name, queue in self.queues.items() if queue}
        taken = [what for each in self.held.values() for what in each.values()]
        for name, node in lacking.items():
            work = self.queues[name][0]
            if node is None or (isinstance(work, int) and self.suite[work].held[node] not in taken):
                found.append(name)
        return found

    def go_on(self, name: str, *, oom: bool) -> None:
        node, work = self.lacks(name), self.queues[name][0]
        self.strikes = 0
        if isinstance(work, Flush | Reset):
            self.queues[name].popleft()
            self.keep(name, ("session",) if isinstance(work, Flush) else ())
            self.planner.flushed(name)
        elif node is not None:
            self.held[name][node] = self.suite[work].held[node]
            return
        else:
            self.queues[name].popleft()
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


@pytest.mark.parametrize("scope", ["session", "a.py", "a.py::T"])
def test_an_idle_worker_gives_up_what_a_test_beside_it_waits_for(scope) -> None:
    def uses(nodeid: str, peak: int | None, **held: str) -> Uses:
        group = nodeid.partition("::")[0]
        return Uses(PlannedTest(nodeid, peak is not None, peak, 1.0, group), held)

    # The first two do not fit together: the one waits for the card, the other for the lock.
    node = {scope: "lock"}
    suite = [uses("a.py::T::a", 10, **node), uses("a.py::T::b", 60, **node)]
    suite += [uses("b.py::T::c", 60, **{"b.py": "lock"})]
    workers = workers_of(suite, 2)
    while not workers.planner.done:
        ready = workers.ready()
        if ready:
            workers.go_on(ready[0], oom=False)
        else:
            workers.strike(workers.planner.keeping()[0])
    assert sorted(workers.passed) == [0, 1, 2]


def test_a_worker_is_stopped_as_soon_as_no_test_waits() -> None:
    lock = {"a.py": "lock"}
    tests = [PlannedTest(f"{group}::t", False, None, 1.0, group) for group in ("a.py", "b.py")]
    workers = workers_of([Uses(tests[0], lock), Uses(tests[1], {"b.py": "lock"})], 2)
    first, second = workers.queues
    workers.go_on(first, oom=False)
    assert workers.ready() == [first]
    workers.go_on(first, oom=False)
    assert workers.ready() == [second]

"""Wide fixtures that keep an engine standing, in runs of simulated workers."""

from __future__ import annotations

import heapq
from collections import Counter
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_gpumem.scheduling.commands import Allotment, Fail, Flush, Reset, Run
from pytest_gpumem.scheduling.estimates import PlannedTest
from pytest_gpumem.scheduling.fixtures import WideFixture, nodes_of
from pytest_gpumem.scheduling.planner import Planner

CONTEXT, HEADROOM, TOTAL = 5, 5, 100


class Engine(NamedTuple):
    """A fixture that starts a process of so many bytes, its context included."""

    scope: str
    size: int

    def of(self, module: str) -> WideFixture:
        """Return it as a module's tests use it."""
        node = {"class": f"{module}::Test", "module": module, "session": ""}[self.scope]
        return WideFixture(node, "engine")


class Runs:
    """Workers that set up and tear down as pytest does, on a card that may run out of memory."""

    def __init__(
        self,
        tests: list[PlannedTest],
        sizes: dict[WideFixture, int],
        workers: int,
        leasing: tuple[str, ...] = (),
    ):
        self.tests, self.sizes, self.leasing = tests, sizes, leasing
        cards = {("", "card"): TOTAL}
        self.planner = Planner(tests, cards, context=CONTEXT, headroom=HEADROOM, leasing=leasing)
        self.standing: dict[str, dict[WideFixture, int]] = {}
        self.grants: list[Allotment] = []
        self.set_ups = self.now = 0
        self.ooms: Counter[int] = Counter()
        self.passed: Counter[int] = Counter()
        self.ends: list[tuple[int, int, str, int, bool]] = []
        for number in range(workers):
            self.standing[f"w{number}"] = {}
            self.planner.add_worker(f"w{number}", [("", "card")])

    def tell(self, worker: str) -> None:
        held = self.standing[worker]
        told = {each.name: size for each, size in held.items()}
        self.planner.resident(worker, sum(held.values()), ("", "card"), told)

    def begin(self, worker: str, test: int) -> None:
        nodes, held = set(nodes_of(self.tests[test].nodeid)), self.standing[worker]
        for each in [each for each in held if each.node not in nodes]:
            del held[each]
        self.tell(worker)
        oom = False
        for each in self.tests[test].wide:
            if each not in held and not oom:
                self.set_ups += 1
                held[each] = self.sizes[each]
                oom = sum(sum(each.values()) for each in self.standing.values()) > TOTAL
                if oom:
                    del held[each]
                else:  # as a worker tells when the set-up is over
                    self.tell(worker)
                    self.planner.stands(each.name, leases=bool(self.leasing and held[each]))
        heapq.heappush(self.ends, (self.now + 3 + test % 3, test, worker, test, oom))

    def end(self) -> None:
        self.now, _, worker, test, oom = heapq.heappop(self.ends)
        self.tell(worker)
        again = oom and self.planner.retries(test)
        fixtures = 0 if oom else sum(self.sizes[each] for each in self.tests[test].wide)
        self.ooms[test] += oom
        self.passed[test] += not oom
        self.planner.finished(worker, test, duration=1.0, peak=0, fixtures=fixtures, oom=again)

    def run(self) -> Runs:
        queues: dict[str, list[int]] = {name: [] for name in self.standing}
        while not self.planner.done:
            commands = self.planner.commands()
            assert commands or self.ends or any(queues.values()), "the planner is stuck"
            for command in commands:
                assert not isinstance(command, Fail)
                if isinstance(command, Run):
                    queues[command.worker].append(command.test)
                    self.grants += filter(None, [command.grant])
                elif isinstance(command, Flush | Reset):
                    held, flush = self.standing[command.worker], isinstance(command, Flush)
                    for each in [each for each in held if each.node or not flush]:
                        del held[each]
                    self.tell(command.worker)
                    self.planner.flushed(command.worker)
            busy = {worker for _, _, worker, _, _ in self.ends}
            for worker, queue in queues.items():
                if queue and worker not in busy:
                    self.begin(worker, queue.pop(0))
            if self.ends:
                self.end()
        return self


def suite(
    engine: Engine, *, mark: int | None, modules: int = 4, tests: int = 4, cpu: int = 4
) -> tuple[list[PlannedTest], dict[WideFixture, int]]:
    """Return modules of tests, the first ones of each with the engine."""
    planned, sizes = [], {}
    for module in (f"m{number}.py" for number in range(modules)):
        for number in range(tests + cpu):
            served = number < tests
            wide = (engine.of(module),) if served else ()
            sizes |= dict.fromkeys(wide, engine.size)
            planned.append(
                PlannedTest(
                    f"{module}::Test::test_{number}",
                    served and mark is not None,
                    mark if served else None,
                    1.0,
                    module,
                    marked=served and mark is not None,
                    seen=False,
                    wide=wide,
                )
            )
    return planned, sizes


USES = {"class": 4, "module": 4, "session": 1}


@pytest.mark.parametrize("scope", USES)
def test_marked_tests_of_a_large_engine_set_it_up_once_and_never_run_out_of_memory(
    scope: str,
) -> None:
    runs = Runs(*suite(Engine(scope, 70), mark=80), workers=4).run()
    assert runs.ooms.total() == 0
    assert runs.set_ups == USES[scope]
    # What stands is not asked for again.
    assert {grant.size for grant in runs.grants} == {80, 10 + CONTEXT}


@pytest.mark.parametrize("scope", ["class", "module", "session"])
def test_of_tests_of_an_engine_that_nobody_knows_only_the_first_ones_run_out_of_memory(
    scope: str,
) -> None:
    runs = Runs(*suite(Engine(scope, 70), mark=None), workers=4).run()
    assert set(runs.passed) == set(range(len(runs.tests)))
    assert max(runs.passed.values()) == 1
    assert runs.ooms.total() < 4  # all workers but one
    # Of those that ran out of memory, one may come back when its module is done.
    assert runs.set_ups - runs.ooms.total() <= USES[scope] + 1


@pytest.mark.parametrize("scope", ["class", "module", "session"])
def test_an_engine_whose_code_takes_a_lease_is_set_up_once_from_the_first_run_on(
    scope: str,
) -> None:
    runs = Runs(*suite(Engine(scope, 70), mark=None), workers=4, leasing=("engine",)).run()
    assert runs.ooms.total() == 0
    assert runs.set_ups == USES[scope]


@pytest.mark.parametrize("scope", ["class", "module", "session"])
@pytest.mark.parametrize("size", [0, 10])
def test_small_leases_and_those_that_are_not_taken_cost_no_time(scope: str, size: int) -> None:
    told, untold = (
        Runs(*suite(Engine(scope, size), mark=None, cpu=0), workers=4, leasing=leasing).run()
        for leasing in [("engine",), ()]
    )
    assert told.now <= untold.now + 5  # one test: here workers hear of a fixture as a test ends
    assert set(told.passed) == set(untold.passed)


@pytest.mark.parametrize("seen", [0, 3])
def test_who_waits_for_what_a_fixture_holds_goes_when_its_test_is_over(seen: int) -> None:
    fixture = WideFixture("", "engine")
    tests = [
        PlannedTest(f"{n}.py::t", False, None, 1.0, f"{n}.py", seen=False, wide=(fixture,))
        for n in range(3)
    ]
    planner = Planner(
        tests, {("", "card"): TOTAL}, context=CONTEXT, headroom=HEADROOM, leasing=("engine",)
    )
    for name in ("a", "b", "c"):
        planner.add_worker(name, [("", "card")])

    def given() -> list[int]:
        return sorted(each.test for each in planner.commands() if isinstance(each, Run))

    assert given() == [0]
    planner.resident("a", seen, ("", "card"), {"engine": seen} if seen else {})
    if seen:
        planner.stands("engine", leases=True)
    else:  # its set-up failed
        planner.finished("a", 0, duration=0.1, peak=0)
    assert given() == [1, 2]


def test_while_an_engine_starts_no_other_worker_is_sent_its_tests() -> None:
    fixture = WideFixture("", "engine")
    tests = [
        PlannedTest(f"{n}.py::t", False, None, 1.0, f"{n}.py", seen=False, wide=(fixture,))
        for n in range(3)
    ]
    planner = Planner(tests, {("", "card"): TOTAL}, context=CONTEXT, headroom=HEADROOM)
    planner.add_worker("a", [("", "card")])
    assert [each.test for each in planner.commands() if isinstance(each, Run)] == [0]
    planner.begins("a", "engine")
    planner.add_worker("b", [("", "card")])
    assert planner.commands() == []
    planner.resident("a", 70, ("", "card"), {"engine": 70})
    planner.stands("engine", leases=False)
    assert planner.commands() == []  # there is no room for a second one
    planner.finished("a", 0, duration=1.0, peak=0, fixtures=70)
    assert [each.worker for each in planner.commands() if isinstance(each, Run)] == ["a"]


def test_an_engine_that_outgrew_its_size_serves_on_beside_tests_that_fill_the_card() -> None:
    fixture = WideFixture("", "engine")
    tests = [
        PlannedTest(f"{n}.py::t", True, 0, 1.0, f"{n}.py", seen=True, wide=(fixture,), fixtures=70)
        for n in range(2)
    ]
    tests.append(PlannedTest("2.py::t", True, 15, 9.0, "2.py", seen=True))
    planner = Planner(tests, {("", "card"): TOTAL}, context=CONTEXT, headroom=HEADROOM)
    for name in ("a", "b"):
        planner.add_worker(name, [("", "card")])
    first = {each.test: each.worker for each in planner.commands() if isinstance(each, Run)}
    assert first.keys() == {0, 2}  # 75 and 20 of the 95 that are given out
    planner.resident(first[0], 78, ("", "card"), {"engine": 78})
    planner.finished(first[0], 0, duration=1.0, peak=0, fixtures=78)
    assert [(each.worker, each.test) for each in planner.commands() if isinstance(each, Run)] == [
        (first[0], 1)
    ]


@settings(deadline=None)
@given(st.data())
def test_no_test_whose_mark_holds_runs_out_of_memory(data: st.DataObject) -> None:
    scopes = st.sampled_from(["class", "module", "session"])
    planned, sizes = suite(
        Engine(data.draw(scopes), size := data.draw(st.integers(1, 80))),
        mark=data.draw(st.integers(size, 85)),
        modules=data.draw(st.integers(1, 4)),
        tests=data.draw(st.integers(1, 5)),
        cpu=data.draw(st.integers(0, 4)),
    )
    other = Engine(data.draw(scopes), data.draw(st.integers(1, 85 - size)))
    for at, test in enumerate(planned):
        if data.draw(st.booleans()):
            wide = WideFixture(other.of(test.group).node, "other")
            sizes[wide] = other.size
            planned[at] = test._replace(
                wide=(*test.wide, wide),
                gpu=True,
                marked=True,
                peak=other.size + (test.peak or 0),
            )
            if (planned[at].peak or 0) > TOTAL - CONTEXT - HEADROOM:
                planned[at] = test
    runs = Runs(planned, sizes, data.draw(st.integers(1, 4))).run()
    assert runs.ooms.total() == 0
    assert set(runs.passed) == set(range(len(planned)))


def test_what_a_fixture_of_the_session_holds_is_no_room_for_who_does_not_use_it() -> None:
    session, own = WideFixture("", "served"), WideFixture("b.py", "own")
    tests = [
        PlannedTest("a.py::a", True, 40, 1.0, "a.py", marked=True, wide=(session,)),
        PlannedTest("b.py::b", True, 40, 1.0, "b.py", marked=True, wide=(own,)),
    ]
    runs = Runs(tests, {session: 40, own: 40}, workers=1).run()
    assert [grant.size for grant in runs.grants] == [40, 40]


def test_while_fixtures_make_way_for_a_tests_own_nobody_gets_their_room() -> None:
    tests = [
        PlannedTest(
            "a.py::a", True, 70, 9.0, "a.py", marked=True, wide=(WideFixture("a.py", "a"),)
        ),
        PlannedTest("b.py::b", True, 0, 5.0, "b.py", fixtures=70, wide=(WideFixture("b.py", "b"),)),
        PlannedTest("c.py::c", True, 60, 1.0, "c.py"),
    ]
    planner = Planner(tests, {("", "card"): TOTAL}, context=CONTEXT, headroom=HEADROOM)
    planner.add_worker("w0", [("", "card")])
    assert [command.test for command in planner.commands() if isinstance(command, Run)] == [0]
    planner.resident("w0", 75, ("", "card"), {"a": 70})
    planner.finished("w0", 0, duration=1.0, peak=0, fixtures=70)
    assert [command.test for command in planner.commands() if isinstance(command, Run)] == [1]
    planner.add_worker("w1", [("", "card")])
    planner.resident("w0", CONTEXT, ("", "card"), {})  # a is torn down, b is to be set up
    assert planner.commands() == []


def test_of_a_fixture_that_modules_set_up_in_sizes_of_their_own_each_is_taken_by_its_own() -> None:
    """A large one among them would have the others run alone, and be torn down for each other."""
    tests, sizes = [], {}
    for module in (f"m{number}.py" for number in range(12)):
        fixture = WideFixture(module, "engine")
        sizes[fixture] = 15 if sizes else 70
        for number in range(6):
            nodeid = f"{module}::test[{number}]"
            tests.append(PlannedTest(nodeid, False, None, 1.0, module, seen=False, wide=(fixture,)))
    runs = Runs(tests, sizes, workers=4).run()
    assert runs.set_ups <= 2 * 12 + 4  # a scout of each, the module, one that ran out of memory
    assert set(runs.passed) == set(range(len(tests)))

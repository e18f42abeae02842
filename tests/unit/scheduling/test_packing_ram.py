"""Main memory as the planner packs it: never more than there is, everything ends."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem.scheduling.commands import Fail, Flush, Replace, Reset, Run, Stop
from pytest_gpumem.scheduling.estimates import PlannedTest, planned_tests
from pytest_gpumem.scheduling.history import Expectation
from pytest_gpumem.scheduling.planner import Planner
from pytest_gpumem.scheduling.ram import WORTH_A_LEASE, run_time

CARD, CONTEXT, ROOM = 100, 10, 1000


def planned(name: str, ram: int, group: str = "m.py", **more: object) -> PlannedTest:
    return PlannedTest(f"{group}::{name}", False, None, 1.0, group, ram=ram)._replace(**more)


class Suite:
    """Workers that obey a planner and end tests as they are told to, with what runs now."""

    def __init__(self, tests, workers=2, rooms=None, hosts=1):
        self.tests = tests
        self.rooms = {f"h{host}": ROOM for host in range(hosts)} if rooms is None else rooms
        self.planner = Planner(tests, {"card": CARD}, context=CONTEXT, headroom=5, rooms=self.rooms)
        self.queues: dict[str, list[int]] = {}
        self.hosts: dict[str, str] = {}
        self.grown: Counter[str] = Counter()
        self.log: list[object] = []
        self.started: Counter[int] = Counter()
        self.hosted = hosts
        for _ in range(workers):
            self.hire()

    def hire(self, host=None):
        name = f"w{len(self.hosts)}"
        self.hosts[name] = host or f"h{len(self.hosts) % self.hosted}"
        self.queues[name] = []
        self.planner.add_worker(name, ["card"], self.hosts[name])

    def obey(self):
        told = self.planner.commands()
        self.log += told
        for command in told:
            match command:
                case Run(name, test):
                    self.queues[name].append(test)
                    self.started[test] += 1
                    self.check(name)
                case Flush(name) | Reset(name):
                    self.planner.flushed(name)
                case Replace(name):
                    assert not self.queues[name]
                    self.leave(name)
                    self.hire(self.hosts[name])
                case Stop(name):
                    assert not self.queues[name]
                case Fail():
                    raise AssertionError(command)
        if any(isinstance(command, Replace) for command in told):
            self.obey()  # there is a new worker

    def leave(self, name):
        del self.queues[name]
        self.grown.pop(name, None)
        return self.planner.remove_worker(name)

    def busy(self):
        return sorted(name for name, queue in self.queues.items() if queue)

    def finish(self, name):
        test = self.queues[name].pop(0)
        self.planner.finished(name, test, duration=1.0, peak=self.tests[test].peak or 0)

    def to_the_end(self):
        for _ in range(30 * len(self.tests) + 30):
            self.obey()
            if self.planner.done:
                return
            if busy := self.busy():
                self.finish(busy[0])
        raise AssertionError("it does not end")

    def running(self, host):
        return {
            name: self.tests[queue[0]].ram
            for name, queue in self.queues.items()
            if queue and self.hosts[name] == host
        }

    def check(self, name):
        """Never is more given than there is, unless no other test that is packed runs."""
        host = self.hosts[name]
        running = self.running(host)
        kept = sum(self.grown[each] for each in self.queues if self.hosts[each] == host)
        packs = [test for test in running.values() if test > self.small]
        if host in self.rooms and running[name] > self.small and len(packs) > 1:
            assert sum(running.values()) + kept <= self.rooms[host]

    @property
    def small(self):
        """Tests that take more are packed: none where all fitted as the run began."""
        small = self.planner._ram._small
        return float("inf") if small is None else small


def commands(tests, **more):
    run = Suite(tests, **more)
    run.to_the_end()
    return run.log


def test_two_that_do_not_fit_run_one_after_the_other_and_others_beside_them() -> None:
    run = Suite([planned("a", 700), planned("b", 600), planned("c", 10)])
    run.obey()
    assert run.running("h0") == {"w0": 700, "w1": 10}
    run.finish("w1")
    run.obey()
    assert not run.queues["w1"]
    run.finish("w0")
    run.obey()
    assert 600 in run.running("h0").values()
    run.finish(run.busy()[0])
    run.obey()
    assert run.planner.done


def test_what_workers_have_grown_by_is_not_there_for_tests() -> None:
    run = Suite([planned(str(number), 500) for number in range(6)], workers=3)
    run.obey()
    assert list(run.running("h0").values()) == [500, 500]
    run.grown["w0"] = 100
    run.planner.main_memory("w0", 100)
    run.finish("w0")
    run.obey()
    assert list(run.running("h0").values()) == [500]
    run.to_the_end()


def test_a_test_larger_than_the_room_runs_when_no_other_is_packed() -> None:
    run = Suite([planned("a", 5000), planned("b", 400), planned("c", 400), planned("d", 400)])
    run.obey()
    assert run.running("h0") == {"w0": 5000}
    run.finish("w0")
    run.obey()
    assert run.running("h0") == {"w0": 400, "w1": 400}
    run.to_the_end()


def test_each_host_has_its_own() -> None:
    run = Suite([planned(str(number), 800) for number in range(4)], workers=4, hosts=2)
    run.obey()
    assert run.running("h0") == {"w0": 800}
    assert run.running("h1") == {"w1": 800}
    run.to_the_end()


def test_a_gpu_test_waits_for_both() -> None:
    tests = [
        planned("c", 900),
        planned("g", 800, gpu=True, peak=20),
        planned("h", 0, gpu=True, peak=20),
    ]
    run = Suite(tests, workers=3)
    run.obey()
    first = run.running("h0")
    assert sorted(first.values()) in ([0, 800], [0, 900])
    run.to_the_end()
    assert run.started == {0: 1, 1: 1, 2: 1}


def test_what_crashes_gives_its_room_back() -> None:
    run = Suite([planned("a", 700), planned("b", 600)])
    run.obey()
    assert run.leave("w0") == 0
    run.obey()
    assert run.running("h0") == {"w1": 600}


def test_a_worker_that_is_too_large_is_replaced_when_its_module_is_done() -> None:
    tests = [planned(f"{m}{n}", 0, f"{m}.py", duration=1.0) for m in "abc" for n in range(3)]
    run = Suite(tests, workers=1)
    run.obey()
    run.planner.main_memory("w0", 10**9, too_large=True)
    for _ in range(3):
        assert not any(isinstance(each, Replace) for each in run.log)
        run.finish("w0")
        run.obey()
    replaced = run.log.index(Replace("w0"))
    assert {tests[each.test].group for each in run.log[:replaced]} == {"a.py"}
    run.to_the_end()
    # One for which nothing waits is not replaced.
    last = Suite(tests[:3], workers=1)
    last.obey()
    last.planner.main_memory("w0", 10**9, too_large=True)
    last.to_the_end()
    assert not any(isinstance(each, Replace) for each in last.log)


SMALL_SUITE = st.lists(
    st.builds(
        lambda ram, gpu, peak, group, seconds: planned(
            "t", ram, f"m{group}.py", gpu=gpu, peak=peak if gpu else None, duration=seconds
        ),
        st.sampled_from([0, 0, 1, 30, 200, 333, 500, 501, 999, 1000, 1001, 10**6]),
        st.sampled_from([False, False, True]),
        st.none() | st.integers(0, 60),
        st.integers(0, 2),
        st.sampled_from([0.001, 0.1, 1.0, 30.0]),
    ),
    min_size=1,
    max_size=20,
)


@given(
    tests=SMALL_SUITE,
    workers=st.integers(1, 5),
    hosts=st.integers(1, 2),
    data=st.data(),
)
def test_never_more_than_there_is_and_everything_ends(tests, workers, hosts, data) -> None:
    tests = [each._replace(nodeid=f"{each.nodeid}{n}") for n, each in enumerate(tests)]
    run = Suite(tests, workers=workers, hosts=hosts)
    run.obey()
    for _ in range(60 * len(tests)):
        if run.planner.done:
            break
        busy = run.busy()
        assert busy, "nobody runs, and not all is done"
        name = data.draw(st.sampled_from(busy))
        what = data.draw(st.sampled_from(["end", "end", "end", "grow", "crash"]))
        if what != "crash":
            run.finish(name)
            if what == "grow":
                run.grown[name] = grown = data.draw(st.sampled_from([0, 50, 400, 2000]))
                run.planner.main_memory(name, grown, too_large=grown > 1000)
        else:
            run.leave(name)
            run.hire(run.hosts[name])
        run.obey()
    assert run.planner.done
    assert set(run.started) == set(range(len(tests)))


@given(tests=SMALL_SUITE, workers=st.integers(1, 4))
def test_a_suite_that_all_fits_or_of_which_nothing_is_told_runs_as_before(tests, workers) -> None:
    tests = [each._replace(nodeid=f"{each.nodeid}{n}") for n, each in enumerate(tests)]
    without = commands([each._replace(ram=0) for each in tests], workers=workers)

    assert commands(tests, workers=workers, rooms={}) == without
    assert commands(tests, workers=workers, rooms={"h0": 10**9}) == without
    assert commands([each._replace(ram=0) for each in tests], workers=workers) == without


@pytest.mark.parametrize(
    ("told", "seen", "expected"), [((), 6, 7), (((0, 5),), 4, 5), (((0, 5),), 6, 6)]
)
def test_a_mark_counts_before_what_was_learned_unless_the_test_took_more(
    told, seen, expected
) -> None:
    def expect(_nodeid: str, _mark: int | None) -> Expectation:
        return Expectation(None, 1.0, "learned", gpu=False, ram=7, ram_seen=seen)

    (test,) = planned_tests(["a.py::x"], (), expect, most=10, any_card=False, rams=told)
    assert test.ram == expected
    assert not test.gpu


def test_what_a_worker_returned_of_another_module_does_not_keep_it_from_being_replaced() -> None:
    tests = [planned(f"{m}{n}", 0, f"{m}.py", duration=0.001) for m in "ab" for n in range(3)]
    run = Suite(tests, workers=1)
    run.obey()
    assert len(run.queues["w0"]) > 3
    for _ in range(3):
        run.finish("w0")
    run.planner.main_memory("w0", 10**9, too_large=True)
    while run.queues["w0"]:
        run.planner.returned("w0", [run.queues["w0"].pop(0)])
    run.obey()
    assert Replace("w0") in run.log


@given(
    tests=st.lists(st.tuples(st.integers(0, 100), st.integers(1, 9)), min_size=1, max_size=30),
    workers=st.integers(1, 8),
    room=st.integers(0, 300),
)
def test_a_modelled_run_keeps_all_workers_busy_as_far_as_main_memory_goes(tests, workers, room):
    total = sum(seconds for _, seconds in tests)
    longest = max(seconds for _, seconds in tests)
    time = run_time(tests, workers, room)

    assert max(total / workers, longest) - 1e-9 <= time <= total + 1e-9
    assert run_time(tests, workers, 10**6) == pytest.approx(max(total / workers, longest))
    assert run_time(tests, 1, room) == pytest.approx(total)


def test_tests_that_do_not_fit_at_once_run_one_after_another():
    assert run_time([(60, 5.0)] * 4, 4, 100) == 20.0
    # Small ones run beside them.
    assert run_time([(60, 5.0)] * 4 + [(0, 1.0)] * 20, 2, 100) == 20.0
    # Nothing is left for tests.
    assert run_time([(0, 1.0), (1, 1.0)], 2, 0) == 1.0


def test_what_takes_much_main_memory_is_run_with_what_to_lease_of_it():
    tests = [
        planned("small", WORTH_A_LEASE - 1),
        planned("large", WORTH_A_LEASE),
        PlannedTest("m.py::gpu", True, 20, 1.0, "m.py", seen=True, ram=2 * WORTH_A_LEASE),
    ]
    for rooms, leased in (
        ({"h0": 10 * WORTH_A_LEASE}, [0, WORTH_A_LEASE, 2 * WORTH_A_LEASE]),
        ({}, [0, 0, 0]),
    ):
        suite = Suite(tests, workers=1, rooms=rooms)
        suite.to_the_end()
        runs = {each.test: each.grant for each in suite.log if isinstance(each, Run)}
        assert [0 if runs[at] is None else runs[at].ram for at in range(3)] == leased
        assert runs[0] is None
        assert runs[2].cards == 1
        assert runs[1] is None or runs[1].cards == 0


def test_what_relatives_took_in_this_run_is_leased_for_tests_of_which_nothing_else_is_known():
    tests = [planned(f"t[{number}]", 0) for number in range(3)]
    tests += [planned("other", 0), planned("t[known]", 2 * WORTH_A_LEASE)]
    # Long enough that none is handed out ahead.
    tests = [each._replace(duration=60.0, seen=False) for each in tests]
    suite = Suite(tests, workers=1, rooms={"h0": 100 * WORTH_A_LEASE})
    took = {0: WORTH_A_LEASE, 1: WORTH_A_LEASE - 1}
    suite.obey()
    while not suite.planner.done:
        test = suite.queues["w0"].pop(0)
        suite.planner.finished("w0", test, duration=60.0, peak=0, ram=took.get(test, 0))
        suite.obey()
    runs = [each for each in suite.log if isinstance(each, Run)]
    leased = {each.test: 0 if each.grant is None else each.grant.ram for each in runs}

    likely = WORTH_A_LEASE * 130 // 100
    assert leased == {0: 0, 1: likely, 2: likely, 3: 0, 4: 2 * WORTH_A_LEASE}

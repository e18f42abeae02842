from __future__ import annotations

import itertools
from collections import Counter, defaultdict, deque

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from pytest_gpumem.admission import Claim, fits
from pytest_gpumem.scheduling import policy
from pytest_gpumem.scheduling.commands import Allotment, CardKey, Fail, Flush, Reset, Run, Stop
from pytest_gpumem.scheduling.estimates import PlannedTest
from pytest_gpumem.scheduling.fixtures import WideFixture
from pytest_gpumem.scheduling.history import family
from pytest_gpumem.scheduling.piles import Pile
from pytest_gpumem.scheduling.planner import Planner

CONTEXT, HEADROOM, TOTAL = 10, 5, 100


def cpu(name: str, duration: float = 1.0, group: str = "a.py") -> PlannedTest:
    return PlannedTest(f"{group}::{name}", False, None, duration, group)


def gpu(name: str, peak: int | None, duration: float = 1.0, group: str = "g.py") -> PlannedTest:
    return PlannedTest(f"{group}::{name}", True, peak, duration, group)


def planner_of(
    tests: list[PlannedTest],
    *,
    workers: int = 2,
    cards: int = 1,
    others: int = 0,
) -> Planner:
    uuids = [f"card{number}" for number in range(cards)]
    planner = Planner(
        tests,
        dict.fromkeys(uuids, TOTAL),
        context=CONTEXT,
        headroom=HEADROOM,
        others=dict.fromkeys(uuids, others),
    )
    for number in range(workers):
        first = number % cards
        planner.add_worker(f"w{number}", uuids[first:] + uuids[:first])
    return planner


def any_test(_: int) -> bool:
    return True


def runs(planner: Planner) -> list[tuple[str, int]]:
    """Return who is to run what now; nothing else is commanded."""
    return [command[:2] for command in planner.commands()]  # type: ignore[misc]


class Workers:
    """Does what a planner says; tests end in the order of their durations."""

    def __init__(self, tests: list[PlannedTest], planner: Planner) -> None:
        self.tests = tests
        self.planner = planner
        self.queues: dict[str, deque[tuple[float, int]]] = {}
        self.now = 0.0
        self.order: list[tuple[str, int]] = []
        self.other: list[object] = []
        self.peaks: dict[int, int] = {}

    def obey(self) -> list[object]:
        commands = list(self.planner.commands())
        for command in commands:
            if isinstance(command, Run):
                queue = self.queues.setdefault(command.worker, deque())
                begin = queue[-1][0] if queue else self.now
                queue.append((begin + self.tests[command.test].duration, command.test))
                self.order.append((command.worker, command.test))
            else:
                self.other.append(command)
                if isinstance(command, (Flush, Reset)):
                    self.planner.flushed(command.worker)
        return commands

    def finish(self, *, oom: bool = False, peak: int | None = None) -> int:
        busy = {name: queue for name, queue in self.queues.items() if queue}
        name = min(busy, key=lambda name: busy[name][0])
        self.now, test = busy[name].popleft()
        planned = self.tests[test]
        peak = peak if peak is not None else self.peaks.get(test, planned.peak)
        if peak is not None:
            self.planner.resident(name, CONTEXT)
        again = oom and self.planner.retries(test)
        self.planner.finished(name, test, duration=planned.duration, peak=peak, oom=again)
        return test

    def running(self) -> set[int]:
        return {queue[0][1] for queue in self.queues.values() if queue}

    def run(self) -> list[int]:
        for _ in range(20 * len(self.tests) + 20):
            self.obey()
            if self.planner.done:
                break
            if any(self.queues.values()):
                self.finish()
        assert self.planner.done
        return [test for _, test in self.order]


def test_gpu_tests_start_before_cpu_tests_and_the_longest_first() -> None:
    tests = [cpu("c"), gpu("short", 10, 1.0), cpu("d"), gpu("long", 10, 9.0)]
    workers = Workers(tests, planner_of(tests, workers=1))
    order = workers.run()
    assert order[:2] == [3, 1]


def test_gpu_tests_with_late_fixtures_come_after_cpu_tests_that_these_would_bar() -> None:
    late, tests = WideFixture("", "late"), []
    for number in range(8):
        group = f"m{number}.py"
        own = WideFixture(group, "own")
        for n in range(10):
            early, on_card = cpu(f"t{n}", group=group), gpu(f"t{n}", 10, group=group)
            tests.append(
                early._replace(wide=(own,)) if number < 6 else on_card._replace(wide=(own, late))
            )
    workers = Workers(tests, planner_of(tests, workers=2))
    workers.run()
    # Nobody had to give the late fixture back.
    assert all(isinstance(each, Stop) for each in workers.other)


def test_modules_whose_fixtures_hold_vram_do_not_take_turns() -> None:
    # Those that were slow, for the fixture was set up in them, do not go ahead of their modules.
    tests = [
        gpu(f"g{n}", 2, 0.5 if n % 4 else 6.0 + n, group)._replace(fixtures=60)
        for group in ("a.py", "b.py")
        for n in range(20)
    ]
    workers = Workers(tests, planner_of(tests, workers=2))
    order = [tests[test].group for test in workers.run()]
    # A worker that waits has half of a module for itself.
    assert sum(before != after for before, after in itertools.pairwise(order)) <= 2


def test_only_as_many_workers_open_a_context_as_shorten_the_run() -> None:
    few = [gpu(f"g{n}", 10) for n in range(10)] + [cpu(f"c{n}") for n in range(90)]
    workers = Workers(few, planner_of(few, workers=4))
    workers.run()
    assert len({worker for worker, test in workers.order if few[test].gpu}) == 1

    many = [gpu(f"g{n}", 10) for n in range(90)] + [cpu(f"c{n}") for n in range(10)]
    workers = Workers(many, planner_of(many, workers=4))
    workers.run()
    assert len({worker for worker, test in workers.order if many[test].gpu}) == 4


def test_contexts_that_would_leave_too_little_room_stay_closed() -> None:
    # Two contexts leave 75 bytes: the large tests run first, in the first context.
    tests = [gpu(f"g{n}", 5) for n in range(40)] + [gpu(f"big{n}", 80) for n in range(3)]
    workers = Workers(tests, planner_of(tests, workers=4))
    order = workers.run()
    assert order[:3] == [40, 41, 42]
    assert len({worker for worker, _ in workers.order}) > 1


def test_a_module_stays_with_its_worker() -> None:
    tests = [cpu(f"t{n}", group=f"m{m}.py") for m in range(20) for n in range(20)]
    workers = Workers(tests, planner_of(tests, workers=4))
    workers.run()
    homes: dict[str, set[str]] = {}
    for worker, test in workers.order:
        homes.setdefault(tests[test].group, set()).add(worker)
    assert sum(map(len, homes.values())) <= 20 * 1.5


def test_a_large_test_is_passed_by_a_limited_number_of_small_ones() -> None:
    small = [gpu(f"s{n}", 30, 1.0 + n % 7 / 10, group="g.py") for n in range(400)]
    tests = [*small[:100], gpu("large", 70, 1.0), *small[100:]]
    workers = Workers(tests, planner_of(tests, workers=2))
    order = workers.run()
    # Two workers get there after 200 tests; then so many may pass.
    assert order.index(100) <= 200 + policy.BACKFILL + 2


def test_cpu_tests_fill_the_wait_of_a_worker_whose_gpu_test_does_not_fit() -> None:
    tests = [gpu("a", 50, 9.0, "a.py"), gpu("b", 50, 9.0, "b.py")]
    tests += [cpu(f"c{n}", 1.0) for n in range(4)]
    workers = Workers(tests, planner_of(tests, workers=2))
    workers.obey()
    assert {tests[test].gpu for test in workers.running()} == {True, False}
    workers.run()


def test_an_idle_worker_is_held_while_a_test_waits_for_room_and_stopped_when_none_waits() -> None:
    tests = [gpu("a", 50, 9.0), gpu("b", 50, 9.0)]
    planner = planner_of(tests, workers=2)
    workers = Workers(tests, planner)
    assert [type(command) for command in workers.obey()] == [Run]
    workers.finish()
    assert Counter(map(type, workers.obey())) == {Run: 1, Stop: 1}
    workers.finish()
    assert [type(command) for command in workers.obey()] == [Stop]


def test_a_test_of_unknown_peak_runs_alone_and_its_peak_is_then_expected_of_its_family() -> None:
    tests = [gpu(f"t[{n}]", None) for n in range(6)]
    workers = Workers(tests, planner_of(tests, workers=3))
    workers.obey()
    assert workers.running() == {0}
    workers.finish(peak=20)
    workers.obey()
    # 20 times 1.3 beside 3 contexts: two tests fit.
    assert len(workers.running()) == 2


def test_a_test_out_of_memory_runs_once_more_and_alone() -> None:
    tests = [gpu(f"t{n}", 10, 1.0 + n) for n in range(4)]
    planner = planner_of(tests, workers=2)
    workers = Workers(tests, planner)
    workers.obey()
    assert len(workers.running()) == 2
    assert planner.retries(min(workers.running()))
    again = workers.finish(oom=True)
    beside = None
    while not planner.done:
        workers.obey()
        if again in workers.running():
            beside = workers.running() - {again}
        workers.finish(oom=True)
    assert beside == set()
    assert Counter(test for _, test in workers.order)[again] == 2


def test_a_retry_disturbed_by_a_test_never_seen_runs_again_when_no_such_test_is_left() -> None:
    tests = [gpu("g", None)] + [
        cpu(f"c{n}", 5.0, f"c{n}.py")._replace(seen=False) for n in range(6)
    ]
    planner = planner_of(tests, workers=2)
    workers = Workers(tests, planner)
    for attempt in range(2):
        workers.obey()
        assert 0 in workers.running()
        assert planner.retries(0), attempt
        workers.finish(oom=True)
    beside: set[int] = set()
    while not planner.done:
        workers.obey()
        if 0 in workers.running():
            beside |= workers.running() - {0}
            assert not planner.retries(0)
        workers.finish()
    assert beside == set()
    assert workers.order[-1][1] == 0
    assert [test for _, test in workers.order].count(0) == 3


def test_a_test_felled_out_of_memory_teaches_neither_its_peak_nor_its_time() -> None:
    tests = [gpu(f"a[{n}]", None, 10.0) for n in range(3)]
    planner = planner_of(tests, workers=1)
    for test in range(2):
        assert planner.commands() == [Run("w0", test, Allotment(None, 1, alone=True))]
        planner.finished("w0", test, duration=0.01, peak=5, felled=True)
    assert planner.commands() == [Run("w0", 2, Allotment(None, 1, alone=True))]
    assert planner._seen.pace(gpu=True) == 1.0


def test_a_retry_beside_tests_that_ran_before_is_the_last() -> None:
    tests = [gpu("g", None)] + [cpu(f"c{n}", 5.0) for n in range(6)]
    workers = Workers(tests, planner_of(tests, workers=2))
    workers.obey()
    workers.planner.resident("w1", CONTEXT + 30)
    workers.finish(oom=True)
    workers.planner.resident("w1", CONTEXT)
    workers.obey()
    assert len(workers.running()) == 2
    assert 0 in workers.running()
    assert not workers.planner.retries(0)


@pytest.mark.parametrize("test", [gpu("g", None), gpu("g", 50), cpu("c")])
@pytest.mark.parametrize(
    ("others", "kept", "again"), [(0, 0, False), (0, CONTEXT + 30, True), (20, 0, True)]
)
def test_only_what_was_not_alone_on_its_card_runs_again(test, others, kept, again) -> None:
    planner = planner_of([test], workers=2, others=others)
    (run,) = (each for each in planner.commands() if isinstance(each, Run))
    (neighbour,) = {"w0", "w1"} - {run.worker}
    planner.resident(neighbour, kept)
    assert planner.retries(0) == again

    planner.remove_worker(neighbour)  # before the report comes
    assert planner.retries(0) == again


@pytest.mark.parametrize("test", [gpu("late", 50), cpu("late")])
def test_what_was_beside_one_that_has_left_meanwhile_runs_again(test) -> None:
    planner = planner_of([gpu("early", 20), test], workers=2)
    given = {number: worker for worker, number in runs(planner)}
    planner.resident(given[0], CONTEXT)
    planner.finished(given[0], 0, duration=1.0, peak=20)
    assert planner.commands() == [Stop(given[0])]
    planner.remove_worker(given[0])
    assert planner.retries(1)
    planner.finished(given[1], 1, duration=1.0, peak=None, oom=True)
    assert [command[:2] for command in planner.commands()] == [(given[1], 1)]
    assert not planner.retries(1)


def test_no_estimate_is_larger_than_the_card() -> None:
    # 80 times 1.3 is more than the 85 bytes that a card can give; the test runs all the same.
    tests = [gpu("t[0]", None), gpu("t[1]", None)]
    workers = Workers(tests, planner_of(tests, workers=2))
    workers.peaks = {0: 80, 1: 80}
    assert workers.run() == [0, 1]
    assert [command for command in workers.other if isinstance(command, Fail)] == []


def test_tests_larger_than_the_room_beside_the_contexts_do_not_keep_others_from_packing() -> None:
    # Nothing is known. Four contexts leave 55 bytes: what is expected after the first large test
    # is more, and so many tests that run alone make the card drain.
    tests = [cpu(f"{name}[{n}]", group=f"{name}.py") for name in "tu" for n in range(8)]
    tests += [cpu(f"c{n}") for n in range(20)]
    tests += [cpu(f"s{m}[{n}]", group="s.py") for m in range(6) for n in range(6)]
    workers = Workers(tests, planner_of(tests, workers=4))
    sizes = {"t.py": 60, "u.py": 60, "s.py": 5}
    workers.peaks = {n: sizes[t.group] for n, t in enumerate(tests) if t.group in sizes}
    workers.run()
    assert workers.now <= 32.0  # 16 run alone; one after the other they would take 52


def test_a_test_on_two_cards_takes_only_those_of_its_workers_host() -> None:
    cards = [("a", "GPU-0"), ("b", "GPU-0"), ("b", "GPU-1")]
    planner = Planner(
        [gpu("pair", 10)._replace(cards=2)],
        dict.fromkeys(cards, TOTAL),
        context=CONTEXT,
        headroom=HEADROOM,
    )
    planner.add_worker("wa", cards[:1])
    planner.add_worker("wb", cards[1:])
    assert runs(planner) == [("wb", 0)]


def test_equal_uuids_on_two_hosts_are_two_cards() -> None:
    cards = [("a", "GPU-0"), ("b", "GPU-0")]
    tests = [gpu("one", 80), gpu("two", 80)]
    totals = dict.fromkeys(cards, TOTAL)
    planner = Planner(tests, totals, context=CONTEXT, headroom=HEADROOM)
    for name, card in zip("ab", cards, strict=True):
        planner.add_worker(name, [card])
    assert len(planner.commands()) == 2


def test_a_host_without_cards_runs_cpu_tests_and_gives_up_nothing_that_others_can_run() -> None:
    tests = [cpu("c"), gpu("g", 10), gpu("h", None)]
    planner = Planner(tests, {("b", "GPU"): TOTAL}, context=CONTEXT, headroom=HEADROOM)
    planner.add_worker("bare", [])
    planner.add_worker("b", [("b", "GPU")])
    commands = planner.commands()
    assert Run("bare", 0) in commands
    planner.remove_worker("b")
    planner.finished("bare", 0, duration=1.0, peak=None)
    assert planner.commands() == []
    planner.add_worker("again", [("b", "GPU")])
    assert [type(command) for command in planner.commands()] == [Run]


def test_what_tests_cannot_be_using_is_foreign() -> None:
    tests = [gpu(name, 20) for name in "abc"]
    planner = planner_of(tests, workers=2)
    assert runs(planner) == [("w0", 0), ("w1", 2)]
    planner.used("card0", 2 * CONTEXT + 40)
    planner.finished("w0", 0, duration=1.0, peak=20)
    assert runs(planner) == [("w0", 1)]  # it was all of the workers
    planner.used("card0", 2 * CONTEXT + 40 + 40)
    planner.finished("w1", 2, duration=1.0, peak=20)
    planner.requeue(0)
    assert runs(planner) == []
    planner.finished("w0", 1, duration=1.0, peak=20)
    (run,) = [each for each in planner.commands() if isinstance(each, Run)]  # the other may go
    worker, test = run[:2]
    assert test == 0
    planner.finished(worker, 0, duration=1.0, peak=20)
    planner.used("card0", 2 * CONTEXT + 75)
    for test in range(3):
        planner.requeue(test)
    # Nothing fits: one test is sent with its size, to wait for it as its lease does.
    ((worker, test, grant),) = planner.commands()
    assert (grant.size, grant.alone) == (20, True)
    # More room is used as soon as it is told of.
    planner.finished(worker, test, duration=1.0, peak=20)
    planner.used("card0", 2 * CONTEXT)
    ((_, _, grant),) = planner.commands()
    assert (grant.size, grant.alone) == (20, False)


def test_a_test_that_waits_for_other_programs_lets_smaller_ones_go_first() -> None:
    tests = [gpu("large", 60, 9.0), *(gpu(f"small{n}", 10) for n in range(6)), cpu("c")]
    assert Workers(tests, planner_of(tests, workers=1, others=30)).run()[-1] == 0


def test_what_others_use_is_not_told_by_a_card_that_a_worker_gives_something_back_of() -> None:
    tests = [gpu(name, 35) for name in "ab"]
    planner = planner_of(tests, others=30)
    planner.resident("w0", CONTEXT + 30)
    planner.resident("w1", CONTEXT + 30)
    assert {type(command) for command in planner.commands()} == {Flush}
    # The fixtures of both are gone already, which only the card tells as yet.
    planner.used("card0", 30 + 2 * CONTEXT)
    for worker in ("w0", "w1"):
        planner.resident(worker, CONTEXT)
        planner.flushed(worker)
    assert len(runs(planner)) == 1


def test_a_cpu_test_that_runs_out_of_memory_is_tried_again_as_a_gpu_test() -> None:
    tests = [cpu("c")]
    planner = planner_of(tests, workers=1, others=10)
    workers = Workers(tests, planner)
    workers.obey()
    workers.finish(oom=True)
    assert workers.run() == [0, 0]


def test_the_family_of_a_cpu_test_that_used_a_card_is_planned_as_gpu_tests() -> None:
    tests = [cpu(f"t[{n}]", 5.0) for n in range(6)]
    workers = Workers(tests, planner_of(tests, workers=2))
    workers.obey()
    workers.finish(peak=60)
    workers.finish(peak=60)
    for _ in range(4):
        workers.obey()
        assert len(workers.running()) == 1
        workers.finish(peak=60)
    assert workers.planner.done


def test_idle_workers_give_back_fixtures_module_first_before_a_test_runs_alone() -> None:
    tests = [gpu("a", 10, group="a.py"), gpu("b", 60, group="b.py")]
    planner = planner_of(tests, workers=1)
    seen = []
    assert runs(planner) == [("w0", 0)]
    planner.finished("w0", 0, duration=1.0, peak=10)
    assert runs(planner) == [("w0", 1)]
    planner.finished("w0", 1, duration=1.0, peak=60)
    planner.resident("w0", 90)
    planner.requeue(1)
    for _ in range(2):
        seen += planner.commands()
        assert not planner.done
        planner.flushed("w0")
    assert [type(command) for command in seen if command.worker == "w0"] == [Flush, Reset]
    # It gave nothing back; the test runs all the same, and tells itself whether it can.
    assert ("w0", 1) in runs(planner)


def test_a_test_is_not_sent_while_what_it_needs_is_being_given_back() -> None:
    planner = planner_of([gpu("a", 60, group="a.py"), gpu("b", 60, group="b.py")])
    assert runs(planner) == [("w0", 0)]
    planner.resident("w0", 70)
    planner.finished("w0", 0, duration=1.0, peak=60)
    for step in (Flush, Reset):
        assert planner.commands() == [step("w0")]
        planner.resident("w0", 70 if step is Flush else CONTEXT)
        planner.flushed("w0")
    assert Run("w0", 1, Allotment(60, 1, alone=False)) in planner.commands()


def test_a_test_on_two_cards_waits_for_what_is_given_back_on_the_other() -> None:
    tests = [gpu("a", 60, group="a.py"), gpu("b", 60, group="b.py"), gpu("wide", 80)]
    tests[2] = tests[2]._replace(cards=2, exclusive=True)
    planner = planner_of(tests, cards=2)
    assert sorted(runs(planner)) == [("w0", 0), ("w1", 1)]
    planner.resident("w1", 70)
    planner.finished("w1", 1, duration=1.0, peak=60)
    planner.finished("w0", 0, duration=1.0, peak=60)
    for step in (Flush, Reset):
        assert planner.commands() == [step("w1")]
        planner.resident("w1", 70 if step is Flush else CONTEXT)
        planner.flushed("w1")
    assert any(isinstance(each, Run) and each.test == 2 for each in planner.commands())


def given_back(planner: Planner, kept: dict[str, int]) -> list[str]:
    """Let workers do what they are told to give back; return who was told, in order."""
    told = []
    while commands := [each for each in planner.commands() if isinstance(each, Flush | Reset)]:
        for command in commands:
            told.append(command.worker)
            planner.resident(command.worker, kept[command.worker])
            planner.flushed(command.worker)
    return told


def test_what_stayed_when_all_was_given_back_is_not_asked_for_again() -> None:
    planner = planner_of([gpu("a", 10), gpu("b", 80, group="b.py")], workers=1)
    assert runs(planner) == [("w0", 0)]
    planner.resident("w0", 30)
    planner.finished("w0", 0, duration=1.0, peak=10)
    assert given_back(planner, {"w0": 25}) == ["w0", "w0"]
    planner.finished("w0", 1, duration=1.0, peak=80)

    planner.requeue(1)
    assert runs(planner) == [("w0", 1)]
    planner.resident("w0", 40)
    planner.finished("w0", 1, duration=1.0, peak=80)
    planner.requeue(1)
    assert given_back(planner, {"w0": 25}) == ["w0"]
    assert not planner.done


@pytest.mark.parametrize(("gives", "asked"), [(20, 2), (5, 6)])
def test_no_more_workers_give_back_fixtures_than_the_waiting_test_needs(
    gives: int, asked: int
) -> None:
    tests = [gpu(f"t{n}", 5, group=f"{n}.py") for n in range(3)]
    planner = planner_of([*tests, gpu("large", 50, 0.5, group="large.py")], workers=3)
    assert [test for _, test in runs(planner)] == [0, 1, 2]
    kept = {"w0": 30, "w1": 30, "w2": 20}
    for name, size in kept.items():
        planner.resident(name, size)
    planner.finished("w0", 0, duration=1.0, peak=5)
    assert runs(planner) == []
    planner.finished("w1", 1, duration=1.0, peak=5)
    planner.finished("w2", 2, duration=1.0, peak=5)
    left = {name: max(CONTEXT, size - gives) for name, size in kept.items()}

    # 100 bytes less a headroom of 5 and the 80 that are kept leave 15: 35 are to come back.
    told = given_back(planner, left)
    assert len(told) == asked
    assert told[:2] == ["w0", "w1"]


def test_a_worker_that_ends_its_module_gives_nothing_back_for_tests_that_have_room() -> None:
    tests = [gpu("a", 10, group="m.py"), *(cpu(f"c{n}", group="m.py") for n in range(20))]
    planner = planner_of([*tests, gpu("b", 10, 0.5)], workers=1)
    assert runs(planner) == [("w0", 0)]
    planner.resident("w0", 30)
    planner.finished("w0", 0, duration=1.0, peak=10)

    ran = []
    while not planner.done:
        for name, test in runs(planner):
            ran.append(test)
            planner.finished(name, test, duration=1.0, peak=0)
    assert ran[-1] == 21


def test_a_test_is_granted_what_is_set_aside_for_it() -> None:
    tests = [gpu("a", 20), gpu("b", None, group="h.py"), cpu("c")]
    workers = Workers(tests, planner_of(tests, workers=1))
    grants = {}
    while not workers.planner.done:
        for command in workers.planner.commands():
            if isinstance(command, Run):
                grants[command.test] = command.grant
                workers.planner.finished(command.worker, command.test, duration=1.0, peak=20)
    assert grants == {0: Allotment(20, 1, alone=False), 1: Allotment(None, 1, alone=True), 2: None}


def test_room_for_fixtures_is_set_aside_where_they_are_not_set_up() -> None:
    tests = [gpu(f"t{n}", 20)._replace(fixtures=40) for n in range(2)]
    planner = planner_of(tests, workers=1)
    (first,) = planner.commands()
    assert isinstance(first, Run)
    assert first.grant == Allotment(60, 1, alone=False)
    planner.resident("w0", CONTEXT + 40, fixtures={"": 40})
    planner.finished("w0", first.test, duration=1.0, peak=20, fixtures=40)
    (second,) = planner.commands()
    assert isinstance(second, Run)
    assert second.grant == Allotment(20, 1, alone=False)


@pytest.mark.parametrize(
    ("kept", "standing", "asked"),
    [
        (0, 0, 60),
        (20, 0, 60),  # leaks: they stay beside the fixtures that are to come
        (30, 30, 30),  # another module's fixtures, which make way
        (45, 40, 20),
        (0, 40, 60),  # their models have been archived and come back
    ],
)
def test_only_fixtures_make_room_for_fixtures(kept: int, standing: int, asked: int) -> None:
    tests = [gpu("a", 5), gpu("b", 20, 0.5, group="h.py")._replace(fixtures=40)]
    planner = planner_of(tests, workers=1)
    assert runs(planner) == [("w0", 0)]
    planner.resident("w0", CONTEXT + kept, fixtures={"": standing})
    planner.finished("w0", 0, duration=1.0, peak=5)

    (second,) = planner.commands()
    assert isinstance(second, Run)
    assert second.grant == Allotment(asked, 1, alone=False)


def test_tests_that_fit_only_without_their_fixtures_do_not_run_together() -> None:
    tests = [gpu(f"t{n}", 10)._replace(fixtures=40) for n in range(2)]
    workers = Workers(tests, planner_of(tests, workers=2))
    workers.obey()
    assert len(workers.running()) == 1


def test_a_test_that_ran_out_of_memory_gets_the_room_of_idle_workers_fixtures() -> None:
    tests = [gpu("a", 10, 9.0), gpu("b", 10, group="h.py")]
    planner = planner_of(tests, workers=2)
    assert runs(planner) == [("w0", 0), ("w1", 1)]
    planner.resident("w1", 30)
    planner.finished("w1", 1, duration=1.0, peak=10)
    planner.finished("w0", 0, duration=1.0, peak=10, oom=True)
    given_back = []
    for _ in range(2):
        for command in planner.commands():
            assert isinstance(command, Flush | Reset)
            given_back.append(command.worker)
            planner.flushed(command.worker)
    assert given_back == ["w1", "w1"]
    assert [command.test for command in planner.commands() if isinstance(command, Run)] == [0]


def test_a_test_larger_than_any_card_fails_at_once_with_the_numbers() -> None:
    tests = [gpu("huge", 2**30), cpu("c"), gpu("pair", 5)._replace(cards=3)]
    workers = Workers(tests, planner_of(tests, cards=2))
    assert workers.run() == [1]
    failures = [command for command in workers.other if isinstance(command, Fail)]
    assert [failure.test for failure in failures] == [0, 2]
    assert "g.py::huge needs 1.00 GiB" in failures[0].why
    assert "the card that a worker uses first has 100 B at most" in failures[0].why


@pytest.mark.parametrize(
    ("rings", "count", "told"),
    [
        (["small"], 1, "the card that a worker uses first has 8 B at most"),
        (["small large", "large small"], 2, "each of the 2 cards that a worker uses first has 8 B"),
        (["small large", ""], 3, "needs 3 cards; no process that runs tests sees more than 2"),
        ([""], 1, "needs 1 card; no process that runs tests sees more than 0 cards"),
    ],
)
def test_a_test_that_can_never_run_is_told_what_workers_use(rings, count, told) -> None:
    test = gpu("a", 12)._replace(cards=count)
    cards = {("", "small"): 8, ("", "large"): 80}
    planner = Planner([test], cards, context=0, headroom=0)
    for number, ring in enumerate(rings):
        planner.add_worker(f"w{number}", [("", name) for name in ring.split()])

    (failure,) = (command for command in planner.commands() if isinstance(command, Fail))

    assert told in failure.why


def test_an_exclusive_test_shares_its_card_with_no_other_test() -> None:
    tests = [gpu(f"t{n}", 10, 1 + n) for n in range(6)]
    tests[3] = tests[3]._replace(exclusive=True)
    workers = Workers(tests, planner_of(tests, workers=3))
    while not workers.planner.done:
        workers.obey()
        assert 3 not in workers.running() or workers.running() == {3}
        workers.finish()


def test_a_test_on_two_cards_takes_room_on_both() -> None:
    tests = [gpu("pair", 60, 9.0)._replace(cards=2), gpu("a", 60), gpu("b", 60)]
    workers = Workers(tests, planner_of(tests, workers=2, cards=2))
    workers.obey()
    assert workers.running() == {0}
    workers.finish()
    workers.obey()
    assert workers.running() == {1, 2}


def test_a_test_on_two_cards_waits_for_an_exclusive_test_on_the_other() -> None:
    tests = [gpu("alone", 10, 9.0)._replace(exclusive=True), gpu("pair", 10)._replace(cards=2)]
    planner = planner_of(tests, workers=0, cards=2)
    planner.add_worker("w0", ["card0", "card1"])
    assert runs(planner) == [("w0", 1)]
    planner.finished("w0", 1, duration=1.0, peak=10)
    assert runs(planner) == [("w0", 0)]
    planner.requeue(1)
    planner.add_worker("w1", ["card1", "card0"])
    assert planner.commands() == []
    planner.finished("w0", 0, duration=1.0, peak=10)
    assert [command.test for command in planner.commands() if isinstance(command, Run)] == [1]


def test_a_test_too_large_beside_the_contexts_does_not_keep_the_card_waiting() -> None:
    # Two contexts leave 75 bytes, three 65. What its relatives took makes 68 be expected of x[2].
    tests = [gpu(f"g{n}", 10) for n in range(38)]
    tests += [gpu(f"x[{n}]", None, group="x.py") for n in range(3)]
    tests += [cpu(f"c{n}") for n in range(60)]
    workers = Workers(tests, planner_of(tests, workers=3))
    workers.peaks = {38: 30, 39: 52, 40: 52}
    order = workers.run()
    assert order.index(40) < len(tests) - 20


def test_tests_that_wait_for_what_workers_keep_do_not_let_the_others_run_one_by_one() -> None:
    tests = [gpu(f"t{n}", 10, group=f"m{n // 10}.py") for n in range(40)]
    planner = planner_of(tests, workers=3)
    workers = Workers(tests, planner)
    beside = []
    while not planner.done:
        workers.obey()
        if not workers.running():  # somebody gave something back
            continue
        beside.append(len(workers.running()))
        workers.finish(oom=len(beside) <= policy.DRAIN)
        for name in workers.queues:
            planner.resident(name, CONTEXT + 5)
    # At the end those that ran out of memory run alone.
    assert min(beside[:36]) == 3
    assert max(beside[-policy.DRAIN :]) == 1


def test_a_crashed_test_is_not_run_again_and_its_room_comes_back() -> None:
    tests = [gpu("a", 60, 9.0), gpu("b", 60)]
    planner = planner_of(tests, workers=2)
    assert runs(planner) == [("w0", 0)]
    assert planner.remove_worker("w0") == 0
    assert runs(planner) == [("w1", 1)]
    planner.finished("w1", 1, duration=1.0, peak=60)
    assert planner.done
    assert planner.commands() == [Stop("w1")]


def test_tests_handed_out_ahead_go_to_others_when_their_worker_crashes() -> None:
    tests = [cpu(f"c{n}", 0.001) for n in range(20)]
    planner = planner_of(tests, workers=1)
    first = planner.commands()
    assert len(first) > 1
    assert planner.remove_worker("w0") == 0
    planner.add_worker("w1", ["card0"])
    workers = Workers(tests, planner)
    assert sorted(workers.run()) == list(range(1, 20))


def test_a_test_put_back_into_what_a_worker_has_handed_out_is_found_by_others() -> None:
    pile = Pile([cpu("a"), cpu("b")], late={})
    pile.fill([0], long=9.0)
    portion = pile.adopt("a.py", None, suits=any_test)
    assert portion is not None
    pile.take(portion, 0)
    assert pile.adopt("b.py", None, suits=any_test) is None
    pile.add(1)
    half = pile.adopt("b.py", None, suits=any_test)
    assert half is not None
    assert list(half.tests) == [1]


def test_tests_that_are_put_back_stand_where_they_stood_in_their_module() -> None:
    pile = Pile([cpu(f"t{n}") for n in range(6)], late={})
    pile.fill(range(6), long=9.0)
    portion = pile.adopt("a.py", None, suits=any_test)
    assert portion is not None
    for test in (0, 1, 3):
        pile.take(portion, test)
    for test in (3, 0, 1):
        pile.add(test)
    assert list(portion.tests) == [0, 1, 2, 3, 4, 5]


def test_what_is_extracted_is_looked_for_in_its_modules_alone_in_all_of_their_parts() -> None:
    modules = ("m0.py", "m1.py", "m2.py")
    tests = [cpu(f"t{n}", 2.0 if n in (4, 5, 7) else 1.0, modules[n // 4]) for n in range(12)]
    tests[6] = tests[6]._replace(duration=99.0)
    pile = Pile(tests, late={})
    pile.fill(range(12), long=9.0)
    for module in modules:
        assert pile.adopt(module, None, suits=any_test)
    half = pile.adopt("another.py", None, suits=any_test)
    assert half is not None
    assert half.group == "m1.py"
    asked: list[int] = []

    def suits(test: int) -> bool:
        asked.append(test)
        return test != 5

    assert pile.extract(["m1.py", "gone.py"], suits) == [4, 6, 7]
    assert sorted(asked) == [4, 5, 6, 7]
    assert len(pile) == 9
    assert pile.extract(["m1.py"], any_test) == [5]


def test_short_cpu_tests_are_handed_out_ahead_but_never_beside_a_gpu_test() -> None:
    tests = [gpu(f"g{n}", 10, 0.001) for n in range(5)] + [cpu(f"c{n}", 0.001) for n in range(50)]
    planner = planner_of(tests, workers=2)
    workers = Workers(tests, planner)
    ahead = 0
    while not planner.done:
        workers.obey()
        for queue in workers.queues.values():
            ahead = max(ahead, len(queue))
            assert len(queue) < 2 or not any(tests[test].gpu for _, test in queue)
        workers.finish()
    assert ahead > 1


def test_a_suite_of_short_tests_never_seen_before_is_handed_out_in_few_messages() -> None:
    tests = [cpu(f"c{n}", 1.0, f"m{n // 100}.py")._replace(seen=False) for n in range(2_000)]
    planner = planner_of(tests, workers=2)
    queues: dict[str, deque[int]] = {"w0": deque(), "w1": deque()}
    messages = ended = 0
    while not planner.done:
        given = [command[:2] for command in planner.commands() if isinstance(command, Run)]
        messages += len({worker for worker, _ in given})
        for worker, test in given:
            queues[worker].append(test)
        worker = f"w{ended % 2}" if all(queues.values()) else max(queues, key=queues.__getitem__)
        planner.finished(worker, queues[worker].popleft(), duration=0.001, peak=0)
        ended += 1
    assert messages < len(tests) / 10


def test_what_a_worker_returns_runs_where_it_belongs() -> None:
    tests = [cpu(f"x[{n}]", 0.001)._replace(seen=False) for n in range(20)]
    planner = planner_of(tests, workers=1)
    _, *ahead = runs(planner)
    assert len(ahead) > 1
    planner.resident("w0", CONTEXT)
    planner.finished("w0", 0, duration=0.001, peak=30)
    for worker, test in ahead:
        planner.returned(worker, [test])
    (command,) = planner.commands()
    assert isinstance(command, Run)
    assert command.grant is not None
    assert command.grant.size == 39
    workers = Workers(tests, planner)
    workers.queues["w0"] = deque([(0.0, command.test)])
    assert sorted([command.test, *workers.run()]) == list(range(1, 20))


@pytest.mark.parametrize(("workers", "crowded"), [(9, False), (10, True)])
def test_where_contexts_do_not_fit_never_seen_tests_beside_one_on_the_card_count_as_gpu_tests(
    workers: int, crowded: bool
) -> None:
    tests = [cpu(f"x{n}")._replace(seen=False) for n in range(3 * workers)]
    planner = planner_of(tests, workers=workers)
    running = deque(runs(planner))
    planner.resident("w0", CONTEXT)
    planner.finished(*running.popleft(), duration=1.0, peak=30)
    planner.finished(*running.popleft(), duration=1.0, peak=0)
    given = [command for command in planner.commands() if isinstance(command, Run)]
    assert {command.worker: command.grant is not None for command in given} == (
        {"w0": True} if crowded else {"w0": False, "w1": False}
    )
    running.extend(command[:2] for command in given)
    while running:
        planner.finished(*running.popleft(), duration=1.0, peak=0)
        running.extend(each[:2] for each in planner.commands() if isinstance(each, Run))
    assert planner.done


def test_commands_are_given_once() -> None:
    tests = [cpu("a"), cpu("b")]
    planner = planner_of(tests)
    assert len(planner.commands()) == 2
    assert planner.commands() == []


def test_the_same_reports_give_the_same_commands() -> None:
    tests = [gpu(f"g{n}", n % 50 or None, n % 5) for n in range(60)]
    tests += [cpu(f"c{n}", n % 3, f"m{n % 4}.py") for n in range(60)]
    runs = [Workers(tests, planner_of(tests, workers=3)) for _ in range(2)]
    assert runs[0].run() == runs[1].run()
    assert runs[0].order == runs[1].order


def test_a_run_without_tests_stops_its_workers() -> None:
    planner = planner_of([])
    assert planner.done
    assert planner.commands() == [Stop("w0"), Stop("w1")]


def generated(  # noqa: PLR0917  # hypothesis shows a call that can be pasted
    name: str,
    parameter: int,
    on_gpu: bool,
    peak: int | None,
    duration: float,
    group: int,
    cards: int,
    exclusive: bool,
    seen: bool,
    fixtures: int,
) -> PlannedTest:
    nodeid = f"m{group}.py::{name}[{parameter}]"
    if not on_gpu:
        return PlannedTest(nodeid, False, None, duration, f"m{group}.py", seen=seen)
    own = PlannedTest(nodeid, True, peak, duration, f"m{group}.py", cards, exclusive)
    return own._replace(fixtures=fixtures)


planned = st.builds(
    generated,
    st.sampled_from("abc"),
    st.integers(0, 3),
    st.booleans(),
    st.none() | st.integers(0, TOTAL + 10),
    st.sampled_from([0.0, 0.001, 0.1, 1.0, 30.0]),
    st.integers(0, 2),
    st.sampled_from([1, 1, 1, 2, 3]),
    st.sampled_from([False, False, False, True]),
    st.booleans(),
    st.sampled_from([0, 0, 5, 40]),
)
hosts = st.lists(st.lists(st.sampled_from([TOTAL, TOTAL, 60]), max_size=3), min_size=1, max_size=3)
"""The cards of each host; their UUIDs are the same everywhere."""


class Room(RuleBasedStateMachine):
    """Workers that obey a planner, end tests in any order, crash, grow and run out of memory."""

    @initialize(
        tests=st.lists(planned, max_size=25),
        hosts=hosts,
        workers=st.integers(1, 4),
        others=st.integers(0, 30),
    )
    def begin(self, tests, hosts, workers, others) -> None:
        self.tests = tests
        self.hosts = [
            [(f"host{host}", f"card{number}") for number in range(len(totals))]
            for host, totals in enumerate(hosts)
        ]
        self.totals: dict[CardKey, int] = {
            card: total
            for cards, totals in zip(self.hosts, hosts, strict=True)
            for card, total in zip(cards, totals, strict=True)
        }
        self.others = dict.fromkeys(self.totals, others)
        self.planner = Planner(
            tests,
            self.totals,
            context=CONTEXT,
            headroom=HEADROOM,
            others=self.others,
        )
        self.rings: dict[str, list[CardKey]] = {}
        self.queues: dict[str, list[int]] = {}
        self.resident: dict[tuple[str, CardKey], int] = {}
        self.given_back: Counter[str] = Counter()
        self.flushing: set[str] = set()
        self.stays: defaultdict[str, int] = defaultdict(lambda: CONTEXT)
        """What each cannot give back of its own card."""
        self.started: Counter[int] = Counter()
        self.ended: Counter[int] = Counter()
        self.ooms: Counter[int] = Counter()
        self.beside_unseen: set[int] = set()
        self.beside_gone: set[int] = set()
        self.stopped: set[str] = set()
        self.surprising: set[str] = set()
        self.grants: dict[int, int | None] = {}
        self.alone: set[int] = set()
        self.crashed: list[str] = []
        self.born = 0
        for _ in range(workers):
            self.hire()
        self.obey()

    def hire(self) -> None:
        cards = self.hosts[self.born % len(self.hosts)]
        first = self.born % max(1, len(cards))
        self.start(cards[first:] + cards[:first])

    def start(self, ring: list[CardKey]) -> None:
        name = f"w{self.born}"
        self.rings[name] = ring
        self.queues[name] = []
        self.born += 1
        self.planner.add_worker(name, ring)

    def cards_of(self, worker: str, test: int) -> list[CardKey]:
        return self.rings[worker][: self.tests[test].cards]

    def on_card(self, card: CardKey) -> dict[str, int]:
        """Return the GPU tests that run on a card, by worker."""
        return {
            worker: queue[0]
            for worker, queue in self.queues.items()
            if queue and queue[0] in self.grants and card in self.cards_of(worker, queue[0])
        }

    def on_gpu(self, test: int) -> bool:
        planned = self.tests[test]
        return planned.gpu or bool(self.ooms[test]) or family(planned.nodeid) in self.surprising

    def obey(self) -> None:
        nobody_asks = not self.planner.asking
        commands = self.planner.commands()
        assert not (nobody_asks and commands)
        for command in commands:
            if isinstance(command, Run):
                self.run(command.worker, command.test, command.grant)
            elif isinstance(command, Fail):
                self.ended[command.test] += 1
            elif isinstance(command, Stop):
                assert not self.queues[command.worker]
                self.stopped.add(command.worker)
            else:
                assert not self.queues[command.worker]
                assert command.worker not in self.flushing
                assert self.given_back[command.worker] == isinstance(command, Reset)
                self.given_back[command.worker] += 1
                self.flushing.add(command.worker)
        assert self.planner.commands() == []

    def run(self, worker: str, test: int, grant: Allotment | None) -> None:
        assert worker in self.queues
        assert worker not in self.stopped | self.flushing
        assert self.started[test] == self.ended[test] == self.ooms[test]
        # The planner may also guess so, from others of its module.
        on_gpu = self.on_gpu(test) or grant is not None
        if self.queues[worker]:
            assert not on_gpu
            assert self.queues[worker][0] not in self.grants
        elif on_gpu:
            assert grant is not None
            self.run_on_card(worker, test, grant)
        if not on_gpu and not self.tests[test].seen:
            # Whoever runs at the same time on this host cannot be sure to have been alone.
            self.beside_unseen |= {
                other for card in self.rings[worker] for other in self.on_card(card).values()
            }
        self.given_back[worker] = 0
        self.started[test] += 1
        self.queues[worker].append(test)

    def run_on_card(self, worker: str, test: int, grant: Allotment) -> None:
        cards = self.cards_of(worker, test)
        assert len(cards) == self.tests[test].cards
        for card in cards:
            self.check_room(worker, test, card, grant)
        for card in cards:
            self.resident[worker, card] = max(CONTEXT, self.resident.get((worker, card), 0))
        assert grant.cards == len(cards)
        if grant.size is None or self.tests[test].exclusive:
            assert grant.alone
        self.alone.discard(test)
        if grant.alone:
            assert not any(map(self.on_card, cards))
            self.alone.add(test)
        self.grants[test] = grant.size
        self.beside_unseen.discard(test)
        if any(
            not self.tests[other].seen
            for name, queue in self.queues.items()
            for other in queue
            if other not in self.grants and set(cards) & set(self.rings[name])
        ):
            self.beside_unseen.add(test)
        if self.ooms[test] > 1:
            assert test not in self.beside_unseen

    def check_room(self, worker: str, test: int, card: CardKey, grant: Allotment) -> None:
        running = self.on_card(card)
        if not running and not self.comes_back(card):
            return  # The card is its own; it may be a last resort.
        need = grant.size or 0
        assert grant.size is not None or not running
        if not need and not grant.alone and self.resident.get((worker, card), 0) >= CONTEXT:
            return  # It takes no more than the worker keeps anyway.
        claims = [
            Claim(size, self.granted(name, card), self.is_exclusive(running.get(name)))
            for (name, place), size in self.resident.items()
            if place == card and name != worker
        ]
        own = max(CONTEXT, self.resident.get((worker, card), 0))
        new = Claim(own, need, grant.alone)
        assert fits(self.totals[card], self.others[card], HEADROOM, claims, new)

    def comes_back(self, card: CardKey) -> bool:
        """Return whether a worker is giving back what it keeps of its card."""
        return any(
            self.resident.get((worker, card), 0) > self.stays[worker]
            for worker in self.flushing
            if self.rings[worker][:1] == [card]
        )

    def granted(self, worker: str, card: CardKey) -> int:
        test = self.on_card(card).get(worker)
        return 0 if test is None else self.grants[test] or 0

    def is_exclusive(self, test: int | None) -> bool:
        return test in self.alone

    def busy(self) -> list[str]:
        return [worker for worker, queue in self.queues.items() if queue]

    @precondition(lambda self: self.busy())
    @rule(
        data=st.data(),
        oom=st.sampled_from([False, False, True]),
        peak=st.none() | st.integers(0, TOTAL),
        fixtures=st.sampled_from([0, 20]),
        duration=st.floats(0, 100),
    )
    def finish(self, data, oom, peak, duration, fixtures) -> None:
        worker = data.draw(st.sampled_from(self.busy()))
        test = self.queues[worker].pop(0)
        again = self.planner.retries(test)
        if self.ooms[test]:
            assert again <= (test in self.beside_unseen)
            assert again or test not in self.beside_unseen or not self.may_move()
        else:
            self.check_first_retry(worker, test, again)
        self.beside_gone.discard(test)
        self.ended[test] += 1
        self.grants.pop(test, None)
        if ((oom and again) or peak) and not self.tests[test].gpu:
            self.surprising.add(family(self.tests[test].nodeid))
        self.ooms[test] += oom and again
        self.planner.finished(
            worker, test, duration=duration, peak=peak, fixtures=fixtures, oom=oom and again
        )
        self.obey()

    def may_move(self) -> bool:
        """Return whether a worker is sure to be left that has a card for any test."""
        seen = [self.totals[ring[0]] for ring in self.rings.values() if ring]
        return not self.stopped and max(seen, default=0) == TOTAL

    def check_first_retry(self, worker: str, test: int, again: bool) -> None:
        """A test runs again if others are on its cards, and only if somebody else is there."""
        cards = self.cards_of(worker, test) if test in self.grants else self.rings[worker]
        neighbours = {
            other
            for other, ring in self.rings.items()
            if other != worker and set(ring) & set(cards)
        }
        if self.may_move() and any(set(self.on_card(card)) - {worker} for card in cards):
            assert again
        if (
            not neighbours
            and test not in self.beside_gone
            and not any(self.others[card] for card in cards)
        ):
            assert not again

    @precondition(lambda self: self.queues)
    @rule(data=st.data())
    def crash(self, data) -> None:
        worker = data.draw(st.sampled_from(list(self.queues)))
        queue = self.queues.pop(worker)
        self.crashed.append(worker)
        crashed = self.planner.remove_worker(worker)
        assert crashed == (queue[0] if queue else None)
        if queue:
            self.ended[queue[0]] += 1
            self.grants.pop(queue[0], None)
            for test in queue[1:]:
                self.started[test] -= 1
        self.flushing.discard(worker)
        self.resident = {key: size for key, size in self.resident.items() if key[0] != worker}
        self.obey()

    @precondition(lambda self: self.crashed)
    @rule()
    def replace(self) -> None:
        self.start(self.rings[self.crashed.pop()])
        self.obey()

    @precondition(lambda self: self.queues and self.totals)
    @rule(data=st.data(), size=st.integers(0, TOTAL), fixtures=st.integers(0, TOTAL))
    def grow(self, data, size, fixtures) -> None:
        worker = data.draw(st.sampled_from(list(self.queues)))
        if self.rings[worker]:
            card = data.draw(st.sampled_from(self.rings[worker]))
            self.resident[worker, card] = size
            if card == self.rings[worker][0]:
                self.stays[worker] = max(CONTEXT, min(self.stays[worker], size))
            self.planner.resident(worker, size, card, {"": fixtures})
            self.obey()

    @precondition(lambda self: self.totals)
    @rule(data=st.data(), size=st.integers(0, TOTAL))
    def others_grow(self, data, size) -> None:
        card = data.draw(st.sampled_from(list(self.totals)))
        self.others[card] = size
        self.planner.foreign(card, size)
        self.obey()

    @precondition(lambda self: self.totals)
    @rule(data=st.data(), size=st.integers(0, 2 * TOTAL))
    def a_worker_reads_what_is_used(self, data, size) -> None:
        card = data.draw(st.sampled_from(list(self.totals)))
        # What each worker uses at least, and at most; between them the figure before holds.
        least = most = 0
        for name, ring in self.rings.items():
            if name not in self.queues or card not in ring:
                continue
            kept, queue = self.resident.get((name, card), 0), self.queues[name]
            least += 0 if name in self.flushing else kept
            unseen = any(not self.tests[test].seen for test in queue if test not in self.grants)
            unknown = unseen and not self.grants.keys() & set(queue)
            whole = unknown or self.is_exclusive(self.on_card(card).get(name))
            granted = self.totals[card] if whole else kept + self.granted(name, card)
            most += max(kept, min(granted, self.totals[card]))
        self.others[card] = max(0, min(max(self.others[card], size - most), size - least))
        self.planner.used(card, size)
        self.obey()

    @precondition(lambda self: self.flushing)
    @rule(data=st.data())
    def give_back(self, data) -> None:
        worker = data.draw(st.sampled_from(sorted(self.flushing)))
        self.flushed(worker)
        self.obey()

    def flushed(self, worker: str) -> None:
        self.flushing.remove(worker)
        if self.given_back[worker] > 1 and self.rings[worker]:
            kept = self.resident.get((worker, self.rings[worker][0]), 0)
            self.stays[worker] = max(CONTEXT, kept)
        self.planner.flushed(worker)

    @precondition(lambda self: self.planner.keeping())
    @rule(data=st.data())
    def stall(self, data) -> None:
        worker = data.draw(st.sampled_from(sorted(self.planner.keeping())))
        assert worker in self.queues
        self.planner.stalled(worker)
        self.obey()

    @precondition(lambda self: self.leaving() and not self.planner.done)
    @rule(data=st.data())
    def leave(self, data) -> None:
        self.goes(data.draw(st.sampled_from(self.leaving())))

    def leaving(self) -> list[str]:
        return [worker for worker in self.queues if worker in self.stopped]

    def goes(self, worker: str) -> None:
        assert not self.queues.pop(worker)
        ring = self.rings.pop(worker)
        for name, queue in self.queues.items():
            self.beside_gone |= set(queue[:1]) if set(ring) & set(self.rings[name]) else set()
        assert self.planner.remove_worker(worker) is None
        self.resident = {key: size for key, size in self.resident.items() if key[0] != worker}
        self.obey()

    @invariant()
    def somebody_is_busy_until_all_is_done(self) -> None:
        if not self.crashed and not self.planner.done:
            assert self.busy() or self.flushing or self.leaving()

    @invariant()
    def is_done_when_every_test_has_ended(self) -> None:
        left = [test for test in range(len(self.tests)) if self.ended[test] < 1 + self.ooms[test]]
        assert self.planner.done == (not left)

    def teardown(self) -> None:
        if not hasattr(self, "planner"):
            return
        while self.crashed:
            self.replace()
        for _ in range(10 * len(self.tests) + 10):
            self.obey()
            for worker in self.leaving():
                self.goes(worker)
            for worker in sorted(self.flushing):
                self.flushed(worker)
            for worker in self.busy():
                test = self.queues[worker].pop(0)
                self.ended[test] += 1
                self.grants.pop(test, None)
                if self.tests[test].peak and not self.tests[test].gpu:
                    self.surprising.add(family(self.tests[test].nodeid))
                self.planner.finished(worker, test, duration=1.0, peak=self.tests[test].peak)
            self.obey()
            if self.planner.done:
                break
        assert self.planner.done
        for test in range(len(self.tests)):
            assert self.ended[test] == 1 + self.ooms[test]
        assert not self.busy()


Room.TestCase.settings = settings(
    # `make soak` asks for many more.
    max_examples=max(200, settings().max_examples),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestRoom = Room.TestCase


@pytest.mark.parametrize(("seen", "first"), [(False, "small.py"), (True, "large.py")])
def test_modules_that_nobody_has_run_go_smallest_first(seen: bool, first: str) -> None:
    tests = [
        cpu(f"t{number}", group=group)._replace(seen=seen)
        for group, count in (("large.py", 20), ("small.py", 4))
        for number in range(count)
    ]
    ((_, test),) = runs(planner_of(tests, workers=1))[:1]
    assert tests[test].group == first


def test_who_waits_for_a_scout_that_ran_out_of_memory_waits_for_its_next_attempt() -> None:
    tests = [gpu(f"g[{n}]", None) for n in range(3)] + [
        cpu(f"c{n}", 5.0, f"c{n}.py")._replace(seen=False) for n in range(6)
    ]
    workers = Workers(tests, planner_of(tests, workers=2))
    workers.peaks = {0: 90}
    for _ in range(2):
        workers.obey()
        assert 0 in workers.running()
        workers.finish(oom=True)
    order = workers.run()
    assert order.count(1) == order.count(2) == 1
    assert max(n for n, test in enumerate(order) if test == 0) < min(map(order.index, (1, 2)))

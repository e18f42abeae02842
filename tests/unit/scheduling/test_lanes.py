"""In which lane a test waits."""

from __future__ import annotations

import pytest

from pytest_gpumem.scheduling.backlog import Backlog, Lane
from pytest_gpumem.scheduling.cluster import Cluster
from pytest_gpumem.scheduling.estimates import Estimates, PlannedTest
from pytest_gpumem.scheduling.fixtures import SetUpOrder
from pytest_gpumem.scheduling.lanes import admit, lane_of, open_lanes, scout_ended
from pytest_gpumem.scheduling.ram import MainMemory
from pytest_gpumem.scheduling.state import State

CONTEXT, HEADROOM, TOTAL = 10, 5, 100
CPU = PlannedTest("m.py::c", False, None, 1.0, "m.py")
GPU = PlannedTest("m.py::g", True, 20, 1.0, "m.py")


def state_of(
    *tests: PlannedTest,
    workers: int = 2,
    rooms: dict[str, int] | None = None,
) -> State:
    seen, order = Estimates(tests, most=TOTAL), SetUpOrder(tests)
    cards = {("", "card0"): TOTAL, ("", "card1"): TOTAL}
    cluster = Cluster(tests, seen, cards, {}, context=CONTEXT, headroom=HEADROOM)
    for number in range(workers):
        cluster.join(f"w{number}", [*cards])
    backlog = Backlog(tests, seen, order.late_modules)
    ram = MainMemory(tests, rooms or {})
    return State(tests, seen, order, cluster, backlog, ram=ram)


@pytest.mark.parametrize(
    ("test", "ooms", "lane"),
    [
        (CPU, 0, Lane.CPU),
        (CPU, 1, Lane.ALONE),
        (CPU, 2, Lane.LAST),
        (GPU, 0, Lane.SHARED),
        (GPU, 1, Lane.ALONE),
        (GPU, 2, Lane.LAST),
        (GPU._replace(exclusive=True), 0, Lane.ALONE),
        (GPU._replace(cards=2), 0, Lane.WIDE),
        (GPU._replace(cards=2, exclusive=True), 0, Lane.ALONE),
        (GPU._replace(peak=None), 0, Lane.ALONE),
        (GPU._replace(peak=85), 0, Lane.SHARED),
        (GPU._replace(peak=86), 0, Lane.ALONE),
        (GPU._replace(peak=80, fixtures=6), 0, Lane.ALONE),
    ],
)
def test_what_is_known_of_a_test_decides_how_it_has_to_run(test, ooms, lane) -> None:
    state = state_of(test)
    state.seen.ooms.update([0] * ooms)
    assert lane_of(state, 0) is lane


@pytest.mark.parametrize(("workers", "lane"), [(9, Lane.CPU), (11, Lane.ALONE)])
def test_beside_one_that_used_a_card_a_test_never_seen_is_kept_where_contexts_fit(
    workers, lane
) -> None:
    unseen = CPU._replace(seen=False)
    state = state_of(CPU, unseen._replace(nodeid="m.py::other"), workers=workers)
    state.seen.used_card(0, 10)
    assert lane_of(state, 1) is lane


def test_a_family_waits_for_its_scout_and_for_the_next_one_if_it_told_nothing() -> None:
    state = state_of(*(GPU._replace(nodeid=f"m.py::g[{n}]", peak=None) for n in range(4)))
    for test in range(4):
        admit(state, test)
    alone = state.backlog.alone
    assert ([*alone.tests], state.backlog.families.work) == ([0], 3.0)

    alone.take(0, 1.0)
    scout_ended(state, "m.py::g")
    assert ([*alone.tests], state.backlog.families.work) == ([1], 2.0)

    state.seen.used_card(1, 10)
    scout_ended(state, "m.py::g")
    assert len(state.backlog.shared) == 2
    assert not state.backlog.families.scouts


def test_work_and_area_are_those_of_the_tests_that_wait_to_share() -> None:
    state = state_of(GPU, GPU._replace(cards=2, duration=3.0), GPU._replace(exclusive=True), CPU)
    for test in range(4):
        admit(state, test)
    assert (state.backlog.work, state.backlog.area) == (4.0, 80.0)
    state.backlog.take(state.backlog.wide, 1)
    state.backlog.take(state.backlog.alone, 2)
    assert (state.backlog.work, state.backlog.area) == (1.0, 20.0)


def in_ram(name: str, ram: int) -> PlannedTest:
    return CPU._replace(nodeid=f"m.py::{name}", ram=ram)


@pytest.mark.parametrize(
    ("rams", "workers", "packed"),
    [
        ([0, 0, 0], 2, []),
        ([40, 60, 5], 2, []),  # the two largest fit at once
        ([200], 1, []),  # one worker: nobody is beside it
        ([60, 60, 20, 20], 2, [60, 60]),  # two of 20 fit beside one of 60
        ([60, 60, 21], 2, [60, 60, 21]),
        ([500, 5, 5, 7], 2, [500, 7]),  # for one that never fits, seven eighths are reckoned
        ([100, 0, 0], 3, []),
        ([90, 20, 3], 3, [90, 20, 3]),  # what 3 would have set aside keeps 90 from 20
    ],
)
def test_tests_are_packed_where_setting_their_size_aside_for_each_worker_costs_time(
    rams, workers, packed
) -> None:
    tests = [in_ram(str(number), size) for number, size in enumerate(rams)]
    state = state_of(*tests, workers=workers, rooms={"": 100})
    open_lanes(state)

    assert [rams[test] for test in state.backlog.ram.tests] == packed
    assert len(state.backlog.cpu) == len(rams) - len(packed)
    for test, size in enumerate(rams):
        assert lane_of(state, test) is (Lane.RAM if size in packed else Lane.CPU)


def test_without_a_room_that_was_told_nothing_is_packed() -> None:
    state = state_of(in_ram("a", 500), in_ram("b", 500), rooms={"elsewhere": 100})
    open_lanes(state)

    assert not state.backlog.ram.tests

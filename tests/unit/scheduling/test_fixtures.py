"""Which wide fixtures may be set up beside which: as plain xdist could, and in no other order."""

from __future__ import annotations

import pytest

from pytest_gpumem.scheduling.estimates import PlannedTest
from pytest_gpumem.scheduling.fixtures import NOTHING, SetUpOrder, WideFixture, nodes_of, of_session

A, B = WideFixture("", "a"), WideFixture("", "b")
OF_M1, OF_M2 = WideFixture("m1.py", "m"), WideFixture("m2.py", "m")


def order_of(*tests: tuple[str, tuple[WideFixture, ...]]) -> SetUpOrder:
    return SetUpOrder(
        [
            PlannedTest(nodeid, False, None, 1.0, nodeid.split("::")[0], wide=wide)
            for nodeid, wide in tests
        ]
    )


ONE_AFTER_THE_OTHER = order_of(("m1.py::t", (A,)), ("m2.py::t", (B,)))
IN_TURNS = order_of(("m1.py::t", (A,)), ("m2.py::t", (B,)), ("m3.py::t", (A,)))
TOGETHER = order_of(("m1.py::t", (A,)), ("m1.py::u", (A, B)), ("m2.py::t", (B,)))
OF_A_MODULE = order_of(("m1.py::t", (OF_M1,)), ("m2.py::t", (A,)), ("m2.py::u", (OF_M2, A)))
ALL_THROUGH = order_of(("m1.py::t", (A, OF_M1)), ("m2.py::t", (A, OF_M2)))
FIRST_ALONE = order_of(("m1.py::t", (A, OF_M1)), ("m1.py::u", (OF_M1,)), ("m2.py::t", (A,)))
PARAMS = [WideFixture("", "a", number) for number in range(2)]
OF_PARAMETERS = order_of(("m1.py::t[0]", (PARAMS[0],)), ("m1.py::t[1]", (PARAMS[1],)))


@pytest.mark.parametrize(
    ("order", "ran", "next_one", "may"),
    [
        (ONE_AFTER_THE_OTHER, [0], 1, True),
        (ONE_AFTER_THE_OTHER, [1], 0, False),
        (IN_TURNS, [1], 0, True),  # plain xdist may set up the third's beside the second's
        (IN_TURNS, [2], 1, True),
        (TOGETHER, [1], 0, True),  # nothing to set up
        (TOGETHER, [2], 0, False),
        (TOGETHER, [2], 1, False),
        (OF_A_MODULE, [1], 0, False),  # the session's fixture, of a later test, outlives m2.py
        (OF_A_MODULE, [2], 1, True),
        (ALL_THROUGH, [1], 0, True),
        (FIRST_ALONE, [1], 0, False),  # it sets up the session's before the module's, as none later
        (FIRST_ALONE, [2, 1], 0, True),
        (FIRST_ALONE, [1], 2, True),  # the module's is torn down
        (OF_PARAMETERS, [1], 0, True),  # the one is torn down before the other is set up
    ],
)
def test_a_test_may_follow_what_plain_xdist_could_have_set_up(order, ran, next_one, may) -> None:
    before = NOTHING
    for test in ran:
        before = order.after(test, before)
    assert order.permits(next_one, before) == may


def test_fixtures_go_with_their_node() -> None:
    before = OF_A_MODULE.after(2, OF_A_MODULE.after(0, NOTHING))
    assert before == {A, OF_M2}
    assert of_session(before) == {A}


def test_where_no_fixture_comes_late_nothing_is_kept_in_mind() -> None:
    assert ALL_THROUGH.after(0, NOTHING) == NOTHING


@pytest.mark.parametrize(
    ("nodeid", "nodes"),
    [
        ("p/q/m.py::T::t[a/b::c]", ["", "p", "p/q", "p/q/m.py", "p/q/m.py::T"]),
        ("m.py::t", ["", "m.py"]),
        ("m.py", ["", "m.py"]),
    ],
)
def test_the_nodes_around_a_test_are_in_its_name(nodeid, nodes) -> None:
    assert [*nodes_of(nodeid)] == nodes

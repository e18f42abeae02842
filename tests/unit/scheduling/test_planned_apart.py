"""What is expected of tests that run in processes of their own."""

from __future__ import annotations

from pytest_gpumem.scheduling.estimates import Estimates, planned_tests
from pytest_gpumem.scheduling.history import History

CONTEXT = 50
NAMES = ["a.py::test_marked", "a.py::test_apart", "a.py::test_kin[0]", "a.py::test_kin[1]"]
WIDE = ([[], [("a.py", "model", None)]], [1, 1, 1, 1])


def test_a_process_of_its_own_costs_a_context_and_its_wide_fixtures_in_addition() -> None:
    tests = planned_tests(
        NAMES,
        [(0, 100, 1, False), (1, 100, 1, False)],
        History().expect,
        most=10_000,
        any_card=True,
        wide=WIDE,
        apart=(1, 3),
        context=CONTEXT,
    )
    estimates = Estimates(tests, most=10_000)

    assert [estimates.need(index) for index in range(4)] == [100, 150, None, None]
    estimates.stands({tests[0].wide[0].name: 30}, tests[0].wide)
    assert [estimates.whole(index) for index in (0, 1)] == [100, 150]
    assert [estimates.need(index) for index in (0, 1)] == [70, 150]  # the worker's own stand
    estimates.used_card(2, 40)
    kin = estimates.need(2)
    assert kin is not None
    assert estimates.need(3) == kin + CONTEXT


def test_no_estimate_of_a_test_with_its_own_context_is_more_than_a_card_has() -> None:
    most = 1000
    marks = [(0, 990, 1, False)]
    history = History()
    history.note(NAMES[1], 980, gpu=True, duration=1.0)
    tests = planned_tests(
        NAMES, marks, history.expect, most=most, any_card=True, apart=(0, 1, 3), context=CONTEXT
    )
    estimates = Estimates(tests, most=most)
    estimates.used_card(2, 990)

    assert [estimates.need(index) for index in range(4)] == [990 + CONTEXT, most, most, most]

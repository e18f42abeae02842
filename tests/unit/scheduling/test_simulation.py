"""The planner on simulated workers: what they take, keep and give back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem.scheduling.estimates import PlannedTest
from pytest_gpumem.scheduling.planner import Planner
from pytest_gpumem.scheduling.simulation import Actual, Machine, simulate


def run(tests, *, card=100, workers=1, context=10, headroom=0, marks=None, **fields):
    """Run tests, given as (module, seconds, peak, fixtures[, lasting]), each known as it is."""
    actual = [
        Actual(f"{module}::t{number}", module, bool(peak or held), seconds, peak, held, *lasting)
        for number, (module, seconds, peak, held, *lasting) in enumerate(tests)
    ]
    planned = [
        PlannedTest(
            each.nodeid, each.gpu, (marks or {}).get(number, each.peak), each.duration,
            each.module, fixtures=each.fixtures,
        )
        for number, each in enumerate(actual)
    ]  # fmt: skip
    return simulate(planned, actual, Machine(card, context, workers, headroom, **fields))


def test_tests_share_the_card_as_far_as_they_fit():
    tests = [("a", 1.0, 40, 0)] * 4

    assert run(tests).seconds == 4
    assert run(tests, workers=2).seconds == 2
    assert run(tests, workers=4).seconds == 2  # beside four contexts only one test has room
    assert run(tests, workers=4, context=0).seconds == 2
    assert run(tests, workers=4, card=200).seconds == 1


def test_a_worker_that_is_idle_beside_a_silent_test_gives_its_fixtures_back():
    tests = [("a", 1.0, 50, 40), ("b", 1.0, 50, 0), ("c", 2.0, 20, 0)]

    assert run(tests, workers=2, context=0).seconds == 3  # 4 where it keeps them


def test_a_test_larger_than_the_card_is_felled_or_refused():
    felled = run([("a", 1.0, 95, 0), ("a", 1.0, 5, 0)], marks={0: 80})
    refused = run([("a", 1.0, 95, 0), ("a", 1.0, 5, 0)])

    assert (felled.felled, felled.refused, felled.ended) == ((0,), (), (1,))
    assert felled.seconds == 1
    ((test, why),) = refused.refused
    assert (test, refused.felled) == (0, ())
    assert why.startswith("a::t0 needs 95 B; the card that a worker uses first has 100 B at most")


def test_fixtures_stay_until_their_module_is_over():
    tests = [("a", 1.0, 10, 60), ("a", 1.0, 10, 60), ("b", 1.0, 70, 0)]

    assert run(tests).felled == ()
    assert [test for test, _ in run(tests, card=79).refused] == [0, 1, 2]
    # A test larger than expected finds them in its module, and not in the next one.
    assert run([("a", 1.0, 10, 60), ("a", 1.0, 40, 1)], marks={1: 5}).felled == (1,)
    assert run([("a", 1.0, 10, 60), ("b", 1.0, 40, 1)], marks={1: 5}).felled == ()


def test_the_planner_is_told_what_real_workers_tell(monkeypatch):
    told = []

    def note(planner, name, size, fixtures):
        told.append((name, size, fixtures))
        resident(planner, name, size, fixtures=fixtures)

    resident = Planner.resident
    monkeypatch.setattr(Planner, "resident", note)
    # A fixture of 60 bytes, 40 of them the session's; a test without; one too large beside those.
    result = run([("a", 1.0, 10, 60, 40), ("b", 1.0, 10, 0), ("c", 1.0, 70, 0)])

    assert (result.ended, result.seconds) == ((0, 1, 2), 3)
    assert told == [
        ("0", 70, {"session": 40, "a": 20}),
        ("0", 50, {"session": 40}),  # before b takes memory, what was a's has gone
        ("0", 50, {"session": 40}),
        ("0", 50, {"session": 40}),  # asked to give back, once: it may keep the session's
        ("0", 10, {}),  # twice
        ("0", 10, {}),
        ("0", 10, {}),
    ]


def test_where_a_test_fails_can_be_said():
    assert run([("a", 2.0, 95, 0)], marks={0: 80}, oom_part=0.5).seconds == 1


@given(
    tests=st.lists(
        st.tuples(
            st.sampled_from("abc"), st.floats(0.1, 5.0), st.integers(0, 120), st.integers(0, 60)
        ),
        max_size=30,
    ),
    workers=st.integers(1, 5),
)
def test_every_test_ends_is_felled_or_is_refused_and_none_is_twice(tests, workers):
    result = run(tests, workers=workers)

    ran = [*result.ended, *result.felled, *(test for test, _ in result.refused)]
    assert sorted(ran) == list(range(len(tests)))
    done = [tests[test][1] for test in result.ended]
    assert sum(done) / workers - 1e-6 <= result.seconds <= sum(done) + 1e-6


def test_the_planner_is_never_stuck_without_a_word(monkeypatch):
    from pytest_gpumem.scheduling import simulation

    monkeypatch.setattr(simulation.Planner, "commands", lambda _: [])
    with pytest.raises(RuntimeError, match="stuck"):
        run([("a", 1.0, 1, 0)])

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem.admission import (
    Claim,
    bounds,
    fits,
    foreign,
    may_start,
    never_fits,
    room,
    spare,
    waits_in_vain,
)

SIZES = st.integers(0, 20)
CLAIMS = st.builds(Claim, SIZES, SIZES, st.booleans())
REQUESTS = st.builds(Claim, st.just(0), SIZES, st.booleans())
EXTRA = st.builds(Claim, st.just(0), SIZES, st.just(False))


def running(size):
    return Claim(0, size, exclusive=False)


@given(st.integers(0, 100), SIZES, SIZES, st.lists(CLAIMS), CLAIMS)
def test_what_fits_leaves_headroom_and_foreign_bytes_alone(total, others, headroom, claims, new):
    if fits(total, others, headroom, claims, new):
        assert room(total, others, headroom, [*claims, new]) >= 0


@given(st.integers(0, 100), st.lists(CLAIMS), CLAIMS)
def test_an_exclusive_claim_has_no_running_neighbour(total, claims, new):
    if fits(total, 0, 0, claims, new):
        for claim in claims:
            assert not (new.exclusive and (claim.extra or claim.exclusive))
            assert not (claim.exclusive and new.extra)


@given(st.integers(0, 100), SIZES, SIZES, st.lists(CLAIMS), CLAIMS)
def test_what_never_fits_does_not_fit_on_an_empty_card_and_so_on_no_other(
    total, others, headroom, claims, new
):
    assert never_fits(total, headroom, new) != fits(total, 0, headroom, [], new)
    if never_fits(total, headroom, new):
        assert not fits(total, others, headroom, claims, new)


@given(st.integers(0, 60), st.lists(SIZES, max_size=7))
def test_spare_is_what_no_combination_that_fits_reaches(capacity, sizes):
    sums = [
        sum(chosen)
        for count in range(len(sizes) + 1)
        for chosen in itertools.combinations(sizes, count)
    ]
    assert spare(capacity, sizes) == capacity - max(each for each in sums if each <= capacity)


def test_nothing_is_spare_when_there_are_too_many_combinations_to_count():
    sizes = [3**power for power in range(20)]
    assert spare(10**9, sizes) == 0
    # Where there is room for all, none has to be counted.
    assert spare(2**40, sizes) == 2**40 - sum(sizes)


def test_a_small_request_passes_a_big_one_that_it_cannot_delay():
    held, big = [running(60)], running(40)

    assert may_start(80, 0, 0, held, running(20), ahead=[big])
    # With 61 held beside it the big one fits as soon as the 60 are gone, with 21 more it fits not.
    assert not may_start(101, 0, 0, [running(60), running(20)], running(21), ahead=[running(61)])


def test_nobody_passes_a_request_for_the_whole_card():
    whole = Claim(0, 0, exclusive=True)

    assert not may_start(80, 0, 0, [running(10)], running(1), ahead=[whole])
    assert not may_start(80, 0, 0, [], whole, ahead=[running(10)])


def test_a_request_that_only_foreign_processes_keep_waiting_holds_nobody_up():
    assert may_start(80, 50, 0, [], running(30), ahead=[running(40)])
    assert not may_start(80, 0, 50, [], running(30), ahead=[running(40)])


def test_a_request_that_idle_processes_keep_waiting_runs_alone():
    idle, big = Claim(60, 0, exclusive=False), running(40)

    assert waits_in_vain(80, 0, 0, [idle], big, ahead=[])
    assert not waits_in_vain(80, 0, 0, [idle], running(20), ahead=[])
    assert waits_in_vain(80, 1, 0, [idle], running(20), ahead=[])
    assert not waits_in_vain(80, 0, 0, [idle, running(1)], big, ahead=[])
    assert not waits_in_vain(80, 0, 0, [idle], big, ahead=[running(1)])


IDLE, BUSY, WHOLE = Claim(5, 0, False), Claim(5, 9, False), Claim(5, 0, True)


@pytest.mark.parametrize(
    ("used", "ours", "before", "found"),
    [
        (60, [], 0, 60),
        (60, [(IDLE, None)], 0, 55),
        (60, [(IDLE, 5), (IDLE, 5)], 0, 50),
        # What a process really keeps may be less than it is taken for.
        (3, [(IDLE, None)], 0, 0),
        # A running test may use any part of its claim: what is not told is taken for its own,
        # as far as what was known before allows.
        (60, [(BUSY, None)], 0, 46),
        (60, [(BUSY, None)], 52, 52),
        (60, [(BUSY, None)], 99, 55),
        (60, [(WHOLE, None)], 0, 0),
        (60, [(WHOLE, None)], 40, 40),
        # The driver's figure decides, and what was known before does not.
        (60, [(BUSY, 7)], 99, 53),
        (60, [(WHOLE, 30)], 0, 30),
        # Out of the claim's bounds it is another process's, or more than was asked for.
        (60, [(BUSY, 50)], 0, 46),
        (60, [(BUSY, 1)], 0, 55),
    ],
)
def test_what_is_used_and_not_ours_is_foreign(used, ours, before, found):
    assert foreign(used, [bounds(claim, 100, told) for claim, told in ours], before) == found


@given(
    st.integers(0, 100),
    st.lists(st.tuples(CLAIMS, st.none() | SIZES), max_size=4),
    st.integers(0, 100),
    st.data(),
)
def test_what_is_found_is_possible_and_stays_found(others, ours, before, data):
    """Whatever each process uses within its claim, what is really foreign lies in the bounds."""
    uses, known = 0, []
    for claim, told in ours:
        least, most = bounds(claim, 100, told)
        uses += data.draw(st.integers(least, most))
        known.append((least, most))
    used = others + uses
    found = foreign(used, known, before)

    lowest, highest = (foreign(used, known, each) for each in (0, 10**6))
    assert lowest <= found <= highest
    assert lowest <= others <= highest
    assert foreign(used, known, others) == others
    assert foreign(used, known, found) == found
    if all(least == most for least, most in known):
        assert found == others


def strict(total, claims, new, ahead):
    """First come, first served, and no passing."""
    return not ahead and fits(total, 0, 0, claims, new)


def passing(total, claims, new, ahead):
    return may_start(total, 0, 0, claims, new, ahead=ahead)


def starts(rule, total, arrivals):
    """Return when each request starts; ``arrivals`` are (time, claim by card, duration)."""
    started, running_until = {}, {}
    for now in range(400):
        for index, (time, claims, duration) in enumerate(arrivals):
            held = [arrivals[each][1] for each, end in running_until.items() if end > now]
            ahead = [
                other
                for earlier, (time, other, _) in enumerate(arrivals[:index])
                if time <= now and earlier not in started
            ]
            if (
                time <= now
                and index not in started
                and all(
                    rule(total, on(card, held), claim, on(card, ahead))
                    for card, claim in claims.items()
                )
            ):
                started[index], running_until[index] = now, now + duration
    return started


def on(card, requests):
    return [claims[card] for claims in requests if card in claims]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 9),
            st.dictionaries(st.sampled_from("AB"), REQUESTS, min_size=1),
            st.integers(1, 9),
        ),
        max_size=9,
    ).map(lambda arrivals: sorted(arrivals, key=lambda each: each[0]))
)
def test_nobody_starts_later_than_first_come_first_served_on_one_card_or_two(arrivals):
    early = starts(passing, 20, arrivals)
    late = starts(strict, 20, arrivals)

    assert len(early) == len(arrivals)
    assert all(early[each] <= late[each] for each in late)

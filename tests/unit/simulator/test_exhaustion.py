from __future__ import annotations

import pytest

from pytest_gpumem.simulator.allocator import CachingAllocator, OutOfMemory
from pytest_gpumem.simulator.exhaustion import ENDLESS, Refusing

KIB = 1024


@pytest.fixture
def allocator(monkeypatch):
    """Return an allocator with all the room it wants, and what makes its third call fail."""
    refusing = Refusing(3)
    monkeypatch.setattr(CachingAllocator, "refusing", refusing)
    return CachingAllocator(lambda _: True, lambda _: None, 2**40), refusing


def test_one_allocation_fails_and_then_whoever_asks_for_as_much(allocator):
    card, refusing = allocator
    first, _ = card.malloc(4 * KIB), card.malloc(4 * KIB)
    for size in (8 * KIB, 8 * KIB, 16 * KIB):
        with pytest.raises(OutOfMemory):
            card.malloc(size)
    card.malloc(4 * KIB)
    with pytest.raises(OutOfMemory):
        card.malloc(4 * KIB)  # what is there now, and as much again, are what there was no room for
    card.free(first)
    card.malloc(4 * KIB)
    assert (refusing.counted, refusing.refused, refusing.endless) == (8, 4, False)
    assert card.stats()["num_ooms"] == 4


@pytest.mark.parametrize("at", [0, 7])
def test_what_is_not_reached_fails_nothing(allocator, at):
    card, refusing = allocator
    refusing.at = at
    for _ in range(5):
        card.malloc(KIB)
    assert (refusing.counted, refusing.refused) == (5, 0)


def test_other_devices_have_room(monkeypatch):
    monkeypatch.setattr(CachingAllocator, "refusing", Refusing(1))
    cards = [CachingAllocator(lambda _: True, lambda _: None, 2**40, at) for at in (0, 1)]
    with pytest.raises(OutOfMemory):
        cards[0].malloc(KIB)
    cards[1].malloc(KIB)


def test_who_tries_for_ever_is_let_in_at_last(allocator):
    card, refusing = allocator
    for turn in range(2 + ENDLESS):
        if turn < 2:
            card.malloc(KIB)
            continue
        with pytest.raises(OutOfMemory):
            card.malloc(8 * KIB)
    card.malloc(8 * KIB)
    assert (refusing.refused, refusing.endless) == (ENDLESS, True)


def test_who_asks_for_less_each_time_does_not_try_for_ever(allocator):
    card, refusing = allocator
    card.malloc(KIB)
    card.malloc(KIB)

    for power in range(ENDLESS + 5):
        try:
            card.malloc(2**40 >> power)
        except OutOfMemory:
            continue
    assert not refusing.endless


def test_meanwhile_nothing_counts(allocator):
    card, refusing = allocator
    with refusing.paused():
        for _ in range(5):
            card.malloc(KIB)
    assert refusing.counted == 0

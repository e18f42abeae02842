"""What a test took by itself is the same after any other tests, whatever is cached."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem import devices
from pytest_gpumem.devices import AllocatorReading
from pytest_gpumem.records import Card
from pytest_gpumem.simulator.allocator import CachingAllocator
from pytest_gpumem.tracking.tracker import Tracker

CARD = Card("GPU-1", "A card", 2**40)
MIB = 2**20


@pytest.fixture(scope="module", autouse=True)
def no_torch():
    """Keep the heap out of it, in which torch's tensors are looked for: other tests fill it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "torch", raising=False)
        yield


class Memory:
    """torch's allocator by its policy, on a card without end."""

    name = "caching"
    exact_peaks = True

    def __init__(self) -> None:
        self.blocks = CachingAllocator(lambda _: True, lambda _: None, CARD.total)

    def active(self) -> bool:
        return True

    def read(self) -> tuple[AllocatorReading, ...]:
        stats = self.blocks.stats()
        figures = [stats[f"{kind}_bytes"]["all"] for kind in ("allocated", "reserved", "requested")]
        plain = [figure[which] for figure in figures for which in ("current", "peak")]
        return (AllocatorReading(*plain[:4], 0, 0, *plain[4:]),)

    def card(self, index: int) -> Card:
        return CARD

    def reset_peak(self, index: int) -> None:
        self.blocks.reset_peak_stats()

    def release_cached(self) -> None:
        self.blocks.empty_cache()

    def settle(self) -> None:
        pass


@pytest.fixture
def memory(monkeypatch):
    memory = Memory()
    monkeypatch.setattr(devices, "allocators", lambda: (memory,))
    return memory


sizes = st.integers(1, 30 * MIB)
steps = st.lists(st.tuples(sizes, st.booleans()), min_size=1, max_size=6)
"""Of a test: what it takes, and whether it gives what it took last back before."""
suites = st.lists(st.tuples(steps, st.none() | sizes), min_size=1, max_size=8)
"""With each test's wider fixture, which is set up in the middle of it."""


def run(memory, tracker, name, steps, fixture):
    """Run a test; return what it took."""
    tracker.begin_test(name)
    held, given_back = [], []
    for number, (size, gives) in enumerate(steps):
        if gives and held:
            memory.blocks.free(held.pop())
        held.append(memory.blocks.malloc(size))
        if fixture is not None and number == len(steps) // 2:
            wide = tracker.begin_fixture("model", "module")
            given_back.append((wide, memory.blocks.malloc(fixture)))
            tracker.end_fixture(wide)
    for block in held:
        memory.blocks.free(block)
    for wide, block in given_back:
        tracker.begin_teardown(wide)
        memory.blocks.free(block)
    (card,) = tracker.end_test().cards
    return card.own, card.own_left


def expected(steps):
    held, most = [], 0
    for size, gives in steps:
        if gives and held:
            held.pop()
        held.append(size)
        most = max(most, sum(held))
    return most, 0


@given(suite=suites, order=st.randoms(use_true_random=False))
def test_no_order_changes_it(suite, order):
    with pytest.MonkeyPatch.context() as patch:
        memory = Memory()
        patch.setattr(devices, "allocators", lambda: (memory,))
        tracker = Tracker()
        tests = list(enumerate(suite))
        order.shuffle(tests)
        for number, (steps, fixture) in tests:
            assert run(memory, tracker, str(number), steps, fixture) == expected(steps)


def test_allocated_bytes_depend_on_what_is_cached(memory):
    tracker = Tracker()
    cached = run(memory, tracker, "a", [(3 * MIB, False)], None)
    first = tracker.begin_test("b") or memory.blocks.malloc(2 * MIB + 1)
    (card,) = tracker.end_test().cards

    assert cached == (3 * MIB, 0)
    assert (card.own, card.own_left) == (2 * MIB + 1, 2 * MIB + 1)
    assert card.peak - card.baseline > card.own
    memory.blocks.free(first)


def test_an_allocator_that_does_not_count_requests_is_taken_at_its_word(monkeypatch):
    readings = iter([AllocatorReading(0, 0, 0, 0, 0, 0), AllocatorReading(5, 9, 9, 9, 0, 0)])
    memory = Memory()
    reading = [next(readings)]
    monkeypatch.setattr(memory, "read", lambda: (reading[0],))
    monkeypatch.setattr(devices, "allocators", lambda: (memory,))
    tracker = Tracker()
    tracker.begin_test("a")
    reading[0] = next(readings)
    (card,) = tracker.end_test(judge=False).cards

    assert (card.own, card.own_left) == (9, 5)

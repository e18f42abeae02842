from __future__ import annotations

import gc

import pytest

from pytest_gpumem import devices
from pytest_gpumem.devices import AllocatorReading
from pytest_gpumem.records import Card
from pytest_gpumem.tracking import holders
from pytest_gpumem.tracking.meter import release_when_shared
from pytest_gpumem.tracking.tracker import Tracker

CARD = Card("GPU-1", "A card", 1000)


class FakeAllocator:
    """An allocator whose figures a test moves by hand."""

    name = "fake"
    exact_peaks = True

    def __init__(self) -> None:
        self.allocated = self.peak = self.reserved = self.ooms = 0
        self.released = self.settled = 0

    def take(self, size: int) -> None:
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        self.reserved = max(self.reserved, self.allocated)

    def give(self, size: int) -> None:
        self.allocated -= size

    def active(self) -> bool:
        return True

    def read(self) -> tuple[AllocatorReading, ...]:
        return (
            AllocatorReading(self.allocated, self.peak, self.reserved, self.reserved, 0, self.ooms),
        )

    def card(self, index: int) -> Card:
        return CARD

    def reset_peak(self, index: int) -> None:
        self.peak = self.allocated

    def release_cached(self) -> None:
        self.reserved = self.allocated
        self.released += 1

    def settle(self) -> None:
        self.settled += 1


class Giver:
    """Gives memory back when it dies, as a tensor does."""

    def __init__(self, memory: FakeAllocator, size: int) -> None:
        self.memory, self.size = memory, size
        memory.take(size)

    def __del__(self) -> None:
        self.memory.give(self.size)


@pytest.fixture
def memory(monkeypatch):
    fake = FakeAllocator()
    monkeypatch.setattr(devices, "allocators", lambda: (fake,))
    return fake


@pytest.fixture
def tracker(memory):
    return Tracker()


def only(usage):
    (card,) = usage.cards
    return card


def test_a_test_has_its_own_peak_and_baseline(tracker, memory):
    memory.take(900)
    memory.give(800)
    tracker.begin_test("a")
    memory.take(50)
    memory.give(50)
    card = only(tracker.end_test())

    assert (card.baseline, card.peak, card.leftover) == (100, 150, 0)


def test_a_test_that_touched_nothing_leaves_no_record(tracker, memory):
    memory.take(100)
    tracker.begin_test("a")

    assert tracker.end_test() == tracker.end_test()
    assert tracker.end_test().cards == ()


def test_what_a_wider_fixture_takes_is_its_own_and_not_the_tests(tracker, memory):
    tracker.begin_test("a")
    model = tracker.begin_fixture("model", "session")
    memory.take(700)
    memory.give(400)
    tracker.end_fixture(model)
    memory.take(20)
    memory.give(20)
    usage = tracker.end_test()

    assert (only(usage).baseline, only(usage).peak, only(usage).leftover) == (300, 320, 0)
    (fixture,) = usage.fixtures
    assert (fixture.name, fixture.allocated, fixture.peak, fixture.released) == (
        "model",
        300,
        700,
        None,
    )


def test_nested_fixtures_are_charged_apart(tracker, memory):
    tracker.begin_test("a")
    outer = tracker.begin_fixture("outer", "module")
    memory.take(10)
    inner = tracker.begin_fixture("inner", "session")
    memory.take(100)
    tracker.end_fixture(inner)
    memory.take(1)
    tracker.end_fixture(outer)
    usage = tracker.end_test()

    assert {each.name: each.allocated for each in usage.fixtures} == {"inner": 100, "outer": 11}


def test_a_function_fixture_belongs_to_its_test(tracker, memory):
    tracker.begin_test("a")
    batch = tracker.begin_fixture("batch", "function")
    memory.take(60)
    tracker.end_fixture(batch)
    memory.give(60)
    usage = tracker.end_test()

    assert only(usage).peak == 60
    assert only(usage).leftover == 0
    assert usage.fixtures[0].released == 60


def test_a_teardown_is_charged_to_its_fixture_until_the_next_begins(tracker, memory):
    tracker.begin_test("a")
    model, index = (tracker.begin_fixture(name, "module") for name in ("model", "index"))
    memory.take(30)
    tracker.end_fixture(index)
    memory.take(500)
    tracker.end_fixture(model)
    tracker.end_test()
    tracker.begin_test("b")
    tracker.begin_teardown(model)
    memory.give(500)
    tracker.begin_teardown(index)
    memory.give(30)
    usage = tracker.end_test()

    assert {each.name: each.released for each in usage.fixtures} == {"model": 500, "index": 30}
    assert usage.cards[0].leftover == 0


def test_a_fixture_that_keeps_memory_after_its_teardown_is_a_leak(tracker, memory):
    tracker.begin_test("a")
    model = tracker.begin_fixture("model", "module")
    memory.take(2**27)
    tracker.end_fixture(model)
    tracker.begin_teardown(model)
    memory.give(2**26)
    (fixture,) = tracker.end_test().fixtures

    assert (fixture.released, fixture.leaked) == (2**26, 2**26)


def test_a_fixture_set_up_again_between_tests_does_not_swallow_the_test(tracker, memory):
    tracker.begin_test("a")
    old = tracker.begin_fixture("model", "module")
    memory.take(10)
    tracker.end_fixture(old)
    tracker.end_test()
    tracker.begin_test("b")
    tracker.begin_teardown(old)
    memory.give(10)
    new = tracker.begin_fixture("model", "module")
    memory.take(20)
    tracker.end_fixture(new)
    memory.take(5)
    memory.give(5)
    usage = tracker.end_test()

    assert only(usage).peak == 25
    assert [(each.allocated, each.released) for each in usage.fixtures] == [(10, 10), (20, None)]


def test_memory_taken_between_tests_is_nobodys_leak(tracker, memory):
    tracker.begin_test("a")
    tracker.end_test()
    memory.take(2**26)
    tracker.begin_test("b")

    assert tracker.end_test().cards == ()


def test_garbage_in_cycles_is_collected_before_the_verdict(tracker, memory):
    tracker.begin_test("a")
    giver = Giver(memory, 100)
    giver.cycle = giver
    del giver
    card = only(tracker.end_test())

    assert (card.leftover, card.leaked) == (0, 0)


def test_the_collector_is_not_run_when_everything_came_back(tracker, memory, monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda *_: pytest.fail("gc.collect was called"))
    tracker.begin_test("a")
    memory.take(100)
    memory.give(100)

    assert only(tracker.end_test()).peak == 100


def test_the_heap_is_not_walked_for_a_test_that_left_nothing(tracker, memory, monkeypatch):
    tracker.begin_test("a")
    memory.take(300)
    tracker.end_test()
    monkeypatch.setattr(holders, "live_storages", lambda *_: pytest.fail("the heap was walked"))
    for name in "bc":
        tracker.begin_test(name)
        memory.give(100)
        tracker.end_test()


def test_a_traceback_does_not_pin_the_tests_variables(tracker, memory):
    def body():
        giver = Giver(memory, 100)
        raise ValueError(giver.size)

    tracker.begin_test("a")
    try:
        body()
    except ValueError as error:
        caught = error
    card = only(tracker.end_test([caught]))

    assert card.leftover == 0


def test_under_a_debugger_nothing_is_touched_and_nothing_is_called_a_leak(tracker, memory):
    def body():
        giver = Giver(memory, 100)
        raise ValueError(giver.size)

    tracker.begin_test("a")
    try:
        body()
    except ValueError as error:
        caught = error
    card = only(tracker.end_test([caught], judge=False))

    assert (card.leftover, card.leaked) == (100, 0)
    assert "giver" in caught.__traceback__.tb_next.tb_frame.f_locals


def test_memory_that_stays_is_looked_at_a_second_time(tracker, memory):
    tracker.begin_test("a")
    memory.take(2**26)
    card = only(tracker.end_test())

    assert memory.settled == 1
    assert (card.leftover, card.leaked) == (2**26, 2**26)


def test_memory_that_no_tensor_holds_is_a_note_while_it_is_small(tracker, memory):
    tracker.begin_test("a")
    memory.take(8_519_680)
    card = only(tracker.end_test())

    assert (card.leftover, card.leaked) == (8_519_680, 0)
    assert "no Python tensor or array" in card.note


def test_an_out_of_memory_error_that_was_caught_is_counted(tracker, memory):
    tracker.begin_test("a")
    memory.ooms += 2

    assert only(tracker.end_test()).ooms == 2


def test_a_shared_card_gets_its_cache_back(memory):
    tracker = Tracker(release_when_shared(True))
    tracker.begin_test("a")
    memory.take(100 * 2**20)
    memory.give(100 * 2**20)
    tracker.end_test()

    assert memory.released == 1


def test_a_small_cache_on_a_card_of_ones_own_is_kept(memory):
    tracker = Tracker(release_when_shared(False))
    tracker.begin_test("a")
    memory.take(200)
    memory.give(200)
    tracker.end_test()

    assert memory.released == 0


def test_what_only_a_teardown_takes_is_its_fixtures(tracker, memory):
    tracker.begin_test("a")
    memory.take(2**20)
    memory.give(2**20)
    model = tracker.begin_fixture("model", "module")
    tracker.end_fixture(model)
    tracker.end_test()
    tracker.begin_test("b")
    tracker.begin_teardown(model)
    memory.take(2**27)
    usage = tracker.end_test()

    assert [(each.name, each.leaked) for each in usage.fixtures] == [("model", 2**27)]
    assert only(usage).leaked == 0


def test_what_is_let_go_of_at_the_end_is_credited_to_the_fixture_torn_down(tracker, memory):
    tracker.begin_test("a")
    model = tracker.begin_fixture("model", "module")
    memory.take(2**27)
    tracker.end_fixture(model)
    memory.take(2**26)
    tracker.begin_teardown(model)
    usage = tracker.end_test(let_go=lambda: memory.give(2**27) or {})

    assert [(each.released, each.leaked) for each in usage.fixtures] == [(2**27, 0)]
    assert (only(usage).leftover, only(usage).leaked) == (2**26, 2**26)


# Several frameworks on one card


class Vague(FakeAllocator):
    """An allocator of a framework that keeps no peak."""

    exact_peaks = False

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def read(self) -> tuple[AllocatorReading, ...]:
        now = max(self.allocated, self.reserved)
        return (AllocatorReading(self.allocated, self.allocated, now, now, 0, 0),)


class Buffer:
    """An array of a framework beside torch."""

    def __init__(self, memory: FakeAllocator, size: int) -> None:
        self.memory, self.size = memory, size
        memory.take(size)

    def __del__(self) -> None:
        self.memory.give(self.size)


KEPT: list[Buffer] = []


@pytest.fixture
def beside(memory, monkeypatch):
    """Return an allocator that has arrays, and shares the card with ``memory``."""
    other = Vague("other")

    def living():
        for each in gc.get_objects():
            if type(each) is Buffer:
                yield devices.Array(each, id(each), each.size, "other:0", (each.size,), "uint8")

    monkeypatch.setattr(devices, "allocators", lambda: (memory, other))
    monkeypatch.setattr(devices, "living_arrays", living)
    yield other
    KEPT.clear()


def test_what_frameworks_hold_of_one_card_is_added(tracker, memory, beside):
    memory.take(100)
    beside.take(30)
    tracker.begin_test("a")
    memory.take(50)
    memory.give(50)
    card = only(tracker.end_test())

    # Of one that did not move what it holds counts, not what it may have held.
    assert (card.baseline, card.peak, card.own, card.leftover) == (130, 180, 50, 0)
    assert (card.reserved, card.vague) == (180, ())


def test_who_tells_no_peak_is_named(tracker, memory, beside):
    tracker.begin_test("a")
    beside.take(30)
    memory.take(50)
    card = only(tracker.end_test())
    tracker.begin_test("b")
    memory.give(50)
    memory.take(40)
    then = only(tracker.end_test())

    assert (card.peak, card.vague) == (80, ("other",))
    assert (then.baseline, then.vague) == (80, ())


def test_an_array_that_stays_is_a_leak_with_its_holder(tracker, beside):
    tracker.begin_test("a")
    KEPT.append(Buffer(beside, 4096))
    first = only(tracker.end_test())
    tracker.begin_test("b")
    KEPT.append(Buffer(beside, 4096))
    second = only(tracker.end_test())

    assert (first.leaked, second.leaked) == (4096, 4096)
    for card in (first, second):
        assert "module global KEPT" in card.holders[0].where
    # The first test's array is not among them.
    (holder,) = second.holders
    assert (holder.size, holder.tensors, holder.whole) == (4096, 1, 0)


def test_an_array_of_a_wider_fixture_is_no_leak(tracker, beside):
    tracker.begin_test("a")
    fixture = tracker.begin_fixture("table", "session")
    value = [Buffer(beside, 4096)]
    tracker.end_fixture(fixture, value)
    value.append(Buffer(beside, 512))
    card = only(tracker.end_test())

    assert (card.leaked, card.leftover) == (0, 512)
    assert "'table'" in card.note


def test_an_array_in_a_cycle_is_collected_and_no_leak(tracker, beside):
    tracker.begin_test("a")
    cycle = [Buffer(beside, 4096)]
    cycle.append(cycle)
    del cycle
    assert only(tracker.end_test()).leftover == 0


@pytest.mark.parametrize("told", [180, 100, None])
def test_what_is_counted_twice_is_told_by_the_drivers_figure(
    tracker, memory, beside, monkeypatch, told
):
    monkeypatch.setattr(devices, "own_bytes", lambda _card, _reserved: told)
    said = []
    monkeypatch.setattr(devices, "note", said.append)
    tracker.begin_test("a")
    memory.take(90)
    beside.take(90)
    tracker.end_test()

    assert any("fake and other together" in each for each in said) is (told == 100)

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest

from pytest_gpumem import devices
from pytest_gpumem.devices import AllocatorReading, DriverReading, users
from pytest_gpumem.devices.host import Host
from pytest_gpumem.records import Card
from pytest_gpumem.scheduling.history import Learned
from pytest_gpumem.scheduling.workers import (
    VIEWS,
    VISIBLE,
    Holdings,
    first_cards,
    give_back,
    place,
    tell_cards,
    views,
    worker_count,
)

GIB = 2**30
MIB = 2**20
ROOMY = Host(cpus=64, ram=512 * GIB)


def learned(*tests):
    """Return what was learned of tests, given as (peak, seconds); no peak: not on the card."""
    return [Learned(peak or 0, seconds, 1, peak is not None) for peak, seconds in tests]


GPU_ONLY = learned((GIB, 10.0), (2 * GIB, 5.0))
MIXED = [*GPU_ONLY, *learned((None, 30.0))]


def count(wanted=16, machine=ROOMY, free=(4 * GIB,), known=GPU_ONLY, **more):
    more = {"headroom": 0, "scheduled": True} | more
    return worker_count(wanted, machine, free, known, context=512 * MIB, **more)


@pytest.mark.parametrize(
    ("free", "known"), [((), GPU_ONLY), ((GIB,), []), ((GIB,), learned((None, 1.0)))]
)
def test_without_a_card_or_anything_learned_xdist_decides(free, known):
    assert count(free=free, known=known) is None


def test_contexts_fill_what_the_largest_test_leaves():
    found = count()

    assert found.workers == 4  # (4 GiB - 2 GiB) / 512 MiB
    assert found.reason == (
        "4 workers: VRAM holds 4 contexts of 512.00 MiB beside the largest peak of 2.00 GiB"
    )


def test_headroom_is_not_for_contexts():
    assert count(headroom=GIB).workers == 2


def test_every_card_holds_its_own_contexts():
    assert count(free=(4 * GIB, 3 * GIB)).workers == 6


def test_there_is_always_one_worker():
    assert count(free=(GIB,)).workers == 1
    assert count(machine=Host(1, 10 * MIB)).workers == 1
    assert count(free=(GIB,)).reason.startswith("1 worker: VRAM holds 1 context of")


def test_workers_without_a_context_run_the_tests_without_a_card():
    assert count(known=MIXED).workers == 16
    assert count(known=MIXED, scheduled=False).workers == 4


def test_it_never_starts_more_than_xdist_would():
    found = count(wanted=3)

    assert (found.workers, found.reason) == (3, "3 workers: as xdist would start")


def test_processors_and_main_memory_limit_as_well():
    few = count(known=MIXED, machine=Host(2, None))
    small = count(known=MIXED, machine=Host(64, 3 * GIB + 1))

    assert (few.workers, few.reason) == (2, "2 workers: 2 CPUs")
    assert (small.workers, small.reason) == (3, "3 workers: 3.00 GiB of main memory left")


def in_ram(*tests):
    """Return what was learned of tests without a card, given as (MiB, seconds)."""
    return [Learned(0, seconds, 1, gpu=False, ram=size * MIB) for size, seconds in tests]


ALL_ALIKE = [(200, 1.0)] * 40
ONE_HUGE = [*ALL_ALIKE, (3000, 10.0)]
SUITES = [
    # Tests, what a worker keeps, what is left, the best number, and that without a scheduler.
    ("next to nothing", [(1, 1.0)] * 50, 60, 8 * 1024, 16, 16),
    ("workers fill it", [(0, 1.0)] * 50, 700, 4 * 1024, 5, 5),
    ("torch, small tests", [(50, 0.5)] * 100, 900, 8 * 1024, 8, 8),
    # Beside the huge one, three others may use 600 MiB at once; more workers would take their room.
    ("one huge test", ONE_HUGE, 100, 4 * 1024, 4, 1),
    ("all huge", [(1024, 1.0)] * 30, 100, 4 * 1024, 4, 3),
    ("all too large", [(6000, 1.0)] * 3, 100, 4 * 1024, 1, 1),
    ("half of it each", [(2000, 1.0)] * 10, 40, 4 * 1024, 2, 2),
    ("long and lean, short and fat", [(10, 9.0)] * 16 + [(2000, 0.1)] * 16, 50, 4 * 1024, 16, 1),
    ("long and fat, short and lean", [(1500, 9.0)] * 8 + [(10, 0.1)] * 99, 50, 4 * 1024, 3, 2),
    ("no room at all", ALL_ALIKE, 500, 100, 1, 1),
]
"""The best number is that beyond which no further worker makes the run shorter, by hand."""


@pytest.mark.parametrize(
    ("tests", "keeps", "left", "best", "unpacked"),
    [each[1:] for each in SUITES],
    ids=[each[0] for each in SUITES],
)
def test_main_memory_is_for_as_many_workers_as_it_shortens_the_run(
    tests, keeps, left, best, unpacked
):
    machine = Host(16, left * MIB)
    told = {"free": (), "known": in_ram(*tests), "machine": machine, "each_ram": keeps * MIB}
    packed = count(**told, packs_ram=True)

    assert abs(packed.workers - best) <= 1
    assert abs(count(**told).workers - unpacked) <= 1
    assert count(**told, packs_ram=True, scheduled=False).workers == count(**told).workers
    if packed.workers < 16:
        assert f"{left * MIB / GIB:.2f} GiB of main memory left" in packed.reason or left < 1024


def test_main_memory_counts_with_a_gib_each_before_anything_is_learned():
    found = count(free=(), known=[], machine=Host(64, 5 * GIB), packs_ram=True)

    assert (found.workers, found.reason) == (5, "5 workers: 5.00 GiB of main memory left")
    assert count(free=(), known=[], machine=Host(64, 5 * GIB)) is None
    assert count(free=(), known=[], machine=Host(4, None), packs_ram=True).workers == 4


def test_learned_main_memory_is_told_with_its_numbers():
    tests = in_ram((1024, 1.0))
    found = count(machine=Host(64, 8 * GIB), free=(), known=tests, each_ram=GIB)

    assert found.reason == (
        "4 workers: 8.00 GiB of main memory left, of which a worker keeps 1.00 GiB and the largest "
        "test takes 1.00 GiB"
    )


def spec(visible=None, **fields):
    places = {"ssh": None, "vagrant_ssh": None, "socket": None, "via": None} | fields
    return SimpleNamespace(env={} if visible is None else {VISIBLE: visible}, **places)


def test_workers_are_told_what_those_before_them_on_their_host_may_use(monkeypatch):
    monkeypatch.setenv(VISIBLE, "2,3")
    specs = [spec(), spec(ssh="a"), spec("0"), spec("1", ssh="a"), spec(ssh="b"), spec()]

    assert [json.loads(text) for text in views(specs)] == [
        ["2,3"],
        [None],
        ["2,3", "0"],
        [None, "1"],
        [None],
        ["2,3", "0", "2,3"],
    ]


CARDS = [Card(f"GPU-{letter}", "card", GIB) for letter in "abc"]
SMALL, LARGE = Card("GPU-small", "small", 8 * GIB), Card("GPU-large", "large", 80 * GIB)
SLICES = [Card("MIG-1", "slice", GIB), Card("MIG-2", "slice", GIB)]


@pytest.mark.parametrize(
    ("allowed", "first"),
    [
        (["abc"], "a"),
        (["abc", "abc", "abc", "abc"], "abca"),
        (["ab", "bc", "ac"], "abc"),
        (["c", "abc", "abc"], "cab"),
        (["a", "b", "", "ab"], "aba"),
    ],
)
def test_workers_spread_over_the_cards_that_each_may_use(allowed, first):
    by_name = dict(zip("abc", CARDS, strict=True))
    found = first_cards([[by_name[name] for name in names] for names in allowed])

    assert [card.uuid for card in found] == [f"GPU-{name}" for name in first]


@pytest.mark.parametrize(
    ("count", "first"),
    [(1, [LARGE]), (2, [LARGE, SMALL]), (3, [LARGE, SMALL, LARGE])],
)
def test_the_largest_card_has_a_worker_before_a_smaller_one_has(count, first):
    assert first_cards([[SMALL, LARGE]] * count) == first


@pytest.fixture
def machine_with(monkeypatch):
    """Give the machine the cards that each text of CUDA_VISIBLE_DEVICES allows."""

    def make(allowed):
        monkeypatch.setenv(VISIBLE, "mine")
        monkeypatch.setattr(devices, "cards_to_choose", lambda text: tuple(allowed[text]))

    return make


@pytest.mark.parametrize(
    ("told", "cards", "seen"),
    [
        (["mine"], CARDS, "GPU-a,GPU-b,GPU-c"),
        (["mine"] * 2, CARDS, "GPU-b,GPU-c,GPU-a"),
        (["mine"] * 6, CARDS, "GPU-c,GPU-a,GPU-b"),
        ([None, None], CARDS, "GPU-b,GPU-c,GPU-a"),  # on another host, where it found "mine"
        (["other", "mine"], CARDS, "GPU-b,GPU-c,GPU-a"),
        (["mine"], [SMALL, LARGE], "GPU-large,GPU-small"),
        (["mine"], SLICES, "MIG-1"),
        (["mine"] * 2, SLICES, "MIG-2"),
        (["mine"] * 3, SLICES, "MIG-1"),
    ],
)
def test_a_worker_sees_its_own_card_first_and_the_others_after_it(machine_with, told, cards, seen):
    machine_with({"mine": cards, "other": CARDS[:1]})
    os.environ[VIEWS] = json.dumps(told)
    visible = SLICES[:1] if cards is SLICES else cards

    assert ",".join(card.uuid for card in place(visible)) == os.environ[VISIBLE] == seen
    assert VIEWS not in os.environ  # what a test starts is not a worker


@pytest.mark.parametrize(
    ("told", "cards"),
    [
        ("", CARDS),
        ('["mine"]', CARDS[:1]),
        ('["mine"]', []),
        ('["mine"]', [CARDS[0], Card("XPU-0", "card", GIB, "xpu")]),
    ],
)
def test_where_there_is_nothing_to_turn_the_callers_variable_stays(
    machine_with, monkeypatch, told, cards
):
    machine_with({"mine": cards})
    monkeypatch.setenv(VIEWS, told)

    assert place(cards) == cards
    assert os.environ[VISIBLE] == "mine"


class FakeAllocator:
    """Two cards, of which the first is in use."""

    def __init__(self):
        self.reserved, self.reserved_peak, self.ooms = 5, 9, 0
        self.used = set()

    def read(self):
        used = AllocatorReading(1, 1, self.reserved, self.reserved_peak, 0, self.ooms)
        return used, AllocatorReading(0, 0, 0, 0, 0, 0)

    def card(self, index):
        return CARDS[index]

    def release_cached(self):
        self.reserved = 1


@pytest.fixture
def driver(monkeypatch):
    """Let the driver tell what it is given here, by pid, and note how often it was asked."""
    told, asked = {}, []

    def process_bytes(card):
        asked.append(card.uuid)
        return told

    monkeypatch.setattr(users, "process_bytes", process_bytes)
    return told, asked


@pytest.fixture
def allocator(monkeypatch):
    fake = FakeAllocator()
    monkeypatch.setattr(devices, "allocators", lambda: (fake,))
    return fake


def test_what_a_process_keeps_is_what_the_driver_says(driver, allocator):
    told, _ = driver
    told[os.getpid()] = 77

    assert Holdings(context=50)() == {"GPU-a": 77}


def test_a_silent_driver_is_made_up_for_by_the_context(driver, allocator):
    assert Holdings(context=50)() == {"GPU-a": 55}


def test_a_strangers_figure_is_not_taken_for_ours(driver, allocator):
    told, _ = driver
    told[os.getpid()] = 3  # less than is reserved: in a container our number is another's

    assert Holdings(context=50)() == {"GPU-a": 55}


def test_the_driver_is_asked_only_when_something_changed(driver, allocator):
    _, asked = driver
    holdings = Holdings(context=50)
    holdings()
    holdings()
    assert len(asked) == 1

    give_back()
    assert holdings() == {"GPU-a": 51}
    assert len(asked) == 2


def test_what_was_given_back_is_not_kept_though_its_peak_is_forgotten(driver, allocator):
    holdings = Holdings(context=50)
    holdings()
    allocator.reserved = allocator.reserved_peak = 0

    assert holdings() == {"GPU-a": 50}


def test_a_context_stays_where_a_test_gave_all_back_and_its_peak_was_forgotten(driver, allocator):
    allocator.reserved = allocator.reserved_peak = 0
    allocator.used = {0}

    assert Holdings(context=50)() == {"GPU-a": 50}


def test_a_process_whose_first_request_failed_keeps_a_context(driver, allocator):
    allocator.reserved = allocator.reserved_peak = 0
    allocator.ooms = 1

    assert Holdings(context=50)() == {"GPU-a": 50}


def test_without_an_active_framework_nothing_is_kept():
    assert Holdings(context=50)() == {}


def test_of_each_card_is_told_how_much_of_it_is_used(driver, monkeypatch):
    told, _ = driver
    told[os.getpid()] = 7
    readings = {"GPU-a": DriverReading(used=30, free=70, total=100, reserved=0)}
    monkeypatch.setattr(users, "driver_reading", lambda card: readings.get(card.uuid))

    assert tell_cards(CARDS[:2]) == [("GPU-a", GIB, 30), ("GPU-b", GIB, 7)]

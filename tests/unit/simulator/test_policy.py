"""PyTorch's settings of its allocator: what they say, and what blocks are then handed out."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem.simulator.allocator import CachingAllocator
from pytest_gpumem.simulator.policy import Policy, read_settings
from pytest_gpumem.simulator.segments import OutOfMemory

if TYPE_CHECKING:
    from pytest_gpumem.simulator.blocks import Block

MIB = 2**20


def settings(text: str) -> Policy:
    policy, ignored = read_settings(text, Policy())
    assert not ignored
    return policy


def allocator(text: str = "", total: int = 400 * MIB) -> CachingAllocator:
    used = 0

    def reserve(size: int) -> bool:
        nonlocal used
        if used + size > total:
            return False
        used += size
        return True

    def release(size: int) -> None:
        nonlocal used
        used -= size

    made = CachingAllocator(reserve, release, total)
    made.policy = settings(text)
    return made


@pytest.mark.parametrize(
    ("text", "size", "rounded"),
    [
        ("", 21 * MIB + 1, 21 * MIB + 512),
        ("roundup_power2_divisions:4", 1200 * MIB, 1280 * MIB),
        ("roundup_power2_divisions:4", 84 * MIB, 96 * MIB),
        ("roundup_power2_divisions:4", 1 * MIB, 1 * MIB),
        ("roundup_power2_divisions:4", 2048, 2048),
        ("roundup_power2_divisions:4", 2049, 2560),
        ("roundup_power2_divisions:4", 2561, 3072),
        ("roundup_power2_divisions:1", 2561, 3072),
        ("roundup_power2_divisions:[64:8,128:2,256:2,512:2,1024:1,>:1]", 84 * MIB, 88 * MIB),
        ("roundup_power2_divisions:[64:8,128:2,256:2,512:2,1024:1,>:1]", 400 * MIB, 512 * MIB),
        ("roundup_power2_divisions:[64:8,128:2,256:2,512:2,1024:1,>:1]", 5 * MIB, 5 * MIB),
        ("roundup_power2_divisions: [256:1, >:4]", 5 * 2**30 + 1, 6 * 2**30),
        ("roundup_power2_divisions:[>:2]", 5 * MIB, 6 * MIB),
        ("roundup_power2_divisions:[>:2]", MIB + 513, MIB + 1024),
        ("roundup_power2_divisions:[256:0,>:2]", 300 * MIB, 300 * MIB),
        ("roundup_power2_divisions:[256:0,>:2]", 600 * MIB, 768 * MIB),
    ],
)
def test_requests_are_rounded_as_the_settings_say(text: str, size: int, rounded: int) -> None:
    assert settings(text).rounded(size) == rounded


@given(st.integers(1, 2**40), st.sampled_from((0, 1, 2, 4, 8, 64, 1024)))
def test_rounding_never_takes_less_nor_much_more(size: int, steps: int) -> None:
    rounded = Policy(divisions=(steps,) * 16).rounded(size)
    assert rounded >= size
    assert rounded % 512 == 0
    assert rounded - size < max(512, size / max(1, steps) if steps > 1 else 512)


@pytest.mark.parametrize(
    "text",
    [
        "max_split_size_mb:19",
        "max_split_size_mb:",
        "max_split_size_mb:many",
        "max_split_size_mb:-64",
        "max_non_split_rounding_mb:1",
        "garbage_collection_threshold:1.2",
        "garbage_collection_threshold:0",
        "garbage_collection_threshold:nan",
        "garbage_collection_threshold:half",
        "roundup_power2_divisions:3",
        "roundup_power2_divisions:0",
        "roundup_power2_divisions:[63:2]",
        "roundup_power2_divisions:[64:3]",
        "roundup_power2_divisions:[64]",
        "roundup_power2_divisions:[0:2]",
        "nonsense:1",
        "nonsense",
        "max_split_size:64",
        "backend:foo",
        "expandable_segments:maybe",
    ],
)
def test_what_torch_refuses_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"option|threshold|roundup|value|key|argument"):
        read_settings(text, Policy())


@pytest.mark.parametrize(
    ("text", "ignored"),
    [
        ("", []),
        (" , backend : native ,expandable_segments:False", []),
        ("expandable_segments:True,max_split_size_mb:64", ["expandable_segments:True"]),
        ("release_lock_on_cudamalloc:True,pinned_num_register_threads:8", []),
        ("backend:cudaMallocAsync", ["backend:cudaMallocAsync"]),
        (
            "roundup_power2_divisions:[64:2,>:4],throw_on_cudamalloc_oom:True",
            ["throw_on_cudamalloc_oom:True"],
        ),
    ],
)
def test_what_changes_nothing_is_told(text: str, ignored: list[str]) -> None:
    assert read_settings(text, Policy())[1] == ignored


def test_settings_left_out_are_as_at_the_start_but_for_one() -> None:
    first = settings("max_split_size_mb:64,max_non_split_rounding_mb:30,roundup_power2_divisions:4")
    then, _ = read_settings("garbage_collection_threshold:0.5", first)
    assert then == Policy(max_rounding=30 * MIB, collection=0.5)


def test_an_oversize_block_is_handed_out_whole_and_for_oversize_requests_only() -> None:
    plain, limited = allocator(), allocator("max_split_size_mb:30")
    for each in (plain, limited):
        each.free(each.malloc(50 * MIB))
    assert plain.malloc(12 * MIB).size == 12 * MIB
    assert plain.reserved == 50 * MIB
    assert limited.malloc(12 * MIB).size == 12 * MIB
    assert limited.reserved == 62 * MIB
    assert limited.malloc(45 * MIB).size == 50 * MIB
    assert limited.reserved == 62 * MIB
    stats = limited.stats()
    assert stats["max_split_size"] == 30 * MIB
    assert stats["oversize_allocations"] == {
        "current": 1,
        "peak": 1,
        "allocated": 2,
        "freed": 1,
    }
    assert stats["oversize_segments"]["current"] == 1


def test_an_oversize_block_that_is_far_too_large_is_left_alone() -> None:
    limited = allocator("max_split_size_mb:30,max_non_split_rounding_mb:25")
    limited.free(limited.malloc(80 * MIB))
    limited.malloc(50 * MIB)
    assert limited.reserved == 130 * MIB
    limited.malloc(60 * MIB)
    assert limited.reserved == 130 * MIB


def test_one_oversize_segment_makes_room_before_all_others_go() -> None:
    limited = allocator("max_split_size_mb:30", total=200 * MIB)
    for block in [limited.malloc(size * MIB) for size in (12, 40, 100)]:
        limited.free(block)
    limited.malloc(70 * MIB)  # the one of 100 is too large to be handed out
    stats = limited.stats()
    assert (limited.reserved, stats["num_alloc_retries"]) == ((12 + 40 + 70) * MIB, 0)
    assert stats["num_device_free"] == 1


def test_several_oversize_segments_make_room_the_largest_first() -> None:
    limited = allocator("max_split_size_mb:30", total=200 * MIB)
    for block in [limited.malloc(size * MIB) for size in (12, 40, 50, 60)]:
        limited.free(block)
    limited.malloc(100 * MIB)
    stats = limited.stats()
    assert (limited.reserved, stats["num_alloc_retries"]) == ((12 + 40 + 100) * MIB, 0)
    with pytest.raises(OutOfMemory):
        limited.malloc(150 * MIB)


def test_blocks_that_were_split_under_other_settings_are_not_torn_from_their_segment() -> None:
    changed = allocator("", total=100 * MIB)
    kept, rest = changed.malloc(20 * MIB), changed.malloc(70 * MIB)
    changed.free(rest)
    changed.malloc(2 * MIB)  # cuts the segment of 70
    changed.policy = settings("max_split_size_mb:30")
    with pytest.raises(OutOfMemory):
        changed.malloc(80 * MIB)
    assert kept.allocated
    assert sum(each["total_size"] for each in changed.snapshot()) == changed.reserved


def test_old_cached_segments_go_when_more_than_the_threshold_is_held() -> None:
    plain, collecting = allocator(), allocator("garbage_collection_threshold:0.3")
    for each in (plain, collecting):
        each.memory_fraction = 0.9  # without one PyTorch collects nothing
        each.free(each.malloc(60 * MIB))
        for _ in range(3):
            each.free(each.malloc(70 * MIB))  # asks the pool: what waits grows older
        each.malloc(80 * MIB)
    assert (plain.reserved, collecting.reserved) == (210 * MIB, 150 * MIB)
    stats = collecting.stats()
    assert (stats["num_alloc_retries"], stats["num_device_free"]) == (0, 1)


def test_nothing_is_collected_without_a_memory_fraction() -> None:
    collecting = allocator("garbage_collection_threshold:0.1")
    for size in (60, 70, 80):
        collecting.free(collecting.malloc(size * MIB))
    collecting.malloc(90 * MIB)
    assert (collecting.reserved, collecting.stats()["num_device_free"]) == (300 * MIB, 0)


def test_a_stream_is_handed_its_own_blocks_alone() -> None:
    made = allocator()
    made.free(made.malloc(2 * MIB, stream=3))
    assert made.malloc(2 * MIB).stream == 0
    assert made.reserved == 40 * MIB
    assert made.malloc(2 * MIB, stream=3).stream == 3
    assert made.reserved == 40 * MIB
    assert {each["stream"] for each in made.snapshot()} == {0, 3}


def test_a_block_that_another_stream_uses_is_active_until_memory_is_asked_for() -> None:
    made = allocator()
    block = made.malloc(2 * MIB)
    made.use(block, 7)
    made.free(block)

    def now(name: str) -> int:
        return int(made.stats()[name]["all"]["current"])

    assert (now("allocated_bytes"), now("active_bytes"), now("requested_bytes")) == (
        0,
        2 * MIB,
        2 * MIB,
    )
    assert made.snapshot()[0]["blocks"][0]["state"] == "active_pending_free"
    again = made.malloc(2 * MIB)
    assert again.address == block.address
    assert (now("allocated_bytes"), now("active_bytes")) == (2 * MIB, 2 * MIB)
    made.free(again)
    assert (now("allocated_bytes"), now("active_bytes"), now("requested_bytes")) == (0, 0, 0)


def test_an_empty_cache_waits_for_the_other_streams() -> None:
    made = allocator()
    block = made.malloc(30 * MIB)
    made.use(block, 7)
    made.use(block, block.stream)
    made.free(block)
    made.empty_cache()
    assert (made.reserved, made.stats()["active_bytes"]["all"]["current"]) == (0, 0)


POLICIES = st.sampled_from(
    [
        Policy(),
        Policy(max_split=30 * MIB),
        Policy(max_split=20 * MIB, max_rounding=25 * MIB),
        Policy(collection=0.2),
        Policy(collection=0.9, max_split=40 * MIB),
        Policy(divisions=(4,) * 16),
        Policy(divisions=(0, 2, 8) + (1,) * 13, collection=0.5),
    ]
)
STEPS = st.one_of(
    st.tuples(st.just("take"), st.integers(1, 90 * MIB), st.sampled_from([0, 0, 3])),
    st.tuples(st.just("free"), st.integers(0, 99), st.just(0)),
    st.tuples(st.just("use"), st.integers(0, 99), st.sampled_from([0, 3, 9])),
    st.tuples(st.just("policy"), POLICIES, st.just(0)),
    st.tuples(st.just("fraction"), st.sampled_from([1.0, 0.7, 0.3]), st.just(0)),
    st.tuples(st.just("empty"), st.just(0), st.just(0)),
)


def bytes_of(made: CachingAllocator, name: str) -> int:
    return int(made.stats()[name]["all"]["current"])


@given(st.lists(STEPS, max_size=60))
def test_the_books_are_right_whatever_the_settings_and_streams(steps: list[Any]) -> None:
    made = allocator(total=300 * MIB)
    held: list[Block] = []
    for what, value, stream in steps:
        if what == "take":
            with contextlib.suppress(OutOfMemory):
                held.append(made.malloc(value, stream))
        elif what == "free" and held:
            made.free(held.pop(value % len(held)))
        elif what == "use" and held:
            made.use(held[value % len(held)], stream)
        elif what == "policy":
            made.policy = value
        elif what == "fraction":
            made.memory_fraction = value
        elif what == "empty":
            made.empty_cache()
        segments = made.snapshot()
        assert sum(each["total_size"] for each in segments) == made.reserved <= 300 * MIB
        assert made.allocated == sum(block.size for block in held)
        assert sum(each["active_size"] for each in segments) == bytes_of(made, "active_bytes")
        assert bytes_of(made, "active_bytes") >= made.allocated
    for block in held:
        made.free(block)
    made.empty_cache()
    stats = made.stats()
    pooled = [each for each in stats.values() if isinstance(each, dict) and "all" in each]
    assert all(pool["current"] == 0 for each in pooled for pool in each.values())
    assert made.reserved == 0

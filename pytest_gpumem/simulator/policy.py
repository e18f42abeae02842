"""The settings of PyTorch's allocator that change which blocks it hands out.

Their words and what they mean follow ``c10/core/AllocatorConfig.cpp`` of torch 2.13. What torch's
own reader checks is checked again, since not every build has one.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MIN_BLOCK = 512
"""Bytes that every block is a multiple of."""
SMALL_REQUEST = 2**20
"""Bytes up to which requests come from the small pool."""
_MIB = 2**20
_LEAST_SPLIT = 20
"""MiB of the segments for large requests, below which no limit of splitting may lie."""
_INTERVALS = 16
_FIRST_INTERVAL = 20
"""The first interval of rounding ends at 2^21 bytes, and so on to 2^36."""
_OBEYED = frozenset(("backend:native", "expandable_segments:False"))
_OF_TIME_ALONE = frozenset(
    (
        "release_lock_on_cudamalloc",
        "release_lock_on_hipmalloc",
        "pinned_use_cuda_host_register",
        "pinned_use_hip_host_register",
        "pinned_num_register_threads",
        "pinned_use_background_threads",
    )
)
_KNOWN = _OF_TIME_ALONE | {
    "backend",
    "expandable_segments",
    "graph_capture_record_stream_reuse",
    "large_segment_size_mb",
    "per_process_memory_fraction",
    "pinned_free_catch_all",
    "pinned_max_cached_size_mb",
    "pinned_max_round_threshold_mb",
    "pinned_reserve_segment_size_mb",
    "throw_on_cudamalloc_oom",
}
"""What torch knows beside those that are obeyed: of all versions to 2.14."""
_CHOICES = {
    "backend": (
        ("native", "cudaMallocAsync"),
        "Unknown allocator backend, options are native and cudaMallocAsync",
    ),
    "expandable_segments": (
        ("True", "False"),
        "Expected a single True/False argument for expandable_segments",
    ),
}
"""The values that some of them take, and torch's words for others."""


class Policy(NamedTuple):
    """How blocks are cut and given back; sizes are bytes."""

    max_split: int | None = None
    """From this size on a block is oversize: handed out whole or not at all. None: no block is."""
    max_rounding: int = _LEAST_SPLIT * _MIB
    """An oversize block that is this much larger than a request is not handed out for it."""
    collection: float = 0.0
    """Above this part of what the process may take, old cached segments go back; 0: never."""
    divisions: tuple[int, ...] = ()
    """By power of two: into so many steps its requests are rounded. Empty: to 512 bytes."""

    def rounded(self, size: int) -> int:
        """Return the bytes of the block that a request is handed."""
        power = size.bit_length() - 1
        steps = 0
        if self.divisions:
            steps = self.divisions[min(max(power - _FIRST_INTERVAL, 0), _INTERVALS - 1)]
        if steps <= 1 or size <= MIN_BLOCK * steps:
            return -(-size // MIN_BLOCK) * MIN_BLOCK
        step = (1 << power) >> (steps.bit_length() - 1)
        return -(-size // step) * step

    def is_oversize(self, size: int) -> bool:
        """Tell whether a block of ``size`` is never split."""
        return self.max_split is not None and size >= self.max_split

    def allows(self, block: int, request: int) -> bool:
        """Tell whether a cached block may be handed out for a request, as far as it is oversize."""
        if self.is_oversize(request):
            return block < request + self.max_rounding
        return not self.is_oversize(block)


def read_settings(text: str, before: Policy) -> tuple[Policy, list[str]]:
    """Return the policy that settings ask for, and those of them that change nothing here.

    As in torch, what is not named is as at the start, but for ``max_non_split_rounding_mb``, which
    stays as ``before`` had it.

    Raises:
        ValueError: in torch's words, for a value that it refuses.

    """
    policy, ignored = Policy(max_rounding=before.max_rounding), []
    for each in re.split(r",(?![^\[]*\])", re.sub(r"\s", "", text)):
        name, _, value = each.partition(":")
        if name == "max_split_size_mb":
            policy = policy._replace(max_split=_large(name, value))
        elif name == "max_non_split_rounding_mb":
            policy = policy._replace(max_rounding=_large(name, value))
        elif name == "garbage_collection_threshold":
            policy = policy._replace(collection=_part(value))
        elif name == "roundup_power2_divisions":
            policy = policy._replace(divisions=_divisions(value))
        elif each:
            _check(name, value)
            if each not in _OBEYED and name not in _OF_TIME_ALONE:
                ignored.append(each)
    return policy, ignored


def _check(name: str, value: str) -> None:
    if name not in _KNOWN:
        raise ValueError(f"Unrecognized key '{name}' in Accelerator allocator config.")
    allowed, words = _CHOICES.get(name, ((value,), ""))
    if value not in allowed:
        raise ValueError(words)


def _whole(name: str, value: str) -> int:
    if not re.fullmatch(r"\d{1,18}", value, re.ASCII):
        raise ValueError(f"Error, expecting {name} value")
    return int(value)


def _large(name: str, value: str) -> int:
    size = _whole(name, value)
    if size < _LEAST_SPLIT:
        raise ValueError(f"CachingAllocator option {name} too small, must be >= {_LEAST_SPLIT}")
    return size * _MIB


def _part(value: str) -> float:
    try:
        part = float(value)
    except ValueError:
        part = 0.0
    if not 0 < part < 1:
        raise ValueError("garbage_collect_threshold is invalid, set it in (0.0, 1.0)")
    return part


def _divisions(value: str) -> tuple[int, ...]:
    """Read ``4``, or ``[256:1,512:2,>:4]``: MiB from which each number of steps holds."""
    name = "roundup_power2_divisions"
    if not value.startswith("["):
        return (_steps(_whole(name, value), least=1),) * _INTERVALS
    divisions = [0] * _INTERVALS
    first, last = True, 0
    for pair in filter(None, value.strip("[]").split(",")):
        start, _, count = pair.partition(":")
        steps = _steps(_whole(name, count), least=0)
        if start == ">":
            divisions[last + 1 :] = [steps] * (_INTERVALS - last - 1)
            continue
        size = _whole(name, start)
        if size.bit_count() != 1:
            raise ValueError("For roundups, the intervals have to be power of 2 ")
        index = min(size.bit_length() - 1, _INTERVALS - 1)
        if first:
            divisions[:index] = [steps] * index
        divisions[index] = steps
        first, last = False, index
    return tuple(divisions)


def _steps(count: int, *, least: int) -> int:
    if count < least or count.bit_count() > 1:
        raise ValueError(
            "For roundups, the divisions has to be power of 2"
            + ("" if least else " or 0 to disable roundup")
        )
    return count

"""The segments of PyTorch's caching allocator: what it takes from the card and gives back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_gpumem.simulator.blocks import Block, Figure, Figures, Pool
from pytest_gpumem.simulator.policy import SMALL_REQUEST, Policy

if TYPE_CHECKING:
    from collections.abc import Callable

_SMALL_SEGMENT = 2 * 2**20
_LARGE_SEGMENT = 20 * 2**20
_OWN_SEGMENT = 10 * 2**20
_SEGMENT_STEP = 2 * 2**20


class OutOfMemory(Exception):  # noqa: N818  # becomes torch.OutOfMemoryError, which has no suffix
    """A segment did not fit, not even after the cached ones were given back."""

    def __init__(self, requested: int, allocated: int, reserved: int, allowed: int | None) -> None:
        super().__init__(f"no room for a segment of {requested} bytes")
        self.requested = requested
        """Bytes of the refused segment, which PyTorch prints as "Tried to allocate"."""
        self.allocated = allocated
        """Bytes in blocks handed out when it was refused."""
        self.reserved = reserved
        """Bytes in segments when it was refused."""
        self.allowed = allowed
        """Bytes the memory fraction allows; ``None`` at 1.0: no limit."""


def _segment_size(size: int) -> int:
    if size <= SMALL_REQUEST:
        return _SMALL_SEGMENT
    if size < _OWN_SEGMENT:
        return _LARGE_SEGMENT
    return -(-size // _SEGMENT_STEP) * _SEGMENT_STEP


class Segments:
    """The segments that a process has of one card, in use or cached.

    ``reserve``, ``release`` and ``total`` are those of ``CachingAllocator``; ``first_address`` is
    that of the first segment.
    """

    def __init__(
        self,
        reserve: Callable[[int], bool],
        release: Callable[[int], None],
        total: int,
        first_address: int,
    ) -> None:
        self._reserve = reserve
        self._release = release
        self._total = total
        self._next_address = first_address
        self.small = Pool("small")
        self.large = Pool("large")
        self.figures = Figures()
        """Those of both pools together."""
        self.oversize = Figure()
        """Segments that the policy forbids to split."""
        self.fraction = 1.0
        self.policy = Policy()
        """Asked in every request, so its fields are looked at before its methods are called."""
        self.heads: dict[int, Block] = {}
        """The first block of each, by address."""
        self.noting: Callable[[str, int, int], None] = lambda _action, _address, _size: None
        """Called as one is taken (``segment_alloc``) or given back (``segment_free``)."""
        self.clear_counters()

    def clear_counters(self) -> None:
        """Let the counts of events start from 0."""
        self.retries = self.refused = self.flushes = self.taken = self.given_back = 0

    @property
    def allowed(self) -> int | None:
        """Bytes that they may take by the memory fraction; ``None`` at 1.0: no limit."""
        return None if self.fraction == 1.0 else round(self.fraction * self._total)

    @property
    def collects(self) -> bool:
        """Whether old cached ones are given back: PyTorch does so under a memory fraction."""
        return self.policy.collection > 0 and self.fraction != 1.0

    def reuse(self, pool: Pool, rounded: int, stream: int) -> Block | None:
        """Return the smallest cached block for ``rounded`` bytes, unless the policy forbids it."""
        if self.policy.collection and self.collects:
            pool.asked += 1
        return pool.take_best(rounded, stream, self.policy)

    def take(self, pool: Pool, rounded: int, stream: int) -> Block:
        """Take a segment from the card for a block of ``rounded`` bytes.

        Raises:
            OutOfMemory: when there is no room, although every whole cached one was given back.

        """
        size = _segment_size(rounded)
        if self.collects:
            self._collect()
        if not (
            self._fits(size)
            or (self._release_oversize(pool, rounded, stream) and self._fits(size))
            or self._fits_at_last(size)
        ):
            self.refused += 1
            now = self.figures.allocated_bytes.current
            raise OutOfMemory(size, now, self.figures.reserved_bytes.current, self.allowed)
        self.taken += 1
        for figures in (self.figures, pool.figures):
            figures.segment.add(1)
            figures.reserved_bytes.add(size)
        if self.policy.is_oversize(size):
            self.oversize.add(1)
        block = self.heads[self._next_address] = Block(self._next_address, size, pool, stream)
        self.noting("segment_alloc", block.address, size)
        self._next_address += size
        return block

    def _fits(self, size: int) -> bool:
        allowed = self.allowed
        if allowed is not None and self.figures.reserved_bytes.current + size > allowed:
            return False
        return self._reserve(size)

    def _fits_at_last(self, size: int) -> bool:
        self.release_cached()
        self.retries += 1
        return self._fits(size)

    def _collect(self) -> None:
        """Give cached large segments back, the oldest first, until less than the policy's part.

        A segment's age is how often its pool has been asked since it was cached. Each round gives
        back all that are at least as old as the average, even if fewer would do: so it is seldom.
        """
        limit = int(self.policy.collection * round(self.fraction * self._total))
        whole = self.large.whole_segments()
        while whole and self.figures.reserved_bytes.current > limit:
            ages = [self.large.asked - block.cached_at for block in whole]
            average = sum(ages) / len(ages)
            old = [block for block, age in zip(whole, ages, strict=True) if age >= average]
            whole = [block for block, age in zip(whole, ages, strict=True) if age < average]
            for block in old:
                self._give_back(block)

    def _release_oversize(self, pool: Pool, size: int, stream: int) -> bool:
        """Give back cached oversize blocks that make room for ``size``: one, else the largest.

        Returns whether enough was given back; without a limit of splitting nothing is oversize.
        """
        if self.policy.max_split is None:
            return False
        wanted = max(size, self.policy.max_split)
        # Who made the limit smaller may have blocks that were split before.
        oversize = [
            block
            for block in pool.of_stream(stream)
            if self.policy.is_oversize(block.size) and not block.split
        ]
        if enough := [block for block in oversize if block.size >= wanted]:
            self._give_back(enough[0])
            return True
        released = 0
        while oversize and released < wanted:
            block = oversize.pop()
            released += block.size
            self._give_back(block)
        return released >= wanted

    def release_cached(self) -> None:
        """Give every segment that is cached as a whole back to the card."""
        self.flushes += 1
        for pool in (self.large, self.small):
            for block in pool.whole_segments():
                self._give_back(block)

    def _give_back(self, block: Block) -> None:
        block.pool.take(block)
        self.given_back += 1
        for figures in (self.figures, block.pool.figures):
            figures.segment.take(1)
            figures.reserved_bytes.take(block.size)
        if self.policy.is_oversize(block.size):
            self.oversize.take(1)
        del self.heads[block.address]
        self.noting("segment_free", block.address, block.size)
        self._release(block.size)


def counted(segments: Segments, oversize: Figure) -> dict[str, Any]:
    """Return what ``torch._C._cuda_memoryStats`` returns; ``oversize`` are blocks."""
    every, small, large = segments.figures, segments.small.figures, segments.large.figures

    def pools(name: str) -> dict[str, dict[str, int]]:
        return {
            "all": getattr(every, name).as_dict(),
            "small_pool": getattr(small, name).as_dict(),
            "large_pool": getattr(large, name).as_dict(),
        }

    return {
        "num_alloc_retries": segments.retries,
        "num_ooms": segments.refused,
        "num_oom_rejections": 0,
        # Without a limit -1, as the real one shows it.
        "max_split_size": -1 if segments.policy.max_split is None else segments.policy.max_split,
        "num_sync_all_streams": segments.flushes,
        "num_device_alloc": segments.taken,
        "num_device_free": segments.given_back,
        "allocation": pools("allocation"),
        "segment": pools("segment"),
        "active": pools("active"),
        "inactive_split": pools("inactive_split"),
        "allocated_bytes": pools("allocated_bytes"),
        "reserved_bytes": pools("reserved_bytes"),
        "reserved_bytes_by_private_pools": {},
        "active_bytes": pools("active_bytes"),
        "inactive_split_bytes": pools("inactive_split_bytes"),
        "requested_bytes": pools("requested_bytes"),
        "oversize_allocations": oversize.as_dict(),
        "oversize_segments": segments.oversize.as_dict(),
    }

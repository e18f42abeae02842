"""The blocks of PyTorch's caching allocator, its pools of cached ones, and its statistics."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Any

MIN_BLOCK = 512
SMALL_REQUEST = 2**20


class Block:
    """A range of a segment, handed out or cached; ``size`` and ``requested`` are bytes."""

    __slots__ = ("address", "allocated", "cached", "next", "pool", "prev", "requested", "size")

    def __init__(self, address: int, size: int, pool: Pool) -> None:
        self.address = address
        self.size = size
        self.requested = 0
        self.pool = pool
        self.allocated = False
        self.cached = False
        self.prev: Block | None = None
        self.next: Block | None = None

    @property
    def split(self) -> bool:
        """Whether the segment has other blocks besides this one."""
        return self.prev is not None or self.next is not None


class Figure:
    """One statistic as PyTorch counts it (``c10::CachingAllocator::Stat``)."""

    __slots__ = ("allocated", "current", "freed", "peak")

    def __init__(self) -> None:
        self.current = self.peak = self.allocated = self.freed = 0

    def add(self, amount: int) -> None:
        """Count what came."""
        self.current = current = self.current + amount
        self.allocated += amount
        if current > self.peak:  # noqa: PLR1730  # max() costs more, in every simulated tensor
            self.peak = current

    def take(self, amount: int) -> None:
        """Count what went."""
        self.current -= amount
        self.freed += amount

    def as_dict(self) -> dict[str, int]:
        """Return it as ``torch.cuda.memory_stats`` has it."""
        return {
            "current": self.current,
            "peak": self.peak,
            "allocated": self.allocated,
            "freed": self.freed,
        }


class Figures:
    """The statistics of one pool, or of both together."""

    __slots__ = (
        "allocated_bytes",
        "allocation",
        "inactive_split",
        "inactive_split_bytes",
        "requested_bytes",
        "reserved_bytes",
        "segment",
    )

    def __init__(self) -> None:
        self.allocation = Figure()
        self.segment = Figure()
        self.inactive_split = Figure()
        self.allocated_bytes = Figure()
        self.reserved_bytes = Figure()
        self.inactive_split_bytes = Figure()
        self.requested_bytes = Figure()

    def all(self) -> list[Figure]:
        """Return each of them."""
        return [getattr(self, name) for name in self.__slots__]

    def handed_out(self, block: Block) -> None:
        """Count a block that a tensor got."""
        self.allocation.add(1)
        self.allocated_bytes.add(block.size)
        self.requested_bytes.add(block.requested)

    def taken_back(self, block: Block) -> None:
        """Count a block that a tensor gave back."""
        self.allocation.take(1)
        self.allocated_bytes.take(block.size)
        self.requested_bytes.take(block.requested)

    def inactive_moved(self, count: int, size: int) -> None:
        """Count a net change, as PyTorch does: a sum of single steps would raise the peaks."""
        (self.inactive_split.add if count > 0 else self.inactive_split.take)(abs(count))
        (self.inactive_split_bytes.add if size > 0 else self.inactive_split_bytes.take)(abs(size))


class Pool:
    """The cached blocks of small or of large requests, best fit first."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.small = name == "small"
        self.figures = Figures()
        # Addresses differ, so that the comparison of two entries never reaches the blocks.
        self._entries: list[tuple[int, int, Block]] = []

    def put(self, block: Block) -> None:
        """Cache ``block``."""
        block.cached = True
        insort(self._entries, (block.size, block.address, block))

    def take(self, block: Block) -> None:
        """Take out ``block``, which is cached."""
        block.cached = False
        del self._entries[bisect_left(self._entries, (block.size, block.address))]

    def take_best(self, size: int) -> Block | None:
        """Take the smallest block that holds ``size``; of equal ones the lowest address."""
        index = bisect_left(self._entries, (size,))
        if index == len(self._entries):
            return None
        block = self._entries.pop(index)[2]
        block.cached = False
        return block

    def take_whole_segments(self) -> list[Block]:
        """Take the blocks that are all of their segment, in PyTorch's order of release."""
        whole = [block for *_, block in self._entries if not block.split]
        for block in whole:
            self.take(block)
        return whole

    def leaves_rest(self, block: Block, size: int) -> bool:
        """Tell whether ``block`` is split when ``size`` bytes of it are handed out."""
        rest = block.size - size
        return rest >= MIN_BLOCK if self.small else rest > SMALL_REQUEST


def merge(lower: Block, upper: Block) -> Block:
    """Let ``lower`` absorb the block above it; so a segment's first block stays the same."""
    lower.size += upper.size
    lower.next = upper.next
    if upper.next is not None:
        upper.next.prev = lower
    return lower


def describe_segment(head: Block) -> dict[str, Any]:
    """Return the segment that begins with ``head`` as ``torch.cuda.memory_snapshot`` does."""
    blocks: list[Block] = []
    block: Block | None = head
    while block is not None:
        blocks.append(block)
        block = block.next
    allocated = sum(block.size for block in blocks if block.allocated)
    return {
        "address": head.address,
        "total_size": sum(block.size for block in blocks),
        "allocated_size": allocated,
        "active_size": allocated,
        "requested_size": sum(block.requested for block in blocks if block.allocated),
        "stream": 0,
        "segment_type": head.pool.name,
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "frames": [],
        "blocks": [_describe_block(block) for block in blocks],
    }


def _describe_block(block: Block) -> dict[str, Any]:
    return {
        "address": block.address,
        "size": block.size,
        "requested_size": block.requested if block.allocated else 0,
        "state": "active_allocated" if block.allocated else "inactive",
        "frames": [],
    }

"""The blocks of PyTorch's caching allocator, its pools of cached ones, and its statistics."""

from __future__ import annotations

from bisect import bisect_left, insort
from copy import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_gpumem.simulator.policy import Policy


class Block:
    """A range of a segment, handed out or cached; ``size`` and ``requested`` are bytes.

    ``cached_at`` is how often its pool had been asked for a block when it was cached.
    """

    __slots__ = (
        "address",
        "allocated",
        "cached",
        "cached_at",
        "next",
        "pool",
        "prev",
        "requested",
        "size",
        "stream",
    )

    cached_at: int

    def __init__(self, address: int, size: int, pool: Pool, stream: int = 0) -> None:
        self.address = address
        self.size = size
        self.requested = 0
        self.pool = pool
        self.stream = stream
        """Number of the stream that it is handed out to; 0 is the default one."""
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
        "active",
        "active_bytes",
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
        # The same, until a block waits for another stream.
        self.active = self.allocation
        self.active_bytes = self.allocated_bytes

    def all(self) -> list[Figure]:
        """Return each of them."""
        return [getattr(self, name) for name in self.__slots__]

    def handed_out(self, block: Block) -> None:
        """Count a block that a tensor got."""
        self.allocation.add(1)
        self.allocated_bytes.add(block.size)
        self.requested_bytes.add(block.requested)
        if self.active is not self.allocation:
            self.active.add(1)
            self.active_bytes.add(block.size)

    def taken_back(self, block: Block) -> None:
        """Count a block that a tensor gave back and nobody else uses."""
        self.allocation.take(1)
        self.allocated_bytes.take(block.size)
        self.requested_bytes.take(block.requested)
        if self.active is not self.allocation:
            self.active.take(1)
            self.active_bytes.take(block.size)

    def waits(self, block: Block) -> None:
        """Count a block that a tensor gave back and another stream still uses: it stays active."""
        if self.active is self.allocation:
            self.active, self.active_bytes = copy(self.allocation), copy(self.allocated_bytes)
        self.allocation.take(1)
        self.allocated_bytes.take(block.size)

    def waited(self, block: Block) -> None:
        """Count one of these that no stream uses any more."""
        self.requested_bytes.take(block.requested)
        self.active.take(1)
        self.active_bytes.take(block.size)

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
        self.asked = 0
        """How often it was asked for a block while old ones were to be collected."""
        # Addresses differ, so that the comparison of two entries never reaches the blocks.
        self._entries: list[tuple[int, int, int, Block]] = []

    def put(self, block: Block) -> None:
        """Cache ``block``."""
        block.cached = True
        block.cached_at = self.asked
        insort(self._entries, (block.stream, block.size, block.address, block))

    def take(self, block: Block) -> None:
        """Take out ``block``, which is cached."""
        block.cached = False
        del self._entries[bisect_left(self._entries, (block.stream, block.size, block.address))]

    def take_best(self, size: int, stream: int, policy: Policy) -> Block | None:
        """Take the stream's smallest block that holds ``size``; of equal ones the lowest.

        None where there is none, or where the policy forbids to hand out that one.
        """
        entries = self._entries
        index = bisect_left(entries, (stream, size))
        if index == len(entries):
            return None
        of, held, _, block = entries[index]
        if of != stream or (policy.max_split is not None and not policy.allows(held, size)):
            return None
        del entries[index]
        block.cached = False
        return block

    def of_stream(self, stream: int) -> list[Block]:
        """Return the stream's cached blocks, smallest first."""
        first = bisect_left(self._entries, (stream,))
        after = bisect_left(self._entries, (stream + 1,))
        return [block for *_, block in self._entries[first:after]]

    def whole_segments(self) -> list[Block]:
        """Return the blocks that are all of their segment, in PyTorch's order of release."""
        return [block for *_, block in self._entries if not block.split]


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
        "active_size": sum(block.size for block in blocks if not block.cached),
        "requested_size": sum(block.requested for block in blocks if block.allocated),
        "stream": head.stream,
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
        "state": _state(block),
        "frames": [],
    }


def _state(block: Block) -> str:
    if block.allocated:
        return "active_allocated"
    return "inactive" if block.cached else "active_pending_free"

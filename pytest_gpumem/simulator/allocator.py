"""PyTorch's caching allocator as plain bookkeeping: its policy and its segments.

Policy, constants and statistics follow ``c10/cuda/CUDACachingAllocator.cpp`` and
``c10/core/AllocatorConfig.h`` (native backend). No memory is held here: addresses are made up,
``reserve`` and ``release`` stand for cudaMalloc and cudaFree, and streams have no work left to do.
"""

from __future__ import annotations

import functools
import marshal
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec, TypeVar

from pytest_gpumem.simulator.blocks import Block, Figure, describe_segment, merge
from pytest_gpumem.simulator.policy import MIN_BLOCK, SMALL_REQUEST
from pytest_gpumem.simulator.segments import OutOfMemory, Segments, counted

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.simulator.exhaustion import Refusing
    from pytest_gpumem.simulator.policy import Policy

_FIRST_ADDRESS = 0x7F00_0000_0000
_DEVICE_SPACE = 2**48
_P = ParamSpec("_P")
_R = TypeVar("_R")


def _exclusive(
    method: Callable[Concatenate[CachingAllocator, _P], _R],
) -> Callable[Concatenate[CachingAllocator, _P], _R]:
    """Run the method alone, with everything given back before it settled."""

    @functools.wraps(method)
    def alone(self: CachingAllocator, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            with self._lock:
                self._settle()
                nested, self._busy = self._busy, True
                try:
                    return method(self, *args, **kwargs)
                finally:
                    self._busy = nested
        finally:
            self._settle()

    return alone


class CachingAllocator:
    """PyTorch's allocator for one device of one process; safe to use from several threads.

    ``reserve(bytes)`` answers whether the card had room for a segment, ``release(bytes)`` gives
    one back, ``total`` is what a memory fraction is a fraction of, ``index`` the number of the
    device in its process.

    A collected tensor gives its block back at any moment, even in the middle of a call of the
    same thread. So ``free`` and ``empty_cache`` only queue what they want; it is settled before
    they return, or, where a call is under way, as soon as that call ends.
    """

    refusing: ClassVar[Refusing | None] = None
    """What makes the card full before it is, for all devices of this process."""

    def __init__(
        self,
        reserve: Callable[[int], bool],
        release: Callable[[int], None],
        total: int,
        index: int = 0,
    ) -> None:
        # All devices of a process share one space of addresses.
        self._segments = Segments(reserve, release, total, _FIRST_ADDRESS + index * _DEVICE_SPACE)
        self._index = index
        self._lock = threading.RLock()
        self._busy = False
        self._returned: deque[Block | None] = deque()
        self._small, self._large = self._segments.small, self._segments.large
        self._all = self._segments.figures
        self._oversize = Figure()
        self._shared: set[Block] = set()
        """Those that other streams were told to use."""
        self._waiting: list[Block] = []
        """Those of them that were given back."""
        self._told: bytes | None = None
        """What ``stats`` returned last; None: something has changed since."""

    @property
    def allocated(self) -> int:
        """Bytes in blocks handed out, rounded as the allocator rounds them."""
        self._settle()
        return self._all.allocated_bytes.current

    @property
    def peak(self) -> int:
        """Highest bytes in blocks handed out, since the start or a reset."""
        return self._all.allocated_bytes.peak

    @property
    def reserved(self) -> int:
        """Bytes in segments, handed out or cached."""
        self._settle()
        return self._all.reserved_bytes.current

    def note_segments(self, noting: Callable[[str, int, int], None]) -> None:
        """Have ``noting`` called with action, address and size of each segment from now on."""
        self._segments.noting = noting

    @property
    def memory_fraction(self) -> float:
        """The share of the card's total that segments may take; ``None`` sets it back to 1.0.

        Raises:
            ValueError: when it is set to less than 0 or more than 1.

        """
        return self._segments.fraction

    @memory_fraction.setter
    def memory_fraction(self, fraction: float | None) -> None:
        fraction = 1.0 if fraction is None else fraction
        if not 0 <= fraction <= 1:
            raise ValueError(f"memory fraction {fraction!r} is outside 0.0 ... 1.0")
        self._segments.fraction = fraction

    @property
    def policy(self) -> Policy:
        """How blocks are cut and given back."""
        return self._segments.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        with self._lock:
            self._segments.policy, self._told = policy, None

    @property
    def allowed(self) -> int | None:
        """Bytes that segments may take by the memory fraction; ``None`` at 1.0: no limit."""
        return self._segments.allowed

    @_exclusive
    def malloc(self, size: int, stream: int = 0) -> Block:
        """Hand out a block for ``size`` bytes (more than 0) to the stream with this number.

        Raises:
            OutOfMemory: when a new segment is needed and fits neither the card nor the memory
                fraction, although every whole cached segment was given back.

        """
        if size <= 0:
            raise ValueError(f"a block of {size} bytes: an empty tensor takes no block")
        self._told = None
        if self._waiting:
            self._cache_waiting()
        segments = self._segments
        policy = segments.policy
        plain = -(-size // MIN_BLOCK) * MIN_BLOCK
        rounded = policy.rounded(size) if policy.divisions else plain
        if self.refusing is not None:
            self._ask(self.refusing, rounded)
        pool = self._small if rounded <= SMALL_REQUEST else self._large
        block = segments.reuse(pool, rounded, stream) or segments.take(pool, rounded, stream)
        self._cut(block, rounded)
        block.requested = size
        block.allocated = True
        self._all.handed_out(block)
        pool.figures.handed_out(block)
        if policy.max_split is not None and policy.is_oversize(block.size):
            self._oversize.add(1)
        return block

    def _ask(self, refusing: Refusing, size: int) -> None:
        allocated = self._all.allocated_bytes.current
        if refusing.refuses(self._index, allocated, size):
            segments = self._segments
            segments.refused += 1
            reserved = self._all.reserved_bytes.current
            raise OutOfMemory(size, allocated, reserved, segments.allowed)

    def use(self, block: Block, stream: int) -> None:
        """Say that another stream uses ``block``: once given back it is free when that is done."""
        if stream != block.stream:
            self._shared.add(block)

    def free(self, block: Block) -> None:
        """Give ``block`` back to the cache; it merges with cached neighbours.

        Raises:
            ValueError: when the block is not handed out.

        """
        if not block.allocated:
            raise ValueError(f"the block at {block.address:#x} is not handed out")
        block.allocated = False
        self._returned.append(block)
        self._settle()

    def empty_cache(self) -> None:
        """Give every segment that is cached as a whole back to the card."""
        self._returned.append(None)
        self._settle()

    def stats(self) -> dict[str, Any]:
        """Return what ``torch._C._cuda_memoryStats`` returns: nested counts and bytes.

        A copy of what it returned last, if nothing has changed: it is asked several times a test,
        and to put forty dicts together takes ten times as long.
        """
        told = None if self._returned else self._told
        found: dict[str, Any] = marshal.loads(told or self._count())  # noqa: S302  # written here
        return found

    @_exclusive
    def _count(self) -> bytes:
        """Return what is counted, written down until something changes."""
        if self._told is None:
            self._told = marshal.dumps(counted(self._segments, self._oversize))
        return self._told

    @_exclusive
    def reset_peak_stats(self) -> None:
        """Let every peak start again from its current value."""
        self._told = None
        for figure in self._figures():
            figure.peak = figure.current

    @_exclusive
    def reset_accumulated_stats(self) -> None:
        """Let every sum (``allocated``, ``freed``) and every event counter start from 0."""
        self._told = None
        for figure in self._figures():
            figure.allocated = figure.freed = 0
        self._segments.clear_counters()

    @_exclusive
    def snapshot(self) -> list[dict[str, Any]]:
        """Return the segments and their blocks as ``torch.cuda.memory_snapshot()`` does."""
        heads = sorted(self._segments.heads.items())
        return [describe_segment(head) | {"device": self._index} for _, head in heads]

    def _figures(self) -> list[Figure]:
        pools = (self._all, self._small.figures, self._large.figures)
        each = [figure for figures in pools for figure in figures.all()]
        return [*each, self._oversize, self._segments.oversize]

    def _settle(self) -> None:
        """Do what ``free`` and ``empty_cache`` queued, unless a call under way will."""
        while self._returned and self._lock.acquire(blocking=False):
            try:
                if self._busy:
                    return
                self._busy = True
                try:
                    self._settle_one()
                finally:
                    self._busy = False
            finally:
                self._lock.release()

    def _settle_one(self) -> None:
        if not self._returned:  # another thread was faster
            return
        block = self._returned.popleft()
        self._told = None
        if block is None:
            self._cache_waiting()
            self._segments.release_cached()
            return
        policy = self._segments.policy
        if policy.max_split is not None and policy.is_oversize(block.size):
            self._oversize.take(1)
        if block in self._shared:
            self._shared.remove(block)
            self._all.waits(block)
            block.pool.figures.waits(block)
            self._waiting.append(block)
            return
        self._all.taken_back(block)
        block.pool.figures.taken_back(block)
        self._cache(block)

    def _cache_waiting(self) -> None:
        """Cache what other streams used: they are done."""
        waiting, self._waiting = self._waiting, []
        for block in waiting:
            self._all.waited(block)
            block.pool.figures.waited(block)
            self._cache(block)

    def _cut(self, block: Block, size: int) -> None:
        """Make ``block`` as small as policy allows and cache the rest of it."""
        pool, was_split = block.pool, block.split
        if self._leaves_rest(block, size):
            rest = Block(block.address + size, block.size - size, pool, block.stream)
            rest.prev, rest.next = block, block.next
            if rest.next is not None:
                rest.next.prev = rest
            block.next = rest
            block.size = size
            pool.put(rest)
            count, moved = (0, -size) if was_split else (1, rest.size)
        elif was_split:
            count, moved = -1, -block.size
        else:
            return
        self._all.inactive_moved(count, moved)
        pool.figures.inactive_moved(count, moved)

    def _leaves_rest(self, block: Block, size: int) -> bool:
        """Tell whether ``block`` is split when ``size`` bytes of it are handed out."""
        rest = block.size - size
        if block.pool.small:
            return rest >= MIN_BLOCK
        policy = self._segments.policy
        return rest > SMALL_REQUEST and (policy.max_split is None or not policy.is_oversize(size))

    def _cache(self, block: Block) -> None:
        """Put a block that nobody uses into its pool, merged with its cached neighbours."""
        pool, count, moved = block.pool, 0, 0
        if block.prev is not None and block.prev.cached:
            pool.take(block.prev)
            count, moved = count - 1, moved - block.prev.size
            block = merge(block.prev, block)
        if block.next is not None and block.next.cached:
            pool.take(block.next)
            count, moved = count - 1, moved - block.next.size
            block = merge(block, block.next)
        if block.split:
            count, moved = count + 1, moved + block.size
        pool.put(block)
        self._all.inactive_moved(count, moved)
        pool.figures.inactive_moved(count, moved)

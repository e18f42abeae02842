"""The blocks of a state as one stream of chunks, copied from and to wherever they are."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import sys
import threading
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import numpy as np

from pytest_gpumem.archive import torch_private
from pytest_gpumem.archive.codec import ALIGN, CHUNK, KINDS, Bytes
from pytest_gpumem.errors import DamagedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Future

    from pytest_gpumem.archive.desk import Desk

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")
_MOST_THREADS = 8
AHEAD: Final = 3
"""Chunks that may be done and wait for the one that comes before them."""
_POPULATE_WRITE = 23
"""``MADV_POPULATE_WRITE`` of Linux, which Python does not name."""


class Chunk(NamedTuple):
    """A part of the stream, at most ``CHUNK`` bytes."""

    number: int
    kind: str
    start: int
    """Offset in the stream."""
    size: int


class Layout:
    """How blocks follow one another in the stream, and where it is cut into chunks.

    Blocks of one kind follow one another, each at a multiple of ``ALIGN``; a new kind begins a
    new chunk. ``runs`` are the kinds in order, each with the sizes of its blocks in bytes.

    Raises:
        DamagedError: when that is no such list.

    """

    def __init__(self, runs: Sequence[tuple[str, Sequence[int]]]) -> None:
        self.sizes: list[int] = []
        self.starts: list[int] = []
        self.chunks: list[Chunk] = []
        at = 0
        for kind, sizes in runs:
            begin = at
            if kind not in KINDS or not all(type(size) is int and size > 0 for size in sizes):
                raise DamagedError("its blocks are not a list of sizes")
            for size in sizes:
                self.starts.append(at)
                self.sizes.append(size)
                at += -(-size // ALIGN) * ALIGN
            if at - begin > 2**50:
                raise DamagedError("its blocks are larger than any memory")
            for start in range(begin, at, CHUNK):
                chunk = Chunk(len(self.chunks), kind, start, min(CHUNK, at - start))
                self.chunks.append(chunk)

    def pieces(self, chunk: Chunk) -> Iterator[tuple[int, int, int, int]]:
        """Yield (block, offset in the block, offset in the chunk, bytes) for the whole chunk."""
        end = chunk.start + chunk.size
        block = bisect_right(self.starts, chunk.start) - 1
        while block < len(self.starts) and self.starts[block] < end:
            first = max(self.starts[block], chunk.start)
            last = min(self.starts[block] + self.sizes[block], end)
            if first < last:
                yield block, first - self.starts[block], first - chunk.start, last - first
            block += 1

    def chunks_of(self, blocks: Iterable[int]) -> list[Chunk]:
        """Return the chunks in which these blocks lie."""
        starts = [chunk.start for chunk in self.chunks]
        found: set[int] = set()
        for block in blocks:
            first = bisect_right(starts, self.starts[block]) - 1
            last = bisect_right(starts, self.starts[block] + self.sizes[block] - 1)
            found.update(range(first, last))
        return [self.chunks[number] for number in sorted(found)]


def fresh(size: int, device: str) -> Any:
    """Return a new ``torch.UntypedStorage`` of ``size`` bytes."""
    import torch

    return torch.empty(size, dtype=torch.uint8, device=device).untyped_storage()


def _populate(address: int, size: int) -> None:
    """Have the system back new memory at once, rather than page by page; see madvise(2).

    To touch each page takes longer than to read it from the page cache. Large pages cost a quarter
    of that where there are some, and 4 times as much where the system has to make them first.
    """
    if sys.platform == "linux":
        first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (address + size - first) // mmap.PAGESIZE * mmap.PAGESIZE
        # Systems before Linux 5.14 refuse it, which costs nothing but time.
        if length > 0:
            _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _POPULATE_WRITE)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


class Place:
    """Where a block lies: an address of main memory, or bytes of a device."""

    __slots__ = ("address", "bytes", "storage")

    def __init__(self, storage: Any, offset: int, size: int) -> None:
        self.storage = storage  # keeps it alive
        base = torch_private.main_memory(storage)
        self.address, self.bytes = (base or 0) + offset, None
        if base is None:
            import torch

            view = torch.empty(0, dtype=torch.uint8, device=storage.device)
            self.bytes = view.set_(storage, offset, (size,), (1,))


class Memory:
    """The places of some blocks; ``None`` for a block that nobody wants."""

    def __init__(self, layout: Layout, places: Sequence[Place | None]) -> None:
        self.layout = layout
        self._places = places
        self._pinned = any(place is not None and place.bytes is not None for place in places)

    def gather(self, chunk: Chunk, desk: Desk, *, copied: bool = False) -> Bytes:
        """Return the bytes of a chunk: a copy on ``desk``, or the memory itself where that will do.

        Other threads may write to the memory itself meanwhile.
        """
        pieces = list(self.layout.pieces(chunk))
        if not copied and (whole := self._whole(pieces, chunk)) is not None:
            return whole
        staging, out = desk.staging(pinned=self._pinned)
        end = 0
        for block, at, to, size in pieces:
            place = self._places[block]
            assert place is not None  # noqa: S101  # only restoring leaves blocks out
            out[end:to] = 0
            end = to + size
            if place.bytes is None:
                ctypes.memmove(out.ctypes.data + to, place.address + at, size)
            else:
                staging[to:end].copy_(place.bytes[at : at + size])
        out[end : chunk.size] = 0
        return out[: chunk.size]

    def scatter(self, chunk: Chunk, decode: Callable[[Bytes], None], desk: Desk) -> None:
        """Have ``decode`` write the bytes of a chunk, and bring them to their places."""
        pieces = list(self.layout.pieces(chunk))
        if (whole := self._whole(pieces, chunk)) is not None:
            _populate(whole.ctypes.data, chunk.size)
            decode(whole)
            return
        staging, out = desk.staging(pinned=self._pinned)
        decode(out[: chunk.size])
        for block, at, to, size in pieces:
            place = self._places[block]
            if place is None:
                continue
            if place.bytes is None:
                ctypes.memmove(place.address + at, out.ctypes.data + to, size)
            else:
                place.bytes[at : at + size].copy_(staging[to : to + size])

    def _whole(self, pieces: list[tuple[int, int, int, int]], chunk: Chunk) -> Bytes | None:
        """Return the memory of a chunk that is one piece of main memory."""
        block, at, _, size = pieces[0]
        place = self._places[block]
        if size != chunk.size or place is None or place.bytes is not None:
            return None
        view: Any = (ctypes.c_uint8 * size).from_address(place.address + at)
        return np.frombuffer(view, np.uint8)


def each(
    work: Callable[[_Task], _Result], tasks: Sequence[_Task], *, reading: bool = False
) -> list[_Result]:
    """Return ``work`` of each task, done by several threads, this one among them.

    They take them as they come: handing each of them over would take as long as reading it. Where
    they are ``reading`` there is one more than there are CPUs, for one of them waits for the disk.
    """
    found: dict[int, _Result] = {}
    waiting = iter(list(enumerate(tasks)))  # one step of it is atomic
    # Neither the error nor a future of it may be in a variable of a frame in its traceback: that
    # cycle would keep the callers' variables, a state's memory among them, until it is collected.
    failed = threading.Event()

    def take() -> None:
        try:
            for at, task in waiting:
                if failed.is_set():
                    return
                found[at] = work(task)
        except BaseException:
            failed.set()
            raise

    others = min(threads(len(tasks)) + reading, len(tasks)) - 1
    with ThreadPoolExecutor(max(1, others), "gpumem-archive") as pool:
        helping: list[Future[None]] = []
        # As the process ends, or at the limit of its threads, this one does what they would.
        with contextlib.suppress(RuntimeError):
            for _ in range(others):
                helping.append(pool.submit(take))
        take()
        while helping:
            helping.pop().result()
    return [found[at] for at in range(len(tasks))]


def in_turn(
    work: Callable[[Chunk], _Result],
    then: Callable[[Chunk, _Result], None],
    chunks: Sequence[Chunk],
) -> None:
    """Do ``work`` of each chunk in several threads, and ``then``, with what came of it, in order.

    Whoever is done with a chunk does what is next in order, his own or another one's, and goes on:
    nobody waits for a thread that the system lets wait, unless he is ``AHEAD`` chunks before it.
    """
    turn = threading.Condition()
    ready: dict[int, _Result] = {}
    now, failed = 0, False

    def one(at: int) -> None:
        nonlocal now, failed
        try:
            found = work(chunks[at])
            with turn:
                ready[at] = found
                while now in ready and not failed:
                    then(chunks[now], ready.pop(now))
                    now += 1
                    turn.notify_all()
                turn.wait_for(lambda: failed or at < now + AHEAD)
        except BaseException:
            with turn:
                failed = True
                turn.notify_all()
            raise

    each(one, range(len(chunks)))


def threads(tasks: int) -> int:
    """Return how many threads work on so many tasks."""
    return min(_cpus(), _MOST_THREADS, tasks)


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

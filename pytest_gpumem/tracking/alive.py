"""What was alive on a card at one moment, from torch's record of its allocations and frees.

A snapshot of torch's allocator has the blocks that live when it is taken and the events before
that, oldest first. Played backwards from these blocks, the events give what lived when the first
of them happened; played forwards from there they give the bytes after each event, and at the
moment that is looked for what these bytes are. So one snapshot at the end is all that is needed,
whatever was there before the record began, and a record of which only the end was kept is right
about that end. Two passes forwards and one back: a million events take some seconds.

Sizes are those that were asked for, as ``CardUsage.own`` has them. A block lives until
``free_completed``, with which the allocator counts it off (c10/cuda/CUDACachingAllocator.cpp).
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpumem.records import AliveGroup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    Frames = Sequence[Mapping[str, Any]]
    """As torch has them: ``filename``, ``line`` and ``name``, innermost frame first."""

THIS_TEST = "this test"
NO_FRAME = "no Python frame"
"""Where a thread of C++ allocated, as autograd's does for a backward pass on a real card."""
UNKNOWN = "unknown"
MOST_GROUPS = 100
"""Of one moment; smaller ones are kept as their sum."""

_OURS = str(Path(__file__).parents[1]) + os.sep


class Turn(NamedTuple):
    """From when on somebody is charged for what is allocated."""

    time: int
    """Microseconds since the epoch."""
    owner: str
    """``THIS_TEST``, or what is set up or torn down."""


class Block:
    """An allocation that was alive."""

    __slots__ = ("address", "born", "died", "frames", "size")

    def __init__(self, address: int, size: int, frames: Frames, born: int = 0) -> None:
        self.address = address
        self.size = size
        """Bytes asked for."""
        self.frames = frames
        self.born = born
        """When it was allocated, as in ``Turn``; 0: before the events that are kept."""
        self.died = sys.maxsize


class Moment(NamedTuple):
    """What was alive at one moment."""

    blocks: tuple[Block, ...]
    refused: Mapping[str, Any] | None = None
    """The event of running out of memory, where that is the moment."""

    @property
    def size(self) -> int:
        """Bytes that were asked for."""
        return sum(block.size for block in self.blocks)


def replay(
    trace: Sequence[Mapping[str, Any]],
    living: Iterable[Mapping[str, Any]],
    turns: Sequence[Turn] = (),
    *,
    felled: bool = False,
) -> Moment:
    """Return what was alive at the peak, or when memory ran out.

    Args:
        trace: events of one device as a snapshot has them, oldest first.
        living: blocks of its segments that are in use when it was taken.
        turns: who was charged when, oldest first; the peak is that of the test's own turns. All
            of it is the test's unless given.
        felled: whether the moment is the last at which memory ran out, if there is one.

    """
    start = _at_start(trace, living)
    index = _last_refusal(trace) if felled else None
    refused = None if index is None else trace[index]
    if index is None:
        index = _peak(trace, sum(block.size for block in start.values()), turns)
    alive = dict(start)
    for event in trace[:index]:
        if event["action"] == "alloc":
            alive[event["addr"]] = _block(event, event.get("time_us", 0))
        elif event["action"] == "free_completed":
            alive.pop(event["addr"], None)
    found = tuple(alive.values())
    for event in trace[index:]:
        if event["action"] == "free_completed" and event["addr"] in alive:
            alive.pop(event["addr"]).died = event.get("time_us", 0)
    return Moment(found, refused)


def _block(event: Mapping[str, Any], born: int = 0) -> Block:
    return Block(event["addr"], event["size"], event.get("frames", ()), born)


def _at_start(
    trace: Sequence[Mapping[str, Any]], living: Iterable[Mapping[str, Any]]
) -> dict[int, Block]:
    """Return what lived before the first event, by address."""
    alive = {
        each["address"]: Block(
            each["address"], each.get("requested_size", each["size"]), each.get("frames", ())
        )
        for each in living
    }
    for event in reversed(trace):
        if event["action"] == "alloc":
            alive.pop(event["addr"], None)
        elif event["action"] == "free_completed":
            # With the stack of its allocation: that is what torch keeps where frees have none.
            alive[event["addr"]] = _block(event)
    return alive


def _last_refusal(trace: Sequence[Mapping[str, Any]]) -> int | None:
    found = (at for at in range(len(trace) - 1, -1, -1) if trace[at]["action"] == "oom")
    return next(found, None)


def _peak(trace: Sequence[Mapping[str, Any]], size: int, turns: Sequence[Turn]) -> int:
    """Return after how many events most was alive in the test's own turns; ``size`` at first."""
    own = not turns or turns[0].owner == THIS_TEST
    most, index, place = size if own else -1, 0, 0
    for at, event in enumerate(trace):
        time = event.get("time_us", 0)
        while place < len(turns) and turns[place].time <= time:
            own = turns[place].owner == THIS_TEST
            place += 1
            if own and size > most:
                most, index = size, at
        if event["action"] == "alloc":
            size += event["size"]
            if own and size > most:
                most, index = size, at + 1
        elif event["action"] == "free_completed":
            size -= event["size"]
    own = any(turn.owner == THIS_TEST for turn in turns[place:])
    return len(trace) if most < 0 or (own and size > most) else index


# Lines


def line_of(frames: Frames, root: Path) -> str:
    """Return ``file:line function`` of the innermost frame that is the user's own code.

    Not torch's, not of ``site-packages`` or Python's library: where all are, ``in torch`` or
    whatever package the innermost one is in; ``NO_FRAME`` where there is none.
    """
    first = ""
    for frame in frames:
        package = _package(frame["filename"], str(root))
        if not package:
            return f"{_shown(frame['filename'], root)}:{frame['line']} {frame['name']}"
        first = first or package
    return f"in {first}" if first else NO_FRAME


@functools.lru_cache(maxsize=4096)
def _package(filename: str, root: str) -> str:
    """Return which package that is not the user's a file is of, "" if it is the user's own."""
    if filename.startswith(_OURS):
        return "pytest_gpumem"
    if filename.startswith(_torch()):
        return "torch"
    if filename.startswith("<"):
        return filename
    # A project may lie in such a place itself, and have one of them inside.
    inside = filename.removeprefix(root + os.sep)
    parts = Path(inside).parts
    for installed in ("site-packages", "dist-packages"):
        if installed in parts:
            after = parts[parts.index(installed) + 1 :]
            return after[0].removesuffix(".py") if after else installed
    return "Python's library" if inside.startswith(_LIBRARY) else ""


_LIBRARY = os.path.dirname(os.__file__) + os.sep  # noqa: PTH120  # sysconfig would be slow


def _torch() -> str:
    """Return the folder of torch, a text that no path begins with where it is not loaded."""
    file = getattr(sys.modules.get("torch"), "__file__", None)
    return "\0" if file is None else os.path.dirname(file) + os.sep  # noqa: PTH120  # of each frame


def _shown(filename: str, root: Path) -> str:
    path = Path(filename)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else filename


# Kinds

_BACKWARD = {"backward", "grad", "_engine_run_backward"}
_CONVERTING = {"_apply", "convert", "to_empty"}
_FORWARD = {"_call_impl", "_wrapped_call_impl"}


def kind_of(frames: Frames) -> str:
    """Return what torch allocated it for, as far as the innermost frames that decide it tell.

    What a backward pass allocates is a ``gradient``, of activations too; what ``Module.to`` and
    the modules of ``torch.nn`` allocate when they are made is a ``parameter`` (buffers too);
    what is allocated within the call of a module is an ``activation``.
    """
    torch = _torch()
    for frame in frames:
        if frame["filename"].startswith(torch):
            place, name = frame["filename"][len(torch) :].replace(os.sep, "/"), frame["name"]
            if name in _BACKWARD and place.startswith(("_tensor.py", "autograd/")):
                return "gradient"
            if place == "nn/parameter.py":
                return "parameter"
            if place == "nn/modules/module.py" and name in _FORWARD:
                return "activation"
            if place == "nn/modules/module.py" and name in _CONVERTING:
                return "parameter"
            if place.startswith("nn/modules/") and name in {"__init__", "reset_parameters"}:
                return "parameter"
            if place.startswith("optim/") and name == "_init_group":
                return "optimizer state"
    return UNKNOWN


# Groups


def grouped(
    blocks: Iterable[Block],
    owner: Callable[[Block], str],
    kind: Callable[[Block], str],
    root: Path,
) -> tuple[AliveGroup, ...]:
    """Return the blocks by line, owner and kind, most bytes first; they sum to what all have.

    Args:
        blocks: what was alive.
        owner: says whose a block is.
        kind: says what was seen to be its use, "" where nothing was seen.
        root: directory from which files are named.

    """
    sums: dict[tuple[str, str, str], list[int]] = {}
    told: dict[int, tuple[str, str]] = {}
    for block in blocks:
        # Thousands of blocks have one stack, as a rule in one list.
        known = told.get(id(block.frames))
        if not block.frames:
            known = NO_FRAME if block.born else "", UNKNOWN
        elif known is None:
            known = line_of(block.frames, root), kind_of(block.frames)
            told[id(block.frames)] = known
        key = known[0], owner(block), _surer(kind(block), known[1])
        found = sums.setdefault(key, [0, 0])
        found[0] += block.size
        found[1] += 1
    return bounded(
        AliveGroup(size, who, what, where, count)
        for (where, who, what), (size, count) in sums.items()
    )


def _surer(seen: str, by_stack: str) -> str:
    """Return what was seen in the heap where that says anything, or else what a stack says."""
    return by_stack if seen in ("", UNKNOWN, "other") and by_stack != UNKNOWN else seen or UNKNOWN


def bounded(groups: Iterable[AliveGroup]) -> tuple[AliveGroup, ...]:
    """Return the largest groups, and the sum of the others as one."""
    found = sorted(groups, key=lambda each: (-each.size, each.where, each.owner))
    rest = found[MOST_GROUPS:]
    if not rest:
        return tuple(found)
    size, count = sum(each.size for each in rest), sum(each.allocations for each in rest)
    other = AliveGroup(size, f"{len(rest)} smaller entries", UNKNOWN, "", count)
    return (*found[:MOST_GROUPS], other)

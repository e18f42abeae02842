"""What ``_record_memory_history`` of torch asks for: where blocks were allocated, and every event.

Entries, what has a stack and what has none follow ``c10/cuda/CUDACachingAllocator.cpp``
(``record_trace``, ``maybeGatherContext``) and ``torch/csrc/cuda/Module.cpp``; the stacks are those
of Python.
"""

from __future__ import annotations

import sys
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gpumem.clock import clock

if TYPE_CHECKING:
    from pytest_gpumem.simulator.blocks import Block

__tracebackhide__ = True  # pytest shows the test's line last, none of these

_PACKAGE = str(Path(__file__).parents[1])
"""Our own frames are in no stack."""

_Stack = list[tuple[Any, int]]
"""Code and line, innermost frame first."""


class _Entry:
    """One event; ``stack`` is None where it has none."""

    __slots__ = ("action", "address", "size", "stack", "time")

    def __init__(self, action: str, address: int, size: int, stack: _Stack | None) -> None:
        self.action = action
        self.address = address
        self.size = size
        self.stack = stack
        self.time = clock.time_ns() // 1000


class History:
    """Keeps stacks and events from ``record`` on; costs next to nothing before."""

    def __init__(self) -> None:
        self.recording = False
        self._gathers = _NOTHING
        self._most = 0
        """Events that are kept of each device."""
        self._events: dict[int, deque[_Entry]] = {}
        self._living: dict[int, _Stack | None] = {}
        """By the address of each block that was handed out since recording began."""
        self._stacks: dict[tuple[int, ...], _Stack] = {}
        """Each stack once: thousands of events come from one line."""

    def record(
        self,
        enabled: str | None,
        context: str | None,
        most: int,
        *,
        clear: bool,
    ) -> None:
        """Start (``"state"``: living blocks, ``"all"``: every event too) or stop (None).

        Args:
            enabled: as torch has it.
            context: what has its stack: ``"state"`` living blocks, ``"alloc"`` allocations too,
                ``"all"`` every event, None nothing.
            most: events that are kept of each device, the last ones.
            clear: whether what was kept until now is forgotten.

        """
        if enabled is None or clear:
            self._events.clear()
            self._stacks.clear()
        self.recording = enabled is not None
        self._gathers = _GATHERS[context] if self.recording else _NOTHING
        self._most = min(most, sys.maxsize) if enabled == "all" else 0

    def allocated(self, block: Block, device: int) -> None:
        """Keep the stack of a new block."""
        if self.recording:
            stack = self._stack() if self._gathers >= _STATE else None
            self._note("alloc", block.address, block.requested, device, stack)
            self._living[block.address] = stack

    def freed(self, block: Block, device: int) -> None:
        """Forget the stack of a block; its memory may be used again at once."""
        if not (self.recording or self._living):
            return
        stack = self._living.pop(block.address, None)
        if self.recording:
            if self._gathers >= _ALL:
                stack = self._stack()
            for action in ("free_requested", "free_completed"):
                self._note(action, block.address, block.requested, device, stack)

    def refused(self, size: int, free: int, device: int) -> None:
        """Keep an out-of-memory event."""
        if self.recording:
            stack = self._stack() if self._gathers >= _STATE else None
            self._note("oom", free, size, device, stack)

    def segment(self, device: int, action: str, address: int, size: int) -> None:
        """Keep that a segment was taken from the card or given back: ``segment_alloc``, ..."""
        if self.recording:
            taken = action == "segment_alloc"
            stack = self._stack() if self._gathers >= (_ALLOC if taken else _ALL) else None
            self._note(action, address, size, device, stack)

    def describe(self, segments: list[dict[str, Any]], devices: int) -> dict[str, Any]:
        """Return ``segments`` with their stacks, in the form of ``torch.cuda.memory._snapshot``."""
        frames = _Frames()
        for segment in segments:
            for block in segment["blocks"]:
                stack = self._living.get(block["address"])
                block["frames"] = [] if stack is None else frames.of(stack)
        told = {
            "segments": segments,
            "device_traces": [
                [_described(each, frames) for each in self._events.get(device, ())]
                for device in range(devices)
            ],
            "allocator_settings": {"expandable_segments": False, "max_split_size": -1},
            "external_annotations": [],
        }
        for device in range(devices) if self.recording else ():
            here = [each for each in segments if each["device"] == device]
            self._note("snapshot", 0, sum(each["active_size"] for each in here), device, None)
        return told

    def _note(
        self, action: str, address: int, size: int, device: int, stack: _Stack | None
    ) -> None:
        if not self._most:
            return
        entry = _Entry(action, address, size, stack if self._gathers >= _ALLOC else None)
        if device not in self._events:
            self._events[device] = deque(maxlen=self._most)
        self._events[device].append(entry)

    def _stack(self) -> _Stack:
        """Return the Python stack above this package."""
        stack: _Stack = []
        frame: Any = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            if not code.co_filename.startswith(_PACKAGE):
                stack.append((code, frame.f_lineno))
            frame = frame.f_back
        # By identity: the hash of a code object reads all of its bytecode.
        key = tuple([part for code, line in stack for part in (id(code), line)])
        return self._stacks.setdefault(key, stack)


_NOTHING, _STATE, _ALLOC, _ALL = range(4)
_GATHERS = {None: _NOTHING, "state": _STATE, "alloc": _ALLOC, "all": _ALL}
"""What has its stack, as ``RecordContext`` has it."""


class _Frames:
    """Stacks as torch describes them, each once: a snapshot has thousands of events of one line."""

    def __init__(self) -> None:
        self._known: dict[int, list[dict[str, Any]]] = {}

    def of(self, stack: _Stack) -> list[dict[str, Any]]:
        """Return the frames of a stack, which lives as long as this."""
        if id(stack) not in self._known:
            self._known[id(stack)] = [
                {"filename": code.co_filename, "line": line, "name": code.co_name}
                for code, line in stack
            ]
        return self._known[id(stack)]


def _described(entry: _Entry, frames: _Frames) -> dict[str, Any]:
    """Return an event as torch does, which leaves the frames out where there are none."""
    where = "device_free" if entry.action == "oom" else "addr"
    told = {"action": entry.action, where: entry.address, "size": entry.size, "stream": 0}
    told |= {"time_us": entry.time, "compile_context": "N/A", "user_metadata": ""}
    return told if entry.stack is None else told | {"frames": frames.of(entry.stack)}

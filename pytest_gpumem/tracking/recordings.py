"""Which tests are recorded: what the tracker knows of it, which most runs never have to do with."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pytest_gpumem import devices

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_gpumem.records import Alive
    from pytest_gpumem.tracking.meter import Meters
    from pytest_gpumem.tracking.recorder import Recorder
    from pytest_gpumem.tracking.turns import Turns
    from pytest_gpumem.tracking.verdict import TensorLedger

LOOKS = 10
"""Tests of a process that are looked at when they ran out of memory: each look is a pass over the
heap, 0.1 s with torch loaded, and hundreds of tests may run out of memory."""


class Recordings:
    """Has those tests recorded that are to be; costs the others nothing.

    Args:
        turns: who runs.
        meters: the cards in use.
        tensors: whose doing each living tensor is.
        root: directory from which files are named.
        stacks: whether the stacks of all living allocations are to be kept, for leaks.

    """

    def __init__(
        self,
        turns: Turns,
        meters: Meters,
        tensors: TensorLedger,
        root: Path,
        *,
        stacks: bool = False,
    ) -> None:
        self._known = turns, meters, tensors, root
        self._stacks = stacks
        self._next = ""
        self._recorder: Recorder | None = None
        """Of the running test."""
        self.wanted = stacks
        """Whether ``begin`` has anything to do."""
        self.running = False
        """Whether the running test is recorded."""
        self._looks = 0

    def record_next(self, nodeid: str) -> None:
        """Have the test ``nodeid`` recorded if it is the next one."""
        self._next, self.wanted = nodeid, True

    def begin(self, nodeid: str) -> None:
        """Begin to record what is to be, as far as torch is there; right as the test begins."""
        if self._stacks and "torch" in sys.modules:
            self._stacks = False
            devices.record_stacks()
        if self._next == nodeid:
            from pytest_gpumem.tracking.recorder import Known, Recorder

            self._recorder = Recorder(nodeid, Known(*self._known))
            self.running = True
        self._next, self.wanted = "", self._stacks

    def turn(self) -> None:
        """Take note that from now on somebody else may be charged."""
        if self._recorder is not None:
            self._recorder.turn()

    def look(self) -> None:
        """Take note of what torch uses memory for now, where its test is recorded."""
        if self._recorder is not None:
            self._recorder.look()

    def end(self, *, felled: bool, snapshots: Path | None = None) -> tuple[Alive, ...]:
        """Return what was alive in the test that has ended, if it was recorded.

        Args:
            felled: whether memory ran out in it: then the moment of that counts, not the peak.
            snapshots: directory into which the whole record is written.

        """
        recorder, self._recorder = self._recorder, None
        self.running = False
        return () if recorder is None else recorder.end(felled=felled, snapshots=snapshots)

    def left(self) -> tuple[Alive, ...]:
        """Return what tensors hold now in a test that ran out of memory and is not recorded.

        Their lines are not known, and neither is what has died since. Nothing after ``LOOKS``.
        """
        if self.running or "torch" not in sys.modules or self._looks == LOOKS:
            return ()
        self._looks += 1
        from pytest_gpumem.tracking.recorder import Known, left

        return left(Known(*self._known))

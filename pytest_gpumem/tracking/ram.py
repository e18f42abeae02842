"""What the test that runs takes of main memory: its process, and what it started.

Its own process is read when it begins and when it is over, and its peak is the kernel's high-water
mark, which begins anew with each test. Where nobody may reset the mark, it tells the peak of a test
that raised it; of others only what was seen is known. Children are looked at while they run.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pytest_gpumem.clock import clock
from pytest_gpumem.devices import host
from pytest_gpumem.records import RamUsage

if TYPE_CHECKING:
    from collections.abc import Mapping

_COST = 20
"""A look at children takes at most one part in so many of the time."""


class RamMeter:
    """Reads the main memory of this process and of its descendants, around each test."""

    def __init__(self) -> None:
        self.exact = True
        """Whether the high-water mark could be reset."""
        self._baseline = 0
        self._mark = 0
        self._before: dict[int, host.Share] = {}
        """The children there were when the test began."""
        self._children_peak = 0
        self._next_look = 0.0
        self._kept = 0
        """The most that the process and its children had before or after a test."""

    def begin(self) -> None:
        """Begin a test."""
        self.exact = host.reset_peak()
        self._mark = 0 if self.exact else host.status().peak
        self._before = _children()
        self._children_peak = 0
        self._baseline = host.resident() or 0

    def worth_a_look(self) -> bool:
        """Return whether children may be looked at now, by what the last look took."""
        return clock.monotonic() >= self._next_look and host.has_children()

    def look(self) -> None:
        """Look at the children; called again and again while a test runs."""
        began = clock.thread_time()
        self._see(_children())
        self._next_look = clock.monotonic() + _COST * (clock.thread_time() - began)

    def _see(self, children: Mapping[int, host.Share]) -> None:
        # The mark of one that was there before may be of an earlier test.
        nobody = host.Share(0, 0)
        peaks = (
            each.peak if each.peak > self._before.get(pid, nobody).peak else each.now
            for pid, each in children.items()
        )
        self._children_peak = max(self._children_peak, sum(peaks) - _sum(self._before))

    def end(self) -> RamUsage:
        """Return what the test did, now that it is over."""
        after, mark, _ = host.status()
        highest = max(self._baseline, after, mark if mark > self._mark else 0)
        children = _children()
        self._see(children)
        before, kept = self._baseline + _sum(self._before), after + _sum(children)
        self._kept = max(self._kept, before, kept)
        return RamUsage(
            baseline=self._baseline,
            peak=highest + self._children_peak,
            kept=kept - before,
            children_peak=self._children_peak,
        )

    def kept(self) -> int:
        """Return the most that the process kept to itself: without the files that it maps."""
        return max(0, self._kept - host.status().of_files)


def _children() -> dict[int, host.Share]:
    if not host.has_children():
        return {}
    return {pid: host.share_of(pid) for pid in host.descendants(os.getpid())}


def _sum(children: Mapping[int, host.Share]) -> int:
    return sum(each.now for each in children.values())

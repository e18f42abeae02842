"""Looks at the children of tests again and again, in a thread.

What no allocator tells would be lost when a process ends before its test does. The driver is asked
only while there are children. The thread is none of ``threading``'s, whose number a suite may
count, and it is away while the process forks: from Python 3.12 on a fork beside another thread is
warned of.
"""

from __future__ import annotations

import _thread
import os
import weakref
from typing import TYPE_CHECKING

from pytest_gpumem.devices.notebook import note_failure

if TYPE_CHECKING:
    from collections.abc import Callable

_running: weakref.WeakSet[Sampler] = weakref.WeakSet()


class Sampler:
    """Calls ``look`` every ``interval`` seconds if ``worth_it()``, from ``start`` to ``stop``."""

    def __init__(
        self, look: Callable[[], None], worth_it: Callable[[], bool], interval: float
    ) -> None:
        self._look = look
        self._worth_it = worth_it
        self._interval = interval
        self.then: Callable[[], None] = lambda: None
        """Called after each look, in the thread."""
        self._go_on = _thread.allocate_lock()
        """Held while the thread is to run."""
        self._ended = _thread.allocate_lock()
        """Held by the thread."""

    def start(self) -> None:
        """Begin, unless it has begun."""
        if self not in _running:
            self._go_on, self._ended = _thread.allocate_lock(), _thread.allocate_lock()
            self._go_on.acquire()
            self._ended.acquire()
            _running.add(self)
            _thread.start_new_thread(self._run, (self._go_on, self._ended))

    def stop(self) -> None:
        """End, and wait for the look that is being taken."""
        if self in _running:
            _running.discard(self)
            self._go_on.release()
            self._ended.acquire()

    def _run(self, go_on: _thread.LockType, ended: _thread.LockType) -> None:
        try:
            while not go_on.acquire(timeout=self._interval):
                if self._worth_it():
                    self._look()
                    self.then()
        except Exception as error:  # in a thread of nobody's
            note_failure("looking at the tests' child processes", error)
        finally:
            ended.release()


_paused: list[Sampler] = []


def _before_fork() -> None:
    for each in list(_running):
        each.stop()
        _paused.append(each)


def _after_fork() -> None:
    while _paused:
        _paused.pop().start()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_paused.clear)

"""The thread that looks at children."""

from __future__ import annotations

import contextlib
import os
import threading
import time

from pytest_gpumem.tracking.offspring import has_children
from pytest_gpumem.tracking.sampler import Sampler


def threads():
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208  # counted, not used


def wait_for(what):
    until = time.monotonic() + 10
    while not what():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_it_looks_again_and_again_and_only_if_that_is_worth_it():
    looks, worth = [], [False]
    sampler = Sampler(lambda: looks.append(1), lambda: worth[0], 0.005)
    before, known = threads(), threading.active_count()
    sampler.start()
    sampler.start()
    assert threads() == before + 1
    assert threading.active_count() == known
    time.sleep(0.05)
    assert looks == []
    worth[0] = True
    wait_for(lambda: len(looks) > 2)
    sampler.stop()
    sampler.stop()
    wait_for(lambda: threads() == before)
    seen = len(looks)
    time.sleep(0.03)
    assert len(looks) == seen


def test_no_thread_is_beside_a_fork_and_it_goes_on_after_it():
    looks = []
    sampler = Sampler(lambda: looks.append(1), lambda: True, 0.005)
    sampler.start()
    pid = os.fork()
    if not pid:
        os._exit(threads() - 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    seen = len(looks)
    wait_for(lambda: len(looks) > seen)
    sampler.stop()


def look_for_children():
    assert not has_children()
    pid = os.fork()
    if not pid:
        os._exit(5)
    assert has_children()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
    assert not has_children()


def test_children_are_seen_and_nothing_is_taken_from_who_waits_for_them():
    # In a process of its own: tests before this one may have left this one children.
    pid = os.fork()
    if not pid:
        with contextlib.suppress(AssertionError):
            look_for_children()
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

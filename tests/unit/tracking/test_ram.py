"""What a test takes of main memory, by the meter, with and without the high-water mark."""

from __future__ import annotations

import mmap
import subprocess
import sys

import pytest

from pytest_gpumem.clock import clock
from pytest_gpumem.devices import host
from pytest_gpumem.tracking.ram import RamMeter

MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def about(mib):
    return pytest.approx(mib * MIB, abs=4 * MIB)


@pytest.fixture
def childless(monkeypatch):
    """Leave out what tests before this one started, such as a forkserver."""
    with monkeypatch.context() as patch:
        patch.setattr(host, "has_children", lambda: False)
        yield patch


def take(mib):
    """Map so much memory and touch it: malloc may hand out what this process has already."""
    taken = mmap.mmap(-1, mib * MIB)
    for place in range(0, len(taken), mmap.PAGESIZE):
        taken[place] = 1
    return taken


@linux
def test_peak_and_kept_of_the_process_are_those_of_the_test(childless):
    if not host.reset_peak():
        pytest.skip("nobody may reset the high-water mark here")
    meter = RamMeter()
    take(96).close()  # of nobody's: before the test
    meter.begin()
    kept = take(16)
    take(48).close()
    usage = meter.end()
    meter.begin()
    small = meter.end()
    kept.close()
    meter.begin()
    take(8).close()
    last = meter.end()

    assert (usage.own_peak, usage.kept, usage.children_peak) == (about(64), about(16), 0)
    assert (small.own_peak, small.kept) == (about(0), about(0))
    assert last.own_peak == about(8)
    assert meter.kept() == about((usage.baseline + usage.kept - host.status().of_files) / MIB)


@linux
def test_a_mark_that_nobody_may_reset_tells_the_peak_of_who_raised_it(monkeypatch, childless):
    told = iter([(0, 100), (80, 300), (0, 300), (90, 300)])
    baselines = iter([60, 70])
    monkeypatch.setattr(host, "reset_peak", lambda: False)
    monkeypatch.setattr(host, "status", lambda: host.Status(*next(told), 0))
    monkeypatch.setattr(host, "resident", lambda: next(baselines))
    meter = RamMeter()
    meter.begin()
    raised = meter.end()
    meter.begin()
    below = meter.end()

    assert not meter.exact
    assert (raised.baseline, raised.peak, raised.kept) == (60, 300, 20)
    assert (below.baseline, below.peak, below.kept) == (70, 90, 20)


def test_marks_of_children_count_only_where_the_test_raised_them(monkeypatch):
    share = host.Share
    seen = iter(
        [
            {1: share(100, 500)},  # as the test begins: the mark is of an earlier one
            {1: share(120, 500), 2: share(10, 40)},
            {1: share(110, 600), 2: share(10, 40)},
            {1: share(130, 500)},
        ]
    )
    monkeypatch.setattr("pytest_gpumem.tracking.ram._children", lambda: next(seen))
    meter = RamMeter()
    meter.begin()
    meter.look()
    first = meter._children_peak
    meter.look()
    usage = meter.end()

    assert first == 120 + 40 - 100
    assert usage.children_peak == 600 + 40 - 100
    assert usage.kept == pytest.approx(30, abs=4 * MIB)


@linux
def test_a_look_waits_in_proportion_to_what_the_last_one_took(monkeypatch, childless):
    meter = RamMeter()
    assert not meter.worth_a_look()  # without children there is nothing to look at
    childless.undo()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert meter.worth_a_look()
        seconds = iter([1.0, 1.5])
        monkeypatch.setattr(clock, "thread_time", lambda: next(seconds))
        meter.look()
        assert not meter.worth_a_look()
        child.communicate(b"\n")

"""What children tell in the run's book of what torch allocated, by processes that write there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from pytest_gpumem import devices
from pytest_gpumem.devices import family
from pytest_gpumem.devices.book import Book
from pytest_gpumem.records import Card, CardUsage
from pytest_gpumem.tracking import children as module
from pytest_gpumem.tracking.children import Children
from pytest_gpumem.tracking.starters import Starters
from pytest_gpumem.tracking.tracker import Tracker

CARD = Card("GPU-told", "fake", 1000)
CONTEXT = 5
CHILD = """
import os, sys
from pathlib import Path
from pytest_gpumem.devices import family
from pytest_gpumem.devices.allocator import AllocatorReading
from pytest_gpumem.devices.book import Book

(link,) = family.links(os.environ["GPUMEM_FAMILY"])
page = None
print(flush=True)
for line in sys.stdin:
    now, most, ooms = map(int, line.split())
    page = page or Book(Path(link.book)).join(link.owner, link.name)
    page.tell(0, "GPU-told", AllocatorReading(now, most, now, most, 0, ooms))
    print(flush=True)
if page:
    page.end()
"""


@pytest.fixture
def driver(monkeypatch):
    seen: dict[int, int] = {}
    monkeypatch.setattr(devices, "others_bytes", lambda card: dict(seen))
    monkeypatch.setattr(module, "RECENT", 0.0)
    return seen


@pytest.fixture
def children(driver, tmp_path, monkeypatch):
    monkeypatch.delenv(family.VARIABLE, raising=False)
    starters = Starters(lambda: Book.create(tmp_path / "families", CONTEXT))
    found = Children(starters, lambda: (CARD,), CONTEXT)
    yield found
    found.close()


@contextmanager
def child(env=None):
    """Start a child; called with bytes allocated now and at most, and its errors, it tells them."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", CHILD], text=True, env=env, **pipes) as process:
        process.stdout.readline()

        def tell(*figures):
            print(*figures, file=process.stdin, flush=True)
            process.stdout.readline()

        yield SimpleNamespace(tell=tell, pid=process.pid)


def owner(number):
    return SimpleNamespace(number=number, name="", scope="module", torn_down=True)


def usage_of(children, number):
    empty = CardUsage(CARD.uuid, 0, 0, 0, 0, 0, 0, 0, None)
    (usage,) = children.widen((), owner(number), (), lambda _: empty)
    return usage


def test_what_a_child_allocated_is_its_starters(children):
    number = children.enter("test_a")
    with child() as one:
        one.tell(30, 70, 0)
        children.look()
        assert children.living() == {CARD.uuid: 30 + CONTEXT}
    children.settle([owner(number)])
    assert usage_of(children, number).children_peak == 70
    (told,) = children.report()
    assert (told.started_by, told.peak, told.leaked) == ("test_a", 70, 0)
    assert told.end > 0
    assert children.living() == {}


def test_of_two_children_one_after_the_other_the_first_had_ended_when_the_second_began(children):
    children.enter("test_a")
    for _ in range(2):
        with child() as each:
            each.tell(10, 10, 0)
    children.look()
    first, second = sorted(children.report(), key=lambda told: told.start)
    assert first.start < first.end < second.start < second.end


def test_a_process_that_is_about_to_end_is_no_second_one(children, driver, monkeypatch):
    number = children.enter("test_a")
    with child() as one:
        one.tell(10, 40, 0)
        driver[one.pid] = 60
        children.look()
        # Its locks are gone and its number is not: for a moment, when it is killed.
        monkeypatch.setattr("pytest_gpumem.slots.Slots.lives", lambda *_: False)
        children.look()
        driver[one.pid] = 50
        children.look()
        assert len(children.report()) == 1
    assert usage_of(children, number).children_peak == 40


def test_of_a_copy_of_the_environment_that_an_import_made_each_child_is_the_running_tests(children):
    copied = dict(os.environ)  # as a module of tests does for all of its tests
    with child(copied) as server:
        server.tell(500, 500, 0)
        time.sleep(0.02)  # the kernel tells beginnings by 10 ms
        number = children.enter("test_a")
        with child(copied) as one, child(copied) as other:
            one.tell(30, 70, 0)
            one.tell(30, 30, 0)
            other.tell(20, 20, 0)
            children.look()
            tests = [each.started_by for each in children.report()]
            assert sorted(tests) == ["outside of tests", "test_a", "test_a"]
        children.settle([owner(number)])
    children.settle([owner(0)])
    assert usage_of(children, number).children_peak == 70
    assert not children.starters.book.used  # which is asked before each test


@pytest.mark.parametrize("ended", [False, True], ids=["it runs", "it has ended"])
def test_a_child_that_the_driver_saw_first_is_the_same_one(children, driver, ended):
    number = children.enter("test_a")
    with child() as one:
        driver[one.pid] = 90
        children.look()
        (before,) = children.report()
        one.tell(30, 70, 0)
        if not ended:
            children.look()
    if ended:
        children.look()
    (after,) = children.report()
    assert before.pid == after.pid == one.pid
    assert (before.peak, after.peak, after.used_peak) == (None, 70, 90)
    children.settle([owner(number)])
    assert usage_of(children, number).children_peak == 70


def test_what_a_failed_set_up_started_is_handed_over_with_what_it_told(children):
    test = children.enter("test_asks")
    fixture = children.enter("fixture 'engine' (module)")
    with child() as one:
        one.tell(10, 40, 0)
        children.look()
        children.hand_over(owner(fixture), owner(test))
        one.tell(10, 60, 0)
        children.look()
        assert {each.started_by for each in children.report()} == {"test_asks"}
    children.settle([owner(test)])
    assert usage_of(children, test).children_peak >= 60


def test_an_oom_of_a_child_is_told_until_the_test_is_over(children):
    children.enter("test_a")
    with child() as one:
        one.tell(1, 1, 0)
        assert children.oom() == ""
        one.tell(1, 1, 2)
        assert children.oom().startswith(f"CUDA out of memory in process {one.pid} (")
        assert list(children.ooms().values()) == [2]
        children.report()
        assert children.oom() == ""


@pytest.fixture
def tracker(children, monkeypatch):
    monkeypatch.setattr(devices, "allocators", lambda: ())
    found = Tracker()
    found.children = children
    return found


def test_a_test_has_what_its_child_took_and_a_fixture_what_its_own_keeps(tracker, driver):
    engine = tracker.begin_fixture("engine", "module")
    with child() as served:
        driver[served.pid] = 50
        tracker.end_fixture(engine)
        tracker.begin_test("test_a")
        tracker.children.look()
        assert tracker.standing() == {CARD.uuid: {"engine": 50}}
        with child() as own:
            own.tell(20, 30, 1)
            assert tracker.child_oom().startswith("CUDA out of memory in process")
            assert [card.children_peak for card in tracker.usage()] == [30]
        used = tracker.end_test(fixtures=["engine"])
    assert {each.started_by for each in used.children} >= {"fixture 'engine' (module)"}
    (card,) = used.cards
    assert card.card == CARD.uuid
    tracker.meters.close()


def test_what_a_failed_wide_set_up_started_is_the_tests(tracker, driver):
    tracker.begin_test("test_a")
    fixture = tracker.begin_fixture("engine", "session")
    with child() as started:
        driver[started.pid] = 70
        tracker.children.look()
        tracker.fail_fixture(fixture)
        used = tracker.end_test()
    assert [each.started_by for each in used.children] == ["test_a"]
    tracker.meters.close()

"""Whose a child is and what it held, with real processes and a driver of the tests' own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from pytest_gpumem import devices
from pytest_gpumem.devices import family
from pytest_gpumem.devices.book import Book
from pytest_gpumem.records import Card, CardUsage
from pytest_gpumem.tracking import children as module
from pytest_gpumem.tracking.children import Children
from pytest_gpumem.tracking.starters import Starters

MIB = 2**20
CARD = Card("GPU-children", "fake", 1000 * MIB)


def owner(number, name="", scope="module", torn_down=True):
    return SimpleNamespace(number=number, name=name, scope=scope, torn_down=torn_down)


def untouched(uuid):
    return CardUsage(uuid, 0, 0, 0, 0, 0, 0, 0, None)


class Driver(dict):
    """Bytes by process."""


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(devices, "others_bytes", lambda card: dict(driver))
    monkeypatch.setattr(module, "ENDING", 0.02)
    monkeypatch.setattr(module, "LAG", 0.2)
    return driver


@pytest.fixture
def children(driver, tmp_path, monkeypatch):
    monkeypatch.delenv(family.VARIABLE, raising=False)
    found = Children(Starters(lambda: Book.create(tmp_path / "families", 5)), lambda: (CARD,), 5)
    yield found
    found.close()
    assert family.VARIABLE not in os.environ


@pytest.fixture
def start():
    running = []

    def start(**options):
        command = [sys.executable, "-c", "print(flush=True); import sys; sys.stdin.read()"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        running.append(subprocess.Popen(command, **pipes, **options))
        running[-1].stdout.readline()
        return running[-1]

    yield start
    for each in running:
        each.communicate()


def end(process):
    process.kill()
    process.wait()


def test_what_the_driver_sees_belongs_to_who_started_it(children, driver, start):
    first = children.enter("test_first")
    a = start()
    second = children.enter("test_second")
    b = start()
    driver.update({a.pid: 30, b.pid: 40, os.getppid(): 500})
    children.look()
    driver[b.pid] = 20
    children.look()
    end(b)
    del driver[b.pid]
    children.settle([owner(second)])
    (usage,) = children.widen((), owner(second), [owner(first)], untouched)
    assert (usage.peak, usage.children_peak, usage.extra) == (40, 40, 40)
    assert (usage.leaked, usage.fixture_bytes) == (0, 30)
    told = {each.started_by: each for each in children.report()}
    assert (told["test_second"].used_peak, told["test_second"].used) == (40, 0)
    assert told["test_second"].end > 0
    assert told["test_first"].end == 0


def test_with_a_cleared_environment_it_belongs_to_who_ran_as_it_began(children, driver, start):
    children.enter("test_before")
    number = children.enter("test_starts")
    child = start(env={})
    time.sleep(0.02)  # the kernel tells when it began to 10 ms
    children.enter("test_after")
    driver[child.pid] = 10
    children.look()
    assert [each.started_by for each in children.report()] == ["test_starts"]
    assert children.held_by([owner(number)]) == {CARD.uuid: 10}


@pytest.fixture
def childless(monkeypatch):
    """Leave out what tests before this one started, such as a forkserver."""
    monkeypatch.setattr("pytest_gpumem.tracking.offspring.has_children", lambda _besides: False)


def test_an_orphan_is_judged_once_and_told_again_when_it_ends(children, driver, start, childless):
    number = children.enter("test_leaves")
    child = start()
    driver[child.pid] = 64
    children.settle([owner(number)])
    (usage,) = children.widen((), owner(number), (), untouched)
    assert (usage.leaked, usage.leftover, usage.orphaned) == (64, 64, 64)
    assert [each.leaked for each in children.report()] == [64]
    children.forget([owner(number)])
    later = children.enter("test_later")
    children.settle([owner(number), owner(later)])
    assert children.report() == ()
    end(child)
    del driver[child.pid]
    children.settle([owner(later)])
    (told,) = children.report()
    assert (told.started_by, told.leaked, told.used) == ("test_leaves", 64, 0)
    assert not children.stirred()


def test_a_driver_that_lags_is_waited_for_but_not_for_ever(children, driver, start, monkeypatch):
    number = children.enter("test_engine")
    child = start()
    driver[child.pid] = 64
    children.look()
    end(child)
    naps = []

    def sleep(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            del driver[child.pid]

    monkeypatch.setattr(module.clock, "sleep", sleep)
    children.settle([owner(number)])
    assert len(naps) == 3
    assert [each.leaked for each in children.report()] == [0]


def test_what_a_fixture_started_whose_set_up_failed_is_the_tests(children, driver, start):
    test = children.enter("test_asks")
    fixture = children.enter("fixture 'engine' (module)")
    child = start()
    driver[child.pid] = 7
    children.look()
    children.hand_over(owner(fixture), owner(test))
    children.look()
    (usage,) = children.widen((), owner(test), (), untouched)
    assert usage.children_peak == 7
    assert {each.started_by for each in children.report()} == {"test_asks"}


def test_a_fixture_has_what_it_started_until_all_ended(children, driver, start):
    number = children.enter("fixture 'engine' (module)")
    child = start()
    driver[child.pid] = 50
    children.look()
    standing = owner(number, "engine", torn_down=False)
    (up,) = children.widen_fixtures((), [standing])
    assert (up.name, up.allocated, up.released) == ("engine", 50, None)
    assert children.held_by([standing]) == {CARD.uuid: 50}
    end(child)
    driver.clear()
    children.settle([owner(number)])
    assert children.held_by([standing]) == {}
    (down,) = children.widen_fixtures((), [owner(number, "engine")])
    assert (down.allocated, down.released, down.leaked) == (50, 50, 0)


def test_a_process_without_children_is_not_stirred_and_a_strangers_is_none(
    children, driver, childless
):
    children.enter("test_alone")
    assert not children.stirred()
    driver[os.getppid()] = 100
    children.look()
    assert children.report() == ()
    assert not children.known


def test_runs_around_this_one_keep_their_lines(driver, tmp_path, monkeypatch):
    outer = "4|/elsewhere/1:1.00-ab|test_outer"
    monkeypatch.setenv(family.VARIABLE, outer)
    inner = Starters(lambda: Book.create(tmp_path / "families", 5))
    inner.enter("test_inner")
    links = family.links(os.environ[family.VARIABLE])
    assert [link.name for link in links] == ["test_outer", "test_inner"]
    inner.close()
    assert os.environ[family.VARIABLE] == outer

"""Nobody waits for ever for a test that sleeps, see ``loans``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from pytest_gpumem.admission import Claim
from pytest_gpumem.clock import clock
from pytest_gpumem.devices.family import seconds_of_sleeper
from pytest_gpumem.leases import loans
from pytest_gpumem.leases.entries import HELD, RESIDENT, WAITING, Entry, entry_of
from pytest_gpumem.leases.family import kin_among
from pytest_gpumem.leases.loans import Lending, may_lend
from pytest_gpumem.leases.page import Page

LINES = {"1.a": ("a", "x"), "2.b": ("b", "a", "x"), "3.c": ("c", "x")}
"""Of three processes b is a's child, and c nobody's."""
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def entry(state: str, number: int, process: str, *, test: bool = False) -> Entry:
    claim = Claim(600, 0, False) if state == RESIDENT else Claim(0, 600, exclusive=False)
    return entry_of(state, number, process, {"key": claim}, test=test)


def page(*entries: Entry) -> Page:
    return Page([each.name for each in entries], lambda names: kin_among(names, LINES.__getitem__))


@pytest.mark.parametrize(
    ("lease", "requester", "sibling", "lends"),
    [
        (entry(HELD, 1, "1.a", test=True), "3.c", False, True),
        (entry(HELD, 1, "1.a", test=False), "3.c", False, False),  # a program's of its own
        (entry(HELD, 1, "1.a", test=False), "3.c", True, True),
        (entry(WAITING, 1, "1.a", test=True), "3.c", False, False),
        (entry(RESIDENT, 0, "1.a"), "3.c", True, False),
        (entry(HELD, 1, "1.a", test=True), "2.b", False, False),  # it is within that
        (entry(HELD, 1, "2.b", test=True), "1.a", False, False),  # its child's
        (entry(HELD, 1, "1.a", test=True), "1.a", False, False),
    ],
)
def test_what_is_lent_is_of_tests_that_the_request_waits_for(
    lease, requester, sibling, lends
) -> None:
    request = entry(WAITING, 9, requester)
    assert may_lend(lease, request, page(lease, request), sibling=sibling) is lends


class Families:
    """Tells what a test has it tell."""

    def __init__(self, told: list[float | None], *, sibling: bool = False) -> None:
        self.told = iter(told)
        self.sibling = sibling

    def is_sibling(self, _: str) -> bool:
        return self.sibling

    def seconds_of_sleeper(self, _: str) -> float | None:
        return next(self.told)


@pytest.mark.parametrize(
    ("told", "first", "second"),
    [
        ([5.0] * 12, 2, 8),
        ([5.0, None, *[5.0] * 10], 4, 10),  # it ran at the second look, and perhaps until the third
        ([5.0, 5.1, *[5.1] * 10], 3, 9),  # and so does who used a CPU since
        ([5.0 + place / 1000 for place in range(12)], 2, 8),  # looks now and then if a lock is free
        ([float(place) for place in range(12)], None, None),
        ([None] * 12, None, None),
    ],
)
def test_a_lease_is_lent_after_a_nap_and_more_so_after_a_sleep(
    told, first, second, monkeypatch
) -> None:
    lease, request = entry(HELD, 1, "1.a", test=True), entry(WAITING, 2, "3.c")
    lender = Lending(request, Families(told, sibling=True), {}, worker=False)
    seconds = iter([place / 8 for place in range(12)])
    monkeypatch.setattr(clock, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(loans, "NAP", 0.25)
    monkeypatch.setattr(loans, "SLEEP", 1.0)
    looks = [lender.look(page(lease, request)) for _ in range(12)]

    def beginning(found: list[bool]) -> int | None:
        return found.index(True) if True in found else None

    assert beginning([lease.name in each.unused for each in looks]) == first
    assert beginning([lease.name in each.asleep for each in looks]) == second


@pytest.mark.parametrize(("test", "sibling"), [(True, True), (False, False)])
def test_tests_and_other_runs_lend_only_after_long(test, sibling, monkeypatch) -> None:
    lease, request = entry(HELD, 1, "1.a", test=True), entry(WAITING, 2, "3.c", test=test)
    lender = Lending(request, Families([5.0] * 12, sibling=sibling), {}, worker=test)
    seconds = iter(range(12))
    monkeypatch.setattr(clock, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(loans, "SLEEP", 9.0)
    looks = [lender.look(page(lease, request)) for _ in range(12)]
    assert [bool(each.unused) for each in looks] == [False] * 9 + [True] * 3


@pytest.mark.parametrize(
    ("begins", "number", "lends"),
    [(1.2, 1, True), (1.5, 1, False), (1.2, 9, False)],  # at once; after a while; another lease
)
def test_whose_sleep_was_just_seen_lends_to_the_next_request_at_once(
    begins, number, lends, monkeypatch
) -> None:
    naps: dict[str, loans.Nap] = {}
    for place, (at, holds) in enumerate([(0.0, 1), (begins, number)], 5):
        lease = entry(HELD, holds, "1.a", test=True)
        request = entry(WAITING, place, "3.c")
        seconds = iter([at, at, at + 1])
        monkeypatch.setattr(clock, "monotonic", lambda seconds=seconds: next(seconds))
        lender = Lending(request, Families([5.0, 5.0], sibling=True), naps, worker=False)
        looks = [lender.look(page(lease, request)) for _ in range(1 + (at == 0.0))]
    assert bool(looks[0].unused) is lends


def test_where_nothing_is_ever_lent_nobody_looks() -> None:
    lease, request = entry(HELD, 1, "1.a"), entry(WAITING, 2, "3.c")
    assert Lending(request, Families([]), {}, worker=False).look(page(lease, request)) is None
    held = entry(HELD, 1, "1.a", test=True)
    assert Lending(request, Families([1.0]), {}, worker=False).look(page(held, request)) is not None


@needs_proc
def test_who_sleeps_is_seen_with_all_that_it_started() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    sleeps, spins = (
        "import time; print(flush=True); time.sleep(600)",
        "print(flush=True)\nwhile 1: 0",
    )
    commands = [sleeps, spins, code.format(child=sleeps), code.format(child=spins)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", each], stdout=subprocess.PIPE, start_new_session=True
        )
        for each in commands
    ]
    try:
        for each in processes:
            each.stdout.readline()
        time.sleep(0.1)
        looks = [[seconds_of_sleeper(each.pid) for each in processes] for _ in range(2)]
        before, after = looks
        assert before == [after[0], None, after[2], None]
        assert None not in {after[0], after[2]}
    finally:
        for each in reversed(processes):
            os.killpg(each.pid, signal.SIGKILL)  # and what it started
            each.wait()
            each.stdout.close()
    assert seconds_of_sleeper(processes[0].pid) is None


MEMBER = """
import sys, time
from pathlib import Path
from pytest_gpumem.devices import Usage
from pytest_gpumem.errors import LeaseTimeout
from pytest_gpumem.leases import loans
from pytest_gpumem.leases.request import Want
from pytest_gpumem.leases.store import LeaseStore

A = "GPU-aaaaaaaa-0000-0000-0000-00000000000a"
directory, used, size, sleep, timeout, then = sys.argv[1:]
loans.SLEEP = float(sleep)

class Driver:
    def used(self, uuid): return int(used)
    def usage(self, uuid): return Usage({}, 0)

store = LeaseStore(Path(directory), driver=Driver())
try:
    lease = store.acquire({A: Want(int(size))}, {A: 1000}, "m", float(timeout), test=then != "end")
    print("granted", lease.short, flush=True)
except LeaseTimeout:
    print("waits", flush=True)
if then == "sleep":
    time.sleep(600)
while then == "spin":
    pass
"""


@needs_proc
def test_a_request_starts_beside_a_test_that_sleeps_where_there_is_room_or_after_long(
    tmp_path,
) -> None:
    def member(name: str, *words: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", MEMBER, str(tmp_path / name), *map(str, words)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    cases = {  # how the holder spends its time, what is used, when a sleep is long
        "unused": ("sleep", 0, 600, "granted 0\n"),
        "busy": ("spin", 0, 600, "waits\n"),
        "used": ("sleep", 550, 600, "waits\n"),
        "for long": ("sleep", 550, 0.5, "granted 0\n"),
    }
    holders = {name: member(name, 0, 600, 600, 60, does) for name, (does, *_) in cases.items()}
    try:
        assert {each.stdout.readline() for each in holders.values()} == {"granted 0\n"}
        asking = {
            name: member(name, used, 500, sleep, 2, "end")
            for name, (_, used, sleep, _) in cases.items()
        }
        told = {name: each.communicate()[0] for name, each in asking.items()}
    finally:
        for each in holders.values():
            each.kill()
            each.communicate()
    assert told == {name: end for name, (*_, end) in cases.items()}

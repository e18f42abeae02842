from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pytest_gpumem.admission import Claim, may_start
from pytest_gpumem.clock import clock
from pytest_gpumem.devices import Usage
from pytest_gpumem.errors import LeaseError, LeaseTimeout, TooLarge
from pytest_gpumem.leases import family, ledger, locks, place, queue
from pytest_gpumem.leases.request import Want
from pytest_gpumem.leases.store import LeaseStore
from pytest_gpumem.simulator import Simulation
from pytest_gpumem.units import SIZE_FORM

A, B = "GPU-aaaaaaaa-0000-0000-0000-00000000000a", "GPU-bbbbbbbb-0000-0000-0000-00000000000b"
TOTALS = {A: 1000, B: 1000}
PATIENCE = 60
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--mount-proc"]
CONTAINERS = (
    shutil.which("unshare")
    and not subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode
)


@pytest.fixture(autouse=True)
def nobody_looks_anyway(monkeypatch):
    """Let a wake-up that is lost show."""
    monkeypatch.setattr(queue, "_LOOK_ANYWAY", 10.0 * PATIENCE)


@pytest.fixture(autouse=True)
def members_are_strangers(monkeypatch):
    """Let what this process starts wait for it as any other process does."""
    monkeypatch.setattr(family, "lineage", lambda _: ())


def output(code, *words, before=(), **environment):
    """Run a program and return the lines that it prints."""
    command = [*before, sys.executable, "-c", code, *words]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.fixture
def stores(tmp_path):
    made = []

    def make(**settings: Any) -> LeaseStore:
        made.append(LeaseStore(tmp_path / "run", **settings))
        return made[-1]

    yield make
    for store in made:
        store.close()


@pytest.fixture(params=["woken", "polling"])
def store(request, stores, monkeypatch):
    if request.param == "polling":
        monkeypatch.setattr(locks, "_take_inotify", lambda: None)
    return stores()


class Asking(threading.Thread):
    """Asks for a lease in a thread of its own."""

    def __init__(self, store, wants, label="asking", timeout=PATIENCE, **more):
        super().__init__(daemon=True)
        self.said: list[str] = []
        self.lease = self.error = None
        self._ask = lambda: store.acquire(wants, TOTALS, label, timeout, self.said.append, **more)
        self.start()

    def run(self):
        try:
            self.lease = self._ask()
        except LeaseError as error:
            self.error = error

    def granted(self):
        self.join(PATIENCE)
        assert self.lease is not None, self.error
        return self.lease


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def waiting(store, uuid=A):
    return [holder.label for holder in store.holders(uuid) if holder.waiting]


def test_a_lease_is_in_the_ledger_until_it_is_given_back(store):
    with store.acquire({A: Want(400)}, TOTALS, "tests/a.py::test") as lease:
        assert (lease.card, lease.size, lease.exclusive, lease.short) == (A, 400, False, 0)
        assert store.holders(A) == [(os.getpid(), "tests/a.py::test", 400, False, False)]
        assert store.holders(B) == []
    assert store.holders(A) == []
    lease.release()


def test_a_store_that_is_closed_leaves_nothing(store, tmp_path):
    store.acquire({A: Want(600)}, TOTALS, "first")
    store.set_resident(A, 100)
    store.close()
    for part in ("queue", "alive"):
        assert list((tmp_path / "run" / part).iterdir()) == []


def test_who_does_not_fit_waits_until_it_does(store):
    first = store.acquire({A: Want(600)}, TOTALS, "first")
    second = Asking(store, {A: Want(600)}, "second")
    until(lambda: waiting(store) == ["second"])
    first.release()
    assert second.granted().size == 600


def test_the_whole_card_is_for_one(store):
    first = store.acquire({A: Want()}, TOTALS, "first")
    second = Asking(store, {A: Want(1)}, "second")
    until(lambda: waiting(store) == ["second"])
    first.release()
    second.granted().release()
    with store.acquire({A: Want(10, exclusive=True)}, TOTALS, "alone"):
        assert store.holders(A) == [(os.getpid(), "alone", 10, True, False)]
        with pytest.raises(LeaseError):
            store.acquire({A: Want(1)}, TOTALS, "beside", 0)


def test_nobody_overtakes_the_one_who_wants_much(store):
    first = store.acquire({A: Want(600)}, TOTALS, "first")
    big = Asking(store, {A: Want(900)}, "big")
    until(lambda: waiting(store) == ["big"])
    small = Asking(store, {A: Want(200)}, "small")
    until(lambda: waiting(store) == ["big", "small"])
    fitting = Asking(store, {A: Want(100)}, "fitting")
    fitting.granted()
    first.release()
    big.granted().release()
    small.granted()


def test_several_cards_are_granted_together_or_not_at_all(store):
    first = store.acquire({A: Want(600)}, TOTALS, "first")
    both = Asking(store, {B: Want(600), A: Want(600)}, "both")
    until(lambda: waiting(store) == waiting(store, B) == ["both"])
    beside = Asking(store, {B: Want(400)}, "beside")
    beside.granted().release()
    first.release()
    assert both.granted().wants == {A: Want(600), B: Want(600)}


def test_asking_for_two_cards_in_either_order_does_not_deadlock(stores):
    def ask(store, order):
        for _ in range(30):
            store.acquire({uuid: Want() for uuid in order}, TOTALS, "both", PATIENCE).release()

    threads = [
        threading.Thread(target=ask, args=(stores(), order)) for order in ((A, B), (B, A), (B,))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)


def test_who_asks_for_nothing_waits_for_nobody(store):
    with store.acquire({A: Want()}, TOTALS, "first"):
        assert store.acquire({A: Want(0)}, TOTALS, "nothing", 0).size == 0


def test_more_than_the_card_is_refused_at_once_with_the_numbers(stores):
    with pytest.raises(TooLarge) as caught:
        stores().acquire({A: Want(2048)}, TOTALS, "much")
    assert str(caught.value) == f"2.00 KiB asked for of card {A}, which has 1000 B"
    with pytest.raises(TooLarge) as caught:
        stores(headroom=10).acquire({A: Want(991)}, TOTALS, "much")
    assert str(caught.value).endswith("which has 1000 B, of which 10 B are kept free")


def test_a_wait_that_is_too_long_says_who_holds_the_card_and_leaves_no_trace(store, stores):
    holder = stores()
    holder.acquire({A: Want(700)}, TOTALS, "tests/a.py::test_big")
    waiter = Asking(store, {A: Want(600)}, timeout=0.05)
    waiter.join(PATIENCE)
    assert str(waiter.error) == (
        f"no lease within 0.05 s: 600 B of card {A}: 300 B of 1000 B are free, "
        f"700 B held by pid {os.getpid()} (tests/a.py::test_big)"
    )
    assert isinstance(waiter.error, LeaseTimeout)
    assert waiting(store) == []


def test_a_waiting_request_tells_what_it_waits_for(store):
    first = store.acquire({A: Want(700)}, TOTALS, "first")
    second = Asking(store, {A: Want()}, "second")
    until(lambda: waiting(store) == ["second"])
    third = Asking(store, {A: Want(500)}, "third")
    until(lambda: second.said and third.said)
    holder = f"700 B held by pid {os.getpid()} (first)"
    assert second.said == [f"all of card {A}: 300 B of 1000 B are free, {holder}"]
    assert third.said[-1].endswith(f"{holder}, 1 waiting before")
    first.release()
    second.granted().release()
    third.granted()


def test_a_request_that_gives_up_lets_those_behind_it_start(store):
    first = store.acquire({A: Want(600)}, TOTALS, "first")
    big = Asking(store, {A: Want()}, "big", timeout=0.3)
    until(lambda: big.said)  # and not that it waits: on a busy machine it has given up by then
    small = Asking(store, {A: Want(300)}, "small")
    assert small.granted().size == 300
    big.join(PATIENCE)
    assert isinstance(big.error, LeaseTimeout)
    first.release()


def test_a_thread_that_holds_a_lease_is_not_let_wait_for_another(store):
    with store.acquire({A: Want(600)}, TOTALS, "outer"):
        store.acquire({A: Want(400)}, TOTALS, "fits").release()
        with pytest.raises(LeaseError, match="this thread holds a lease and would wait"):
            store.acquire({A: Want(500)}, TOTALS, "inner")
        assert store.ledger.taken_here()
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(store.ledger.taken_here()))
        thread.start()
        thread.join(PATIENCE)
        assert elsewhere == [[]]
    assert not store.ledger.taken_here()
    assert store.holders(A) == []


def test_an_exception_that_ends_a_wait_leaves_no_trace(store):
    def interrupted(_):
        raise KeyboardInterrupt

    first = Asking(store, {A: Want()}, "first").granted()
    with pytest.raises(KeyboardInterrupt):
        store.acquire({A: Want()}, TOTALS, "second", None, interrupted)
    assert [holder.label for holder in store.holders(A)] == ["first"]
    first.release()


def test_the_clock_on_the_wall_is_not_asked(store, monkeypatch):
    def jump():
        raise AssertionError

    monkeypatch.setattr(clock, "time", jump)
    first = store.acquire({A: Want(600)}, TOTALS, "first")
    second = Asking(store, {A: Want(600)}, "second")
    until(lambda: waiting(store) == ["second"])
    first.release()
    second.granted()


def test_what_others_keep_between_tests_is_not_given_out(store, stores):
    keeper = stores()
    keeper.set_resident(A, 700)
    with keeper.acquire({A: Want(100)}, TOTALS, "running"):
        waiter = Asking(store, {A: Want(300)})
        until(lambda: waiter.said)
        assert f"700 B kept by pid {os.getpid()} between tests" in waiter.said[0]
        keeper.set_resident(A, 600)
        waiter.granted().release()
    keeper.set_resident(A, 0)
    assert store.acquire({A: Want(1000)}, TOTALS, "all", 0).short == 0


def test_one_who_is_woken_and_cannot_start_wakes_the_next(store, stores):
    first = store.acquire({A: Want(600)}, TOTALS, "first")
    stays = store.acquire({A: Want(300)}, TOTALS, "stays")
    careful = Asking(stores(headroom=500), {A: Want(500)}, "careful")
    until(lambda: waiting(store) == ["careful"])
    small = Asking(store, {A: Want(150)}, "small")
    until(lambda: careful.said and small.said)
    first.release()
    small.granted().release()
    assert careful.is_alive()
    stays.release()
    careful.granted()


def test_what_only_idle_processes_keep_from_starting_runs_alone(store, stores):
    stores().set_resident(A, 700)
    lease = store.acquire({A: Want(400)}, TOTALS, "alone", 0)
    assert lease.short == 100
    second = Asking(store, {A: Want(400)}, "second")
    until(lambda: waiting(store) == ["second"])
    lease.release()
    second.granted()


def test_what_an_idle_process_can_spare_is_waited_for(store, stores):
    idle = stores()
    idle.set_resident(A, 700, spare=True)
    assert not idle.is_wanted(A, 1000)
    request = Asking(store, {A: Want(400)}, "asking")
    until(lambda: waiting(store) == ["asking"])
    assert idle.is_wanted(A, 1000)
    idle.set_resident(A, 100, spare=True)
    assert request.granted().short == 0
    assert not idle.is_wanted(A, 1000)


@pytest.mark.parametrize("hope", [0, 0.05])
def test_what_nobody_spares_in_time_is_waited_for_no_longer(store, stores, hope):
    stores().set_resident(A, 700, spare=True)
    assert Asking(store, {A: Want(400)}, hope=hope).granted().short == 100


def test_what_a_lease_will_give_back_is_no_reason_to_spare_anything(store, stores):
    idle = stores()
    idle.set_resident(A, 300, spare=True)
    lease = store.acquire({A: Want(600)}, TOTALS, "runs", 0)
    request = Asking(store, {A: Want(650)}, "next")
    until(lambda: waiting(store) == ["next"])
    assert not idle.is_wanted(A, 1000)
    lease.release()
    request.granted()


def test_who_waits_spares_only_for_those_before_it(store, stores):
    first, second = stores(), stores()
    first.set_resident(A, 300, spare=True)
    second.set_resident(A, 300, spare=True)
    requests = [Asking(first, {A: Want(500)}, "first")]
    until(lambda: waiting(store) == ["first"])
    requests.append(Asking(second, {A: Want(500)}, "second"))
    until(lambda: waiting(store) == ["first", "second"])
    assert (first.is_wanted(A, 1000), second.is_wanted(A, 1000)) == (False, True)
    second.set_resident(A, 100)
    requests[0].granted().release()
    requests[1].granted()


class FakeDriver:
    """A driver that tells what it is given: bytes of the card, and by pid."""

    def __init__(self, used, processes=(), own=0):
        self.told, self.processes, self.own = used, dict(processes), own

    def used(self, uuid):
        return self.told if uuid == A else 0

    def usage(self, uuid):
        known = {os.getpid(): self.own} if self.own else {}
        return Usage(known | self.processes if uuid == A else {}, self.own)


STRANGER = 4_000_000_000  # no process has such a number


@pytest.mark.parametrize(
    ("processes", "said"),
    [
        ({STRANGER: 490}, f"500 B used by other programs (pid {STRANGER}: 490 B)"),
        ({STRANGER: None}, f"500 B used by other programs (pid {STRANGER})"),
        ({}, "500 B used without a lease, it cannot be told by whom"),
    ],
)
def test_bytes_of_foreign_processes_are_waited_for(stores, processes, said):
    driver = FakeDriver(500, processes)
    store = stores(driver=driver)
    store.acquire({A: Want(500)}, TOTALS, "beside", 0).release()
    waiter = Asking(store, {A: Want(600)})
    until(lambda: waiter.said)
    assert waiter.said == [f"600 B of card {A}: 500 B of 1000 B are free, {said}"]
    driver.told = 400
    waiter.granted()


@pytest.mark.parametrize(
    ("driver", "found"),
    [
        (FakeDriver(500), 0),  # it may all be of the lease that a neighbour holds
        (FakeDriver(700), 100),
        (FakeDriver(700, own=50), 50),
        (FakeDriver(700, {"neighbour": 100, STRANGER: 600}), 600),
        (FakeDriver(700, {"neighbour": 650}), 100),  # more than it may have, or another's
        (FakeDriver(300, {STRANGER: 300}), 300),  # the neighbour has taken nothing yet
        (FakeDriver(500, {STRANGER: 300}), 300),  # or something that is not told
        (FakeDriver(300, {STRANGER: None}), 0),
        (FakeDriver(0, {STRANGER: 500}), 0),  # a process that has just ended
    ],
)
def test_what_is_used_without_a_lease_is_foreign(stores, member, driver, found):
    other = member()
    other.ask("take(600)")
    if "neighbour" in driver.processes:
        driver.processes[other.process.pid] = driver.processes.pop("neighbour")

    assert stores(driver=driver).foreign(A, 1000) == found


def test_what_was_found_before_others_ran_their_tests_is_still_there(stores, store):
    driver = FakeDriver(300)
    looking = stores(driver=driver)
    assert looking.foreign(A, 1000) == 300
    held = store.acquire({A: Want(400)}, TOTALS, "test")
    driver.told = 500
    assert looking.foreign(A, 1000) == 300
    driver.told = 250
    assert looking.foreign(A, 1000) == 250
    held.release()


def test_foreign_memory_that_stays_is_waited_for_once(stores, monkeypatch):
    monkeypatch.setattr("pytest_gpumem.leases.request.PATIENCE", 0.5)
    driver = FakeDriver(500, {STRANGER: 500})
    store = stores(driver=driver)
    wants = {A: Want(600)}

    def waits_for(**more):
        begun = time.monotonic()
        store.acquire(wants, TOTALS, "test", **more).release()
        return time.monotonic() - begun

    assert waits_for() > 0.5
    assert waits_for() < 0.4
    # Nor does any other process.
    begun = time.monotonic()
    stores(driver=driver).acquire(wants, TOTALS, "test").release()
    assert time.monotonic() - begun < 0.4
    # With a timeout it is waited for until then, and none is granted.
    with pytest.raises(LeaseTimeout, match=rf"no lease within 0.7 s: .*pid {STRANGER}: 500 B"):
        store.acquire(wants, TOTALS, "test", 0.7)
    # It was less meanwhile, so it may become less again.
    driver.told = 450
    assert waits_for() > 0.5
    driver.told = 300
    with store.acquire(wants, TOTALS, "test") as got:
        assert got.short == 0


def test_headroom_is_never_given_out(stores):
    store = stores(headroom=100)
    store.acquire({A: Want(800)}, TOTALS, "first")
    assert Asking(store, {A: Want(100)}, timeout=0).granted()
    late = Asking(store, {A: Want(1)}, timeout=0)
    late.join(PATIENCE)
    assert isinstance(late.error, LeaseTimeout)


# Processes

# Each evaluates what it is asked, one line each.
MEMBER = """
import os, signal, sys, threading, time
from pathlib import Path
from pytest_gpumem.leases.request import Want
from pytest_gpumem.leases.store import LeaseStore

from pytest_gpumem.leases import locks, queue

A, TOTALS = sys.argv[2], {sys.argv[2]: 1000}
queue._LOOK_ANYWAY = 1e6
if "polling" in sys.argv:
    locks._take_inotify = lambda: None
store = LeaseStore(Path(sys.argv[1]))

def take(size, label="member"):
    global lease
    lease = store.acquire({A: Want(size)}, TOTALS, label)
    return lease.size

def take_until_interrupted():
    try:
        take(None)
    except KeyboardInterrupt:
        return "interrupted"

def fork():
    child = os.fork()
    if child:
        return child
    lease.release()
    os.close(1)
    signal.pause()

def fork_and_exit():
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    else:
        os.close(1)
        sys.exit()

def fork_beside_a_thread():
    # Joining opens files that no child may keep.
    done = threading.Event()

    def join():
        while not done.is_set():
            LeaseStore(Path(sys.argv[1])).acquire({A: Want(1)}, TOTALS, "join").release()

    def fork():
        for _ in range(20):
            child = os.fork()
            if not child:
                store.acquire({A: Want(1)}, TOTALS, "child").release()
                os._exit(0)
            statuses.append(os.waitpid(child, 0)[1])

    statuses = []
    threads = [threading.Thread(target=join), threading.Thread(target=fork)]
    for thread in threads:
        thread.start()
    threads[1].join()
    done.set()
    threads[0].join()
    return statuses

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
for line in sys.stdin:
    print(repr(eval(line)), flush=True)
"""


class Member:
    def __init__(self, directory, *words, before=()):
        command = [*before, sys.executable, "-c", MEMBER, str(directory), A, *words]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def tell(self, expression):
        print(expression, file=self.process.stdin, flush=True)

    def ask(self, expression):
        self.tell(expression)
        return self.answer()

    def answer(self):
        return eval(self.process.stdout.readline())  # noqa: S307  # our own process's words

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def member(tmp_path):
    with contextlib.ExitStack() as stack:

        def make(*words, **options):
            made = Member(tmp_path / "run", *words, **options)
            stack.callback(made.kill)
            return made

        yield make


def test_processes_share_the_card_and_see_one_another(store, member):
    other = member()
    assert other.ask("take(700, 'theirs')") == 700
    assert store.holders(A) == [(other.process.pid, "theirs", 700, False, False)]
    mine = Asking(store, {A: Want(600)}, "mine")
    until(lambda: waiting(store) == ["mine"])
    assert other.ask("lease.release()") is None
    mine.granted()


def test_a_killed_holder_gives_way(store, member):
    other = member()
    other.ask("take(700)")
    mine = Asking(store, {A: Want(600)}, "mine")
    until(lambda: waiting(store) == ["mine"])
    other.kill()
    assert mine.granted()
    assert [holder.label for holder in store.holders(A)] == ["mine"]


def test_a_card_is_shared_with_the_living_only(store, member):
    assert not store.is_shared(A)
    other = member()
    other.ask(f"store.set_resident({A!r}, 700)")
    assert store.is_shared(A)
    assert not store.is_shared(B)
    other.kill()
    assert not store.is_shared(A)


def test_where_nothing_wakes_anybody_processes_look_again_and_again(member, monkeypatch, stores):
    monkeypatch.setattr(locks, "_take_inotify", lambda: None)
    killed, other, store = member("polling"), member("polling"), stores()
    killed.ask("take(700)")
    other.tell("take(600)")
    until(lambda: waiting(store) == ["member"])
    killed.kill()
    assert other.answer() == 600
    mine = Asking(store, {A: Want(600)}, "mine")
    until(lambda: waiting(store) == ["mine"])
    assert other.ask("lease.release()") is None
    mine.granted()


def test_ctrl_c_ends_a_wait_and_leaves_no_trace(store, member):
    first = store.acquire({A: Want(500)}, TOTALS, "first")
    other = member()
    other.tell("take_until_interrupted()")
    until(lambda: waiting(store) == ["member"])
    other.process.send_signal(signal.SIGINT)
    assert other.answer() == "interrupted"
    assert waiting(store) == []
    first.release()
    assert other.ask("take(1000)") == 1000


@pytest.fixture
def locked(tmp_path, member, store):
    """The ledger of a store that has a lease, whose lock a stopped process has; its number."""
    lease = store.acquire({A: Want(100)}, TOTALS, "mine")
    store.set_resident(B, 1)
    other = member()
    other.ask("globals().update(lock=locks.FileLock(Path(sys.argv[1]) / 'lock'))")
    other.ask("lock.acquire()")
    other.process.send_signal(signal.SIGSTOP)
    yield lease, other.process.pid
    other.process.send_signal(signal.SIGCONT)
    other.ask("lock.release()")


def test_a_deadline_holds_while_somebody_has_the_ledgers_lock(store, locked, stores):
    _, pid = locked
    for each in (store, stores()):  # which has not joined yet
        for timeout in (0, 0.2):
            begun, said = time.monotonic(), []
            with pytest.raises(LeaseTimeout, match=rf"the lock .* probably pid {pid} \(.*stopped"):
                each.acquire({A: Want(100)}, TOTALS, "late", timeout, said.append)
            assert timeout <= time.monotonic() - begun < timeout + 0.5
            assert len(said) == bool(timeout)


def test_a_waiting_request_times_out_while_somebody_has_the_ledgers_lock(store, member, stores):
    store.acquire({A: Want()}, TOTALS, "mine")
    waits = Asking(stores(), {A: Want(1)}, timeout=1)
    until(lambda: waits.said)
    other, begun = member(), time.monotonic()
    other.ask("globals().update(lock=locks.FileLock(Path(sys.argv[1]) / 'lock'))")
    other.ask("lock.acquire()")
    waits.join(PATIENCE)
    assert isinstance(waits.error, LeaseTimeout)
    assert time.monotonic() - begun < 2
    other.ask("lock.release()")
    assert waiting(store) == []


def test_without_a_deadline_the_ledgers_lock_is_waited_for_a_while(store, locked, monkeypatch):
    lease, pid = locked
    monkeypatch.setattr(ledger, "LOCK_PATIENCE", 0.2)
    said: list[str] = []
    for ask in (
        lambda: store.acquire({A: Want(100)}, TOTALS, "late", None, said.append),
        lambda: store.set_resident(A, 100),
        lambda: store.set_resident(B, 0),
        store.close,
    ):
        begun = time.monotonic()
        with pytest.raises(LeaseError, match=f"the lock .* held by probably pid {pid} "):
            ask()
        assert time.monotonic() - begun < 0.7
    assert len(said) == 1
    assert [holder.label for holder in store.holders(A)] == ["mine"]
    lease.release()
    assert store.holders(A) == []


def test_a_thread_does_not_wait_beyond_its_deadline_for_another_one(store, locked):
    patient = Asking(store, {A: Want(100)}, timeout=5)
    until(lambda: patient.said)
    begun = time.monotonic()
    with pytest.raises(LeaseTimeout, match="held by another thread of this process"):
        store.acquire({A: Want(100)}, TOTALS, "late", 0.1)
    assert time.monotonic() - begun < 0.6
    # Its thread ends before the store does.
    patient.join(PATIENCE)


# Families

CHILD = """
import sys
from pathlib import Path
from pytest_gpumem.errors import LeaseError
from pytest_gpumem.leases.request import Want
from pytest_gpumem.leases.store import LeaseStore

store = LeaseStore(Path(sys.argv[1]))
for size in map(int, sys.argv[2:]):
    try:
        store.acquire({A: Want(size or None)}, {A: 1000}, "child", 0.2).release()
        print("granted")
    except LeaseError as error:
        print("timeout")
"""


@pytest.mark.parametrize("size", [700, None])
def test_who_is_started_works_within_the_lease_of_who_started_it(
    tmp_path, store, size, monkeypatch
):
    monkeypatch.undo()  # this process tells who it is
    with store.acquire({A: Want(size)}, TOTALS, "parent"):
        code = f"A = {A!r}\n{CHILD}"
        assert output(code, str(tmp_path / "run"), "700", "1000", "0") == ["granted"] * 3


def test_siblings_share_the_lease_of_their_parent(tmp_path, store, member, monkeypatch):
    monkeypatch.undo()
    with store.acquire({A: Want(700)}, TOTALS, "parent"):
        first = member()
        first.ask("take(600)")
        code = f"A = {A!r}\n{CHILD}"
        assert output(code, str(tmp_path / "run"), "100", "600") == ["granted", "timeout"]
        first.ask("lease.release()")
        assert output(code, str(tmp_path / "run"), "700") == ["granted"]


def test_what_a_child_has_is_kept_and_not_waited_for(store, member, monkeypatch):
    monkeypatch.undo()
    child = member()
    child.ask("take(600)")
    with store.acquire({A: Want(300)}, TOTALS, "fits", 0) as lease:
        assert lease.short == 0
    with store.acquire({A: Want(600)}, TOTALS, "does not", 5) as lease:
        assert lease.short == 200


def test_what_a_test_asks_for_comes_out_of_its_lease(store, stores):
    with store.acquire({A: Want(700)}, TOTALS, "test", test=True):
        inner = store.acquire({A: Want(600)}, TOTALS, "fixture", 0)
        assert store.granted_here(A) == 700
        with stores().acquire({A: Want(300)}, TOTALS, "other", 0):
            pass
        elsewhere = Asking(store, {A: Want(100)}, "thread of its own", 0)
        elsewhere.granted().release()
    assert store.granted_here(A) == 600
    # Another test of this process, and two that hold something and wait for one another.
    with store.acquire({A: Want(400)}, TOTALS, "next", 0, test=True):
        pass
    other = stores()
    held = Asking(other, {A: Want(400)}, "theirs").granted()
    waits = Asking(other, {A: Want(500)}, "their test", test=True)
    until(lambda: waits.said or waits.lease)
    mine = Asking(store, {A: Want(500)}, "my test", test=True)
    waits.granted().release()
    held.release()
    mine.granted().release()
    inner.release()


@pytest.mark.skipif(not CONTAINERS, reason="needs Linux namespaces")
def test_containers_that_share_the_directory_share_the_card(store, member):
    """Each counts its processes from 1, and sees none of the others'."""
    one, other = member(before=UNSHARE), member(before=UNSHARE)
    assert one.ask("(os.getpid(), take(700, 'one'))") == (1, 700)
    other.tell("(os.getpid(), take(400, 'other'))")
    until(lambda: waiting(store) == ["other"])
    mine = Asking(store, {A: Want(None)}, "mine")
    until(lambda: waiting(store) == ["other", "mine"])
    one.kill()  # and with unshare its namespace, which nobody else can look into
    assert other.answer() == (1, 400)
    other.kill()
    mine.granted()
    assert [holder.pid for holder in store.holders(A)] == [os.getpid()]


def test_a_killed_holder_gives_way_to_whom_it_can(store, member):
    stays = store.acquire({A: Want(300)}, TOTALS, "stays")
    other = member()
    other.ask("take(600)")
    big = Asking(store, {A: Want(800)}, "big")
    until(lambda: waiting(store) == ["big"])
    small = Asking(store, {A: Want(150)}, "small")
    until(lambda: big.said and small.said)
    other.kill()
    small.granted().release()
    assert big.is_alive()
    stays.release()
    big.granted()


def test_a_killed_process_spares_all(store, member):
    idle = member()
    idle.ask("store.set_resident(A, 700, spare=True)")
    request = Asking(store, {A: Want(400)}, "asking")
    until(lambda: waiting(store) == ["asking"])
    assert idle.ask("store.is_wanted(A, 1000)")
    idle.kill()
    assert request.granted().short == 0


def test_a_killed_waiter_gives_way(store, member):
    first = store.acquire({A: Want(500)}, TOTALS, "first")
    other = member()
    other.tell("take(None, 'theirs')")
    until(lambda: waiting(store) == ["theirs"])
    mine = Asking(store, {A: Want(400)}, "mine")
    until(lambda: waiting(store) == ["theirs", "mine"])
    other.kill()
    assert mine.granted()
    first.release()


def test_what_a_process_left_that_died_unseen_is_taken_out(store, member):
    other = member()
    other.ask("take(700)")
    other.ask("store.set_resident(A, 100)")
    other.kill()
    assert store.acquire({A: Want()}, TOTALS, "mine", 0)
    assert len(store.holders(A)) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_neither_keeps_nor_gives_back_its_parents_lease(store, member):
    other = member()
    other.ask("take(700)")
    child = other.ask("fork()")
    try:
        until(lambda: not _has_open(child, "alive") and not _has_open(child, "lock"))
        assert len(store.holders(A)) == 1
        other.kill()
        assert Asking(store, {A: Want(600)}).granted()
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_that_ends_gives_nothing_back(store, member):
    other = member()
    other.ask("take(700)")
    assert other.ask("fork_and_exit()") is None
    assert [holder.size for holder in store.holders(A)] == [700]
    late = Asking(store, {A: Want(600)}, timeout=0)
    late.join(PATIENCE)
    assert late.lease is None


def test_a_program_that_a_holder_started_does_not_keep_its_lease(store, member):
    other = member()
    other.ask("take(700)")
    child = other.ask("__import__('subprocess').Popen(['sleep', '600'], stdout=2).pid")
    try:
        other.kill()
        assert Asking(store, {A: Want()}).granted()
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_children_forked_while_threads_join_take_leases_and_keep_none(store, member):
    other = member()
    assert set(other.ask("fork_beside_a_thread()")) == {0}
    assert store.holders(A) == []


def _has_open(pid, word):
    links = Path(f"/proc/{pid}/fd")
    with contextlib.suppress(OSError):
        return any(word in str(link.readlink()) for link in links.iterdir())
    return False


def test_a_forked_child_takes_leases_of_its_own(store, member):
    parent = member()
    parent.ask("take(700)")
    code = "os.fork() or (take(200, 'child'), time.sleep(60))"
    child = parent.ask(code)
    try:
        until(lambda: len(store.holders(A)) == 2)
        parent.kill()
        until(lambda: [holder.pid for holder in store.holders(A)] == [child])
    finally:
        os.kill(child, signal.SIGKILL)
    until(lambda: store.holders(A) == [])


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL and record locks")
def test_kills_at_random_double_lose_and_leave_nothing():
    soak = Path(__file__).parents[2] / "soak" / "lease_kills.py"
    command = [sys.executable, soak, "--kills", "30", "--processes", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# The directory


def test_an_unusable_directory_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LeaseError) as caught:
        LeaseStore(tmp_path / "file" / "run").acquire({A: Want(1)}, TOTALS, "")
    assert str(caught.value) == (
        f"leases cannot be kept in {tmp_path / 'file' / 'run'}: Not a directory; "
        "GPUMEM_RUN_DIR can name another directory on this machine"
    )


def test_a_network_file_system_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(place, "_filesystem", lambda _: "nfs4")
    with pytest.raises(LeaseError, match="nfs4 is a network file system"):
        LeaseStore(tmp_path / "run").acquire({A: Want(1)}, TOTALS, "")


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's mount table")
def test_the_file_system_of_a_directory_is_that_of_the_mount_it_lies_in():
    assert place._filesystem(Path("/proc/self/no/such")) == "proc"


def test_the_directory_is_the_users_own_in_memory_or_where_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("GPUMEM_RUN_DIR", str(tmp_path / "named"))
    directory = place.run_directory()
    assert directory.parent == tmp_path / "named"
    LeaseStore(directory).acquire({A: Want(1)}, TOTALS, "", 0)
    assert directory.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("GPUMEM_RUN_DIR")
    # What differs between a session, a service and a job does not matter.
    before = place.run_directory()
    for name in ("XDG_RUNTIME_DIR", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    if before.parent == Path("/dev/shm"):  # noqa: S108  # nothing is written there
        assert place.run_directory() == before


def test_a_directory_named_by_a_relative_path_is_refused(monkeypatch):
    monkeypatch.setenv("GPUMEM_RUN_DIR", "run")
    with pytest.raises(LeaseError, match="GPUMEM_RUN_DIR=run is not an absolute path"):
        place.run_directory()


def test_a_directory_open_to_others_is_closed(tmp_path):
    (tmp_path / "run").mkdir(mode=0o755)
    LeaseStore(tmp_path / "run").acquire({A: Want(1)}, TOTALS, "", 0)
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700


def test_a_directory_that_is_a_link_of_somebodys_is_refused(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path)
    with pytest.raises(LeaseError, match="it is a symbolic link, not a directory"):
        LeaseStore(tmp_path / "run").acquire({A: Want(1)}, TOTALS, "")
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root gives away")
def test_a_directory_of_another_user_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    os.chown(tmp_path / "run", 4711, 4711)
    with pytest.raises(LeaseError, match="it belongs to another user"):
        LeaseStore(tmp_path / "run").acquire({A: Want(1)}, TOTALS, "")


@pytest.mark.skipif(sys.platform == "win32", reason="directories are removed as POSIX has it")
def test_what_a_process_has_is_entered_again_when_the_directory_was_removed(
    store, stores, tmp_path
):
    """As systemd removes what a user has in memory when he logs out."""
    held = store.acquire({A: Want(600)}, TOTALS, "held")
    store.set_resident(B, 300)
    shutil.rmtree(tmp_path / "run")
    assert [holder.size for holder in store.holders(A)] == [600]
    late = Asking(stores(), {A: Want(500)}, timeout=0)
    late.join(PATIENCE)
    assert isinstance(late.error, LeaseTimeout)
    assert store.acquire({B: Want(700)}, TOTALS, "", 0).short == 0
    held.release()
    assert store.holders(A) == []


@pytest.mark.skipif(sys.platform == "win32", reason="directories are removed as POSIX has it")
def test_a_request_whose_directory_is_removed_is_made_again(store, stores, tmp_path):
    first = stores().acquire({A: Want(600)}, TOTALS, "first")
    waiter = Asking(store, {A: Want(500)}, "waiting")
    until(lambda: waiting(store) == ["waiting"])
    shutil.rmtree(tmp_path / "run", ignore_errors=True)  # it is made anew meanwhile
    assert waiter.granted()  # nobody can know of the first until its process looks
    first.release()


NO_SPACE = """
import resource, sys
from pathlib import Path
from pytest_gpumem.leases.request import Want
from pytest_gpumem.leases.store import LeaseStore

before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
store = LeaseStore(Path(sys.argv[1]))
with store.acquire({"GPU-a": Want(1)}, {"GPU-a": 1}, "label"):
    print(store.holders("GPU-a")[0].label)
print(store.holders("GPU-a"))
resource.setrlimit(resource.RLIMIT_FSIZE, before)  # coverage writes at the end
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_full_disk_costs_the_label_not_the_lease(tmp_path):
    assert output(NO_SPACE, tmp_path / "run") == ["no label", "[]"]


READ_ONLY = """
import sys
from pathlib import Path
from pytest_gpumem.errors import LeaseError
from pytest_gpumem.leases.request import Want
from pytest_gpumem.leases.store import LeaseStore

try:
    LeaseStore(Path(sys.argv[1])).acquire({"GPU-a": Want(1)}, {"GPU-a": 1}, "label")
except LeaseError as error:
    print(error)
"""


@pytest.mark.skipif(not CONTAINERS, reason="needs Linux namespaces")
def test_a_read_only_directory_is_one_sentence(tmp_path):
    mount = ["unshare", "--mount", "sh", "-c"]
    mount += ['mount -t tmpfs -o ro,mode=0700 none "$0" && exec "$@"', tmp_path]
    (said,) = output(READ_ONLY, tmp_path / "run", before=mount)
    assert f"leases cannot be kept in {tmp_path}/run: Read-only file system; " in said


# gpu_lease

ON_SIMULATED_CARD = """
import asyncio, os, subprocess, sys, threading
from concurrent.futures import ThreadPoolExecutor
from pytest_gpumem import LeaseError, LeaseTimeout, TooLarge, gpu_lease
from pytest_gpumem.leases.api import store
from pytest_gpumem.simulator import Simulation

simulation = Simulation.attach(sys.argv[2]) if sys.argv[2:] else Simulation.start([2**30], 2**20)
simulation.install()

def held():
    return [holder.size >> 20 for holder in store().holders(simulation.cards[0].uuid)]

def take(size, **options):
    with gpu_lease(size, **options):
        return held()

try:
    SCRIPT
finally:
    simulation.close()
"""


def on_simulated_card(script, directory, **environment):
    code = ON_SIMULATED_CARD.replace("SCRIPT", script.strip().replace("\n", "\n    "))
    return output(code, code, GPUMEM_RUN_DIR=str(directory), **environment)


def test_gpu_lease_works_on_the_simulated_card(tmp_path):
    script = """
with gpu_lease("300 MiB") as lease:
    assert lease.card == simulation.cards[0].uuid
    print(*store().holders(lease.card)[0][1:])
print(held())
for wrong in ({"vram": "2GiB"}, {"device": 3}, {"vram": "much"}):
    try:
        take(wrong.pop("vram", 1), **wrong)
    except (TooLarge, ValueError) as error:
        print(type(error).__name__, str(error).replace(lease.card, "UUID"))
"""
    assert on_simulated_card(script, tmp_path, PYTEST_CURRENT_TEST="a::b") == [
        "a::b 314572800 False False",
        "[]",
        "TooLarge 2.00 GiB asked for of card UUID, which has 1.00 GiB",
        "RequestRefusedError there is no device 3; allowed is 0 to 0",
        f"RequestRefusedError 'much' is not a size; allowed is {SIZE_FORM}",
    ]


def test_gpu_lease_works_in_threads_and_in_asyncio(tmp_path):
    script = """
def work(number):
    for _ in range(5):
        sums.append(sum(take("400 MiB", timeout=60)[:2]))

async def main():
    await asyncio.gather(*(asyncio.to_thread(work, number) for number in range(4)))
    with gpu_lease("1GiB"):
        print(held())

sums = []
threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
asyncio.run(main())
print(len(sums), max(sums) <= 1024, held())
"""
    assert on_simulated_card(script, tmp_path) == ["[1024]", "40 True []"]


def test_gpu_lease_works_in_a_subprocess_within_the_parents(tmp_path):
    script = """
if sys.argv[2:]:
    print(take("500 MiB", timeout=0), flush=True)
    try:
        with gpu_lease("300 MiB"), ThreadPoolExecutor(1) as pool:
            pool.submit(take, "800 MiB", timeout=0).result()
    except LeaseTimeout as error:
        print("800.00 MiB of card" in str(error))
        print("300.00 MiB held by pid %d (child)" % os.getpid() in str(error))
        print("parent" not in str(error))
else:
    os.environ["PYTEST_CURRENT_TEST"] = "child"
    with gpu_lease("600 MiB"):
        subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[1], simulation.path])
"""
    assert on_simulated_card(script, tmp_path) == ["[600, 500]", "True", "True", "True"]


CONFTEST = """
import os, pytest
from pytest_gpumem.simulator import Simulation

simulation = Simulation.attach(os.environ["CARD"])
simulation.install()
"""
SUITE = """
import os, time, pytest
from pathlib import Path
from pytest_gpumem import gpu_lease

alone = Path(os.environ["CARD"]).with_name("alone")

@pytest.mark.parametrize("number", range(10))
def test_that_takes_more_than_half_of_the_card(number):
    with gpu_lease("600 MiB", timeout=60):
        alone.touch(exist_ok=False)
        time.sleep(0.01)
        alone.unlink()
"""


def test_two_pytest_runs_share_a_card(tmp_path):
    simulation = Simulation.start([2**30], 2**20)
    environment = os.environ | {"CARD": simulation.path, "GPUMEM_RUN_DIR": str(tmp_path / "run")}
    environment = {name: value for name, value in environment.items() if "PYTEST_" not in name}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:gpumem", "-p", "no:cacheprovider"]
    runs = []
    try:
        for name in ("one", "other"):
            suite = tmp_path / name
            suite.mkdir()
            (suite / "pytest.ini").write_text("[pytest]")
            (suite / "conftest.py").write_text(CONFTEST)
            (suite / "test_suite.py").write_text(SUITE)
            run = subprocess.Popen(
                command, cwd=suite, env=environment, stdout=subprocess.PIPE, text=True
            )
            runs.append(run)
        for run in runs:
            said, _ = run.communicate(timeout=PATIENCE)
            assert "10 passed" in said
    finally:
        for run in runs:
            run.kill()
        simulation.close()


# Any order of events

WANTS = st.dictionaries(
    st.sampled_from([A, B]),
    st.builds(Want, st.none() | st.integers(1, 10).map(lambda tenth: tenth * 100), st.booleans()),
    min_size=1,
)


class Asked:
    """One request, as the model knows it."""

    def __init__(self, owner, wants, thread):
        self.owner, self.wants, self.thread = owner, wants, thread
        self.held = False

    def claim(self, uuid):
        want = self.wants[uuid]
        return Claim(0, want.size or 0, want.exclusive or want.size is None)


class LeaseMachine(RuleBasedStateMachine):
    """Several stores on one directory, each as if of a process of its own."""

    def __init__(self):
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.stores = [LeaseStore(self.directory / "run") for _ in range(3)]
        self.asked: list[Asked] = []
        self.count = 0

    @rule(owner=st.integers(0, 2), wants=WANTS)
    def ask(self, owner, wants):
        self.count += 1
        label = f"request {self.count}"
        thread = Asking(self.stores[owner], wants, label, timeout=None)
        self.asked.append(Asked(owner, wants, thread))
        # The next one asks when this one is in the queue.
        uuid = next(iter(wants))
        until(lambda: label in [holder.label for holder in self.stores[0].holders(uuid)])

    @rule(owner=st.integers(0, 2), wants=WANTS)
    def ask_without_waiting(self, owner, wants):
        self.count += 1
        thread = Asking(self.stores[owner], wants, "try", timeout=0)
        thread.join(PATIENCE)
        request = Asked(owner, wants, thread)
        assert (thread.lease is not None) == self.may_start(request, self.asked)
        if thread.lease is not None:
            request.held = True
            self.asked.append(request)

    @precondition(lambda self: any(each.held for each in self.asked))
    @rule(data=st.data())
    def give_back(self, data):
        request = data.draw(st.sampled_from([each for each in self.asked if each.held]))
        self.asked.remove(request)
        request.thread.lease.release()

    @rule(owner=st.integers(0, 2))
    def die(self, owner):
        # Threads that wait would live on; real processes are killed while they wait elsewhere.
        if any(each.owner == owner and not each.held for each in self.asked):
            return
        standing = self.stores[owner].ledger.standing
        standing.alive.close()
        standing.guard.close()
        self.stores[owner] = LeaseStore(self.directory / "run")
        self.asked = [each for each in self.asked if each.owner != owner]

    def may_start(self, request, others):
        def beside(uuid, *, held):
            return [each.claim(uuid) for each in others if each.held == held and uuid in each.wants]

        return all(
            may_start(
                1000,
                0,
                0,
                beside(uuid, held=True),
                request.claim(uuid),
                ahead=beside(uuid, held=False),
            )
            for uuid in request.wants
        )

    @invariant()
    def just_those_who_may_have_their_leases(self):
        for index, request in enumerate(self.asked):
            before = self.asked[:index] + [each for each in self.asked[index:] if each.held]
            request.held = request.held or self.may_start(request, before)
        for request in self.asked:
            if request.held:
                assert request.thread.granted()
        held = [each for each in self.asked if each.held]
        for uuid in (A, B):
            sizes = [each.claim(uuid).extra for each in held if uuid in each.wants]
            assert sum(sizes) <= 1000
        time.sleep(0.001)
        assert not any(each.thread.lease for each in self.asked if not each.held)

    def teardown(self):
        while self.asked:
            for request in [each for each in self.asked if each.held]:
                request.thread.lease.release()
                self.asked.remove(request)
            self.just_those_who_may_have_their_leases()
        assert [holder for uuid in (A, B) for holder in self.stores[0].holders(uuid)] == []
        for store in self.stores:
            store.close()
        shutil.rmtree(self.directory)


TestAnyOrderOfEvents = LeaseMachine.TestCase
TestAnyOrderOfEvents.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)

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

from pytest_gpumem.sharing import ledger, locks
from pytest_gpumem.sharing.admission import Claim, may_start
from pytest_gpumem.sharing.lease import LeaseError, LeaseStore, LeaseTimeout, TooLarge, Want
from pytest_gpumem.units import SIZE_FORM

A, B = "GPU-aaaaaaaa-0000-0000-0000-00000000000a", "GPU-bbbbbbbb-0000-0000-0000-00000000000b"
TOTALS = {A: 1000, B: 1000}
PATIENCE = 20


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

    def __init__(self, store, wants, label="asking", timeout=PATIENCE):
        super().__init__(daemon=True)
        self.said: list[str] = []
        self.lease = self.error = None
        self._ask = lambda: store.acquire(wants, TOTALS, label, timeout, self.said.append)
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
    until(lambda: third.said)
    holder = f"700 B held by pid {os.getpid()} (first)"
    assert second.said == [f"the whole card of card {A}: 300 B of 1000 B are free, {holder}"]
    assert third.said[-1].endswith(f"{holder}, 1 waiting before")
    first.release()
    second.granted().release()
    third.granted()


def test_a_request_that_gives_up_lets_those_behind_it_start(store):
    first = store.acquire({A: Want(600)}, TOTALS, "first")
    big = Asking(store, {A: Want()}, "big", timeout=0.3)
    until(lambda: waiting(store) == ["big"])
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
    assert store.holders(A) == []


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


def test_bytes_of_foreign_processes_are_waited_for(stores):
    used = {A: 500}
    asked = []

    def others(uuid, pids):
        asked.append(set(pids))
        return used[uuid]

    store = stores(others=others)
    store.acquire({A: Want(500)}, TOTALS, "beside", 0).release()
    waiter = Asking(store, {A: Want(600)})
    until(lambda: waiter.said)
    assert waiter.said == [
        f"600 B of card {A}: 500 B of 1000 B are free, 500 B used by other programs"
    ]
    used[A] = 400
    waiter.granted()
    assert {os.getpid()} in asked


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
from pytest_gpumem.sharing.lease import LeaseStore, Want

A, TOTALS = sys.argv[2], {sys.argv[2]: 1000}
store = LeaseStore(Path(sys.argv[1]))

def take(size, label="member"):
    global lease
    lease = store.acquire({A: Want(size)}, TOTALS, label, 20)
    return lease.size

def fork():
    child = os.fork()
    if child:
        return child
    lease.release()
    os.close(1)
    signal.pause()

for line in sys.stdin:
    print(eval(line), flush=True)
"""


class Member:
    def __init__(self, directory):
        command = [sys.executable, "-c", MEMBER, str(directory), A]
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

        def make():
            made = Member(tmp_path / "run")
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
    soak = Path(__file__).with_name("lease_kills.py")
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
        "XDG_RUNTIME_DIR or TMPDIR can name another directory on this machine"
    )


def test_a_network_file_system_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "_filesystem", lambda _: "nfs4")
    with pytest.raises(LeaseError, match="nfs4 is a network file system"):
        LeaseStore(tmp_path / "run").acquire({A: Want(1)}, TOTALS, "")


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's mount table")
def test_the_file_system_of_a_directory_is_that_of_the_mount_it_lies_in():
    assert ledger._filesystem(Path("/proc/self/no/such")) == "proc"


def test_the_directory_is_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert ledger.run_directory() == tmp_path / "gpumem"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "no such"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    directory = ledger.run_directory()
    assert directory.parent == tmp_path
    assert directory.stat().st_mode & 0o777 == 0o700
    directory.chmod(0o755)
    assert ledger.run_directory().stat().st_mode & 0o777 == 0o700


def test_a_directory_that_is_a_link_of_somebodys_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own = ledger.run_directory()
    own.rmdir()
    own.symlink_to(tmp_path)
    with pytest.raises(LeaseError, match="it belongs to another user"):
        ledger.run_directory()


# gpu_lease

ON_SIMULATED_CARD = """
import os, sys
from pytest_gpumem.simulator import Simulation
from pytest_gpumem.sharing.lease import gpu_lease, _store

simulation = Simulation.start(2**30, 2**20)
simulation.install()
try:
    with gpu_lease("300 MiB") as lease:
        assert lease.card == simulation.card.uuid
        print(*_store().holders(lease.card)[0][1:])
    print(*_store().holders(lease.card))
    for wrong in ({"vram": "2GiB"}, {"device": 3}, {"vram": "much"}):
        try:
            with gpu_lease(**wrong):
                pass
        except Exception as error:
            print(type(error).__name__, str(error).replace(lease.card, "UUID"))
finally:
    simulation.close()
"""


def test_gpu_lease_works_on_the_simulated_card(tmp_path):
    environment = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path), "PYTEST_CURRENT_TEST": "a::b"}
    done = subprocess.run(
        [sys.executable, "-c", ON_SIMULATED_CARD],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "a::b 314572800 False False",
        "",
        "TooLarge 2.00 GiB asked for of card UUID, which has 1.00 GiB",
        "ValueError there is no device 3; allowed is 0 to 0",
        f"ValueError 'much' is not a size; allowed is {SIZE_FORM}",
    ]


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
        standing = self.stores[owner]._ledger.standing
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

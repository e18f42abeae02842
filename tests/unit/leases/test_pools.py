"""Leases of main memory: pools that are asked for as cards are, and what others use of them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import nullcontext

import pytest

from pytest_gpumem.devices import Usage, host
from pytest_gpumem.errors import LeaseTimeout, TooLarge
from pytest_gpumem.leases import ask, family, loans
from pytest_gpumem.leases.entries import card_key, entry_named
from pytest_gpumem.leases.request import Want
from pytest_gpumem.leases.store import LeaseStore

GIB = 2**30
CARD, RAM = "GPU-aaaaaaaa-0000-0000-0000-00000000000a", host.MACHINE
TOTALS = {CARD: 8 * GIB, RAM: 16 * GIB}


class Idle:
    """A driver of a card that nobody uses."""

    def used(self, _):
        return 0

    def usage(self, _):
        return Usage()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Let the machine have 16 GiB; return what says how much of it is used, and by whom."""

    def use(gib, **families):
        text = f"MemTotal: {16 << 20} kB\nMemAvailable: {int((16 - gib) * 2**20)} kB\n"
        (tmp_path / "proc/meminfo").write_text(text)
        told.update({int(pid[1:]): size for pid, size in families.items()})

    told = {}
    (tmp_path / "proc").mkdir()
    pools = host.pools
    monkeypatch.setattr(host, "pools", lambda: pools(tmp_path))
    monkeypatch.setattr(host, "family_of", lambda pid, _: int(told.get(pid, 0) * GIB))
    monkeypatch.setattr(family, "lineage", lambda _: ())  # members are strangers
    monkeypatch.setattr(family.Families, "is_here", lambda *_: True)
    use(0)
    return use


@pytest.fixture
def stores(tmp_path):
    made = []

    def make():
        made.append(LeaseStore(tmp_path / "run", driver=Idle()))
        return made[-1]

    yield make
    for each in made:
        each.close()


def ram(gib):
    return {RAM: Want(int(gib * GIB))}


def refused(store, wants, **more):
    with pytest.raises(LeaseTimeout) as refusal:
        store.acquire(wants, TOTALS, "refused", 0, **more)
    return str(refusal.value)


def test_nobody_has_the_card_and_waits_for_main_memory(stores, machine):
    one, other, third = stores(), stores(), stores()
    with one.acquire(ram(12), TOTALS, "has main memory"):
        both = {CARD: Want(6 * GIB)} | ram(6)
        asking = threading.Thread(target=lambda: other.acquire(both, TOTALS, "both").release())
        asking.start()
        while not any(each.waiting for each in third.holders(CARD)):
            pass
        # It has none of the card meanwhile, and who needs it less than it leaves passes.
        text = refused(third, {CARD: Want(7 * GIB)})
        assert "8.00 GiB of 8.00 GiB are free, 1 waiting before" in text
        # Of several, that is told which is waited for.
        assert "card" not in refused(third, {CARD: Want(1)} | ram(5))
        third.acquire({CARD: Want(2 * GIB)}, TOTALS, "passes", 0).release()
        assert asking.is_alive()
    asking.join(10)
    assert not asking.is_alive()


def test_what_others_use_leaves_less(stores, machine):
    store = stores()
    machine(6)
    store.acquire(ram(10), TOTALS, "fits", 0).release()
    assert refused(store, ram(11)).startswith(
        "no lease within 0 s: 11.00 GiB of main memory: 10.00 GiB of 16.00 GiB are free, "
        "6.00 GiB used without a lease"
    )
    text = refused(store, {CARD: Want(GIB)} | ram(11))
    assert text.startswith("no lease within 0 s: 11.00 GiB of main memory: ")
    # A test runs beside other programs as without us, but not beside another lease.
    assert store.acquire(ram(11), TOTALS, "test", 0, test=True).short == 0
    assert "10.00 GiB of main memory" in refused(stores(), ram(11), test=True)


def test_what_a_holder_uses_of_its_lease_counts_once(stores, machine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 99)
        holder = stores()
    store = stores()
    holder.acquire(ram(8), TOTALS, "holder")
    machine(9, p99=6)
    # 3 GiB of the 9 are others', and 8 leased.
    assert "5.00 GiB of 16.00 GiB are free" in refused(store, ram(8.1))
    store.acquire(ram(5), TOTALS, "fits", 0).release()
    # What it takes beyond its lease is not there for others either.
    machine(13, p99=12)
    assert "3.00 GiB of 16.00 GiB are free" in refused(store, ram(8.1))


@pytest.mark.parametrize(
    ("ends", "held", "before", "now", "free"),
    [(True, 8, (9, 6), (9, 6), 7), (False, 12, (9, 6), (13, 10), 1)],
    ids=["a test ends and keeps what it has", "a test takes more"],
)
def test_what_changes_while_it_is_looked_is_not_granted_twice(
    stores, machine, monkeypatch, *, ends, held, before, now, free
):
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 99)
        holder = stores()
    lease, store = holder.acquire(ram(held), TOTALS, "holder"), stores()
    machine(before[0])

    def look(pid, _):
        if ends:
            lease.release()
        machine(now[0])
        return now[1] * GIB if pid == 99 else 0

    monkeypatch.setattr(host, "family_of", look)
    assert f"{free}.00 GiB of 16.00 GiB are free" in refused(store, ram(free + 0.1))


@pytest.mark.parametrize("number", [1, 4711, 12345678, 2**40 + 12345678])
def test_a_pool_is_never_taken_for_a_card(number):
    key = card_key(f"RAM-{number}g")
    assert host.is_pool(f"RAM-{number}g")
    assert not host.is_pool(f"GPU-{number}")
    assert set(key) - set("0123456789abcdef")
    entry = entry_named(f"h-0000000007-4711.9f3c2a51-56789abc=5,{key}=7,{card_key(RAM)}=9")
    assert [claim.extra for claim in entry.claims.values()] == [5, 7, 9]


@pytest.mark.parametrize(
    ("used", "long", "lent"), [(1, 600, True), (12, 600, False), (12, 0, True)]
)
def test_who_sleeps_lends_main_memory_only_where_it_is_there_or_after_very_long(
    stores, machine, monkeypatch, *, used, long, lent
):
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 99)
        stores().acquire(ram(12), TOTALS, "sleeps", test=True)
    monkeypatch.setattr(family.Families, "seconds_of_sleeper", lambda *_: 5.0)
    monkeypatch.setattr(loans, "SLEEP", 0.0)
    monkeypatch.setattr(loans, "LONG_SLEEP", long)
    machine(used, p99=used)
    with nullcontext() if lent else pytest.raises(LeaseTimeout, match=r"12\.00 GiB held"):
        stores().acquire(ram(8), TOTALS, "asks", 0.3, test=True)


def test_more_than_there_is_is_refused_by_name(stores, machine):
    with pytest.raises(TooLarge, match=r"17.00 GiB asked for of main memory, which has 16.00 GiB"):
        stores().acquire(ram(17), TOTALS, "too large")


def test_a_test_asks_for_what_its_process_has_as_well(machine, monkeypatch):
    ask._pools.cache_clear()
    monkeypatch.setattr(host, "own", lambda: 2 * GIB)
    monkeypatch.setattr(host, "has_children", lambda: False)
    try:
        assert ask.in_main_memory(3 * GIB, 0) == (ram(5), {RAM: 16 * GIB})
        assert ask.in_main_memory(30 * GIB, GIB)[0] == ram(15)
        # And what a server has that a fixture started.
        machine(0, **{f"p{os.getpid()}": 4})
        monkeypatch.setattr(host, "has_children", lambda: True)
        assert ask.in_main_memory(3 * GIB, 0)[0] == ram(7)
    finally:
        ask._pools.cache_clear()


def test_control_groups_are_pools_within_the_machine(tmp_path):
    files = {
        "proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n",
        "proc/self/cgroup": "0::/outer/inner\n4:memory:/box\n",
        "sys/fs/cgroup/outer/memory.max": f"{6 * GIB}",
        "sys/fs/cgroup/outer/memory.current": f"{5 * GIB}",
        "sys/fs/cgroup/outer/memory.stat": f"anon 1\ninactive_file {GIB}\n",
        "sys/fs/cgroup/outer/inner/memory.max": "max",
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{3 * GIB}",
        "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{GIB}",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{99 * GIB}",  # more than there is
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = host.pools(tmp_path)

    sizes = [(pool.total // GIB, pool.used // GIB) for pool in found]
    assert sizes[0] == (16, 8)
    assert sorted(sizes[1:]) == [(3, 1), (6, 4)]
    assert len({pool.name for pool in found}) == 3
    assert all(map(host.is_pool, (pool.name for pool in found)))
    (tmp_path / "proc/meminfo").unlink()
    assert len(host.pools(tmp_path)) == 3  # where nothing says what the machine has


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_family_is_counted_without_those_who_have_leases_of_their_own():
    code = "b = bytearray(40 << 20); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        child.stdout.readline()
        every, alone = (host.family_of(os.getpid(), besides) for besides in ((), {child.pid}))
        only = host.family_of(child.pid, ())
        child.communicate(b"\n")

    assert only > 40 * 2**20
    assert every - alone == pytest.approx(only, abs=4 * 2**20)

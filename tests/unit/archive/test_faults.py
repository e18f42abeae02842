"""Disks that are full, broken or read-only, and processes that are killed in the middle."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from kills import names, state
from states import same

from pytest_gpumem.archive import consolidator, disk, keys, memory
from pytest_gpumem.archive.store import ArchiveStore
from pytest_gpumem.errors import ArchiveError, DiskError, KeyRefusedError

KEY = b"k" * 32
CALLS = ("open", "pwrite", "fsync", "ftruncate", "preadv", "fstat", "close", "read", "rename")
CALLS += ("unlink", "mkdir", "stat", "lstat", "scandir", "flock", "short pwrite", "short preadv")
"""Functions of ``os`` and ``fcntl``; a short one moves some bytes and tells of no error."""
SURVIVED = {"close", "scandir", "stat", "lstat", "unlink", "short pwrite", "short preadv"}
"""Those whose failure may do no harm."""
ERRORS = itertools.cycle((errno.ENOSPC, errno.EIO, errno.EMFILE, errno.EROFS))


class Fault:
    """Lets the Nth call of a function fail that a store makes, once or from then on."""

    def __init__(self, monkeypatch, name):
        self.at, self.lasting, self.count, self.error = None, False, 0, errno.ENOSPC
        self.name = name
        home = fcntl if name == "flock" else os
        name = name.removeprefix("short ")
        real = getattr(home, name)

        def call(file, *more, **by_name):
            self.count += 1
            if (
                self.at is None
                or self.count < self.at
                or (self.count > self.at and not self.lasting)
            ):
                return real(file, *more, **by_name)
            if self.name == "short pwrite":
                return real(file, memoryview(more[0])[:100], *more[1:])
            if self.name == "short preadv":
                return real(file, [more[0][0][:1000]], *more[1:])
            if name == "close":
                real(file)
            raise OSError(self.error, os.strerror(self.error))

        monkeypatch.setattr(home, name, call)

    def arm(self, at, error, *, lasting):
        self.at, self.error, self.lasting, self.count = at, error, lasting, 0

    def disarm(self):
        self.at = None


CHANGES = {
    "put": lambda store, _: store.put(state(2, 100)),
    "put what takes several writes": lambda store, _: store.put(LARGE),
    "put what is there": lambda store, _: store.put(state(1, 100)),
    "rotate": lambda store, _: store.rotate(),
    "forget": lambda store, _: store.forget(keep_last=0, context="other"),
    "delete": lambda store, name: store.delete(name),
    "anchor": lambda store, _: store.anchor(),
    "get": lambda store, name: store.get(name),
    "verify": lambda store, _: store.verify(read_data=True),
    "look": lambda store, name: (store.stats(), store.health(), store.stored(store.entry(name))),
}
LARGE = state(3, 1_600_000)
TAKEN_AWAY = {"forget", "delete"}


@pytest.mark.parametrize("doing", CHANGES)
def test_each_call_of_each_change_may_fail_and_the_store_stays_whole(tmp_path, monkeypatch, doing):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # only how it fails counts here
    keys.generate(tmp_path / "key")
    folder = tmp_path / "store"
    store = ArchiveStore(folder, key=tmp_path / "key")
    kept = store.put(state(0, 100), context="kept")
    clean = names(folder)
    seen = 0

    for call in CALLS:
        with monkeypatch.context() as patched:
            fault = Fault(patched, call)
            for at in itertools.count(1):
                name = store.put(state(1, 100), context="other")
                fault.arm(at, next(ERRORS), lasting=bool(at % 2))
                failure, done = None, None
                try:
                    done = CHANGES[doing](store, name)
                except (DiskError, KeyRefusedError) as error:
                    failure = str(error)
                reached = fault.count >= at
                fault.disarm()
                seen += failure is not None

                # One sentence, which says what the system said.
                assert failure is None or os.strerror(fault.error) in failure
                assert failure is None or "\n" not in failure
                again = ArchiveStore(folder, key=tmp_path / "key")
                assert again.verify(read_data=doing.startswith("put what takes")) == ()
                same(again.get(kept), state(0, 100))
                there = {entry.id for entry in again.entries()}
                assert failure or (name in there) == (doing not in TAKEN_AWAY)
                assert name in there or doing in TAKEN_AWAY
                assert not doing.startswith("put") or failure or done in there
                assert not any(disk.TEMPORARY in each for each in names(folder))
                for each in there - {kept}:
                    again.delete(each)
                assert [each for each in names(folder) if each != "anchors"] == clean
                # Looking at a store may tell of it as of a problem.
                assert not reached or failure or call in SURVIVED or doing in {"verify", "look"}
                if not reached:
                    break
    assert seen > 10 or doing == "verify"


def test_an_entry_that_could_not_be_read_once_is_read_the_next_time(tmp_path, monkeypatch):
    name = ArchiveStore(tmp_path, key=KEY).put(state(1, 100))
    store = ArchiveStore(tmp_path, key=KEY)
    with monkeypatch.context() as patched:
        fault = Fault(patched, "read")
        fault.arm(1, errno.EIO, lasting=True)
        assert store.entries() == []
        assert [each.name for each in store.health().problems][:1] == [name]
        fault.disarm()
        assert [entry.id for entry in store.entries()] == [name]
    assert store.verify(read_data=True) == ()


@pytest.mark.parametrize("most", [1, 4096, 100_001])
def test_short_writes_and_reads_lose_nothing(tmp_path, monkeypatch, most):
    pwrite, preadv = os.pwrite, os.preadv
    if most > 1:
        monkeypatch.setattr(
            disk.os, "pwrite", lambda file, data, at: pwrite(file, memoryview(data)[:most], at)
        )
    monkeypatch.setattr(
        disk.os, "preadv", lambda file, views, at: preadv(file, [views[0][: max(most, 1000)]], at)
    )
    store = ArchiveStore(tmp_path, key=KEY)

    same(store.get(store.put(state(1, 1_500_000))), state(1, 1_500_000))


def test_threads_that_are_refused_direct_reading_at_once_all_go_on_without_it(
    tmp_path, monkeypatch
):
    path = tmp_path / "big"
    data = os.urandom(5 * 2**20)
    path.write_bytes(data)
    preadv, readers = os.preadv, 4
    together = threading.Barrier(readers)
    refusals = itertools.count()

    def refuses(file, views, at):
        if next(refusals) < readers:
            together.wait(30)
            raise OSError(errno.EINVAL, "not aligned")
        return preadv(file, views, at)

    monkeypatch.setattr(disk, "_set_direct", lambda file, on: on)
    monkeypatch.setattr(disk.os, "preadv", refuses)
    file = disk.OldFile(path)
    try:
        with ThreadPoolExecutor(readers) as pool:
            pieces = list(
                pool.map(lambda at: bytes(file.read(at, 2**20)), range(0, 5 * 2**20, 2**20))
            )
    finally:
        file.close()
    assert b"".join(pieces) == data


def test_a_write_that_does_nothing_is_an_error(tmp_path, monkeypatch):
    store = ArchiveStore(tmp_path, key=KEY)
    monkeypatch.setattr(disk.os, "pwrite", lambda file, data, at: 0)

    with pytest.raises(DiskError, match="the system wrote nothing"):
        store.put(state(1, 100))


@pytest.mark.parametrize("elements", [100_000, 3_000_000], ids=["small", "several writes"])
def test_what_the_disk_changed_is_found_before_the_state_counts_as_archived(
    tmp_path, monkeypatch, elements
):
    store = ArchiveStore(tmp_path, key=KEY)
    pwrite, writes = os.pwrite, itertools.count()

    def lying(file, data, at):
        changed = bytearray(data)
        changed[len(changed) // 2] ^= next(writes) == 0
        return pwrite(file, changed, at)

    before = names(tmp_path)
    monkeypatch.setattr(disk.os, "pwrite", lying)
    monkeypatch.setattr(disk, "_DIRECT", 0)  # a copy begins at no page
    with pytest.raises(ArchiveError):
        store.put(state(1, elements))
    assert names(tmp_path) == before


def test_a_large_state_is_read_back_while_it_is_written(tmp_path, monkeypatch):
    store = ArchiveStore(tmp_path, key=KEY)
    did = []
    for name in ("pwrite", "preadv"):
        real = getattr(os, name)

        def call(*arguments, name=name, real=real):
            did.append(name)
            return real(*arguments)

        monkeypatch.setattr(disk.os, name, call)
    content = state(1, 8_000_000)
    found = store.put(content)
    assert "pwrite" in did[did.index("preadv") :]
    same(store.get(found), content)


@pytest.mark.parametrize("wrong", [None, "work", "then"])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_what_is_done_in_turn_is_done_in_order_and_ends_with_the_first_error(
    monkeypatch, threads, wrong
):
    monkeypatch.setattr(memory, "_cpus", lambda: threads)
    chance = random.Random(threads)  # noqa: S311  # a seed makes it repeatable
    done, ahead = [], []
    pauses = [chance.choice([0, 0, 0.0001, 0.003]) for _ in range(60)]

    def work(number):
        ahead.append(number - len(done))
        time.sleep(pauses[number])
        if wrong == "work" and number == 40:
            raise OSError("no")
        return -number

    def then(number, found):
        assert found == -number
        if wrong == "then" and number == 40:
            raise OSError("no")
        done.append(number)

    with contextlib.ExitStack() as stack:
        if wrong:
            stack.enter_context(pytest.raises(OSError, match="no"))
        memory.in_turn(work, then, range(60))
    assert done == list(range(len(done)))
    assert len(done) <= 40 if wrong else len(done) == 60
    assert max(ahead) < threads + memory.AHEAD


def test_a_file_system_without_direct_access_works_too(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_DIRECT", 0)
    store = ArchiveStore(tmp_path, key=KEY)

    same(store.get(store.put(state(1))), state(1))


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a tmpfs")  # noqa: PTH112, S108
def test_a_tmpfs_works_too(tmp_path):
    folder = f"/dev/shm/gpumem-archive-{os.getpid()}"  # noqa: S108
    try:
        store = ArchiveStore(folder, key=KEY)
        same(store.get(store.put(state(1))), state(1))
    finally:
        shutil.rmtree(folder)


def test_a_limit_on_file_sizes_is_one_error_and_the_model_stays(tmp_path):
    code = """
import resource, signal, sys, torch
from pytest_gpumem import ArchiveStore, GpuConsolidator
store = ArchiveStore(sys.argv[1], key=b"k" * 32)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 2**20, 3 * 2**20))
model = torch.nn.Linear(1500, 1500)
done = GpuConsolidator(store).consolidate_gpu_memory([{"data": model}])
print(done.refused, model.weight.shape, store.entries())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    assert "File too large" in done.stdout
    assert done.stdout.rstrip().endswith("torch.Size([1500, 1500]) []")
    assert names(tmp_path) == ["key", "key-copy", "lock"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_is_read_only_is_one_error(tmp_path):
    store = ArchiveStore(tmp_path / "store", key=KEY)
    (tmp_path / "store" / "entries").chmod(0o500)

    with pytest.raises(DiskError, match=r"cannot write .*: Permission denied"):
        store.put([1])


def test_a_store_that_is_a_file_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(DiskError, match="cannot use the store"):
        ArchiveStore(tmp_path / "file", key=KEY)


def test_what_a_dead_writer_left_is_gone_after_the_next_start(tmp_path):
    store = ArchiveStore(tmp_path, key=KEY)
    kept = store.put(state(1, 100))
    orphan = store.put(state(2, 100))
    before = names(tmp_path)
    content = store.entry(orphan).content
    sealed = (tmp_path / "states" / content).read_bytes()
    store.delete(orphan)
    # Killed when the state had its name and the entry had not.
    (tmp_path / "states" / content).write_bytes(sealed)
    for place in ("states", "entries", "."):
        (tmp_path / place / f"{disk.TEMPORARY}0123").write_bytes(b"part")

    again = ArchiveStore(tmp_path, key=KEY)
    assert len(names(tmp_path)) == len(before) - 2
    same(again.get(kept), state(1, 100))


def test_nothing_of_a_living_writer_is_tidied_away(tmp_path):
    store = ArchiveStore(tmp_path, key=KEY)
    with store._place.locked(alone=False):
        (tmp_path / "states" / f"{disk.TEMPORARY}0123").write_bytes(b"part")
        ArchiveStore(tmp_path, key=KEY)
        assert (tmp_path / "states" / f"{disk.TEMPORARY}0123").exists()


@pytest.fixture(scope="module")
def killed():
    """Return what was said of processes that were killed, in a process without threads to fork."""
    calls = "openat,flock,fcntl,pwrite64,ftruncate,fsync,preadv2,rename,unlink,close"
    program = Path(__file__).parents[2] / "soak" / "archive_kills.py"
    done = subprocess.run(
        [sys.executable, program, "--kills=30", f"--calls={calls}", "--seed=1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_kill_at_any_instant_leaves_the_old_or_the_new(killed):
    assert "at random: Killed(kills=30, " in killed


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_kill_at_any_system_call_leaves_the_old_or_the_new(killed):
    (count,) = re.findall(r"at (\d+) system calls: Killed\(kills=\1, ", killed)
    assert int(count) > 20


def test_a_consolidator_whose_disk_fails_says_so_and_goes_on(tmp_path, monkeypatch):
    store = ArchiveStore(tmp_path, key=KEY)
    fault = Fault(monkeypatch, "fsync")
    fault.arm(1, errno.EIO, lasting=True)
    here = consolidator.GpuConsolidator(store)
    tensor = torch.ones(100)
    done = here.consolidate_gpu_memory([{"data": {"w": tensor}}])

    assert len(done.refused) == 1
    assert "Input/output error" in done.refused[0]
    assert torch.equal(tensor, torch.ones(100))
    fault.disarm()
    assert len(here.consolidate_gpu_memory([{"data": {"w": tensor}}]).ids) == 1


@pytest.mark.parametrize("where", ["here", "there", "everywhere"])
def test_an_error_in_a_thread_keeps_nothing_of_its_callers(monkeypatch, where):
    class State:
        pass

    here, together = threading.get_ident(), threading.Barrier(3)

    def work(_):
        together.wait(10)
        if where == "everywhere" or (where == "here") == (threading.get_ident() == here):
            raise OSError("no")

    def call():
        state = State()
        with contextlib.suppress(OSError):
            memory.each(work, range(3))
            pytest.fail("no error")
        return weakref.ref(state)

    monkeypatch.setattr(memory, "_cpus", lambda: 3)
    gc.collect()
    gc.disable()
    try:
        assert call()() is None
    finally:
        gc.enable()

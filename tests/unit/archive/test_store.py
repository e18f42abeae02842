from __future__ import annotations

import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from states import same

from pytest_gpumem.archive import disk, keys, memory, subclasses, vault
from pytest_gpumem.archive.retention import Forgotten
from pytest_gpumem.archive.states import States
from pytest_gpumem.archive.store import ArchiveStore
from pytest_gpumem.errors import (
    DamagedError,
    InUseError,
    KeyRefusedError,
    NotFoundError,
    QuotaError,
    StateRefusedError,
    WrongKeyError,
)

KEY = b"k" * 32


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def store(folder):
    return ArchiveStore(folder, key=KEY)


def state(number=0, elements=1000):
    generator = torch.Generator().manual_seed(number)
    return {"w": torch.randn(elements, generator=generator), "number": number}


def files(folder):
    return sorted(str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file())


def test_what_put_returned_is_got_by_another_store_on_the_directory(store, folder):
    name = store.put(state(), type="model", context="test_a", tags=["x"], metadata={"lr": 0.1})
    other = ArchiveStore(folder, key=KEY)

    same(other.get(name), state())
    entry = other.entry(name)
    assert (entry.type, entry.context, entry.tags) == ("model", "test_a", ("x",))
    assert entry.metadata == {"lr": 0.1}
    assert entry.size == 4000
    assert other.entries() == store.entries() == [entry]
    assert [each[:2] for each in other.tensors(name)] == [("['w']", "float32")]


def test_one_part_is_got_alone_and_a_wrong_path_is_not_found(store):
    name = store.put({"a": {"b": torch.arange(4)}})

    assert torch.equal(store.get(name, at=["a", "b"]), torch.arange(4))
    with pytest.raises(NotFoundError, match=f"the state {name} has no 'z' there"):
        store.get(name, at="z")


@pytest.mark.parametrize("name", ["0" * 16, "../../etc/passwd", "", "x" * 16, None])
def test_what_is_no_id_is_not_found(store, name):
    with pytest.raises(NotFoundError):
        store.get(name)


def test_an_unchanged_state_is_written_once_and_found_under_each_context(store, folder):
    first = store.put(state(), context="test_a")
    before = files(folder / "states")
    second = store.put(state(), context="test_b")

    assert files(folder / "states") == before
    assert [each.id for each in store.find(context="test_b")] == [second]
    assert store.entry(first).content == store.entry(second).content
    store.delete(first)
    same(store.get(second), state())
    store.delete(second)
    assert files(folder / "states") == []


def test_a_state_whose_file_was_damaged_is_written_again(store, folder):
    name = store.put(state())
    (path,) = (folder / "states").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    other = ArchiveStore(folder, key=KEY)
    with pytest.raises(DamagedError):
        other.get(name)

    other.put(state())
    same(other.get(name), state())


def test_entries_are_found_by_each_of_their_properties(store):
    a = store.put(state(1), type="model", context="x", tags=["t", "u"])
    time.sleep(0.01)
    middle = time.time()
    b = store.put(state(2), type="optimizer", context="x", tags=["t"])

    def ids(**conditions):
        return [each.id for each in store.find(**conditions)]

    assert ids() == ids(context="x") == ids(tag="t") == [a, b]
    assert ids(type="model") == ids(tag="u") == ids(until=middle) == ids(content=state(1)) == [a]
    assert ids(since=middle) == ids(content=store.entry(b).content) == [b]
    assert ids(type="model", since=middle) == ids(content=state(3)) == ids(tag="v") == []


def test_forget_says_how_many_decayed_and_how_many_were_removed(store, folder):
    names = [store.put(state(number), context=f"c{number}") for number in range(4)]
    again = store.put(state(0), context="again")
    size = (folder / "states" / store.entry(names[1]).content).stat().st_size

    assert store.forget(keep_last=3, dry_run=True) == Forgotten(2, 1, size)
    assert len(store.entries()) == 5
    assert store.forget(keep_last=3) == Forgotten(2, 1, size)  # state 0 is still wanted
    assert [each.id for each in store.entries()] == [names[2], names[3], again]
    assert store.forget(keep_last=3) == Forgotten(0, 0, 0)
    assert store.forget(context="c2", keep_last=0).decayed == 1
    assert store.forget(max_stored=3 * size) == Forgotten(0, 0, 0)
    assert store.forget(max_stored=size + 100)[:2] == (1, 1)
    assert store.forget(older_than=1000).decayed == 0
    assert store.forget(older_than=0).decayed == 1
    assert store.entries() == []
    assert files(folder) == ["key", "key-copy", "lock"]


def test_stats_tell_what_each_context_holds(store):
    store.put(state(1), context="a")
    store.put(state(1), context="b")
    store.put(state(2), context="b")

    stats = store.stats()
    assert [(name, each.entries, each.states, each.size) for name, each in stats.items()] == [
        (None, 3, 2, 8000),
        ("a", 1, 1, 4000),
        ("b", 2, 2, 8000),
    ]
    assert 6000 < stats[None].stored < 8000


def test_the_quota_refuses_clearly_and_room_can_be_made(folder):
    store = ArchiveStore(folder, key=KEY, quota=9_000)
    first = store.put(state(1))
    store.put(state(2))
    assert store.health().score < 1
    with pytest.raises(QuotaError, match=r"is full: 7\.\d+ KiB used and .* allowed are 8\.79 KiB"):
        store.put(state(3))
    assert len(store.entries()) == 2
    store.put(state(2), context="unchanged needs no room")

    store.delete(first)
    same(store.get(store.put(state(3))), state(3))


def test_a_thread_that_puts_is_waited_for_where_another_one_counts_for_the_quota(folder):
    store = ArchiveStore(folder, key=KEY, quota=10**9)
    states = store._place.states
    store.put(state(1)), store.put(state(2))
    putting = threading.Thread(target=store.put, args=[state(3)])

    class Names(set):
        def __contains__(self, name):
            if putting.ident is None:
                states._sizes_at = counted
                putting.start()
                putting.join(1)
            return super().__contains__(name)

    used, counted, really = states.used(), states._sizes_at, states.names
    states._sizes_at, states.names = None, lambda: Names(really())
    assert states.used() == used
    putting.join()
    assert states.used() > used


def test_verify_and_health_name_what_is_wrong(store, folder):
    good, bad, gone = (store.put(state(number)) for number in range(3))
    assert store.verify(read_data=True) == ()
    (folder / "states" / store.entry(gone).content).unlink()
    path = folder / "states" / store.entry(bad).content
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    (folder / "entries" / ("f" * 16)).write_bytes(b"nonsense")

    assert {each.name for each in store.verify()} == {gone, "f" * 16}
    assert {each.name for each in store.verify(read_data=True)} == {gone, bad, "f" * 16}
    assert {each.name for each in store.health().problems} == {gone, "f" * 16}
    assert store.health().score < 0.6
    store.delete("f" * 16)
    assert [each.id for each in store.entries()] == [good, bad, gone]


@pytest.mark.parametrize("place", ["states", "entries"])
def test_a_file_that_takes_the_place_of_another_is_refused(store, folder, place):
    first, second = store.put(state(1)), store.put(state(2))
    one, other = sorted((folder / place).iterdir())
    one.write_bytes(other.read_bytes())

    again = ArchiveStore(folder, key=KEY)
    assert len(again.verify()) == 1
    refused = 0
    for name in (first, second):
        try:
            again.get(name)
        except DamagedError:
            refused += 1
    assert refused == 1


def test_nothing_is_orphaned_while_an_entry_cannot_be_read(store, folder):
    lost, other = store.put(state(1)), store.put(state(2))
    path = folder / "entries" / lost
    sealed = path.read_bytes()
    path.write_bytes(sealed[:-1])
    store.delete(other)
    path.write_bytes(sealed)

    same(ArchiveStore(folder, key=KEY).get(lost), state(1))


def test_a_state_that_is_damaged_later_is_not_taken_for_archived(store, folder):
    name = store.put(state())
    path = folder / "states" / store.entry(name).content
    sound = path.read_bytes()
    for damaged in (
        sound[:-1],
        bytes(len(sound)),
        sound[:200] + bytes([sound[200] ^ 1]) + sound[201:],
    ):
        path.write_bytes(damaged)
        store.put(state())
        same(store.get(name), state())


def test_what_others_put_and_delete_while_verify_looks_is_no_problem(store, folder, monkeypatch):
    other = ArchiveStore(folder, key=KEY)
    last, listings = other.put(state(0)), []
    needed = other.need(last)

    def listed(place, really=disk.listed):
        nonlocal last, needed
        found = really(place)
        listings.append(place)
        with monkeypatch.context() as inner:
            inner.setattr(disk, "listed", really)
            needed()
            other.delete(last)
            last = other.put(state(len(listings)))
            needed = other.need(last)
        return found

    monkeypatch.setattr(disk, "listed", listed)
    assert store.verify() == ()
    needed()
    assert {place.name for place in listings} == {"store", "states", "entries", "asleep"}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_verify_builds_what_it_reads(store, monkeypatch):
    class Odd(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner):
            self.inner = inner

        def __tensor_flatten__(self):
            return ["inner"], None

        @staticmethod
        def __tensor_unflatten__(inner, context, size, stride):
            return Odd(inner["inner"])

        __torch_dispatch__ = classmethod(lambda *_, **__: NotImplemented)

    monkeypatch.setattr(subclasses, "_allowed", {Odd})
    sparse = torch.eye(3).to_sparse()
    name = store.put(
        [Odd(torch.ones(3)), sparse, torch.quantize_per_tensor(torch.ones(2), 1, 0, torch.qint8)]
    )
    assert store.verify(read_data=True) == ()
    monkeypatch.setattr(subclasses, "_allowed", set())
    assert store.verify() == ()
    (problem,) = store.verify(read_data=True)
    assert problem.name == name
    assert "is not allowed" in problem.what


def test_the_wrong_key_does_not_open_the_store(store, folder):
    name = store.put(state())
    with pytest.raises(WrongKeyError, match="the key of the program does not open the store"):
        ArchiveStore(folder, key=b"x" * 32)

    (folder / "key").unlink()
    same(ArchiveStore(folder, key=KEY).get(name), state())
    (folder / "key-copy").unlink()
    with pytest.raises(DamagedError, match="has lost its key files"):
        ArchiveStore(folder, key=KEY)


def test_after_a_rotation_the_new_key_opens_what_the_old_one_wrote(tmp_path):
    key = tmp_path / "key"
    keys.generate(key)
    old = keys.find(key).keys[0]
    store = ArchiveStore(tmp_path / "store", key=key)
    name = store.put(state())
    before = (tmp_path / "store" / "states" / store.entry(name).content).read_bytes()
    store.rotate()

    assert keys.find(key).keys[1] == old
    with pytest.raises(WrongKeyError):
        ArchiveStore(tmp_path / "store", key=old)
    again = ArchiveStore(tmp_path / "store", key=key)
    same(again.get(name), state())
    assert again.put(state()) != name  # the content hash stays the same
    assert len(files(tmp_path / "store" / "states")) == 1
    assert (tmp_path / "store" / "states" / store.entry(name).content).read_bytes() == before
    with pytest.raises(KeyRefusedError, match="a new one must be given"):
        ArchiveStore(tmp_path / "other", key=KEY).rotate()


def test_everything_in_the_directory_is_its_owners_alone(store, folder):
    store.put(state())

    for each in [folder, *folder.rglob("*")]:
        assert each.stat().st_mode & 0o077 == 0, each


def test_names_and_values_are_nowhere_in_the_files(store, folder):
    name = store.put({"secret-layer": torch.ones(3)}, context="secret-context", tags=["secret-tag"])

    for path in folder.rglob("*"):
        assert b"secret" not in str(path).encode()
        if path.is_file():
            assert b"secret" not in path.read_bytes()
    assert store.tensors(name)[0].path == "['secret-layer']"


def test_a_hostile_name_is_only_a_name(store, folder):
    hostile = {"../../x": torch.ones(1), "a/b\0": torch.ones(2), "": torch.ones(3), "x" * 5000: 1}
    before = set(folder.parent.iterdir())

    same(store.get(store.put(hostile, context="../..", tags=["/etc"])), hostile)
    assert set(folder.parent.iterdir()) == before


@pytest.fixture(scope="module")
def processes():
    """Start functions in processes of their own, and wait for all of them to end well."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "pytest_gpumem.archive.file"])

    def _run(*calls):
        started = [context.Process(target=target, args=more) for target, *more in calls]
        for each in started:
            each.start()
        for each in started:
            each.join()
        assert [each.exitcode for each in started] == [0] * len(started)

    return _run


def put_some(folder, worker, count):
    torch.set_num_threads(1)
    store = ArchiveStore(folder, key=KEY)
    for number in range(count):
        name = store.put(state(number), context=f"worker {worker}")
        same(store.get(name), state(number))


def test_processes_that_write_the_same_states_at_once_lose_nothing(folder, processes):
    processes(*[(put_some, folder, each, 10) for each in range(3)])

    store = ArchiveStore(folder, key=KEY)
    assert len(store.entries()) == 30
    assert store.stats()[None].states == 10
    assert store.verify(read_data=True) == ()


def put_and_delete(folder, worker, count):
    store = ArchiveStore(folder, key=KEY)
    for number in range(count):
        name = store.put(state(1000 * worker + number), context="written")
        if number % 3 == 0:
            store.delete(name)
    store.put({"n": worker}, context="done")


def read_until(folder, writers):
    store = ArchiveStore(folder, key=KEY)
    read = 0
    while True:
        done = len(store.find(context="done")) == writers
        for entry in store.find(context="written"):
            try:
                found = store.get(entry.id)
            except NotFoundError:
                continue  # deleted since
            same(found, state(found["number"]))
            read += 1
        if done:
            assert read > 0
            return


def test_readers_see_whole_states_while_writers_put_and_delete(folder, processes):
    writers = [(put_and_delete, folder, each, 15) for each in range(2)]
    processes(*writers, *[(read_until, folder, 2)] * 3)

    store = ArchiveStore(folder, key=KEY)
    assert len(store.find(context="written")) == 20
    assert store.stats()["written"].states == 20
    assert store.verify(read_data=True) == ()


def rotate_and_put(folder, key, worker, count):
    stores = [ArchiveStore(folder / each, key=key) for each in ("a", "b")]
    for number in range(count):
        store = stores[(worker + number) % 2]
        store.rotate()
        same(store.get(store.put(state(number))), state(number))
        assert store.verify() == ()


def test_stores_with_one_key_file_are_rotated_at_once_and_stay_readable(tmp_path, processes):
    keys.generate(tmp_path / "key")
    processes(*[(rotate_and_put, tmp_path, tmp_path / "key", each, 8) for each in range(4)])

    assert len(keys.find(tmp_path / "key").keys) == 1 + 4 * 8
    for name in ("a", "b"):
        store = ArchiveStore(tmp_path / name, key=tmp_path / "key")
        assert len(store.entries()) == 16
        assert store.verify(read_data=True) == ()


def test_a_store_that_is_open_knows_keys_that_others_added(tmp_path):
    keys.generate(tmp_path / "key")
    one, other = (ArchiveStore(tmp_path / "store", key=tmp_path / "key") for _ in range(2))
    other.rotate()
    assert one.verify() == ()
    # A rotation that was killed between the two files, or before them.
    before = (tmp_path / "store" / "key-copy").read_bytes()
    one.rotate()
    (tmp_path / "store" / "key-copy").write_bytes(before)
    with keys.added(tmp_path / "key"):
        pass
    assert one.verify() == other.verify() == ()
    assert ArchiveStore(tmp_path / "store", key=tmp_path / "key").verify() == ()


def test_a_key_that_somebody_takes_out_meanwhile_is_not_relied_on(tmp_path, monkeypatch):
    keys.generate(tmp_path / "key")
    store = ArchiveStore(tmp_path / "store", key=tmp_path / "key")
    first = (tmp_path / "key").read_text()
    written = []

    def edited(path, data):
        write_small(path, data)
        if not written:
            (tmp_path / "key").write_text(first)  # an editor that began before
        written.append(path)

    write_small = vault.disk.write_small
    monkeypatch.setattr(vault.disk, "write_small", edited)
    store.rotate()
    assert len(written) == 4
    assert ArchiveStore(tmp_path / "store", key=tmp_path / "key").verify() == ()


def test_a_full_key_file_is_refused_and_stays(tmp_path):
    keys.generate(tmp_path / "key")
    store = ArchiveStore(tmp_path / "store", key=tmp_path / "key")
    with (tmp_path / "key").open("a") as file:
        file.write("#" * (2**20 - 100))
    with pytest.raises(KeyRefusedError, match="is full; delete the lines of keys"):
        store.rotate()
    assert ArchiveStore(tmp_path / "store", key=tmp_path / "key").verify() == ()


def test_a_forked_child_reads_into_memory_of_its_own():
    memory = disk.scratch(8)
    child = os.fork()
    if child == 0:
        memory[0] = 1
        os._exit(0)
    os.waitpid(child, 0)
    assert memory[0] == 0


@pytest.mark.parametrize("writers", [4])
def test_threads_write_and_read_and_delete_at_once(store, writers):
    failures = []

    def work(worker):
        try:
            for number in range(25):
                name = store.put(state(100 * worker + number))
                same(store.get(name), state(100 * worker + number))
                if number % 5 == 0:
                    store.delete(name)
                store.find(context="")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(each,)) for each in range(writers)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert failures == []
    assert len(store.entries()) == writers * 20
    assert store.verify(read_data=True) == ()


@pytest.mark.parametrize("few", [0, 2])
def test_without_threads_to_be_had_all_is_done_by_one(store, folder, monkeypatch, few):
    """As in a function of ``atexit``, or at the limit of a container."""
    started = []

    def start(thread, really=threading.Thread.start):
        started.append(thread)
        if len(started) > few and len(started) != few + 3:
            raise RuntimeError("can't start new thread")
        really(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    monkeypatch.setattr(memory, "_cpus", lambda: 4)
    large = state(elements=3_000_000)
    name = store.put(large)
    assert store.verify(read_data=True) == ()
    same(store.get(name), large)
    assert len(started) > few + 3


def test_fifty_operations_leave_no_open_file_and_no_other_file(store, folder):
    def cycle():
        name = store.put(state(1))
        store.get(name)
        store.find(tag="x")
        store.stats()
        store.health()
        store.verify(read_data=True)
        with pytest.raises(StateRefusedError):
            store.put({"f": open})
        with pytest.raises(NotFoundError):
            store.get("0" * 16)
        store.delete(name)

    cycle()
    before = files(folder), len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(50):
        cycle()
    assert (files(folder), len(os.listdir("/proc/self/fd"))) == before  # noqa: PTH208


@pytest.mark.slow
def test_a_thousand_inserts_are_all_found(store):
    names = []
    for goal in (100, 500, 1000):
        names += [store.put({"n": number}) for number in range(len(names), goal)]

        assert [each.id for each in store.entries()] == names
        assert [store.get(name)["n"] for name in names[-50:]] == [*range(goal - 50, goal)]
        assert store.stats()[None][:2] == (goal, goal)
        assert store.health().problems == ()
    assert store.forget(keep_last=10)[:2] == (990, 990)
    assert [each.id for each in ArchiveStore(store.path, key=KEY).entries()] == names[-10:]


def test_create_and_delete_cycles_take_no_memory(store):
    def cycle():
        name = store.put(state(1, 500_000))
        store.get(name)
        store.delete(name)

    def resident():
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(10):
        cycle()
    before = resident()
    for _ in range(50):
        cycle()
    # A sixth of what the states took. Behind other tests, the heap alone was seen to grow by 9 MiB.
    assert resident() - before < 16 * 2**20


@pytest.mark.parametrize("part", ["whole", "small"])
def test_a_state_that_another_thread_changes_meanwhile_is_not_put(store, monkeypatch, part):
    """Else a later put of what it was would find another content under its name."""
    state = {"whole": torch.zeros(300_000), "small": torch.zeros(3)}
    has = States.has

    def changed(self, content):
        state[part].fill_(1)
        return has(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(States, "has", changed)
        with pytest.raises(InUseError, match="the state: it was changed while it was archived"):
            store.put(state)
    assert (store.entries(), [*(store.path / "states").iterdir()]) == ([], [])
    state[part].zero_()
    assert not any(each.any() for each in store.get(store.put(state)).values())

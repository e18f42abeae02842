"""What stands in the place of a store's file is one error: no hang, no memory, no harm."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import struct
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pytest_gpumem.archive import keys
from pytest_gpumem.archive.store import ArchiveStore
from pytest_gpumem.cli import main as cli
from pytest_gpumem.errors import (
    ArchiveError,
    ArgumentError,
    DiskError,
    InUseError,
    KeyRefusedError,
    NotFoundError,
)

SLOTS = (
    "key",
    "key-copy",
    "lock",
    "anchors",
    "state",
    "entry",
    "mark",
    "key file",
    "key file's lock",
)
MOST = 64 * 2**20


def sparse(path):
    path.touch(0o600)
    os.truncate(path, 8 * 2**30)


def claims_an_index(path):
    """A file whose end says that 12 GiB of index are before it."""
    path.touch(0o600)
    os.truncate(path, 16 * 2**30)
    with path.open("r+b") as file:
        file.seek(-16, os.SEEK_END)
        file.write(struct.pack("<Q8s", 12 * 2**30, b"GPUMEM.\n"))


def later_version(path):
    path.write_bytes(b"\x89GPUMEM\n" + bytes([9, 1, 1]) + bytes(200))
    path.chmod(0o600)


def made_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


def open_to_others(path):
    path.write_bytes(b"x" * 100)
    path.chmod(0o666)


def device(path):
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # as /dev/zero
    except PermissionError:
        pytest.skip("only root makes devices")


HOSTILE = {
    "fifo": os.mkfifo,
    "sparse": sparse,
    "index": claims_an_index,
    "link": lambda path: path.symlink_to("/dev/zero"),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "directory": lambda path: path.mkdir(),
    "device": device,
    "socket": made_socket,
    "open": open_to_others,
    "version": later_version,
    "empty": lambda path: path.touch(0o600),
    "noise": lambda path: (path.write_bytes(bytes(range(256)) * 8), path.chmod(0o600)),
}


@contextmanager
def bounded():
    """Fail what hangs, and what takes more memory than ``MOST``."""

    def late(*_):
        raise TimeoutError("it hangs")

    def resident(name):
        status = Path("/proc/self/status").read_text()
        return int(status.partition(f"{name}:")[2].split()[0]) * 1024

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    Path("/proc/self/clear_refs").write_text("5")
    began = resident("VmRSS")
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert resident("VmHWM") - began < MOST


def everything(folder, key, name):
    """Do all that a store can; return what was raised."""
    raised = []

    def tried(work):
        try:
            raised.extend(work() or ())
        except ArchiveError as error:
            raised.append(error)

    tried(lambda: keys.find(key) and None)
    for make in (True, False):
        tried(lambda make=make: ArchiveStore(folder, key=key, make=make) and None)
    try:
        store = ArchiveStore(folder, key=key)
    except ArchiveError as error:
        return [*raised, error]
    tried(lambda: store.verify(read_data=True))
    for work in (
        lambda: store.get(name),
        lambda: store.tensors(name),
        store.entries,
        store.stats,
        store.health,
        store.anchor,
        lambda: store.find(content=[torch.ones(2)]),
        lambda: store.put([torch.ones(2)]),
        lambda: store.put({"w": torch.zeros(500)}),
        store.rotate,
        lambda: store.forget(keep_last=9),
    ):
        tried(lambda work=work: work() and None)
    tried(lambda: store.verify(read_data=True))
    return raised


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_stands_for_any_file_is_one_error(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    for number, slot in enumerate(SLOTS):
        folder, key = tmp_path / str(number) / "store", tmp_path / str(number) / "a.key"
        keys.generate(key)
        store = ArchiveStore(folder, key=key)
        name = store.put({"w": torch.zeros(500)})
        store.anchor()
        end = store.need(name)
        place = {
            "state": folder / "states" / store.entry(name).content,
            "entry": folder / "entries" / name,
            "mark": next((folder / "asleep").iterdir()),
            "key file": key,
            "key file's lock": key.with_name(f".{key.name}.lock"),
        }.get(slot, folder / slot)
        saved = tmp_path / str(number) / "saved"
        place.rename(saved)
        HOSTILE[kind](place)

        with bounded():
            raised = everything(folder, key, name)
        harmless = slot in {"lock", "mark", "key file's lock"} and kind in {
            *("empty", "noise", "sparse", "index", "version"),
        }
        assert harmless or raised, slot
        assert not [each for each in raised if "\n" in str(each)]
        if place.is_dir() and not place.is_symlink():
            place.rmdir()
        elif os.path.lexists(place):
            place.unlink()
        saved.rename(place)
        again = ArchiveStore(folder, key=key)
        assert torch.equal(again.get(name)["w"], torch.zeros(500)), slot
        with pytest.raises(InUseError):
            again.delete(name)
        end()


@pytest.mark.parametrize("place", ["states", "entries", "asleep", "."])
def test_directories_that_lead_elsewhere_or_are_open_to_others_are_refused(tmp_path, place):
    store = ArchiveStore(tmp_path / "store", key=b"k" * 32)
    name = store.put([1])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ("0" * 64)).write_text("somebody else's")
    folder = tmp_path / "store" / place
    folder.chmod(0o777)
    with pytest.raises(DiskError, match=r"open to others \(mode 0777\); chmod 700 it"):
        ArchiveStore(tmp_path / "store", key=b"k" * 32)
    with pytest.raises(DiskError, match="open to others"):
        store.forget(keep_last=0)
    folder.chmod(0o700)
    if place != ".":
        folder.rename(tmp_path / "kept")
        folder.symlink_to(elsewhere)
        with pytest.raises(DiskError, match="it is a symbolic link, not a directory"):
            ArchiveStore(tmp_path / "store", key=b"k" * 32)
        with pytest.raises(ArchiveError):
            store.delete(name)
        assert [each.name for each in elsewhere.iterdir()] == ["0" * 64]


def test_what_is_not_the_stores_is_left_alone_and_named(tmp_path):
    folder = tmp_path / "store"
    store = ArchiveStore(folder, key=b"k" * 32)
    store.put([torch.ones(3)])
    foreign = [
        "notes",
        "states/zzz",
        "entries/.new-x",
        "entries/zzz",
        "asleep/zzz",
        f"states/{'0' * 64}",
    ]
    for each in foreign:
        (folder / each).mkdir()
    again = ArchiveStore(folder, key=b"k" * 32)

    assert {each.name for each in again.verify()} == {*foreign}
    assert again.health().score > 0
    assert again.forget(keep_last=0)[:2] == (1, 1)
    assert ArchiveStore(folder, key=b"k" * 32).entries() == []
    assert all((folder / each).is_dir() for each in foreign)


def test_nothing_is_orphaned_while_something_stands_for_an_entry(tmp_path):
    store = ArchiveStore(tmp_path / "store", key=b"k" * 32)
    lost, other = store.put([torch.ones(3)]), store.put([torch.ones(4)])
    place = tmp_path / "store" / "entries" / lost
    place.rename(tmp_path / "saved")
    os.mkfifo(place)
    store.delete(other)
    (tmp_path / "saved").replace(place)

    assert torch.equal(ArchiveStore(tmp_path / "store", key=b"k" * 32).get(lost)[0], torch.ones(3))


@pytest.mark.parametrize("kind", HOSTILE)
def test_looking_makes_neither_a_key_nor_a_store(tmp_path, monkeypatch, capsys, kind):
    key = tmp_path / "key"
    monkeypatch.setenv(keys.FILE_VARIABLE, str(key))
    monkeypatch.setenv("GPUMEM_ARCHIVE", str(tmp_path / "store"))
    monkeypatch.delenv(keys.KEY_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    for action in ("list", "stats", "verify", "health", "rotate"):
        assert cli.main(["archive", action]) == 2
        assert "there is no store" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

    HOSTILE[kind](tmp_path / "store")
    with bounded():
        assert cli.main(["archive", "list"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [each.name for each in tmp_path.iterdir()] == ["store"]


class Word(str):
    __slots__ = ()


BAD = [
    ("put", {"type": b"x"}, "type=b'x' is not a string"),
    ("put", {"type": None}, "type=None is not a string"),
    ("put", {"context": 3}, "context=3 is not a string"),
    ("put", {"tags": 5}, "tags=5 is not a list of strings"),
    ("put", {"tags": itertools.repeat(5)}, r"tags=repeat\(5\) is not a list"),
    ("put", {"tags": "fast"}, "tags='fast' is not a list of strings"),
    ("put", {"tags": ["a", 1]}, r"tags=\['a', 1\] is not a list"),
    ("put", {"metadata": [1]}, r"metadata=\[1\] is not a dict"),
    ("forget", {"keep_last": -1}, "keep_last=-1 is not a whole number, 0 or more"),
    ("forget", {"keep_last": True}, "keep_last=True is not"),
    ("forget", {"keep_last": 1.5}, "keep_last=1.5 is not"),
    ("forget", {"older_than": -5}, "older_than=-5 is not a number of seconds"),
    ("forget", {"older_than": float("nan")}, "older_than=nan is not"),
    ("forget", {"older_than": float("-inf")}, "older_than=-inf is not"),
    ("forget", {"older_than": "7d"}, "older_than='7d' is not"),
    ("forget", {"max_stored": -1}, "max_stored=-1 is not"),
    ("forget", {"max_stored": float("nan")}, "max_stored=nan is not"),
    ("forget", {"type": 3}, "type=3 is not a string"),
    ("forget", {"older_than": 10**400}, "older_than=<int> is not"),
    ("find", {"until": 10**5000}, "until=<int> is not"),
    ("get_tensors", {"which": [-1]}, r"which=\[-1\] is not a list of whole numbers, 0 or more"),
    ("get_tensors", {"which": [True]}, r"which=\[True\] is not"),
    ("get_tensors", {"which": "0"}, "which='0' is not"),
    ("get_tensors", {"which": None}, "which=None is not"),
    ("find", {"since": "yesterday"}, "since='yesterday' is not"),
    ("find", {"tag": ["x"]}, r"tag=\['x'\] is not a string"),
    ("verify", {"since": "x"}, "'x' is not an anchor"),
    ("verify", {"since": 5}, "'5' is not an anchor"),
    ("get", {"device": "nowhere"}, "device='nowhere' cannot be used: Expected one of cpu"),
    ("get", {"device": 1.5}, "device=1.5 cannot be used"),
    ("get", {"device": None}, "device=None cannot be used"),
]


def test_arguments_are_looked_at_before_anything_is_done(tmp_path):
    store = ArchiveStore(tmp_path / "store", key=b"k" * 32)
    name = store.put([torch.ones(2)])
    first = {"put": [[1]], "get": [name], "get_tensors": [name]}
    for method, arguments, sentence in BAD:
        with pytest.raises(ArgumentError, match=sentence):
            getattr(store, method)(*first.get(method, []), **arguments)
    with pytest.raises(NotFoundError, match="the state has no tensor 7, but 1 of them"):
        store.get_tensors(name, [0, 7])
    with pytest.raises(NotFoundError, match="<str> is not an id"):
        store.get("0" * 1000)
    assert type(store.entry(store.put([1], type=Word("x"), tags=[Word("y")])).type) is str
    store.forget(type="x", keep_last=0)
    for quota in (-1, float("nan"), "1GiB", 2.0, True):
        with pytest.raises(ArgumentError, match=r"quota=.* is not a whole number"):
            ArchiveStore(tmp_path / "other", key=b"k" * 32, quota=quota)
    for path in (3, "", "a\0b", b"x"):
        with pytest.raises(ArgumentError, match=r"path=.* is not a path"):
            ArchiveStore(path, key=b"k" * 32)
    assert [entry.id for entry in store.entries()] == [name]
    assert not (tmp_path / "other").exists()


def test_the_path_of_a_key_file_may_be_a_string(tmp_path):
    keys.generate(tmp_path / "a.key")
    one = ArchiveStore(tmp_path / "store", key=str(tmp_path / "a.key"))
    name = one.put([1])

    assert ArchiveStore(tmp_path / "store", key=tmp_path / "a.key").get(name) == [1]
    with pytest.raises(KeyRefusedError, match="the key that was given is not a key"):
        ArchiveStore(tmp_path / "store", key="no-such-file")


def test_a_store_that_was_put_back_is_found_by_its_anchor(tmp_path):
    folder, old = tmp_path / "store", tmp_path / "old"
    store = ArchiveStore(folder, key=b"k" * 32)
    kept, gone = store.put([1]), store.put([torch.ones(2)])
    first = store.anchor()
    assert store.anchor() == first
    shutil.copytree(folder, old)
    store.delete(gone)
    store.put([2])
    second = store.anchor()
    assert second != first
    store.put([3])
    store.delete(kept)
    assert store.verify(since=first) == store.verify(since=second, read_data=True) == ()

    with_the_anchors = (folder / "anchors").read_bytes()
    shutil.rmtree(folder)
    old.rename(folder)
    back = ArchiveStore(folder, key=b"k" * 32)
    assert back.verify() == back.verify(since=first) == ()
    (problem,) = back.verify(since=second)
    assert problem.name == "anchors"
    assert "it was put back to an older state" in problem.what
    assert back.anchor() != second  # nor does it become known by time
    assert [each.name for each in back.verify(since=second)] == ["anchors"]

    # All but the anchors: what was removed is back.
    (folder / "anchors").write_bytes(with_the_anchors)
    (problem,) = back.verify(since=second)
    assert problem.name == gone
    assert "probably it was removed before that, and put back" in problem.what
    (folder / "anchors").write_bytes(with_the_anchors[:-1])
    assert [each.name for each in back.verify(since=second)] == ["anchors"]

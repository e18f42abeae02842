"""What may stand in the place of a file of the ledger."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from pytest_gpumem.errors import LeaseError, RequestRefusedError, TooLarge
from pytest_gpumem.leases.glimpses import Teller, Watcher, is_watched
from pytest_gpumem.leases.locks import is_held
from pytest_gpumem.leases.request import Want
from pytest_gpumem.leases.store import LeaseStore

A = "GPU-aaaaaaaa-0000-0000-0000-00000000000a"
TOTALS = {A: 1000}
DEAD = "4000000000.0123abcd"
"""A process that does not live."""
posix = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")


def a_fifo(path):
    os.mkfifo(path, 0o600)


def a_sparse_file(path):
    path.touch(mode=0o600)
    os.truncate(path, 2**40)


def a_link(path):
    target = next(each for each in (path, *path.parents) if each.name == "run").parent / "victim"
    target.write_text("precious")
    path.symlink_to(target)


def a_dangling_link(path):
    path.symlink_to("/no/such/place")


def a_directory(path):
    path.mkdir(mode=0o700)
    (path / "precious").touch()


def a_device(path):
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("only root makes devices")


def unreadable(path):
    path.touch(mode=0o000)


def binary(path):
    path.write_bytes(bytes(range(256)))
    path.chmod(0o600)


def open_to_others(path):
    path.touch()
    path.chmod(0o666)


def of_another(path):
    path.touch(mode=0o600)
    try:
        os.chown(path, 4711, 4711)
    except PermissionError:
        pytest.skip("only root gives files away")


KINDS = [
    a_fifo,
    a_sparse_file,
    a_link,
    a_dangling_link,
    a_directory,
    a_device,
    unreadable,
    binary,
    open_to_others,
    of_another,
]


@pytest.fixture
def run(tmp_path):
    """A directory of leases that somebody has used before."""
    directory = tmp_path / "run"
    store = LeaseStore(directory)
    store.acquire({A: Want(1)}, TOTALS, "before").release()
    store.close()
    return directory


def works(run):
    """Return what is said, within two seconds and with little memory."""
    tracemalloc.start()
    begun, store = time.monotonic(), LeaseStore(run)
    try:
        with store.acquire({A: Want()}, TOTALS, "test", 1):
            assert [each.label for each in store.holders(A)] == ["test"]
        store.ancestors()
        return ""
    except LeaseError as error:
        return str(error)
    finally:
        store.close()
        took, most = time.monotonic() - begun, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert took < 2
        assert most < 2**20


PLACES = [
    "queue/h-foo",
    "queue/z-0000000001-4711.0123abcd-0000000a=1000",
    "queue/h-0000000001-4711.0123abcd-0000000a=1000-new",
    "queue/h-" + "9" * 200 + "-4711.0123abcd-0000000a=1000",
    f"queue/h-0000000001-{DEAD}-0000000a=1000",
    f"queue/w-0000000001-{DEAD}-0000000a=1000x-t",
    f"queue/r-0000000000-{DEAD}-0000000a=1000",
    f"alive/{DEAD}",
    "alive/foo",
    "alive/.hidden",
    "other",
]


@posix
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[:20])
def test_a_foreign_file_costs_nobody_a_lease(run, kind, place, tmp_path):
    path = run / place
    kind(path)
    assert works(run) == ""
    # Nobody follows a link, or empties a directory; what is not the ledger's stays.
    assert kind is not a_link or (tmp_path / "victim").read_text() == "precious"
    assert kind is not a_directory or (path / "precious").exists()
    plain = kind in (a_sparse_file, unreadable, binary, open_to_others)
    stays = DEAD not in place or not plain
    assert os.path.lexists(path) == stays
    store = LeaseStore(run)
    store.holders(A)
    named = {Path(each) for each in store.ledger.strange()}
    assert named == ({path} if stays and place != "other" else set())


@posix
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("place", ["lock", "queue", "alive", "."])
def test_what_the_ledger_cannot_do_without_is_one_sentence(run, kind, place, tmp_path):
    path = run / place if place != "." else run
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    kind(path)
    said = works(run)
    usable = place != "lock" if kind is a_directory else kind is unreadable and place == "lock"
    if usable and (kind is a_directory or os.geteuid() == 0):
        assert said == ""
    else:
        assert said.startswith(f"leases cannot be kept in {run}: ") or "a format" in said, said
        assert "\n" not in said
    if kind is a_link:
        assert (tmp_path / "victim").read_text() == "precious"


def test_a_later_format_is_refused(run):
    (run / "lock").write_text("format 2")
    assert "kept in a format that this version of pytest-gpumem does not read" in works(run)
    assert "its lock says 'format 2', and should be empty" in works(run)


@posix
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_monitors_files_are_no_trap_either(run, kind):
    with Watcher(run) as watcher:
        teller = Teller(run)
        for place in ("monitors/foo", "seen/foo", "seen/foo.json", "seen/1-0123abcd.json"):
            kind(run / place)
        assert is_watched(run)
        assert watcher.glimpses() == []
        teller.close()
    assert os.path.lexists(run / "monitors" / "foo")
    assert not is_watched(run)


@posix
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_nobody_holds_the_lock_of_what_is_no_file_of_ours(tmp_path, kind):
    (tmp_path / "run").mkdir()
    kind(tmp_path / "run" / "it")
    assert not is_held(tmp_path / "run" / "it")


# What is asked for


@pytest.mark.parametrize(
    ("wants", "timeout", "said"),
    [
        (Want(-5), None, "is less than 0 bytes"),
        (Want(True), None, "is True, which is no whole number of bytes"),
        (Want(1.5), None, "is 1.5, which is no whole number of bytes"),  # type: ignore[arg-type]
        (Want("1GiB"), None, "'1GiB', which is no whole number"),  # type: ignore[arg-type]
        (Want(float("nan")), None, "is nan, which"),  # type: ignore[arg-type]
        (Want(10**400), None, "is more than any card has"),
        (Want(1), -1, "the timeout of a lease is out of range; allowed are 0 to"),
        (Want(1), float("nan"), "the timeout of a lease is out of range"),
        (Want(1), float("inf"), "or None to wait without a limit"),
        (Want(1), 10**400, "the timeout of a lease is out of range"),
        (Want(1), True, "is True, which is no number of seconds"),
        (Want(1), "5", "is '5', which is no number of seconds"),
    ],
)
def test_what_cannot_be_asked_for_is_one_sentence(tmp_path, wants, timeout, said):
    with pytest.raises(RequestRefusedError) as caught:
        LeaseStore(tmp_path / "run").acquire({A: wants}, TOTALS, "", timeout)
    assert said in str(caught.value)
    assert isinstance(caught.value, LeaseError)
    assert not (tmp_path / "run").exists()


def test_what_fits_no_card_is_too_large(tmp_path):
    with pytest.raises(TooLarge):
        LeaseStore(tmp_path / "run").acquire({A: Want(2**62)}, TOTALS, "")
    store = LeaseStore(tmp_path / "run")
    for wrong in (-1, True, 1.5):
        with pytest.raises(RequestRefusedError, match="what is kept of card"):
            store.set_resident(A, wrong)  # type: ignore[arg-type]
        with pytest.raises(RequestRefusedError, match="the headroom"):
            store.headroom = wrong  # type: ignore[assignment]


@posix
def test_no_more_files_to_open_means_that_nobody_is_dead(run):
    code = """
import resource, sys
from pathlib import Path
from pytest_gpumem.leases.locks import FileLock, is_held

lock = FileLock(Path(sys.argv[1]))
lock.acquire()
assert is_held(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
try:
    print(is_held(sys.argv[1]))
except OSError as error:
    print(error.strerror)
"""
    command = [sys.executable, "-c", code, str(run / "lock")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "Too many open files\n", done.stderr

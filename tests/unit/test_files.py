"""What stands in the place of a file is refused before it does harm."""

import errno
import os
import socket
from pathlib import Path

import pytest

from pytest_gpumem import files


def _sparse(path):
    path.write_bytes(b"")
    os.truncate(path, 8 * 2**30)


def _socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


def _with_mode(mode):
    def make(path):
        path.write_bytes(b"x")
        path.chmod(mode)

    return make


def _link(path):
    (path.parent / "elsewhere").write_bytes(b"x")
    path.symlink_to("elsewhere")


HOSTILE = {
    "fifo": (os.mkfifo, "it is a FIFO, not a regular file"),
    "directory": (os.mkdir, "it is a directory, not a regular file"),
    "link": (_link, "it is a symbolic link, not a regular file"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "it is a symbolic link"),
    "socket": (_socket, "it is a socket, not a regular file"),
    "sparse": (_sparse, "it has 8589934592 bytes; allowed are 100"),
    "mode": (_with_mode(0o620), r"it is open to others \(mode 0620\); chmod 600 it"),
}


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_CREAT])
@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_file_of_ours_is_refused_at_once(tmp_path, monkeypatch, kind, flags):
    monkeypatch.chdir(tmp_path)
    make, told = HOSTILE[kind]
    make(tmp_path / "file")
    with pytest.raises(OSError, match=told):
        files.open_own(tmp_path / "file", flags, most=100)


def test_a_device_is_refused():
    with pytest.raises(OSError, match="it is a device, not a regular file"):
        files.read_own("/dev/zero", 100)


def test_somebody_elses_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(OSError, match="it belongs to another user"):
        files.read_own(tmp_path / "file", 100)
    with pytest.raises(OSError, match="it belongs to another user"):
        files.own_directory(tmp_path)


def test_a_file_is_read_up_to_its_limit(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"x" * 100)
    assert files.read_own(file, 100) == b"x" * 100
    with pytest.raises(OSError, match="it has 100 bytes; allowed are 99") as caught:
        files.read_own(file, 99)
    assert caught.value.errno == errno.EFBIG


def test_a_file_that_grows_meanwhile_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(b"x")
    opened = files.open_own

    def grows(path, **options):
        found = opened(path, **options)
        file.write_bytes(b"x" * 101)
        return found

    monkeypatch.setattr(files, "open_own", grows)
    with pytest.raises(OSError, match="allowed are 100"):
        files.read_own(file, 100)


def test_refusing_closes_what_was_opened(tmp_path):
    open_now = Path("/proc/self/fd")
    before = len(list(open_now.iterdir()))
    for _ in range(3):
        with pytest.raises(OSError, match="directory"):
            files.open_own(tmp_path)
    assert len(list(open_now.iterdir())) == before


def test_a_directory_is_made_or_looked_at(tmp_path):
    made = tmp_path / "a" / "b"
    files.own_directory(made)
    assert made.stat().st_mode & 0o777 == 0o700
    files.own_directory(made)
    (tmp_path / "link").symlink_to(made)
    files.own_directory(tmp_path / "link", follow=True)
    with pytest.raises(OSError, match="it is a symbolic link, not a directory"):
        files.own_directory(tmp_path / "link")
    made.chmod(0o777)
    with pytest.raises(OSError, match=r"open to others \(mode 0777\); chmod 700 it"):
        files.own_directory(tmp_path / "link", follow=True)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="directory"):
        files.own_directory(tmp_path / "file")


def test_text_is_read_of_regular_files_alone(tmp_path):
    (tmp_path / "text").write_text("x = 1")
    os.mkfifo(tmp_path / "fifo")

    assert files.read_text(tmp_path / "text") == "x = 1"
    for name, kind in (("fifo", "a FIFO"), ("", "a directory")):
        with pytest.raises(OSError, match=f"it is {kind}, not a regular file"):
            files.read_toml(tmp_path / name)

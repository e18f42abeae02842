from __future__ import annotations

import logging
import os
import threading

import pytest

from pytest_gpumem.archive import keys
from pytest_gpumem.archive.store import ArchiveStore
from pytest_gpumem.errors import KeyRefusedError

KEY = b"k" * 32
OTHER = b"o" * 32


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name in (keys.KEY_VARIABLE, keys.FILE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


def write(path, text, mode=0o600):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def test_the_program_goes_before_the_file_before_the_environment(monkeypatch):
    monkeypatch.setenv(keys.KEY_VARIABLE, keys.text_of(OTHER))
    assert keys.find().keys == (OTHER,)

    file = write(keys.default_file(), keys.text_of(KEY))
    assert keys.find().keys == (KEY,)
    assert keys.find(file).keys == (KEY,)
    assert keys.find(lambda: OTHER).keys == (OTHER,)
    assert keys.find(OTHER).keys == keys.find(keys.text_of(OTHER)).keys == (OTHER,)


def test_a_key_is_made_on_first_use_with_a_message_and_never_shown(caplog):
    with caplog.at_level(logging.WARNING):
        found = keys.find()

    assert "made a new key for archives in" in caplog.text
    assert keys.default_file().stat().st_mode & 0o777 == 0o600
    assert keys.text_of(found.keys[0]) not in caplog.text
    assert repr(found.keys[0]) not in repr(found)
    caplog.clear()
    assert keys.find() == found
    assert caplog.text == ""


def test_a_key_that_is_not_to_be_made_is_missed_by_name():
    with pytest.raises(KeyRefusedError, match=r"there is no key: neither '.*key' nor GPUM"):
        keys.find(make=False)


def test_all_who_make_the_first_key_at_once_get_the_same():
    found = []
    workers = [threading.Thread(target=lambda: found.append(keys.find().keys)) for _ in range(8)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()

    assert len(found) == 8
    assert len(set(found)) == 1


def test_a_file_has_several_keys_and_comments(tmp_path):
    file = write(tmp_path / "key", f"# mine\n{keys.text_of(KEY)}\n\n{keys.text_of(OTHER)} # old\n")

    assert keys.find(file).keys == (KEY, OTHER)
    with keys.added(file) as found:
        assert len(found.keys) == 3
    assert keys.find(file).keys[1:] == (KEY, OTHER)
    assert "# mine" in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666, 0o620])
def test_a_file_that_others_can_use_is_refused(tmp_path, mode):
    file = write(tmp_path / "key", keys.text_of(KEY), mode)

    with pytest.raises(KeyRefusedError, match=rf"is open to others \(mode {mode:04o}\)"):
        keys.find(file)


def test_what_is_not_the_users_own_regular_file_is_refused(tmp_path, monkeypatch):
    real = write(tmp_path / "key", keys.text_of(KEY))
    (tmp_path / "link").symlink_to(real)
    with pytest.raises(KeyRefusedError, match="is a symbolic link"):
        keys.find(tmp_path / "link")
    with pytest.raises(KeyRefusedError, match="it is a directory, not a regular file"):
        keys.find(tmp_path)
    with pytest.raises(KeyRefusedError, match="cannot be read: No such file"):
        keys.find(tmp_path / "none")
    monkeypatch.setattr(os, "geteuid", lambda: real.stat().st_uid + 1)
    with pytest.raises(KeyRefusedError, match="belongs to another user"):
        keys.find(real)


@pytest.mark.parametrize(
    "text", ["", "secret", "gpumem-key-", "gpumem-key-" + "!" * 43, "gpumem-key-" + "A" * 42]
)
def test_what_is_no_key_is_refused_without_showing_it(tmp_path, monkeypatch, text):
    file = write(tmp_path / "key", text + "\n")
    with pytest.raises(KeyRefusedError) as caught:
        keys.find(file)
    assert str(file) in str(caught.value)
    if text:
        assert text not in str(caught.value).replace("'gpumem-key-'", "")
        monkeypatch.setenv(keys.KEY_VARIABLE, text)
        with pytest.raises(KeyRefusedError, match="GPUMEM_ARCHIVE_KEY in the environment is not"):
            keys.find()
    with pytest.raises(KeyRefusedError):
        keys.find(b"short")


def test_the_key_of_the_environment_opens_what_it_wrote(tmp_path, monkeypatch):
    monkeypatch.setenv(keys.KEY_VARIABLE, keys.text_of(KEY))
    name = ArchiveStore(tmp_path / "store").put([1])

    assert ArchiveStore(tmp_path / "store", key=KEY).get(name) == [1]

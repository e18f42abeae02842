from __future__ import annotations

import pytest
import torch
from states import same

from pytest_gpumem.archive import keys
from pytest_gpumem.archive.store import ArchiveStore
from pytest_gpumem.cli import main as cli

STATE = {"layer": {"w": torch.arange(6.0).view(2, 3)}, "epoch": 3}


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv(keys.FILE_VARIABLE, str(tmp_path / "key"))
    monkeypatch.setenv("GPUMEM_ARCHIVE", str(tmp_path / "store"))
    monkeypatch.delenv(keys.KEY_VARIABLE, raising=False)
    keys.generate(tmp_path / "key")
    return ArchiveStore()


@pytest.fixture
def gpumem(capsys):
    """Run ``gpumem archive``; return its status and what it printed."""

    def _gpumem(*arguments):
        status = cli.main(["archive", *map(str, arguments)])
        shown = capsys.readouterr()
        assert "\r" not in shown.err  # no progress bar off a terminal
        return status, shown.out + shown.err

    return _gpumem


def test_keygen_makes_a_key_once(tmp_path, monkeypatch, gpumem):
    monkeypatch.setenv(keys.FILE_VARIABLE, str(tmp_path / "a" / "key"))

    assert gpumem("keygen") == (
        0,
        f"{tmp_path}/a/key: 1 key; keep a copy: without it nothing can be restored\n",
    )
    assert gpumem("keygen") == (0, f"{tmp_path}/a/key: 1 key; there was one already\n")


def test_rotate_lets_the_new_key_open_the_old_archives(store, gpumem, tmp_path):
    name = store.put(STATE)
    status, shown = gpumem("rotate")

    assert status == 0
    assert "older keys stay in the file" in shown
    first = (tmp_path / "key").read_text().splitlines()[0]
    (tmp_path / "key").write_text(first)
    same(ArchiveStore().get(name), STATE)


def test_list_and_show_name_what_was_archived(store, gpumem):
    name = store.put(STATE, type="model", context="test_a", tags=["x"], metadata={"lr": 0.5})
    other = store.put([1], context="test_b")

    _, shown = gpumem("list")
    assert [line.split()[0] for line in shown.splitlines()] == [name, other]
    assert shown.splitlines()[0].split()[3:] == ["24", "B", "model", "test_a", "#x"]
    assert gpumem("list", "--context=test_b")[1].startswith(other)
    assert gpumem("list", "--since=1h", "--tag=x")[1].startswith(name)
    assert gpumem("list", "--until=1h") == (0, "nothing\n")
    _, shown = gpumem("show", name)
    assert "metadata  {'lr': 0.5}" in shown
    assert "  ['layer']['w']  float32  [2, 3]" in shown


def test_export_writes_what_torch_reads_and_overwrites_nothing(store, gpumem, tmp_path):
    name = store.put(STATE)

    assert gpumem("export", name, tmp_path / "out.pt")[0] == 0
    same(torch.load(tmp_path / "out.pt"), STATE)
    status, shown = gpumem("export", name, tmp_path / "out.pt")
    assert status == 2
    assert shown.endswith("is there already; it is not overwritten\n")


def test_forget_and_delete_say_what_they_did(store, gpumem):
    names = [store.put({"n": number}) for number in range(4)]

    assert gpumem("forget", "--keep-last=2", "--dry-run")[1].startswith(
        "2 entries would be decayed, 2 states would be removed"
    )
    assert gpumem("forget", "--keep-last=2")[1].startswith("2 entries decayed, 2 states removed")
    assert gpumem("delete", names[2], names[3])[0] == 0
    assert gpumem("list") == (0, "nothing\n")
    assert gpumem("forget")[0] == 2


def test_stats_verify_and_health_answer(store, gpumem, tmp_path):
    name = store.put(STATE, context="c")

    *_, shown, anchor = gpumem("stats")[1].splitlines()
    assert shown.split()[-1] == "c"
    assert gpumem("stats")[1].endswith(f"{anchor}\n")  # the same while nothing changes
    assert gpumem("verify", "--since", anchor.removeprefix("anchor: "))[0] == 0
    assert gpumem("verify", "--read-data") == (
        0,
        "1 entries can be restored; every byte was read\n",
    )
    assert gpumem("health")[1].startswith("score ")
    (path,) = (tmp_path / "store" / "states").iterdir()
    path.write_bytes(path.read_bytes()[:-30])
    status, shown = gpumem("verify")
    assert status == 2
    assert shown.startswith(f"{name}: the state {name} cannot be restored: ")
    assert shown.endswith("gpumem archive: error: 1 problem\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["show", "x"], "'x' is not an id: those are 16 hexadecimal digits"),
        (["delete", "0" * 16], f"there is no {'0' * 16} in "),
        (["--store", "/no/such", "list"], "there is no store '/no/such'"),
        (["--key-file", "/no/such", "list"], "the key file '/no/such' cannot be read: No such"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(store, gpumem, arguments, sentence):
    status, shown = gpumem(*arguments)

    assert status == 2
    assert shown.startswith(f"gpumem archive: error: {sentence}")
    assert shown.count("\n") == 1


@pytest.mark.parametrize("arguments", [["forget", "--older-than=soon"], ["forget", "--max-size=1"]])
def test_a_bad_argument_is_a_usage_error(gpumem, arguments):
    with pytest.raises(SystemExit) as caught:
        gpumem(*arguments)
    assert caught.value.code == 2

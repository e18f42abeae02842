"""Inputs that end early, hide in archives or are none: a note or one sentence, and the rest."""

from __future__ import annotations

import errno
import gzip
import io
import pickle
import sys
import tarfile
import zipfile
from types import SimpleNamespace

import pytest
import zstandard

from pytest_gpumem.forensics import readers

LOG = b"E  torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB\n"


def zipped(**entries):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr(zipfile.ZipInfo("logs/"), b"")
        for name, content in entries.items():
            archive.writestr(f"logs/{name}", content)
    return made.getvalue()


def tarred(**entries):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        directory = tarfile.TarInfo("logs")
        directory.type = tarfile.DIRTYPE
        archive.addfile(directory)
        for name, content in entries.items():
            entry = tarfile.TarInfo(f"logs/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return made.getvalue()


def flipped(data, at, to):
    return data[:at] + to + data[at + len(to) :]


ZIP = zipped(a=LOG)
ENCRYPTED = flipped(
    flipped(ZIP, ZIP.index(b"PK\3\4", 1) + 6, b"\1"), ZIP.rindex(b"PK\1\2") + 8, b"\1"
)
"""Says of its entry that it needs a password."""
SNAPSHOT = {"device_traces": [[{"action": "oom", "size": 5}]], "segments": []}


def failures(inputs):
    return sum(len(run.failures) for reading in inputs.readings for run in reading.runs)


@pytest.mark.parametrize(
    ("content", "found", "note"),
    [
        (zipped(a=LOG, b=LOG), 2, ""),
        (zipped(a=LOG, b=bytes(range(256)) * 20), 1, "/logs/b' is neither text nor a report"),
        (flipped(ZIP, ZIP.index(LOG), b"X"), 0, "/logs/a' is damaged"),
        (ENCRYPTED, 0, "is encrypted, password required"),
        (tarred(a=LOG, b=LOG), 2, ""),
        (tarred(a=LOG, b=bytes(range(256)) * 20), 1, "/logs/b' is neither text nor a report"),
        (tarred(a=LOG, b=LOG * 100)[:3000], 1, "is an archive that is cut off or damaged"),
        (gzip.compress(b"starting\n") + gzip.compress(LOG) + bytes(64), 1, ""),
        (gzip.compress(LOG)[:-9], 1, ""),
        (zstandard.compress(LOG) + b"\0" * 64, 1, ""),
        (b"\xff\xfe" + LOG.decode().encode("utf-16-le"), 1, ""),
        (pickle.dumps(SNAPSHOT), 1, ""),
    ],
    ids=["zip", "zip with binary", "zip damaged", "zip encrypted", "tar", "tar with binary",
         "tar cut", "gzip twice", "gzip cut", "zstd damaged", "UTF-16", "snapshot"],
)  # fmt: skip
def test_what_can_be_read_is_and_the_rest_is_noted(tmp_path, content, found, note):
    path = tmp_path / "input"
    path.write_bytes(content)
    inputs = readers.gather([str(path)])
    assert failures(inputs) == found
    assert bool(inputs.notes) == bool(note)
    assert note in "".join(inputs.notes)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"PK\3\4" + bytes(50), "is a zip archive that is cut off or damaged"),
        (zipped(a=zipped(a=zipped(a=zipped(a=LOG)))), ""),
        (b"<?xml version='1.0'?><note/>", "is XML, but no JUnit report"),
        (b"<?xml version='1.0'?>", "is XML, but no JUnit report"),
        (pickle.dumps({"segments": []}), "is no memory snapshot of torch: KeyError"),
        (pickle.dumps([print])[:-3], "is no memory snapshot"),
        (bytes(range(256)) * 20, "is neither text nor a report that is known"),
    ],
    ids=["zip", "zips in zips", "XML", "no XML", "another pickle", "pickle cut", "binary"],
)
def test_what_is_of_no_use_is_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "input"
    path.write_bytes(content)
    if sentence:
        with pytest.raises(ValueError, match=rf"^'{path}' .*{sentence}"):
            readers.gather([str(path)])
    else:
        assert "lies too deep in archives" in readers.gather([str(path)]).notes[0]
    # In a directory it costs nobody else.
    (tmp_path / "z.log").write_bytes(LOG)
    (tmp_path / ".hidden").write_bytes(LOG)
    inputs = readers.gather([str(tmp_path)])
    assert failures(inputs) == 1
    assert len(inputs.notes) == 1


def test_what_cannot_be_opened_is_a_note_of_its_directory(tmp_path, monkeypatch):
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a.log").write_bytes(LOG)
    inputs = readers.gather([str(tmp_path)])
    assert failures(inputs) == 1
    assert inputs.notes == [f"'{tmp_path}/gone': No such file or directory"]


def test_what_breaks_while_it_is_read_is_a_note_with_its_name(tmp_path, monkeypatch):
    whole = readers.read_stream

    def read(file, path, notes):
        if path.endswith("b.log"):
            raise OSError(errno.EIO, "Input/output error")
        return whole(file, path, notes)

    for name in "abc":
        (tmp_path / f"{name}.log").write_bytes(LOG)
    monkeypatch.setattr(readers, "read_stream", read)
    inputs = readers.gather([str(tmp_path)])

    assert len(inputs.readings) == 2
    assert inputs.notes == [f"'{tmp_path}/b.log': Input/output error"]
    with pytest.raises(OSError, match=f"'{tmp_path}/b.log'"):
        readers.gather([str(tmp_path / "b.log")])


@pytest.mark.parametrize(
    ("stdin", "sentence"),
    [
        (None, "'-': standard input is closed"),
        (SimpleNamespace(buffer=io.BytesIO(bytes(range(256)) * 20)), "'-' is neither text"),
    ],
)
def test_a_standard_input_that_is_of_no_use_is_one_sentence(monkeypatch, stdin, sentence):
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(ValueError, match=f"^{sentence}"):
        readers.gather(["-"])


def test_a_standard_input_that_is_no_pipe_is_read(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(LOG)))
    assert failures(readers.gather(["-"])) == 1

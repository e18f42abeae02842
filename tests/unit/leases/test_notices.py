"""What is waited for is told: late enough, once, and where somebody sees it."""

from __future__ import annotations

import os
import time

import pytest

from pytest_gpumem.leases import notices


@pytest.fixture
def pipe(monkeypatch):
    """Return both ends of a pipe; a wait of some milliseconds needs words."""
    monkeypatch.setattr(notices, "AFTER", 0.01)
    monkeypatch.setattr(notices._Terminal, "file", None)
    monkeypatch.setattr(notices._Terminal, "said", -notices.EVERY)
    read, write = os.pipe()
    os.set_blocking(read, False)
    yield read, write
    notices.drop()
    os.close(read)
    os.close(write)


def told(read, seconds=5.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            return os.read(read, 1000).decode()
        except BlockingIOError:
            time.sleep(0.005)
    return ""


def test_the_file_is_kept_once_and_dropped(pipe):
    _, write = pipe
    assert notices.keep(write)
    assert not notices.keep(write)
    assert notices.terminal() not in (None, write)
    notices.drop()
    notices.drop()
    assert notices.terminal() is None
    assert not notices.keep(1_000_000)  # no such file


def test_a_wait_is_told_once(pipe):
    read, write = pipe
    notices.keep(write)
    with notices.Waiting("test_a", dict) as waiting:
        waiting.note("1.00 GiB")
        waiting.note("2.00 GiB")
        assert told(read) == "\ngpumem: test_a waits for 2.00 GiB\n"
    assert told(read, 0.05) == ""


def test_a_short_wait_and_a_wait_soon_after_another_line_need_no_words(pipe, monkeypatch):
    read, write = pipe
    notices.keep(write)
    monkeypatch.setattr(notices._Terminal, "said", time.monotonic())
    with notices.Waiting("test_a", dict) as waiting:
        waiting.note("1.00 GiB")
        assert told(read, 0.05) == ""
    with notices.Waiting("test_b", dict) as waiting:
        assert waiting.what == ""


@pytest.mark.parametrize(
    ("kind", "lines"), [("pipe", 1), ("own", 0), ("file", 0), ("gone", 0), ("none", 0)]
)
def test_the_outermost_process_that_kept_its_file_tells_as_well(pipe, tmp_path, kind, lines):
    read, write = pipe
    file = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY)
    if kind == "own":
        notices.keep(write)
    process = 2**30 if kind == "gone" else os.getpid()
    ancestors = {
        "1:0": None,
        f"{process}:0": {"file": file, "none": None}.get(kind, write),
    }
    with notices.Waiting("test_a", lambda: ancestors) as waiting:
        waiting.note("1.00 GiB")
        time.sleep(0.05)
        heard = told(read, 0.3)
    os.close(file)
    assert heard.count("waits for 1.00 GiB") == lines + (kind == "own")
    assert (tmp_path / "log").read_text() == ""

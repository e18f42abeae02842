from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pytest_gpumem.leases import locks
from pytest_gpumem.leases.locks import FileLock, LockBusyError, News, Watch, is_held

# Takes the lock, says so, and stays.
HOLDER = """
import os, signal, sys
from pathlib import Path
from pytest_gpumem.leases.locks import FileLock

lock = FileLock(Path(sys.argv[1]))
lock.acquire()
child = os.fork() if "fork" in sys.argv else 0
if child or "fork" not in sys.argv:
    print(child, flush=True)
else:
    os.close(1)
signal.pause()
"""


@pytest.fixture
def holder(tmp_path):
    started = []

    def start(path, *words):
        command = [sys.executable, "-c", HOLDER, str(path), *words]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process, int(process.stdout.readline())

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def alive(tmp_path):
    directory = tmp_path / "alive"
    directory.mkdir()
    return directory


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own"
    path.touch()
    return path


def test_one_process_at_a_time_has_the_lock(tmp_path, holder):
    path = tmp_path / "lock"
    assert not is_held(path)
    process, _ = holder(path)
    assert is_held(path)
    process.kill()
    process.wait()
    lock = FileLock(path)
    lock.acquire()
    assert is_held(path)
    lock.release()
    assert not is_held(path)
    lock.close()
    lock.close()


def test_a_wait_for_a_lock_ends_in_time_and_says_who_has_it(tmp_path, holder):
    process, _ = holder(tmp_path / "lock")
    process.send_signal(signal.SIGSTOP)
    lock, said, begun = FileLock(tmp_path / "lock"), [], time.monotonic()
    with pytest.raises(LockBusyError, match=rf"probably pid {process.pid} \(.*, stopped\)"):
        lock.acquire(begun + 0.3, said.append)
    assert 0.3 <= time.monotonic() - begun < 1
    assert len(said) == 1
    process.kill()
    lock.acquire(time.monotonic() + 10)
    lock.close()


def test_looking_at_a_lock_makes_no_file(tmp_path):
    assert not is_held(tmp_path / "no such")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_does_not_outlive_its_process_in_a_forked_child(tmp_path, holder):
    process, child = holder(tmp_path / "lock", "fork")
    try:
        process.kill()
        process.wait()
        FileLock(tmp_path / "lock").acquire()
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="needs O_NOFOLLOW")
def test_a_lock_file_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="it is a symbolic link"):
        FileLock(tmp_path / "link")
    assert not (tmp_path / "victim").exists()


def test_a_touch_that_came_before_the_wait_ends_it(own, alive):
    with Watch(own, alive) as watch:
        os.utime(own)
        assert watch.wait(20).nudged


def test_a_wait_ends_in_time_in_any_thread(own, alive):
    news = []

    def wait():
        with Watch(own, alive) as watch:
            news.append(watch.wait(0.01))

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join(20)
    assert len(news) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="needs inotify")
def test_the_end_of_a_process_is_news_once_its_lock_is_gone(own, alive, holder):
    process, _ = holder(alive / "somebody")
    with Watch(own, alive) as watch:
        process.kill()
        assert watch.wait(20) == News(nudged=False, dead=["somebody"])
        assert not is_held(alive / "somebody")


@pytest.mark.skipif(sys.platform != "linux", reason="needs inotify")
def test_a_file_that_was_closed_is_no_news_before_its_lock_is_gone(own, alive, holder):
    process, _ = holder(alive / "somebody")
    with Watch(own, alive) as watch:
        (alive / "somebody").open("r+b").close()
        killer = threading.Timer(0.05, process.kill)
        killer.start()
        assert watch.wait(20).dead == ["somebody"]
        assert not is_held(alive / "somebody")
    killer.join()


@pytest.mark.skipif(sys.platform != "linux", reason="needs inotify")
def test_the_end_of_a_process_is_no_news_when_somebody_tidied_up(own, alive, holder):
    process, _ = holder(alive / "somebody")
    with Watch(own, alive) as watch:
        process.kill()
        process.wait()
        (alive / "somebody").unlink()
        assert watch.wait(0.05) == News(nudged=False, dead=[])


@pytest.mark.skipif(sys.platform != "linux", reason="needs inotify")
def test_a_file_that_was_closed_keeps_no_wait_beyond_its_end(own, alive, holder):
    holder(alive / "one")
    with Watch(own, alive) as watch:
        with (alive / "one").open("a"):
            pass
        begun = time.monotonic()
        assert watch.wait(0.1) == News(nudged=False, dead=[])
        assert time.monotonic() - begun < 0.6


def test_a_touch_is_news_while_others_are_left_to_tidy_up(own, alive, holder):
    process, _ = holder(alive / "somebody")
    with Watch(own, alive) as watch:
        process.kill()
        process.wait()
        os.utime(own)
        assert watch.wait(20, lambda: 20).nudged


def test_without_inotify_a_wait_is_short_and_anything_may_have_happened(own, alive, monkeypatch):
    monkeypatch.setattr(locks, "_take_inotify", lambda: None)
    with Watch(own, alive) as watch:
        begun = time.monotonic()
        assert watch.wait(None) == News(nudged=True, dead=None)
        assert time.monotonic() - begun >= locks.POLL


@pytest.mark.skipif(sys.platform != "linux", reason="needs inotify")
def test_waits_one_after_the_other_use_the_same_instance(own, alive):
    def instances():
        return sum(map(_is_inotify, Path("/proc/self/fd").iterdir()))

    with Watch(own, alive):
        before = instances()
    for _ in range(20):
        with Watch(own, alive) as watch:
            watch.wait(0)
    assert instances() == before


def _is_inotify(link):
    try:
        return "inotify" in str(link.readlink())
    except OSError:  # the listing's own descriptor
        return False

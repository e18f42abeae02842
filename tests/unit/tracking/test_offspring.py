"""That a process started others is noticed at the end of a test, cheaply where it did not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from pytest_gpumem.tracking import offspring

TRUE, SHELL = shutil.which("true") or "", shutil.which("sh") or ""
LINUX = sys.platform.startswith("linux")


def test_each_way_of_starting_one_is_noticed():
    steps = [
        ("nothing", lambda: None, False),
        ("run and waited for", lambda: subprocess.run([TRUE], check=True), True),
        ("nothing after that", lambda: None, False),
        ("by the shell", lambda: os.system(TRUE), True),  # noqa: S605  # as suites do
        ("nothing again", lambda: None, False),
        ("a daemon", lambda: subprocess.run([SHELL, "-c", "sleep 0.2 &"], check=True), True),
        ("by posix_spawn", lambda: os.waitpid(os.posix_spawn(TRUE, [TRUE], {}), 0), True),
        ("in a thread", in_a_thread, True),
        ("a thread alone", lambda: threading.Thread(target=int).start(), False),
    ]
    assert apart(lambda: {name: found for name, found, _ in noticed(steps)}) == {
        name: expected for name, _, expected in steps
    }


def in_a_thread():
    thread = threading.Thread(target=subprocess.run, args=([TRUE],))
    thread.start()
    thread.join()


def test_one_that_lives_is_noticed_until_it_is_gone():
    def living():
        watch, found = offspring.Offspring(), []
        child = subprocess.Popen([SHELL, "-c", "read line"], stdin=subprocess.PIPE)
        found += [watch.stirred(), watch.stirred(), watch.stirred({child.pid})]
        child.send_signal(signal.SIGKILL)
        found.append(watch.stirred())  # a zombie, or not even that
        child.wait()
        return [*found, watch.stirred(), watch.stirred()]

    # What does not count is not noticed, nor is it the second time.
    assert apart(living) == [True, True, False, True, True, False]


@pytest.mark.parametrize("broken", ["missing", "closed by a test"])
def test_without_the_numbers_of_processes_it_is_noticed_as_well(broken, monkeypatch):
    def noticing():
        if broken == "missing":
            monkeypatch.setattr(offspring, "_NUMBERS", "/nowhere")
        watch = offspring.Offspring()
        if broken != "missing" and LINUX:
            os.close(watch._numbers)
        found = [watch.stirred()]
        subprocess.run([TRUE], check=True)
        time.sleep(offspring.SOON)
        found += [watch.stirred(), watch.stirred()]
        watch.close()
        return found

    assert apart(noticing) == [False, True, False]


@pytest.mark.parametrize(
    ("start", "at_once"),
    [
        pytest.param(lambda: os.posix_spawn(TRUE, [TRUE], {}), False, id="a program"),
        pytest.param(lambda: os.fork() or os._exit(0), True, id="a fork"),
    ],
)
def test_a_program_is_noticed_soon_and_a_fork_at_once(start, at_once, monkeypatch):
    def noticing():
        now = 100.0
        monkeypatch.setattr(offspring.clock, "monotonic", lambda: now)
        watch = offspring.Offspring()
        found = [watch.stirred()]
        os.waitpid(start(), 0)
        found.append(watch.stirred())
        now += offspring.SOON
        return [*found, watch.stirred(), watch.stirred()]

    assert apart(noticing) == [False, at_once, not at_once, False]


def noticed(steps):
    """Yield each step with what is said right after it."""
    watch = offspring.Offspring()
    for name, act, expected in steps:
        act()
        time.sleep(offspring.SOON)
        yield name, watch.stirred(), expected
    watch.close()


def apart(ask):
    """Return what ``ask`` returns in a process that has no other children."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(writer, repr(ask()).encode())
        except BaseException as error:
            os.write(writer, repr(repr(error)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return eval(text)  # noqa: S307  # written above

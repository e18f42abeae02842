from __future__ import annotations

import csv
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pytest_gpumem.cli import main as cli
from pytest_gpumem.leases.glimpses import Watcher, is_watched
from pytest_gpumem.plugin.announce import Watched

SUITE = """
import time
import pytest, torch

@pytest.fixture
def model():
    return torch.zeros(512 << 20, dtype=torch.uint8, device="cuda")

@pytest.mark.gpu(vram="600MiB")
def test_takes_its_time(model):
    time.sleep(1)
    assert False
"""
CPU = """
import time

def test_without_a_card():
    time.sleep(1)
"""
PYTEST = (sys.executable, "-m", "pytest", "-p", "gpumem", "--gpumem-simulate=3.81GiB", "-q")


@pytest.fixture
def environment(tmp_path):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("GPUMEM", "PYTEST_"))}
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "test_it.py").write_text(SUITE)
    (tmp_path / "test_cpu.py").write_text(CPU)
    return clean | {"XDG_RUNTIME_DIR": str(run), "GPUMEM_RUN_DIR": str(run), "COLUMNS": "160"}


def monitor(*arguments):
    return [sys.executable, "-m", "pytest_gpumem.cli.main", "monitor", *map(str, arguments)]


@pytest.fixture
def directory(environment):
    name = f"gpumem-{os.getuid()}"
    return Path(environment["GPUMEM_RUN_DIR"]) / name


def test_a_run_is_seen_from_outside_and_its_status_kept(tmp_path, environment, directory):
    seen = tmp_path / "seen.csv"
    done = subprocess.run(
        monitor("--interval", "0.1", "--csv", seen, "--", *PYTEST, "-n", "2", "-p", "xdist"),
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip

    assert done.returncode == 1
    assert "1 failed, 1 passed" in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("gpumem monitor: ")]
    # What the test was granted holds the context of its process too.
    assert any(
        "test_it.py::test_takes_its_time (held, 984.00 MiB, call, 512.00 MiB allocated, "
        "512.00 MiB reserved)" in line
        for line in lines
    ), done.stderr
    assert any(
        "Simulated CUDA card 896.00 MiB of 3.81 GiB, 1 process: gw" in line for line in lines
    )
    assert any("test_cpu.py::test_without_a_card (call)" in line for line in lines)
    rows = list(csv.DictReader(seen.read_text(encoding="utf-8").splitlines()))
    held = next(row for row in rows if row["phase"] == "call" and row["lease"])
    assert (held["lease"], held["state"]) == (str(984 << 20), "held")
    assert held["process_used"] == str(896 << 20)
    assert (held["allocated"], held["reserved"]) == (str(512 << 20), str(512 << 20))
    assert int(held["card_used"]) + int(held["card_free"]) == int(held["card_total"])
    bare = next(row for row in rows if row["test"] == "test_cpu.py::test_without_a_card")
    assert {bare["worker"], held["worker"]} == {"gw0", "gw1"}
    assert (bare["card"], bare["card_used"], bare["allocated"]) == ("", "", "")
    assert [*directory.glob("monitors/*"), *directory.glob("seen/*")] == []


def watching():
    """Return what looks for monitors, and the hooks of its run."""
    manager = pytest.PytestPluginManager()
    return Watched(manager).look, manager.hook


def test_what_a_killed_monitor_leaves_keeps_no_test_busy(environment, directory, monkeypatch):
    monkeypatch.setenv("GPUMEM_RUN_DIR", environment["GPUMEM_RUN_DIR"])
    look, hook = watching()
    process = subprocess.Popen(monitor(), env=environment, stderr=subprocess.PIPE, text=True)
    process.stderr.readline()  # it has looked once
    assert is_watched(directory)
    look("test_x")
    assert len([*directory.glob("seen/*.json")]) == 1

    process.kill()
    process.communicate()

    assert not is_watched(directory)
    look("test_y")
    hook.pytest_runtest_call(item=None)
    assert [*directory.glob("seen/*")] == []
    with Watcher(directory):
        assert is_watched(directory)
        assert len([*directory.glob("monitors/*")]) == 1
    assert not is_watched(directory)


def test_without_a_monitor_nothing_is_written(directory, environment, monkeypatch):
    monkeypatch.setenv("GPUMEM_RUN_DIR", environment["GPUMEM_RUN_DIR"])
    look, hook = watching()
    look("test_x")
    hook.pytest_runtest_call(item=None)
    hook.pytest_runtest_logfinish(nodeid="test_x", location=None)
    hook.pytest_sessionfinish(session=None, exitstatus=0)

    assert not directory.exists()


def test_a_monitor_is_looked_for_in_the_first_test_and_soon_again(
    directory, environment, monkeypatch
):
    monkeypatch.setenv("GPUMEM_RUN_DIR", environment["GPUMEM_RUN_DIR"])
    look, hook = watching()
    look("test_x")
    with Watcher(directory) as watcher:
        time.sleep(0.06)
        look("test_y")
        assert [(each.test, each.phase) for each in watcher.glimpses()] == [("test_y", "setup")]
        hook.pytest_runtest_call(item=None)
        assert [(each.test, each.phase) for each in watcher.glimpses()] == [("test_y", "call")]
        hook.pytest_sessionfinish(session=None, exitstatus=0)
        assert watcher.glimpses() == []


TELLS = """
import sys, pathlib
from pytest_gpumem.leases.glimpses import Glimpse, Teller
teller = Teller(pathlib.Path(sys.argv[1]))
teller.tell(Glimpse(7, "gw0", "test_x[\u00e9]", "call", {"GPU-1": (1, 2)}))
print("told", flush=True)
sys.stdin.read()
"""


def test_what_a_killed_test_process_told_does_not_count(directory):
    with Watcher(directory) as watcher:
        process = subprocess.Popen(
            [sys.executable, "-c", TELLS, str(directory)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        process.stdout.readline()
        (told,) = watcher.glimpses()
        process.kill()
        process.communicate()

        assert (told.test, told.cards) == ("test_x[\u00e9]", {"GPU-1": [1, 2]})
        assert watcher.glimpses() == []
        (directory / "seen" / "4000000000-0123abcd.json").write_text("{")
        assert watcher.glimpses() == []
    assert [*directory.glob("seen/*")] == []


def test_several_monitors_look_at_once(directory):
    with Watcher(directory):
        with Watcher(directory):
            assert is_watched(directory)
        assert is_watched(directory)
    assert not is_watched(directory)


def test_a_terminal_shows_a_table_below_what_the_command_prints(tmp_path, environment):
    parent, child = pty.openpty()
    process = subprocess.Popen(
        monitor("--interval", "0.1", "--", *PYTEST),
        cwd=tmp_path, env=environment | {"TERM": "xterm"}, stdin=child, stdout=child, stderr=child,
    )  # fmt: skip
    os.close(child)
    shown = b""
    while True:
        try:
            more = os.read(parent, 65536)
        except OSError:  # what Linux says when the other side has gone
            break
        if not more:
            break
        shown += more
    os.close(parent)

    assert process.wait() == 1
    text = shown.decode()
    assert "test_it.py::test_takes_its_time" in text
    assert "896.0" in text
    assert "512.0" in text
    assert "1 failed" in text


def test_a_command_killed_by_a_signal_is_128_and_more():
    done = subprocess.run(
        monitor("--", "/bin/sh", "-c", "kill -9 $$"), capture_output=True, text=True, check=False
    )

    assert done.returncode == 137


def test_a_command_that_is_not_there_is_one_sentence(capsys):
    assert cli.main(["monitor", "--", "/no/such/command"]) == 2
    assert capsys.readouterr().err == (
        "gpumem monitor: error: cannot run '/no/such/command': No such file or directory\n"
    )


@pytest.mark.parametrize("text", ["0", "x", "-1", "nan", "inf"])
def test_a_bad_interval_is_one_sentence(capsys, text):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["monitor", f"--interval={text}"])

    assert stopped.value.code == 2
    assert f"{text!r} is not an interval; allowed is 0.05 to 3600" in capsys.readouterr().err

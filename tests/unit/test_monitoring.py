from __future__ import annotations

import csv
import os
import pty
import subprocess
import sys

import pytest

from pytest_gpumem import cli

SUITE = """
import time
import pytest, torch

@pytest.mark.gpu(vram="600MiB")
def test_takes_its_time():
    kept = torch.zeros(512 << 20, dtype=torch.uint8, device="cuda")
    time.sleep(2)
    assert False
"""
PYTEST = (sys.executable, "-m", "pytest", "-p", "gpumem", "--gpumem-simulate=3.81GiB", "-q")


@pytest.fixture
def environment(tmp_path):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("GPUMEM", "PYTEST_"))}
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "test_it.py").write_text(SUITE)
    return clean | {"XDG_RUNTIME_DIR": str(run), "GPUMEM_RUN_DIR": str(run), "COLUMNS": "160"}


def monitor(*arguments):
    return [sys.executable, "-m", "pytest_gpumem.cli", "monitor", *map(str, arguments)]


def test_a_run_is_seen_from_outside_and_its_status_kept(tmp_path, environment):
    seen = tmp_path / "seen.csv"
    done = subprocess.run(
        monitor("--interval", "0.1", "--csv", seen, "--", *PYTEST),
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip

    assert done.returncode == 1
    assert "1 failed" in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("gpumem monitor: ")]
    # What the test was granted holds the context of its process too.
    assert any("test_it.py::test_takes_its_time (held, 984.00 MiB)" in line for line in lines)
    assert any("Simulated CUDA card 896.00 MiB of 3.81 GiB, 1 process:" in line for line in lines)
    rows = list(csv.DictReader(seen.read_text(encoding="utf-8").splitlines()))
    (lease, *_) = [row for row in rows if row["process_used"] == str(896 << 20) and row["test"]]
    assert (lease["lease"], lease["state"]) == (str(984 << 20), "held")
    assert int(lease["card_used"]) + int(lease["card_free"]) == int(lease["card_total"])


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
    assert f"{text!r} is no interval; allowed is 0.05 to 3600" in capsys.readouterr().err

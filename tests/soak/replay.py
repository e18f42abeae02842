import subprocess
import sys
from pathlib import Path

REPLAY = Path(__file__).parents[2] / "scripts" / "replay" / "run.py"


def test_a_small_replay_runs_and_prints_its_table(tmp_path):
    done = subprocess.run(
        [sys.executable, REPLAY, "--scale", "0.027", "--only", "first", "--output", tmp_path],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "121 tests, seed 1, 4 workers" in done.stdout
    assert "| agents that register and work | all | 11 of 11 |" in done.stdout
    assert "| tests felled by OOM | 0 | 0 |" in done.stdout

"""``gpumem plan`` against what happens: six simulated cards, one to four workers.

A suite of tests that sleep, so that load does not matter, is run once on a large card.
From that run the plan says how long it takes on each smaller card and which tests do not fit; then
it is run there. Prints a row for each card and number of workers, and ends with 1 if a time is more
than 5 % off or a list of what does not fit is not exact.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pytest_gpumem import records

CARDS = ("1GiB", "1.25GiB", "1.5GiB", "2GiB", "3GiB", "4GiB")
LARGE = "8GiB"
CONTEXT = "128MiB"
OFF = 0.05
HEAD = """
import time
import pytest, torch

def take(mib, seconds):
    held = torch.empty(mib * 2**20, dtype=torch.uint8, device="cuda")
    time.sleep(seconds)

@pytest.fixture(scope="module")
def model():
    return torch.empty({fixture} * 2**20, dtype=torch.uint8, device="cuda")

"""


def write_suite(directory: Path, modules: int, seed: int) -> None:
    """Write a suite: tests with and without a card, marks, module fixtures, some too large."""
    rng = random.Random(seed)  # noqa: S311  # the same suite every time
    for number in range(modules):
        text = [HEAD.replace("{fixture}", str(rng.choice((20, 60, 150))))]
        for test in range(8):
            seconds = round(rng.uniform(0.5, 2.0), 2)
            if rng.random() < 0.35:
                text.append(f"def test_cpu_{test}():\n    time.sleep({seconds})\n")
                continue
            mib = round(30 * 45 ** rng.random())
            mark = ""
            if rng.random() < 0.15:
                mark = f'@pytest.mark.gpu(vram="{mib + rng.randint(5, 200)}MiB")\n'
            argument = rng.choice(("", "", "model"))
            body = f"def test_{test}({argument}):\n    take({mib}, {seconds})\n"
            text.append(mark + body)
        (directory / f"test_{number}.py").write_text("\n".join(text))
    (directory / "pytest.ini").write_text("[pytest]\n")


def run_suite(directory: Path, card: str, workers: int, history: Path) -> records.RunRecord:
    """Run the suite, which knows what ``history`` says, and return its record."""
    kept, result = directory / "history.json", directory / "run.json"
    kept.unlink(missing_ok=True)
    if history.exists():
        shutil.copy(history, kept)
    command = [
        sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "gpumem", "-n", str(workers),
        "--gpumem-simulate", card, "--gpumem-simulate-context", CONTEXT,
        "--gpumem-history", str(kept), "--gpumem-json", str(result),
    ]  # fmt: skip
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, check=False, env=clean
    )
    if done.returncode not in (0, 1):
        sys.exit(done.stdout + done.stderr)
    shutil.copy(kept, directory / "learned.json")
    return records.load_run(result)


def took(run: records.RunRecord) -> float:
    """Return the seconds from the first test's beginning to the last one's end."""
    tests = [test for test in run.tests if test.start]
    return max(t.start + t.duration for t in tests) - min(t.start for t in tests)


def unfit(run: records.RunRecord) -> set[str]:
    """Return the tests that failed."""
    return {test.nodeid for test in run.tests if test.outcome in ("failed", "error", "crashed")}


def plan(run: Path, cards: list[str], workers: list[int]) -> dict[str, dict[int, dict]]:
    """Return what ``gpumem plan`` says, by card and number of workers."""
    command = [
        sys.executable, "-m", "pytest_gpumem.cli.main", "plan", str(run), "--json",
        "--workers", ",".join(map(str, workers)), "--context", CONTEXT,
        *(part for card in cards for part in ("--card", card)),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)["cards"]
    return {
        card: {int(count): told for count, told in each["workers"].items()}
        for card, each in zip(cards, found, strict=True)
    }


def main() -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modules", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cards", nargs="*", default=CARDS)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 3, 4])
    parser.add_argument("--directory", type=Path, help="where the suite and its first run are kept")
    chosen = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        directory = (chosen.directory or Path(name)).absolute()
        first, history = directory / "first.json", directory / "first-history.json"
        if not first.exists():
            write_suite(directory, chosen.modules, chosen.seed)
            run_suite(directory, LARGE, 2, directory / "none")
            shutil.copy(directory / "learned.json", history)
            shutil.copy(directory / "run.json", first)
        said = plan(first, list(chosen.cards), chosen.workers)
        print(f"{'card':>8} {'workers':>7} {'planned s':>9} {'took s':>8} {'off':>7}  do not fit")
        for card in chosen.cards:
            for workers in chosen.workers:
                told = said[card][workers]
                run = run_suite(directory, card, workers, history)
                seconds, missing = took(run), unfit(run)
                off = told["seconds"] / seconds - 1
                exact = missing == set(told["unfit"])
                wrong += abs(off) > OFF or not exact
                note = "" if exact else f"  planned {sorted(told['unfit'])}, were {sorted(missing)}"
                print(
                    f"{card:>8} {workers:>7} {told['seconds']:>9.1f} {seconds:>8.1f} {off:>+7.1%}"
                    f"  {len(missing)}{note}",
                    flush=True,
                )
    print(f"{wrong} of {len(chosen.cards) * len(chosen.workers)} wrong")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())

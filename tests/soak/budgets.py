"""Budgets on a thousand tests: no order, shard or number of workers is growth, and growth is found.

The suite has what makes VRAM depend on the order: caches that the first test fills, fixtures of
every scope, blocks of the allocator's cache, late fixtures, cycles, leaks. One run writes its
budgets, and one in the reverse order lowers those of tests that filled a cache. Then it is shuffled
and run again and again, in one process, on workers and in shards, while twenty tests of each run
take one part in a hundred more than the tolerance. One that fills a cache in such an order is named
as not judged, and run once more with a warm-up. Ends with 1 if any other test is above its budget,
or if one of these is not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODES = ([["-n", "0"]], [["-n", "2"]], [["-n", "4"]], [["-n", "0"], ["-n", "2"]])
"""The runs of a shuffle; more than one are shards."""
GROWN = 20
CONFTEST = """
import os, random
import pytest, torch

CACHE = {}

def take(size):
    return torch.empty(size, dtype=torch.uint8, device="cuda")

def grown(nodeid, size):
    return round(size * 1.03) if nodeid in GROWN else size

GROWN = set(filter(None, os.environ.get("GROWN", "").split(",")))

def pytest_collection_modifyitems(items):
    if os.environ["SEED"].isdecimal():
        random.Random(os.environ["SEED"]).shuffle(items)
    elif os.environ["SEED"] == "backwards":
        items.reverse()
    shard, shards = map(int, os.environ.get("SHARD", "0/1").split("/"))
    items[:] = sorted(items, key=lambda item: item.nodeid)[shard::shards] if shards > 1 else items

@pytest.fixture(scope="session")
def weights():
    return take(3_000_000)

@pytest.fixture
def nodeid(request):
    return request.node.name
"""
MODULE = """
import pytest
from conftest import CACHE, grown, take

KEPT = []

@pytest.fixture(scope="module")
def model():
    held = take(2_000_001)
    yield take(1_500_000)

@pytest.fixture
def batch(model):
    return take(400_000)

def cached(key):
    if key not in CACHE:
        first = take(900_000)
        CACHE[key] = take(900_000)
    return CACHE[key]

class Node:
    def __init__(self, size):
        self.held, self.me = take(size), self

@pytest.mark.parametrize("n", range(10))
def test_plain_NUMBER(nodeid, n):
    take(grown(nodeid, 1_000_000 + 70_001 * n))

@pytest.mark.parametrize("n", range(10))
def test_blocks_NUMBER(nodeid, n):
    # Each gets up to a MiB more from the cache, if there is something to get.
    held = [take(grown(nodeid, 1_100_000 + 30_011 * n)) for _ in range(4)]

@pytest.mark.parametrize("n", range(8))
def test_model_NUMBER(nodeid, model, batch, n):
    take(grown(nodeid, 5_000_000 + n))

@pytest.mark.parametrize("n", range(6))
def test_session_NUMBER(nodeid, weights, n):
    take(grown(nodeid, 700_000 * (n + 1)))

@pytest.mark.parametrize("n", range(6))
def test_cache_NUMBER(nodeid, n):
    cached(n % 2), cached("both")
    take(grown(nodeid, 600_000 * (n + 1)))

@pytest.mark.parametrize("n", range(4))
def test_late_NUMBER(request, nodeid, n):
    take(grown(nodeid, 4_000_000 + n))
    request.getfixturevalue("model")

@pytest.mark.parametrize("n", range(3))
def test_cycle_NUMBER(nodeid, n):
    Node(grown(nodeid, 2_000_000 + n))

def test_leak_NUMBER():
    KEPT.append(take(300_000))

@pytest.mark.parametrize("n", range(2))
def test_cpu_NUMBER(n):
    assert n < 2
"""


def write_suite(directory: Path, modules: int) -> list[str]:
    """Write the suite; return the names of the tests that may grow."""
    (directory / "conftest.py").write_text(CONFTEST)
    (directory / "pytest.ini").write_text("[pytest]\n")
    names = []
    counts = {
        "plain": 10,
        "blocks": 10,
        "model": 8,
        "session": 6,
        "cache": 6,
        "late": 4,
        "cycle": 3,
    }
    for number in range(modules):
        text = MODULE.replace("NUMBER", str(number))
        (directory / f"test_{number}.py").write_text(text)
        names += [
            f"test_{kind}_{number}[{n}]" for kind, count in counts.items() for n in range(count)
        ]
    return names


def run(directory: Path, *arguments: str, **environment: str) -> list[dict]:
    """Run the suite; return how its tests stand to their budgets."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [
        sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "gpumem", "-p", "no:cacheprovider",
        "--gpumem-simulate=3GiB", "--gpumem-simulate-context=32MiB", "--gpumem-budget=b.toml",
        "--gpumem-json=run.json", *arguments,
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, check=False,
        env=clean | environment,
    )  # fmt: skip
    if done.returncode not in (0, 1):
        sys.exit(done.stdout + done.stderr)
    return json.loads((directory / "run.json").read_text())["budgets"]


def name_of(each: dict) -> str:
    """Return the name of the test that a verdict is about."""
    return each["nodeid"].partition("::")[2]


def main() -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modules", type=int, default=20, help="of 50 tests each")
    parser.add_argument("--shuffles", type=int, default=30)
    parser.add_argument("--first", type=int, default=0, help="seed of the first shuffle")
    parser.add_argument("--directory", type=Path, help="where the suite and its budgets are kept")
    chosen = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        directory = (chosen.directory or Path(name)).absolute()
        names = write_suite(directory, chosen.modules)
        if not (directory / "b.toml").exists():
            for order in ("forwards", "backwards"):
                run(directory, "-n", "0", "--gpumem-budget-update", SEED=order)
        written = (directory / "b.toml").read_text().count("\n") - 2
        print(f"{written} budgets", flush=True)
        for seed in range(chosen.first, chosen.first + chosen.shuffles):
            begun = time.monotonic()
            grown = set(random.Random(seed).sample(names, GROWN))  # noqa: S311  # a scenario
            parts = MODES[seed % len(MODES)]
            told = []
            for shard, mode in enumerate(parts):
                environment = {"SEED": str(seed), "GROWN": ",".join(grown)}
                told += run(directory, *mode, SHARD=f"{shard}/{len(parts)}", **environment)
            words = {name_of(each): each["verdict"] for each in told}
            above = {name for name, word in words.items() if word == "above"}
            left = {name for name, word in words.items() if word == "left"}
            other = {name for name, word in words.items() if word in ("new", "gone", "renamed")}
            again = sorted(grown & left)
            if again:  # they filled a cache: judged once a first call did so
                ids = [each["nodeid"] for each in told if name_of(each) in again]
                warm = run(
                    directory, "--gpumem-leak-warmups=1", *ids, SEED="", GROWN=",".join(grown)
                )
                above |= {name_of(each) for each in warm if each["verdict"] == "above"}
            false, missed = above - grown, grown - above
            wrong += bool(false or missed or other or len(words) != written)
            mode = " + ".join(" ".join(each) for each in parts)
            print(
                f"seed {seed:>3}, {mode:<11}: {len(words)} tests, {len(above)} of {GROWN} above, "
                f"{again} of them after a warm-up, {len(left - grown)} others not judged, "
                f"false alarms {sorted(false)}, missed {sorted(missed)}, other {sorted(other)}; "
                f"{time.monotonic() - begun:.0f} s",
                flush=True,
            )
    print(f"{wrong} of {chosen.shuffles} shuffles wrong")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())

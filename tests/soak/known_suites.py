"""Random suites in a control group, of whose tests all is known: the kernel is to kill nobody.

Tests take main memory, keep it, have it by fixtures, servers, forks and children, write it into a
tmpfs, or read files that stay cached. All are marked, or were learned by a run of one worker. Then
they run at once, by the scheduler or by leases alone, one run or several, with commands of
``gpumem run --ram`` beside them. Each alone has room, all together by far not.

    python tests/soak/known_suites.py [--limit 1GiB] [--suites 12] [--seed 1] [--how WAY]

Needs to make control groups; skips where it cannot.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from killed_workers import COMMAND, WITHIN, group, remove, version_of

from pytest_gpumem.units import format_bytes, parse_bytes

MIB = 2**20
HEAD = """
import os, subprocess, sys, time
import pytest

KEPT = []

def mark(size):
    return pytest.mark.ram(size) if MARKED else lambda test: test

def hold(size, seconds):
    began = time.monotonic()
    taken = bytearray(size)
    # On a busy machine it takes long to fill: they are to be there at the same time.
    time.sleep(max(seconds, 2 * (time.monotonic() - began)))
"""
KINDS = {
    "peaks": """
@mark(SIZE + PAD)
def test_NAME():
    hold(SIZE, SECONDS)
""",
    "keeps": """
@mark(SIZE + PAD)
def test_NAME():
    KEPT.append(bytearray(SIZE))
""",
    "fixture": """
@pytest.fixture(scope="module")
def table_NAME():
    yield bytearray(SIZE)

@mark(SIZE + PAD)
@pytest.mark.parametrize("number", range(2))
def test_NAME(table_NAME, number):
    time.sleep(SECONDS)
""",
    "server": """
@pytest.fixture(scope="module")
def server_NAME():
    code = "taken = bytearray(SIZE); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1) as server:
        server.stdout.readline()
        yield
        server.communicate(b"1")

@mark(SIZE + PAD)
@pytest.mark.parametrize("number", range(2))
def test_NAME(server_NAME, number):
    hold(number * SIZE, SECONDS)
""",
    "forks": """
@mark(SIZE + PAD)
def test_NAME():
    mine = bytearray(SIZE // 2)
    if not (pid := os.fork()):
        mine[::4096] = b"x" * len(mine[::4096])
        time.sleep(SECONDS)
        os._exit(0)
    os.waitpid(pid, 0)
""",
    "starts": """
@mark(SIZE + PAD)
def test_NAME():
    code = "import time; taken = bytearray(SIZE); time.sleep(SECONDS)"
    subprocess.run([sys.executable, "-c", code], check=True)
""",
    "writes": """
@pytest.mark.ram(SIZE + PAD)  # files are no process's: they are not measured
def test_NAME():
    path = f"/dev/shm/gpumem-soak-{os.getpid()}"
    try:
        with open(path, "wb") as file:
            for _ in range(SIZE >> 20):
                file.write(bytes(1 << 20))
        time.sleep(SECONDS)
    finally:
        os.remove(path)
""",
    "reads": """
@mark(PAD)
def test_NAME():
    for _ in range(3):
        with open(os.environ["BIG"], "rb") as file:
            while file.read(1 << 20):
                pass
""",
    "imports": """
@mark(SIZE // 2 + (160 << 20))
def test_NAME():
    import torch
    torch.zeros(SIZE // 8)
""",
    "tiny": """
def test_NAME():
    pass
""",
}
LASTING = "keeps", "fixture", "server"
WAYS = "marked", "learned", "half", "loadfile", "two", "alone"
"""Half: one of two files is marked, the other learned. By leases alone: under ``loadfile``, two
runs of workers, three runs without xdist."""


class Suite(NamedTuple):
    """One directory with tests."""

    files: dict[str, str]
    kinds: str


def suite(rng: random.Random, room: int, *, marked: tuple[bool, bool], torch: bool) -> Suite:
    """Return a suite whose tests have room in so many bytes, one by one, beside what is kept."""
    kinds = [*KINDS, *["peaks"] * 6, "keeps"]
    if not torch:
        kinds.remove("imports")
    parts, told, kept = [], [], 0
    for number in range(rng.randint(8, 14)):
        kind = rng.choice(kinds)
        size = int(room * rng.choice([0.1, 0.3, 0.4, 0.5, 0.5]))
        if kind in LASTING:
            size //= 2
            kind = kind if kept + size <= 0.45 * room else "peaks"
            kept += size if kind in LASTING else 0
        words = {
            "NAME": f"{kind}_{number}",
            "SIZE": str(size),
            "PAD": str(6 * MIB),
            "SECONDS": str(rng.choice([0.2, 0.5, 0.8])),
        }
        body = KINDS[kind]
        for word, value in words.items():
            body = body.replace(word, value)
        parts.append(body)
        told.append(f"{kind} {format_bytes(size)}")
    half = rng.randint(1, len(parts))
    files = {
        f"test_{name}.py": f"MARKED = {known}\n{HEAD}{''.join(some)}"
        for name, known, some in zip("ab", marked, (parts[:half], parts[half:]), strict=True)
    }
    return Suite(files, ", ".join(told))


class Box:
    """A control group, and a directory in which runs are made."""

    def __init__(self, made: Path, directory: Path) -> None:
        self.made = made
        self.directory = directory
        for name, text in (("within.py", WITHIN), ("command.py", COMMAND)):
            (directory / name).write_text(text)
        self._environ = os.environ | {
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "GPUMEM_RUN_DIR": str(directory),
            "BIG": str(directory / "big"),
        }

    def run(self, script: str, *arguments: str, cwd: Path | None = None) -> str:
        """Run a script in the group; return what it said, with FAILED if that ended badly."""
        done = subprocess.run(
            [sys.executable, str(self.directory / script), str(self.made), *arguments],
            cwd=cwd or self.directory,
            env=self._environ,
            capture_output=True,
            text=True,
            check=False,
        )
        return f"{done.stderr}{done.stdout}{'FAILED' if done.returncode else ''}"

    def killed(self) -> int:
        """Return how many processes the kernel has killed in it."""
        name = "memory.events" if version_of(self.made) == "2" else "memory.oom_control"
        words = (self.made / name).read_text().split()
        return int(words[words.index("oom_kill") + 1])


def one(box: Box, seed: int, limit: int, ways: tuple[str, ...]) -> bool:
    """Make suites, run them at once; return whether nobody was killed and all passed."""
    rng = random.Random(seed)  # noqa: S311  # the same suites each time
    how, workers = rng.choice(ways), rng.choice([3, 4, 6])
    runs = {"two": 2, "alone": 3}.get(how, 1)
    room = (limit - (100 + 35 * workers * runs) * MIB) // runs
    marked = {"marked": (True, True), "learned": (False, False), "half": (True, False)}
    places, suites = [], []
    for number in range(runs):
        known = marked.get(how) or (rng.random() < 0.5, rng.random() < 0.5)
        suites.append(suite(rng, room, marked=known, torch=limit >= 2**31))
        places.append(box.directory / f"{seed}-{number}")
        places[-1].mkdir()
        for name, text in suites[-1].files.items():
            (places[-1] / name).write_text(text)
    ours = ("-p", "gpumem", "--gpumem-ram", "-q", "-p", "xdist")
    for place in places:
        box.run("within.py", *ours, "-n", "1", cwd=place)
    before, began = box.killed(), time.monotonic()
    at_once = ["-n", "0"] if how == "alone" else ["-n", str(workers)]
    at_once += ["--dist", "loadfile"] if how == "loadfile" else []
    with ThreadPoolExecutor() as pool:
        ends = [pool.submit(box.run, "within.py", *ours, *at_once, cwd=place) for place in places]
        if runs > 1 or rng.random() < 0.3:
            size = limit * rng.choice([15, 25, 30]) // 100
            ends.append(pool.submit(box.run, "command.py", str(size)))
        said = [end.result() for end in ends]
    killed = box.killed() - before
    right = not killed and not any("FAILED" in text or "failed" in text for text in said)
    seconds = time.monotonic() - began
    word = "" if right else "  WRONG"
    print(f"{seed}: {how}, {workers} workers: {killed} killed ({seconds:.0f} s){word}", flush=True)
    if not right:
        print(*(each.kinds for each in suites), *said, sep="\n")
    return right


def main() -> int:
    """Run suites; return 1 if one of them lost somebody."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--limit", type=parse_bytes, default=2**30)
    parser.add_argument("--suites", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--how", choices=WAYS, action="append")
    chosen = parser.parse_args()
    try:
        made = group(chosen.limit)
    except OSError as error:
        print(f"skipped: no control group can be made here: {error.strerror}")
        return 0
    try:
        # Not in a tmpfs: what is read from there is not only cached.
        with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
            box = Box(made, Path(name))
            with (box.directory / "big").open("wb") as file:
                for _ in range(chosen.limit // 2 // MIB):
                    file.write(bytes(MIB))
            seeds = range(chosen.seed, chosen.seed + chosen.suites)
            wrong = [
                seed
                for seed in seeds
                if not one(box, seed, chosen.limit, tuple(chosen.how or WAYS))
            ]
    finally:
        remove(made)
    print(f"{chosen.suites} suites, {len(wrong)} of them WRONG")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

"""What measuring costs a suite that keeps many objects alive: it must not grow with their number.

The same suites with a small heap and with one four times as large, in fresh processes, in turn on
the CPU without the plugin and on a simulated card with it: class fixtures that each keep a tensor,
tests that fail with one in a variable, that leak one, and that leave one in a cycle. Seconds are
CPU time of the whole process, the least over the rounds, which other work on the machine changes
least; passes are those over all objects, and collections the full ones, that the plugin asked for.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

CONFTEST = """
import gc, json, os, sys
import torch

class Node:
    __slots__ = ("next", "value")

    def __init__(self, before, value):
        self.next, self.value = before, value

def grow(objects):
    kept = []
    for number in range(objects):
        kept.append(Node(kept[-1] if number % 8 else None, number))
    return kept

HEAP = grow(int(os.environ["BENCH_OBJECTS"]))
counts = {"passes": 0, "collections": 0}

def ours():
    return sys._getframe(2).f_globals.get("__name__", "").startswith("pytest_gpumem.")

def counted(name, word, is_full):
    plain = getattr(gc, name)
    def wrapper(*args, **kwargs):
        counts[word] += ours() and is_full(*args, **kwargs)
        return plain(*args, **kwargs)
    setattr(gc, name, wrapper)

if "BENCH_PROBE" in os.environ:
    counted("get_objects", "passes", lambda generation=None: generation in (None, 2))
    counted("get_referrers", "passes", lambda *_: True)
    counted("collect", "collections", lambda generation=2: generation == 2)

    def pytest_unconfigure():
        with open(os.environ["BENCH_PROBE"], "w") as file:
            json.dump(counts, file)
"""
FIXTURES = """
import os
import pytest
import torch

class Base:
    @pytest.fixture(scope="class", autouse=True)
    def kept(self):
        yield torch.zeros(256, device=os.environ["BENCH_DEVICE"])

    def test_one(self, kept):
        assert kept.numel() == 256

    test_two = test_three = test_one

for number in range({count}):
    globals()[f"TestClass{{number}}"] = type(f"TestClass{{number}}", (Base,), {{}})
del Base
"""
TESTS = """
import os
import pytest
import torch

KEPT = []

class Ring:
    pass

@pytest.mark.parametrize("number", range({count}))
def test_it(number):
    value = torch.zeros(256 + number, device=os.environ["BENCH_DEVICE"])
    {rest}
"""
SIMULATE = ("-p", "gpumem", "--gpumem=on", "--gpumem-simulate=4GiB")
SUITES = {
    "class fixtures that keep 1 KiB": (300, FIXTURES),
    "tests that fail with a tensor": (60, TESTS.replace("{rest}", "assert not value.numel()")),
    "tests that leak a tensor": (60, TESTS.replace("{rest}", "KEPT.append(value)")),
    "tests that leave a cycle": (
        60,
        TESTS.replace("{rest}", "ring = Ring(); ring.itself, ring.value = ring, value"),
    ),
}


def run(suite: Path, objects: int, *, measured: bool, probe: Path | None = None) -> float:
    """Run ``suite`` once and return its CPU seconds.

    Raises:
        SystemExit: with pytest's output, when it did not end as it should.

    """
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider"]
    command += [*SIMULATE, str(suite)] if measured else [str(suite)]
    environment = os.environ | {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "BENCH_OBJECTS": str(objects),
        "BENCH_DEVICE": "cuda" if measured else "cpu",
    }
    if probe is not None:
        environment["BENCH_PROBE"] = str(probe)
    before = children_cpu()
    done = subprocess.run(
        command, check=False, env=environment, cwd=suite, capture_output=True, text=True
    )
    if done.returncode not in (0, 1) or " error" in done.stdout.rpartition("\n")[2]:
        raise SystemExit(f"{suite.name} failed:\n{done.stdout}{done.stderr}")
    return children_cpu() - before


def children_cpu() -> float:
    """Return the CPU seconds of all processes that this one started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and return 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=300_000, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--only", default="", help="suites in whose names this word is")
    options = parser.parse_args(argv)
    sizes = options.objects, options.objects * 4
    chosen = {name: each for name, each in SUITES.items() if options.only in name}
    seconds: dict[tuple[str, int, bool], float] = {}
    probes: dict[tuple[str, int], dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, (count, source) in chosen.items():
            suite = Path(scratch) / name.replace(" ", "-")
            suite.mkdir()
            (suite / "pytest.ini").write_text("[pytest]\n")
            (suite / "conftest.py").write_text(CONFTEST)
            (suite / "test_it.py").write_text(source.format(count=count))
            for objects in sizes:
                probe = suite / "probe.json"
                run(suite, objects, measured=True, probe=probe)
                probes[name, objects] = json.loads(probe.read_text())
                for _ in range(options.rounds):
                    for measured in (False, True):
                        took = run(suite, objects, measured=measured)
                        key = name, objects, measured
                        seconds[key] = min(seconds.get(key, took), took)
    print(
        f"{dt.datetime.now(dt.timezone.utc):%Y-%m-%d}, {os.cpu_count()} CPUs, "
        f"Python {platform.python_version()}, torch {version('torch')}, {options.rounds} rounds\n"
    )
    columns = "suite", "objects", "without, s", "with, s", "ratio", "ms more for each"
    print("|", " | ".join((*columns, "passes", "collections")), "|")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for (name, objects), counts in probes.items():
        off, on = seconds[name, objects, False], seconds[name, objects, True]
        count = chosen[name][0]
        print(
            f"| {count} {name} | {objects:,} | {off:.2f} | {on:.2f} | {on / off:.2f} "
            f"| {(on - off) / count * 1e3:.1f} | {counts['passes']} | {counts['collections']} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

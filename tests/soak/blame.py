"""``gpumem blame`` on generated suites in which tests poison a later one, in many ways.

Run by hand: ``python tests/soak/blame.py [--suites N] [--seed N]``. Of each suite it is known who
is to blame. Prints a line for each, and how many runs it took against what halving needs; the exit
status is 0 when all were found, and nobody else was named.
"""

import argparse
import math
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

STATE = "A, B = [], []\n"
KINDS = {
    # What a polluter does, what a cleaner does, and what the test that fails asserts.
    "global": ("state.A.append(1)", "state.A.clear()", "assert not state.A"),
    "environ": ('os.environ["X"] = "1"', 'os.environ.pop("X", 0)', 'assert "X" not in os.environ'),
    "directory": ('os.chdir("/")', "os.chdir(HERE)", "assert os.getcwd() == HERE"),
    "patched": ("os.cpu_count = None", "os.cpu_count = COUNT", "assert os.cpu_count() > 0"),
    "module": ('sys.modules["none"] = os', 'sys.modules.pop("none", 0)', NotImplemented),
    "fixture": ("pass", "pass", "assert not state.B"),
    "import": ("pass", "pass", "assert not state.A"),
    "together": ("state.A.append(1)", "pass", "assert not (state.A and state.B)"),
    "memory": ("state.A.append(take(600))", "state.A.clear()", "take(600)"),
    "dtype": ("torch.set_default_dtype(torch.float64)", "pass", "assert torch.ones(1).dtype == F"),
}
KINDS["module"] = (*KINDS["module"][:2], "with pytest.raises(ImportError): import none")
HEAD = """
import os, sys
import pytest
import state
HERE, COUNT = os.path.dirname(os.path.abspath(__file__)), os.cpu_count
"""
TORCH = """
import torch
F = torch.float32
def take(mib):
    return torch.zeros(mib << 20, dtype=torch.uint8, device="cuda")
"""


class Suite(NamedTuple):
    kind: str
    count: int
    """Tests before the one that fails."""
    blamed: list[str]
    arguments: list[str]


def source(test):
    """Return the source of a test of this name, fixture and body."""
    named, fixture, body = test
    name, _, parameter = named.partition("[")
    given = [fixture] if fixture else []
    mark = ""
    if parameter:
        mark = f"@pytest.mark.parametrize('p', [{parameter[:-1]!r}])\n"
        given.append("p")
    return f"{mark}def {name}({', '.join(given)}):\n    {body}\n"


def write(directory, kind, chance):
    """Write a suite and return what is known of it."""
    pollutes, cleans, asserts = KINDS[kind]
    count = chance.randint(1, 60)
    files = chance.randint(1, min(4, count))
    order = [f"test_{number:02d}" for number in range(count)]
    file_of = [number * files // count for number in range(count)]
    bodies = ["pass"] * count
    argument = [""] * count
    names = [
        f"{name}[{chance.choice(['a b', 'x::y', '[', 'é', '-k', ''])}{number}]"
        if chance.random() < 0.3 else name
        for number, name in enumerate(order)
    ]  # fmt: skip
    last = chance.randrange(count)
    blamed = [last]
    bodies[last] = pollutes
    if kind not in ("fixture", "import", "together", "dtype"):
        for number in range(last):
            bodies[number] = chance.choice(["pass"] * 8 + [pollutes, cleans])
    heads = [HEAD + (TORCH if kind in ("memory", "dtype") else "")] * files
    conftest = ""
    if kind == "together" and count > 1:
        other = chance.choice([number for number in range(count) if number != last])
        bodies[other] = "state.B.append(1)"
        blamed = sorted([last, other])
    elif kind == "together":
        bodies[last] = "state.A.append(1); state.B.append(1)"
    elif kind == "fixture":
        argument[last] = "wide"
        conftest = (
            "import pytest, state\n@pytest.fixture(scope='session')\n"
            "def wide():\n    state.B.append(1)\n    yield\n"
        )
    elif kind == "import":
        # The last test of the file: every test of it brings the import about.
        last = max(number for number in range(count) if file_of[number] == file_of[last])
        blamed = [last]
        heads[file_of[last]] += "state.A.append(1)\n"
    (directory / "state.py").write_text(STATE)
    (directory / "conftest.py").write_text(conftest)
    (directory / "pytest.ini").write_text("[pytest]\naddopts = -x\n")
    tests = [*zip(names, argument, bodies, strict=True)]
    for file in range(files):
        of_file = [test for number, test in enumerate(tests) if file_of[number] == file]
        (directory / f"test_{file}.py").write_text(heads[file] + "".join(map(source, of_file)))
    tail = TORCH if kind in ("memory", "dtype") else ""
    (directory / "test_z.py").write_text(f"{HEAD}{tail}def test_it():\n    {asserts}\n")
    found = [
        f"test_{file_of[number]}.py::" + names[number].encode("unicode_escape").decode()
        for number in blamed
    ]
    card = ["-p", "gpumem", "--gpumem-simulate=1GiB", "--gpumem-simulate-context=1MiB",
            "--gpumem-oom=fail"] if kind == "memory" else []  # fmt: skip
    return Suite(kind, count, found, card)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suites", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("GPUMEM_S", "PYTEST_"))}
    missed = total = needed = 0
    for number in range(options.seed, options.seed + options.suites):
        chance = random.Random(number)  # noqa: S311  # no secrets
        # Those with torch, whose runs take seconds, less often.
        kinds = [*KINDS, *[kind for kind in KINDS if kind not in ("memory", "dtype")] * 2]
        with tempfile.TemporaryDirectory() as name:
            suite = write(Path(name), chance.choice(kinds), chance)
            done = subprocess.run(
                [sys.executable, "-m", "pytest_gpumem.cli.main", "blame", "test_z.py::test_it",
                 "--", *suite.arguments],
                cwd=name, env=clean | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": name},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
        said = done.stdout.splitlines() or [done.stderr]
        named = re.split(r" makes? ", said[0])[0].split(" and ")
        right = named == suite.blamed and not done.returncode
        runs = done.stderr.count("gpumem blame: run ")
        least = 2 + math.ceil(math.log2(suite.count)) + 1
        missed += not right
        total, needed = total + runs, needed + least
        print(
            f"{number:3} {suite.kind:<9} {suite.count:2} tests, {len(suite.blamed)} to blame, "
            f"{runs} runs, 3 + log2 is {least}: {'found' if right else f'MISSED {suite.blamed}'}"
            f"{'' if right else ' ' + repr(said)}",
            flush=True,
        )
    print(f"{options.suites} suites, {missed} missed; {total} runs, 3 + log2 is {needed}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Suites with wide fixtures that exclude one another end as they do under plain xdist.

Each suite is generated: fixtures of session, package, module and class scope hold a file lock, a
port, a lock in a child process, or the VRAM of a lease, 2 to 4 workers run it, and some of its
tests are marked for the card. It runs under plain xdist and under the plugin's scheduler on a
simulated card, in turns. Outcomes are compared test by test; a run that takes longer than
``LIMIT`` hangs; all runs of the one kind together may take ``RATIO`` times those of the other.

A suite has one such thing of the session, and its tests wait for nothing wider while they hold
something narrower: it ends in whatever order its tests run.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET

LIMIT = 90.0
"""Seconds; plain xdist takes one or two on a free machine."""
RATIO = 1.25
ENVIRONMENT = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONSAFEPATH": "1"}
OURS = ("-p", "gpumem", "--gpumem-simulate=1GiB", "--gpumem-simulate-context=64MiB")

CONFTEST = """
import contextlib, fcntl, os, socket, subprocess, sys, time
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@contextlib.contextmanager
def lock(name):
    with open(HERE / f"{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def port(name):
    with socket.socket(socket.AF_UNIX) as server:
        while True:
            try:
                server.bind(f"\\0{HERE}/{name}")
                break
            except OSError:
                time.sleep(0.005)
        yield


@contextlib.contextmanager
def child(name):
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
    code += "print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-S", "-c", code, str(HERE / f"{name}.lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.readline()
        yield
        process.stdin.close()


@contextlib.contextmanager
def lease(name):
    if os.environ.get("EXCLUSIVE_PLAIN"):
        with lock(name):
            yield
    else:
        from pytest_gpumem import gpu_lease

        with gpu_lease("500MiB"):
            yield


@pytest.fixture(scope="session")
def of_session():
    with SESSION("session"):
        yield
"""


IMPORTS = "import time, pytest\nfrom conftest import child, lease, lock, port\n"


class Suite(NamedTuple):
    """A generated suite."""

    files: dict[str, str]
    workers: int


def generate(rng: random.Random) -> Suite:
    """Return a suite of some ten to forty tests of some 10 ms."""
    kinds = ["lock", "port", "child"]
    files = {"conftest.py": CONFTEST.replace("SESSION", rng.choice(kinds))}
    on_card = rng.random() < 0.4
    # Who waits for a lease holds no other: one scope of the suite has them.
    leased = rng.choice(["package", "module", "class", ""]) if on_card else ""
    tests = rng.choice([2, 3, 4])
    for package in range(rng.choice([1, 1, 2])):
        kind = "lease" if leased == "package" else rng.choice(kinds)
        path = f"p{package}"
        of_session, of_package = rng.random() < 0.3, rng.random() < 0.3
        files[f"{path}/__init__.py"] = ""
        files[f"{path}/conftest.py"] = IMPORTS + fixture("of_package", "package", kind, "package")
        for module in range(rng.choice([1, 2, 3])):
            wide = ["of_session"] if of_session else []
            wide += ["of_package"] if of_package else []
            text = IMPORTS
            if rng.random() < 0.7:
                kind = "lease" if leased == "module" else rng.choice(kinds)
                text += fixture("of_module", "module", kind, rng.choice("ab"))
                wide.append("of_module")
            for number in range(rng.choice([1, 2, 3])):
                kind = "lease" if leased == "class" else rng.choice(kinds)
                held = [*wide, "of_class"] if rng.random() < 0.5 else wide
                text += cls(number, kind, held, tests, rng, on_card=on_card)
            files[f"{path}/test_{module}.py"] = text
    return Suite(files, rng.choice([2, 2, 3, 4]))


def fixture(name: str, scope: str, kind: str, what: str, indent: str = "") -> str:
    """Return a fixture that holds the thing ``what`` of its scope."""
    argument = "self" if indent else ""
    lines = (
        f'@pytest.fixture(scope="{scope}")',
        f"def {name}({argument}):",
        f'    with {kind}("{kind}-{scope}-{what}"):',
        "        yield",
    )
    return "\n" + "".join(f"{indent}{line}\n" for line in lines)


def cls(
    number: int, kind: str, held: list[str], tests: int, rng: random.Random, *, on_card: bool
) -> str:
    """Return a class of tests that all use the fixtures ``held``."""
    text = f"\n\nclass Test{number}:"
    text += fixture("of_class", "class", kind, rng.choice("ab"), "    ")
    for test in range(tests):
        if on_card and rng.random() < 0.4:
            mark = rng.choice(["", 'vram="100MiB"', 'vram="400MiB"', "exclusive=True"])
            text += f"    @pytest.mark.gpu({mark})\n"
        fails = "; assert 0" if rng.random() < 0.05 else ""
        needs = ", ".join(["self", *held])
        text += (
            f"    def test_{test}({needs}): time.sleep({rng.choice([0.0, 0.01, 0.03])}){fails}\n"
        )
    return text


class Ended(NamedTuple):
    """How a run ended."""

    outcomes: dict[str, str] | None
    """By test; None where it had to be killed."""
    seconds: float
    output: str


def run(suite: Suite, directory: Path, plugins: tuple[str, ...], env: dict[str, str]) -> Ended:
    """Run a suite in ``directory``, which holds its files."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "xdist", "-p", "no:cacheprovider"]
    command += ["-W", "ignore", f"-n{suite.workers}", "--junitxml=report.xml", *plugins]
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=directory,
        env=os.environ | ENVIRONMENT | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return Ended(None, LIMIT, output)
    seconds = time.monotonic() - began
    if not (directory / "report.xml").exists():
        return Ended({}, seconds, output)
    cases = ET.parse(directory / "report.xml").iter("testcase")  # noqa: S314  # pytest's own
    outcomes = {
        f"{case.get('classname')}.{case.get('name')}": " ".join(
            sorted(e.tag for e in case if e.tag != "properties")
        )
        for case in cases
    }
    (directory / "report.xml").unlink()
    return Ended(outcomes, seconds, output)


def main() -> int:
    """Run the campaign and return 1 if anything differs, hangs or takes too long."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=300, help="suites (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="of the first suite (default: 0)")
    chosen = parser.parse_args()
    differ = hung = without = 0
    spent = {"plain": 0.0, "ours": 0.0}
    for seed in range(chosen.seed, chosen.seed + chosen.count):
        rng = random.Random(seed)  # noqa: S311  # not for secrets
        suite = generate(rng)
        with tempfile.TemporaryDirectory() as text:
            directory = Path(text)
            for name, content in suite.files.items():
                (directory / name).parent.mkdir(exist_ok=True)
                (directory / name).write_text(content)
            (directory / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
            ways = [("plain", (), {"EXCLUSIVE_PLAIN": "1"}), ("ours", OURS, {})]
            rng.shuffle(ways)
            ended = {way: run(suite, directory, *how) for way, *how in ways}
        plain, ours = ended["plain"], ended["ours"]
        if plain.outcomes is None:
            without += 1
            print(f"{seed}: hangs without the plugin", flush=True)
            continue
        for way, each in ended.items():
            spent[way] += each.seconds
        hung += ours.outcomes is None
        if ours.outcomes != plain.outcomes or not plain.outcomes:
            differ += 1
            print(f"{seed}: {plain.outcomes} without, {ours.outcomes} with the plugin")
            print("\n".join(f"  | {line}" for line in ours.output.splitlines()[-30:]), flush=True)
        elif ours.seconds > 1.5 * plain.seconds + 0.5:
            print(
                f"{seed}: {plain.seconds:.1f} s, {ours.seconds:.1f} s with the plugin", flush=True
            )
    ratio = spent["ours"] / max(spent["plain"], 1e-9)
    print(
        f"{chosen.count} suites, {differ} differ, {hung} hang ({without} without the plugin too); "
        f"{spent['ours']:.0f} s, {ratio:.2f} of plain xdist's {spent['plain']:.0f} s"
    )
    return int(bool(differ or without or ratio > RATIO))


if __name__ == "__main__":
    sys.exit(main())

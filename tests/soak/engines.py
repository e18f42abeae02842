"""An engine of 70 % of the card, kept by a class, module or session fixture, with four workers.

    python tests/soak/engines.py [--scope module] [--workers 4]

The engine is a process with torch in it, as a model server is. Its tests have it work with memory
of its own, others use the card beside it, and some need no card. Each suite runs three times: with
a lease in the fixture, then without any word about its size, first and once it was learned. Printed
are, of each run, the tests that passed, those that ran out of memory, how often the engine was set
up and in how many modules or classes it is used, and the seconds of the run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFTEST = """
import os, subprocess, sys
from pathlib import Path

import pytest
import pytest_gpumem

ENGINE = '''
import sys
import torch
weights = torch.zeros(int(sys.argv[1]) * 2**20, dtype=torch.uint8, device="cuda")
print("ready", flush=True)
for line in sys.stdin:
    try:
        torch.zeros(int(line) * 2**20, dtype=torch.uint8, device="cuda")
        print("done", flush=True)
    except torch.OutOfMemoryError as error:
        print(error, flush=True)
'''

class Engine:
    def __init__(self):
        with Path(os.environ["SET_UPS"]).open("a") as noted:
            print(os.getpid(), file=noted)
        command = [sys.executable, "-c", ENGINE, os.environ["ENGINE_MIB"]]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, stderr=subprocess.STDOUT, **pipes)
        lines = []
        while not lines or lines[-1] not in ("ready\\n", ""):
            lines.append(self.process.stdout.readline())
        if lines[-1] != "ready\\n":
            self.process.communicate()
            raise RuntimeError("".join(lines))

    def work(self, mib):
        print(mib, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer == "done\\n", answer

"""
ENGINE = """
@pytest.fixture(scope=os.environ["ENGINE_SCOPE"])
def engine():
    started = Engine()
    yield started
    started.process.communicate()
"""
LEASED = """
@pytest.fixture(scope=os.environ["ENGINE_SCOPE"])
def engine():
    with pytest_gpumem.gpu_lease("3200MiB"):
        started = Engine()
        yield started
        started.process.communicate()
"""
USERS = """
import time
import pytest

class TestEngine:
    @pytest.mark.parametrize("mib", [20, 60, 100, 140])
    def test_works(self, engine, mib):
        engine.work(mib)
        time.sleep(0.1)

class TestAgain:
    @pytest.mark.parametrize("mib", [40, 80])
    def test_works(self, engine, mib):
        engine.work(mib)
"""
OTHERS = """
import time
import pytest

@pytest.mark.parametrize("mib", [50, 100, 200, 300])
def test_uses_the_card(mib):
    import torch
    torch.zeros(mib * 2**20, dtype=torch.uint8, device="cuda")
    time.sleep(0.1)

@pytest.mark.parametrize("number", range(4))
def test_needs_no_card(number):
    time.sleep(0.1)
"""
USES = {"class": 8, "module": 4, "session": 1}


def write_suite(place: Path, engine: str) -> None:
    """Write four modules that use the engine and four that do not."""
    (place / "conftest.py").write_text(CONFTEST + engine)
    for number in range(4):
        (place / f"test_engine_{number}.py").write_text(USERS)
        (place / f"test_others_{number}.py").write_text(OTHERS)


def run(place: Path, scope: str, workers: int) -> tuple[str, bool]:
    """Run the suite and return what is printed of it, and whether all of its tests passed."""
    noted, record = place / "set-ups", place / "run.json"
    noted.unlink(missing_ok=True)
    record.unlink(missing_ok=True)
    card = ("-p", "gpumem", "--gpumem-simulate=4GiB", "--gpumem-simulate-context=128MiB")
    options = (*card, f"--gpumem-json={record}", f"-n{workers}", "-q")
    words = {"ENGINE_SCOPE": scope, "ENGINE_MIB": "2867"}
    start = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=place,
        env={**os.environ, **words, "SET_UPS": str(noted)},
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
    )
    seconds = time.monotonic() - start
    tests = json.loads(record.read_text())["tests"]
    ooms = sum(bool(test["oom"]) for test in tests)
    ooms += sum(child["ooms"] for test in tests for child in test["children"] if not test["oom"])
    last = ended.stdout.strip().splitlines()[-1]
    told = f"{ooms} out of memory, {len(noted.read_text().split())} set-ups in {USES[scope]} uses"
    return f"{last}; {told}; {seconds:.0f} s", ended.returncode == 0


def main() -> int:
    """Run each kind of suite and print its figures."""
    parser = argparse.ArgumentParser(description="An engine of 70 % of a card.")
    parser.add_argument("--scope", choices=USES, action="append", help="default: all")
    parser.add_argument("--workers", type=int, default=4)
    given = parser.parse_args()
    failed = 0
    for scope in given.scope or USES:
        for words, engine, times in (("with a lease", LEASED, 1), ("without a word", ENGINE, 2)):
            place = Path(tempfile.mkdtemp(prefix="engines-"))
            write_suite(place, engine)
            for number in range(times):
                told, passed = run(place, scope, given.workers)
                failed += not passed
                print(f"{scope:8} {words}, run {number + 1}: {told}", flush=True)
            shutil.rmtree(place)
    return failed


if __name__ == "__main__":
    sys.exit(main())

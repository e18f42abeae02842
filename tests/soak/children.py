"""Starts processes from tests in every way that we know, and kills parents at random moments.

    python tests/soak/children.py [--kills 200]

Prints how many tests were told otherwise than they were, and how many survivors of killed parents
were named with another test than the one that started them, or with none. Half of the survivors
tell of themselves, as those with torch do, of the others only the driver tells.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "plugin"))

from children import problems
from harness import SUITES, run_pytest, write_suite

CARD = ("-p", "gpumem", "--gpumem-simulate", "4GiB", "--gpumem-simulate-context", "8MiB")
KILLS = """
import os, random, signal, subprocess, sys, time
from pathlib import Path
import pytest

PARENT = '''
import os, subprocess, sys, time
print(flush=True)
for number in range(2):
    subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], start_new_session=True)
    time.sleep(float(sys.argv[3]))
time.sleep(60)
'''
CHILD = '''
import os, sys, time
from pathlib import Path
from pytest_gpumem.devices import family
from pytest_gpumem.devices.allocator import AllocatorReading
from pytest_gpumem.devices.book import Book
from pytest_gpumem.simulator.card import SharedCard
(link,) = family.links(os.environ["GPUMEM_FAMILY"])
card = SharedCard.open(Path(os.environ["GPUMEM_SIMULATE_CARD"]))
card.join()
card.reserve(2**21)
if os.getpid() % 2:
    page = Book(Path(link.book)).join(link.owner, link.name)
    page.tell(0, card.uuid, AllocatorReading(2**20, 2**20, 2**21, 2**21, 0, 0))
Path(sys.argv[1], str(os.getpid())).touch()
time.sleep(8)
'''
"Takes part as the agent does, without the seconds that torch takes to start."
PLACE = Path(os.environ["PLACE"])

@pytest.mark.parametrize("number", range(int(os.environ["KILLS"])))
def test_parent_is_killed(number):
    rng = random.Random(number)
    mine = PLACE / str(number)
    mine.mkdir()
    command = [sys.executable, "-c", PARENT, CHILD, str(mine), str(rng.random() / 10)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE)
    parent.stdout.readline()  # however long a busy machine takes to start it
    time.sleep(rng.random() / 2)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()

@pytest.fixture(scope="session", autouse=True)
def the_last_ones_are_waited_for():
    yield
    time.sleep(3)
"""


def ways() -> int:
    """Run the whole suite of ways, with one, two and four processes; return what is wrong."""
    wrong = 0
    for workers in ((), ("-n", "2"), ("-n", "4")):
        with tempfile.TemporaryDirectory() as name:
            place = Path(name, "suite")
            place.mkdir()
            write_suite(place)
            shutil.copy(SUITES / "children.py", place / "test_children.py")
            env = {"CASES": "all"}
            arguments = (*CARD[:2], "--gpumem-simulate", "4GiB", *workers)
            context = ("--gpumem-simulate-context", "64MiB", "--gpumem-json", "run.json")
            run = run_pytest(place, *arguments, *context, env=env, timeout=3000)
            found = problems(run)
            tests = len({test.nodeid for test in run.record.tests})
            print(f"{' '.join(workers) or 'plain':6} {tests} tests, {len(found)} told otherwise")
            for sentence in found:
                print(f"    {sentence}")
            wrong += len(found) + bool(run.status)
    return wrong


def kills(number: int, *workers: str) -> int:
    """Kill parents at random moments; return how many survivors were named wrongly or not."""
    with tempfile.TemporaryDirectory() as name:
        suite, place = Path(name, "suite"), Path(name, "place")
        suite.mkdir()
        place.mkdir()
        write_suite(suite, test_kills=KILLS)
        env = {"PLACE": str(place), "KILLS": str(number)}
        arguments = (*CARD, *workers, "--gpumem-json", "run.json")
        run = run_pytest(suite, *arguments, env=env, timeout=3000)
        started = {
            int(path.name): int(path.parent.name) for path in place.glob("*/*") if path.is_file()
        }
        told: dict[int, str] = {}
        for test in run.record.tests:
            for child in test.children:
                told[child.pid] = child.started_by
        missing = [pid for pid in started if pid not in told]
        wrong = [pid for pid in told if not told[pid].endswith(f"[{started.get(pid)}]")]
        print(
            f"{' '.join(workers) or 'plain':6} {number} parents killed, {len(started)} survivors, "
            f"{len(missing)} not named, {len(wrong)} named with another test, status {run.status}"
        )
        return len(missing) + len(wrong)


def main() -> int:
    """Run both campaigns."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--only", choices=("ways", "kills"))
    chosen = parser.parse_args()
    wrong = 0
    if chosen.only != "kills":
        wrong += ways()
    if chosen.only != "ways":
        wrong += sum(kills(chosen.kills, *workers) for workers in ((), ("-n", "2")))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

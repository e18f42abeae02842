"""Seeded bugs in handlers of out-of-memory errors: all are found, and no right one is called wrong.

Generates suites of right and wrong handlers (``tests/plugin/oom_handlers.py``), of random sizes and
in random order, runs each with ``--gpumem-oom-at every``, in one process and on two workers, and
compares the verdict of each allocation. Ends with 1 at the first difference. ``--operations`` does
it as on a real card, where torch's operations are watched; the compiled card is one for them.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "plugin"))

from oom_handlers import handlers, suite

CARD = ("-p", "gpumem", "--gpumem-simulate", "1GiB", "-p", "no:cacheprovider")
AS_ON_A_REAL_CARD = """
def pytest_collection_finish(session):
    proving = session.config.pluginmanager.getplugin("gpumem-oom-at")
    if proving is not None:
        proving.simulated = False
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suites", type=int, default=10)
    parser.add_argument("--of-each", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--operations", action="store_true")
    asked = parser.parse_args()
    counts: Counter[str] = Counter()
    for seed in range(asked.seed, asked.seed + asked.suites):
        numbers = random.Random(seed)  # noqa: S311  # to be the same each time
        known = handlers(numbers, asked.of_each)
        names = list(known)
        numbers.shuffle(names)
        known = {name: known[name] for name in names}
        arguments = ("-n", "2") if seed % 2 else ()
        found = run(suite(known), arguments, operations=asked.operations)
        for name, handler in known.items():
            counts.update(handler.wanted)
            if found.get(name) != handler.wanted:
                print(f"seed {seed}: {name}: {found.get(name)}, not {handler.wanted}")
                print(handler.body)
                return 1
    bugs = sum(number for verdict, number in counts.items() if verdict != "recovered")
    print(f"{asked.suites} suites: all of {bugs} bugs were found as what they are")
    print(f"{counts['recovered']} allocations that are handled rightly were called so")
    return 0


def run(source: str, arguments: tuple[str, ...], *, operations: bool) -> dict[str, tuple[str, ...]]:
    """Return the verdicts of each test's allocations."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        (place / "test_it.py").write_text(source)
        (place / "pytest.ini").write_text("[pytest]\n")
        command = [sys.executable, "-m", "pytest", *CARD, "-q", "--gpumem-json=run.json"]
        command += ["--gpumem-oom-at=every", *arguments]
        if operations:
            (place / "conftest.py").write_text(AS_ON_A_REAL_CARD)
            command.append("--gpumem-simulate-compiled")
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
        if not (place / "run.json").exists():
            sys.exit(done.stdout + done.stderr)
        tests = json.loads((place / "run.json").read_text())["tests"]
    return {
        each["nodeid"].partition("::test_")[2]: tuple(
            one["verdict"] for one in (each["proof"] or {"tried": ()})["tried"]
        )
        for each in tests
    }


if __name__ == "__main__":
    sys.exit(main())

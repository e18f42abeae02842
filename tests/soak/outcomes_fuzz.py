"""Suites of few tests that end in every way end as they do under plain xdist.

Each has up to three tests: some pass, fail, break, are larger than the card, run out of memory,
end their worker; with one to four workers, ``-x``, ``--maxfail``, deselected tests, workers that
are not replaced. Outcomes and exit status are compared through JUnit XML; an INTERNALERROR is
always wrong. A case that differs is tried again: only one that differs twice counts.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "plugin"))

from outcomes import difference, draw


def main() -> int:
    """Run the cases and return 1 if any differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=150)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    chance, found, began = random.Random(chosen.seed), 0, time.perf_counter()  # noqa: S311  # no secret
    with tempfile.TemporaryDirectory() as text:
        for number in range(chosen.cases):
            case, place = draw(chance), Path(text) / str(number)
            if difference(place, case) and (told := difference(place, case)):
                found += 1
                print(f"{number}: {case}\n{told}", flush=True)
    seconds = time.perf_counter() - began
    print(f"{chosen.cases} suites, {found} differ, {seconds:.0f} s")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

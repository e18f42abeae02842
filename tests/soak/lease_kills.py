"""Kill processes that hold or wait for leases, at random, many times.

Run by hand: ``python tests/soak/lease_kills.py [--kills N] [--seed N]``. Prints a line with the
figures; the exit status is 0 when all kills were done, nothing was granted twice, nobody starved
and nothing was left behind.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import leases


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seed", type=int, default=os.getpid())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        killed = leases.kill_at_random(
            Path(directory), options.kills, options.processes, options.seed
        )
    print(f"seed {options.seed}: {killed}")
    return 0 if killed.faultless and killed.kills == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())

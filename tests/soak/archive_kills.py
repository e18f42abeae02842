"""Kill processes that put states into a store, at random and at every system call.

Run by hand: ``python tests/soak/archive_kills.py [--kills N] [--calls NAMES] [--seed N]``. Prints
a line with the figures for each; the exit status is 0 when after every kill all that had been
acknowledged was there, whole, and nothing stale was left after the next start.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "archive"))

import kills


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument(
        "--calls", help="Names of system calls, with commas between. Default: all that a put makes."
    )
    parser.add_argument("--seed", type=int, default=os.getpid())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "random"
        folder.mkdir()
        found = [kills.kill_at_random(folder, options.kills, options.seed)]
        print(f"seed {options.seed}, at random: {found[0]}")
        if kills.STRACE is None:
            print("at system calls: not done, there is no strace")
        else:
            folder = Path(directory) / "calls"
            folder.mkdir()
            wanted = options.calls.split(",") if options.calls else None
            counts = kills.calls_of_a_put(folder)
            calls = [
                (call, at)
                for call, count in sorted(counts.items())
                for at in range(1, count + 1)
                if wanted is None or call in wanted
            ]
            found.append(kills.kill_at_calls(folder, calls))
            print(f"at {len(calls)} system calls: {found[1]}")
    return 0 if all(each.kills and each.unfinished and not each.faults for each in found) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Sets what is told to have been alive against 200 random programs that know it, line by line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "simulator"))

import alive_programs

from pytest_gpumem.simulator import Simulation

MIB = 2**20


def main() -> int:
    """Run the programs; the first that differs ends it with its seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="Seed of the first program.")
    parser.add_argument("--programs", type=int, default=200)
    chosen = parser.parse_args()
    simulation = Simulation.start((1024 * MIB,), 100 * MIB)
    simulation.install()
    try:
        for seed in range(chosen.first, chosen.first + chosen.programs):
            alive_programs.check(range(seed, seed + 1))
    finally:
        simulation.close()
    print(f"{chosen.programs} programs: every line as their ledgers have it")
    return 0


if __name__ == "__main__":
    sys.exit(main())

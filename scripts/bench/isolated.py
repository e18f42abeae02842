"""What it costs that a test runs in a process of its own, cold and with one that waits.

One run has an isolated test that nothing waits for, one that finds its process waiting, and one in
the run's own process; of each the seconds from its start to its end are taken, and what processes
took of the CPUs. Absolute seconds are of the machine; the ratios are what counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CONFTEST = """
import json, resource, time
import pytest

TOOK = {}

def cpu():
    return sum(
        getattr(resource.getrusage(who), field)
        for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)
        for field in ("ru_utime", "ru_stime")
    )

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    begun, before = time.perf_counter(), cpu()
    result = yield
    TOOK[item.name] = time.perf_counter() - begun, cpu() - before
    return result

def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput"):
        with open("took.json", "w") as file:
            json.dump(TOOK, file)
"""
SUITE = """
import time
import pytest
{imports}
isolated = pytest.mark.gpu(isolated=True)

def work(): {work}

@isolated
def test_cold(): work()
def test_first(): work()
def test_wait(): time.sleep({pause})
@isolated
def test_warm(): work()
def test_own(): work()
"""
SUITES = {
    "no torch": ("", "pass"),
    "torch": ("import torch", "torch.zeros(2**20, device='cuda')"),
}


def measure(imports: str, work: str, pause: float) -> dict[str, tuple[float, float]]:
    """Return by test the seconds and the CPU seconds that it took."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        (place / "conftest.py").write_text(CONFTEST)
        (place / "test_it.py").write_text(SUITE.format(imports=imports, work=work, pause=pause))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "gpumem", "--gpumem-simulate=1GiB"]
        subprocess.run(
            [*command, "-p", "no:cacheprovider"],
            cwd=place,
            env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        found: dict[str, tuple[float, float]] = json.loads((place / "took.json").read_text())
    return found


def main() -> None:
    """Print a line for each suite and test."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pause", type=float, default=10.0, help="seconds for getting ready")
    pause = parser.parse_args().pause
    print(f"{'suite':<10} {'test':<12} {'wall s':>8} {'CPU s':>8}")
    for name, (imports, work) in SUITES.items():
        took = measure(imports, work, pause)
        for test in ("test_own", "test_warm", "test_cold"):
            wall, cpu = took[test]
            print(f"{name:<10} {test:<12} {wall:8.3f} {cpu:8.3f}")


if __name__ == "__main__":
    main()

"""Every way in which a test can break its process, in every phase, by every runner.

Each run has a test for each way, all in processes of their own, and tests of the run's own process
between them; each way must fell one test in the phase where it happened, and nothing else.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "plugin"))

from harness import run_pytest, write_suite

HEAD = """
import os, signal
import pytest

isolated = pytest.mark.gpu(isolated=True)

def segfault(): os.kill(os.getpid(), signal.SIGSEGV)
def really_segfault():
    import ctypes
    ctypes.string_at(0)
def abort(): os.abort()
def leave(): os._exit(3)
def leave_well(): os._exit(0)
def kill(): os.kill(os.getpid(), signal.SIGKILL)
def fill_memory():
    group = os.environ["SOAK_GROUP"]
    if not group:
        pytest.skip("no control group of its own")
    with open(f"{group}/cgroup.procs", "w") as file:
        file.write(str(os.getpid()))
    kept = []
    while True:
        kept.append(bytearray(os.urandom(2**20)))
"""
STICKY = """
import torch

def lose():
    torch._assert_async(torch.zeros(1, device="cuda"))
    torch.zeros(1, device="cuda")
"""
PHASES = {
    "setup": "@pytest.fixture\ndef in_{0}(): {0}()\n@isolated\ndef test_{0}(in_{0}): pass\n",
    "call": "@isolated\ndef test_{0}(): {0}()\n",
    "teardown": (
        "@pytest.fixture\ndef in_{0}():\n    yield\n    {0}()\n"
        "@isolated\ndef test_{0}(in_{0}): pass\n"
    ),
}
WAYS = {
    "segfault": "signal 11 (SIGSEGV)",
    "really_segfault": "signal 11 (SIGSEGV)",
    "abort": "signal 6 (SIGABRT)",
    "leave": "exit status 3",
    "leave_well": "exit status 0",
    "kill": "signal 9 (SIGKILL)",
    "fill_memory": "signal 9 (SIGKILL), probably by the kernel",
}
BETWEEN = "def test_after_{0}(): pass\n"
RUNNERS = {
    "-n 0": ("-n", "0"),
    "-n 2": ("-n", "2"),
    "no xdist": ("-p", "no:xdist"),
}


def control_group() -> Path | None:
    """Return a control group of 200 MiB; None where none can be made."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for base, limit in (
            (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
            (Path("/sys/fs/cgroup"), "memory.max"),
        ):
            if controllers not in ("", "memory"):
                continue
            group = base / path.lstrip("/") / f"gpumem-soak-{os.getpid()}"
            try:
                group.mkdir()
                (group / limit).write_text(str(200 * 2**20))
            except OSError:
                if group.is_dir():
                    group.rmdir()
                continue
            return group
    return None


def differences(directory: Path, phase: str, runner: str, group: Path | None) -> list[str]:
    """Return what did not end as it should."""
    write_suite(
        directory,
        test_it=HEAD + "".join(PHASES[phase].format(w) + BETWEEN.format(w) for w in WAYS),
        test_sticky=HEAD + STICKY + PHASES[phase].format("lose")
        + "def test_after_lose(): torch.zeros(1, device='cuda')\n",
    )  # fmt: skip
    run = run_pytest(
        directory,
        *("-p", "gpumem", "--gpumem-simulate=1GiB", "--gpumem-json=run.json"),
        *RUNNERS[runner],
        env={"SOAK_GROUP": str(group or "")},
    )
    found = []
    ends = {test.nodeid.split("::")[1]: test for test in run.record.tests}
    counts = run.outcomes
    for way, words in WAYS.items():
        if way == "fill_memory" and group is None:
            continue
        place = {"setup": " in its set-up", "call": "", "teardown": " in its teardown"}[phase]
        sentence = f"test_it.py::test_{way} ended its process{place}: {words}"
        if sentence not in run.output:
            found.append(f"{way}: not told {sentence!r}")
        if ends[f"test_{way}"].outcome != "crashed":
            found.append(f"{way}: {ends[f'test_{way}'].outcome}")
    if ends["test_lose"].outcome != ("failed" if phase == "call" else "error"):
        found.append(f"lose: {ends['test_lose'].outcome}")
    others = {name: test.outcome for name, test in ends.items() if name.startswith("test_after")}
    found += [f"{name}: {end}" for name, end in others.items() if end != "passed"]
    if len(others) != len(WAYS) + 1:
        found.append(f"only {len(others)} tests of the run's own process ran")
    felled = counts.get("failed", 0) + counts.get("error", 0)
    if felled != len(WAYS) + (group is not None):
        found.append(f"{felled} tests were felled")
    return [*found, run.output] if found else []


def main() -> int:
    """Run the matrix; print what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runner", choices=RUNNERS, action="append")
    runners = parser.parse_args().runner or list(RUNNERS)
    wrong = 0
    group = control_group()
    if group is None:
        print("the kernel's killer was not tried: no control group can be made here")
    try:
        for runner in runners:
            for phase in PHASES:
                with tempfile.TemporaryDirectory() as directory:
                    found = differences(Path(directory), phase, runner, group)
                wrong += bool(found)
                print(f"{runner}, {phase}: {'; '.join(found) or 'each fells one test'}", flush=True)
    finally:
        if group is not None:
            group.rmdir()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs pytest as a user does, in a process of its own, and reads what it left."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from pytest_gpumem import records
from pytest_gpumem.units import parse_bytes

SUITES = Path(__file__).parent / "suites"
WITHOUT_TORCH = Path(__file__).parents[2] / "scripts" / "bench" / "without_torch.py"
TAKE = """
import os, signal
import pytest, torch

KEPT = []

def take(kib=64):
    return torch.zeros(kib * 1024, dtype=torch.uint8, device="cuda")
"""
TAKE_WITHOUT_TORCH = """
import os, signal, time
import pytest
from without_torch import ALLOCATOR

class take:
    size = 0

    def __init__(self, kib=64):
        ALLOCATOR.take(kib * 1024)
        self.size = kib * 1024

    def __del__(self):
        if self.size and ALLOCATOR.shared.joined:
            ALLOCATOR.give(self.size)

"""
CARD = parse_bytes("3.81GiB")
SIMULATE = ("-p", "gpumem", "--gpumem-simulate", "3.81GiB")
MODES = {
    "plain": (),
    "n0": ("-n", "0"),
    "n2": ("-n", "2"),
    "no-xdist": ("-p", "no:xdist"),
}
"""The four ways in which every feature must work."""
COMPILED = "GPUMEM_TEST_COMPILED" in os.environ
"""Whether every simulated card is to be a compiled one."""
ON_WORKERS = [pytest.param(mode, marks=[pytest.mark.slow] * (mode != "n2")) for mode in MODES]
"""The same, for what takes long: a worker does what one process does, and sends it home."""


@dataclass(frozen=True)
class Run:
    """A finished pytest run."""

    status: int
    output: str
    directory: Path

    @property
    def record(self) -> records.RunRecord:
        return records.load_run(self.directory / "run.json")

    def test(self, name: str) -> records.RecordedTest:
        """Return the record of the test whose nodeid ends in ``name``."""
        (found,) = [each for each in self.record.tests if each.nodeid.endswith(f"::{name}")]
        return found

    def card(self, name: str) -> records.CardUsage:
        """Return what the test ``name`` did to its only card."""
        (found,) = self.test(name).cards
        return found

    @property
    def outcomes(self) -> dict[str, int]:
        """Return the counts of pytest's last line."""
        last = re.findall(r"^=* ?((?:\d+ \w+(?:, )?)+) in [\d.]+s", self.output, re.MULTILINE)[-1]
        return {word.rstrip("s"): int(n) for n, word in re.findall(r"(\d+) (\w+)", last)}

    @property
    def section(self) -> str:
        """Return the GPU memory section of the terminal."""
        found = re.findall(
            r"^=+ GPU memory =+$\n(.*?)^(?:=|\d+ (?:passed|failed|error))",
            self.output,
            re.MULTILINE | re.DOTALL,
        )
        return found[0] if found else ""


def run_pytest(
    directory: Path,
    *arguments: str,
    beside: Sequence[str] | None = ("xdist",),
    env: dict[str, str] | None = None,
    timeout: float = 300,
    within: Sequence[Path] | None = None,
) -> Run:
    """Run pytest in ``directory`` with our plugin and those ``beside`` it.

    With None, or where the arguments do not name ours, all that are installed are there, as a user
    finds them; starting them is then most of the time of a small run, in each worker again.
    ``within`` are a script, and its arguments, that goes on as pytest with all that follows.
    """
    if not {"gpumem", "no:gpumem"} & set(arguments):
        beside = None
    clean = {
        name: value
        for name, value in os.environ.items()
        # Where leases lie may be told from outside: two runs of these tests at once, each with a
        # directory of its own, do not wait for one another.
        if name == "GPUMEM_RUN_DIR"
        or not name.startswith(("GPUMEM", "PYTEST_", "CUDA_", "HF_", "GITHUB_"))
    }
    if COMPILED:
        clean["GPUMEM_SIMULATE_COMPILED"] = "1"
    cache = directory.with_name(f"{directory.name}-cache")
    program = ["-m", "pytest"] if within is None else list(map(str, within))
    command = [sys.executable, *program, "--color=no", "-o", f"cache_dir={cache}"]
    if beside is None or "asyncio" in beside:  # which warns of its absence
        command += ["-o", "asyncio_default_fixture_loop_scope=function"]
    if beside is not None:
        clean["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        command += [
            word for name in beside if f"no:{name}" not in arguments for word in ("-p", name)
        ]
    done = subprocess.run(
        [*command, *arguments],
        cwd=directory,
        env=clean | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"} | (env or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Run(done.returncode, done.stdout + done.stderr, directory)


def write_suite(directory: Path, **files: str) -> Path:
    """Write the files (``test_x="..."`` becomes ``test_x.py``) and an ini file that keeps quiet."""
    (directory / "pytest.ini").write_text(
        "[pytest]\nmarkers = asyncio\n    anyio\nfilterwarnings = error\n"
    )
    for name, text in files.items():
        (directory / f"{name}.py").write_text(text)
    return directory

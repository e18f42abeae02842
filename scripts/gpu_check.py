"""Run the real-GPU tests and print their figures as a dated section for docs/figures.md.

Needs an NVIDIA card with its driver and a torch built for CUDA; no network. ``--rehearse`` runs the
same tests on a simulated card, which shows that they run and measures nothing.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent / "tests" / "real_gpu"


class Figures:
    """Collects what the tests recorded under the name ``figure``."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the figures of a test's call; the report of its teardown carries them again."""
        for name, value in report.user_properties:
            if name == "figure" and report.when == "call" and isinstance(value, list):
                self.rows.append((value[0], value[1]))
                print(f"{value[0]}: {value[1]}", file=sys.stderr, flush=True)


def card_line() -> str | None:
    """Return the first card's name and driver as nvidia-smi says them, None without a card."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    query = [smi, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return f"{done.stdout.splitlines()[0]} (name, driver)" if done.returncode == 0 else None


def print_section(card: str, rows: list[tuple[str, str]], outcome: str) -> None:
    """Print one dated section in Markdown."""
    today = f"{dt.datetime.now(dt.timezone.utc):%Y-%m-%d}"
    print(f"\n## {today}: {card}\n")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "pytest", "pytest-gpumem"))
    print(f"Python {platform.python_version()}, {versions}. {outcome}\n")
    print("| what | figure |\n|---|---|")
    for name, text in rows:
        print(f"| {name} | {text} |")


def main(argv: list[str] | None = None) -> int:
    """Run the tests, print the figures, and return pytest's exit status (1 without a card)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="use a simulated card")
    options = parser.parse_args(argv)
    card = card_line()
    if options.rehearse:
        os.environ["GPUMEM_SIMULATE"] = "3.81GiB"
        card = "rehearsal on a simulated card, no figures of a GPU"
    if card is None:
        print("No NVIDIA card answers here (nvidia-smi), so nothing was measured.")
        return 1
    figures = Figures()
    # The tests start pytests of their own; this one only collects their figures.
    outer = ["-p", "no:gpumem", "-p", "no:cacheprovider"]
    status = pytest.main([*outer, str(TESTS)], plugins=[figures])
    outcome = "All tests passed." if status == 0 else "Some tests FAILED, see their output."
    print_section(card, figures.rows, outcome)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())

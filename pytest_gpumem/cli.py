"""The ``gpumem`` command: ``doctor``, ``report``, ``forensics`` and ``compare``."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpumem import __version__, devices, records
from pytest_gpumem.forensics import cli as forensics
from pytest_gpumem.reports import terminal
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 for input that cannot be used.

    ``gpumem compare`` returns 1 when a threshold is missed.
    """
    parser = argparse.ArgumentParser(prog="gpumem", description=__doc__)
    parser.add_argument("--version", action="version", version=f"pytest-gpumem {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("doctor", help="Say which cards and versions pytest would find here.")
    report = commands.add_parser("report", help="Show the GPU memory section of a finished run.")
    report.add_argument("run", type=Path, metavar="RUN.json", help="Written by --gpumem-json.")
    report.add_argument("--top", type=int, default=10, metavar="N", help="Tests in the table.")
    report.add_argument("-v", "--verbose", action="count", default=0, help="Longer; -vv: all.")
    forensics.add_forensics(commands)
    forensics.add_compare(commands)
    chosen = parser.parse_args(arguments)
    try:
        if hasattr(chosen, "run_command"):
            return int(chosen.run_command(chosen))
        lines = _doctor() if chosen.command == "doctor" else _report(chosen)
        for line in lines:
            sys.stdout.write(f"{line}\n")
    except BrokenPipeError:
        # The reader of a pipe, such as head, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(chosen.command, f"cannot read {error.filename!r}: {error.strerror}")
    except ValueError as error:
        return _fail(chosen.command, str(error))
    return 0


def _fail(command: str, sentence: str) -> int:
    sys.stderr.write(f"gpumem {command}: error: {sentence}\n")
    return 2


def _report(chosen: argparse.Namespace) -> Iterator[str]:
    run = records.load(chosen.run)
    shown = list(terminal.lines(run, chosen.top, chosen.verbose))
    yield from shown or ["no test touched a card"]


def _doctor() -> Iterator[str]:
    yield f"python        {platform.python_version()} on {platform.platform()}"
    for name in ("pytest-gpumem", "pytest", "pytest-xdist", "torch", "nvidia-ml-py"):
        yield f"{name:<13} {_version(name)}"
    found = devices.find_cards()
    if not found.cards:
        yield f"card          none: {found.why_none}"
    for card in found.cards:
        reading = devices.driver_reading(card)
        free = f", {format_bytes(reading.free)} free" if reading else ""
        yield f"card          {card.name} ({card.uuid}), {format_bytes(card.total)}{free}"
    if found.note:
        yield f"note          {found.note}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())

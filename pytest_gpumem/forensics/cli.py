"""``gpumem forensics`` and ``gpumem compare``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpumem.forensics import compare
from pytest_gpumem.records import to_plain

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from pytest_gpumem.forensics.records import Findings

_EPILOG = """Exit status: 0 when the input was read, whatever it tells; 2 when it cannot be used."""


def add_forensics(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Enter ``gpumem forensics``."""
    parser = commands.add_parser(
        "forensics",
        help="Say from logs which tests ran out of memory, why, and what to do.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "logs",
        nargs="+",
        metavar="LOG",
        help="pytest output, JUnit XML, pytest-html, --gpumem-json, a torch memory snapshot, "
        "dmesg or Slurm text; plain, .gz or .zst; a directory of them; - is standard input.",
    )
    parser.add_argument(
        "--format",
        choices=("terminal", "json", "markdown", "html"),
        default="terminal",
        help="Default: terminal.",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="Write there instead.")
    parser.add_argument(
        "--top", type=int, default=10, metavar="N", help="Rows of each table. Default: 10."
    )
    parser.set_defaults(run_command=_forensics)


def add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Enter ``gpumem compare``."""
    parser = commands.add_parser(
        "compare",
        help="Say what got better, worse, new and gone between two runs.",
        epilog="Exit status: 0; 1 when AFTER misses a threshold; 2 when input cannot be used.",
    )
    parser.add_argument("before", metavar="BEFORE", help="As for gpumem forensics.")
    parser.add_argument("after", metavar="AFTER")
    parser.add_argument("--max-oom", type=int, metavar="N", help="Tests out of memory in AFTER.")
    parser.add_argument("--max-errors", type=int, metavar="N", help="What pytest counts as errors.")
    parser.add_argument(
        "--min-pass-rate", type=compare.percent, metavar="P", help="Percent of judged tests."
    )
    parser.add_argument(
        "--max-peak-growth",
        type=compare.growth,
        metavar="G",
        help="How much a test's peak may grow: 10%% or a size such as 64MiB.",
    )
    parser.add_argument("--format", choices=("terminal", "json", "markdown"), default="terminal")
    parser.set_defaults(run_command=_compare)


def _forensics(chosen: argparse.Namespace) -> int:
    from pytest_gpumem.forensics import analysis

    found = analysis.analyse(chosen.logs)
    if chosen.format == "terminal" and chosen.output is None:
        from pytest_gpumem.reports import forensics as report

        report.show(found, chosen.top)
        return 0
    _write(_formatted(found, chosen), chosen.output)
    return 0


def _formatted(found: Findings, chosen: argparse.Namespace) -> Iterator[str]:
    from pytest_gpumem.reports import forensics as report

    if chosen.format == "json":
        return iter([json.dumps(to_plain(found), indent=1)])
    if chosen.format == "html":
        return report.html(found, chosen.top)
    if chosen.format == "markdown":
        return report.markdown(found, chosen.top)
    return report.text(found, chosen.top)


def _write(lines: Iterator[str], output: Path | None) -> None:
    if output is None:
        for line in lines:
            sys.stdout.write(f"{line}\n")
        return
    temporary = output.with_name(f".{output.name}.part")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        temporary.replace(output)
    except OSError as error:
        error.filename = str(output)  # the name that the user knows
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _compare(chosen: argparse.Namespace) -> int:
    from pytest_gpumem.forensics import analysis

    limits = compare.Limits(
        chosen.max_oom, chosen.max_errors, chosen.min_pass_rate, chosen.max_peak_growth
    )
    told = compare.compare(
        analysis.analyse([chosen.before]), analysis.analyse([chosen.after]), limits
    )
    if chosen.format == "json":
        sys.stdout.write(json.dumps(to_plain(told), indent=1) + "\n")
    else:
        from pytest_gpumem.reports import forensics as report

        for line in report.comparison(told, markdown=chosen.format == "markdown"):
            sys.stdout.write(f"{line}\n")
    return 1 if told.missed else 0

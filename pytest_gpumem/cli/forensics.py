"""``gpumem forensics`` and ``gpumem compare``."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpumem import files
from pytest_gpumem.cli.arguments import read_count
from pytest_gpumem.forensics import compare, grammars
from pytest_gpumem.records import to_plain
from pytest_gpumem.records.findings import CAUSES
from pytest_gpumem.units import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_gpumem.forensics.runs import Seen
    from pytest_gpumem.records.findings import Findings

_EPILOG = (
    "Exit status: 0 when a test run was read, whatever it tells; 1 when --cause or --felled has no "
    "test; 2 when the input cannot be used or holds no test run."
)


_LIVE = 200
"""Characters of a message that comes while a log is written."""
_SILENCE = 5.0, 15.0
"""Seconds after which it is told what is read: first, and from then on."""
_NAME = 100
"""Characters of a file's name that are told then."""


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
        "dmesg or Slurm text; plain, .gz, .bz2, .xz or .zst; a .zip or .tar or a directory of "
        "them; - is standard input.",
    )
    parser.add_argument(
        "--format",
        choices=("terminal", "json", "markdown", "html"),
        default="terminal",
        help="Default: terminal.",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="Write there instead.")
    parser.add_argument(
        "--top", type=read_count, metavar="N", help="Also the tables of tests, errors and files."
    )
    parser.add_argument(
        "--cause",
        choices=tuple(CAUSES),
        metavar="CAUSE",
        help=f"Print the tests of one cause, one a line: {', '.join(CAUSES)}.",
    )
    parser.add_argument(
        "--felled", action="store_true", help="Print the tests that a shared failure felled."
    )
    parser.set_defaults(run_command=partial(_watched, _forensics))


def add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Enter ``gpumem compare``."""
    parser = commands.add_parser(
        "compare",
        help="Say what got better, worse, new and gone between two runs.",
        epilog="Exit status: 0; 1 when AFTER misses a threshold; 2 when input cannot be used.",
    )
    parser.add_argument("before", metavar="BEFORE", help="As for gpumem forensics.")
    parser.add_argument("after", metavar="AFTER", help="The later run, in any of these forms.")
    parser.add_argument(
        "--max-oom", type=read_count, metavar="N", help="Tests out of memory in AFTER."
    )
    parser.add_argument(
        "--max-errors", type=read_count, metavar="N", help="What pytest counts as errors."
    )
    parser.add_argument(
        "--min-pass-rate", type=compare.percent, metavar="P", help="Percent of judged tests."
    )
    parser.add_argument(
        "--max-peak-growth",
        type=compare.growth,
        metavar="G",
        help="How much a test's own peak may grow: 10%% or a size such as 64MiB.",
    )
    parser.add_argument(
        "--max-leaks", type=read_count, metavar="N", help="Tests that leak in AFTER."
    )
    parser.add_argument(
        "--allow-incomplete", action="store_true", help="Judge thresholds by incomplete runs, too."
    )
    parser.add_argument(
        "--top", type=read_count, default=20, metavar="N", help="Rows of each table. Default: 20."
    )
    parser.add_argument(
        "--format",
        choices=("terminal", "json", "markdown"),
        default="terminal",
        help="Default: terminal.",
    )
    parser.set_defaults(run_command=partial(_watched, _compare))


class _Progress:
    """Says on standard error what is read, where that takes long."""

    def __init__(self, command: str) -> None:
        self._command = command
        self._next = time.monotonic() + _SILENCE[0]
        self._name = ""
        self._files = self._size = 0

    def __call__(self, name: str, size: int) -> None:
        """Enter so many bytes of a file."""
        self._files += name != self._name
        self._name = name
        self._size += size
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _SILENCE[1]
            self._say(f"read {self._read()} so far, now {printable(name)[-_NAME:]!r}")

    def interrupted(self) -> int:
        """Say how far it came, and return the exit status of a process that Ctrl-C ends."""
        self._say(f"ended by Ctrl-C{f' after {self._read()}' if self._files else ''}")
        return 128 + signal.SIGINT

    def _read(self) -> str:
        files = "1 file" if self._files == 1 else f"{self._files:,} files"
        return f"{files}, {self._size / 1e6:,.0f} MB"

    def _say(self, sentence: str) -> None:
        sys.stderr.write(f"gpumem {self._command}: {sentence}\n")
        sys.stderr.flush()


def _watched(
    read: Callable[[argparse.Namespace, _Progress], int], chosen: argparse.Namespace
) -> int:
    """Run a command that reads files; Ctrl-C ends it with one sentence."""
    progress = _Progress(chosen.command)
    try:
        return read(chosen, progress)
    except KeyboardInterrupt:
        return progress.interrupted()


def _forensics(chosen: argparse.Namespace, progress: _Progress) -> int:
    from pytest_gpumem.forensics import analysis

    _learn()
    person = chosen.format == "terminal" and chosen.output is None
    asks = bool(chosen.cause or chosen.felled)
    found = analysis.analyse(chosen.logs, _live if person and not asks else None, progress)
    if chosen.cause or chosen.felled:
        return _names(found, chosen.cause)
    told = bool(found.totals.runs or found.events or found.deaths)
    if not told and chosen.format != "json":
        raise ValueError(_nothing(found))
    if person:
        from pytest_gpumem.reports import forensics as report
        from pytest_gpumem.reports.sections import show

        show(report.sections(found, chosen.top))
        return 0
    _write(_formatted(found, chosen), chosen.output)
    if not told:
        raise ValueError(_nothing(found))
    return 0


def _live(seen: Seen, test: str | None) -> None:
    """Print a message of a log that is still being written."""
    text = seen.message.text.strip()[: _LIVE - 1]
    sys.stdout.write(printable(f"line {seen.line}: {f'{test}: ' if test else ''}{text}\n"))
    sys.stdout.flush()


def _learn() -> None:
    """Add the messages that the suite in the current directory has of its own."""
    path = Path("pyproject.toml")
    if not path.is_file():
        return
    try:
        table: object = files.read_toml(path)
    except ValueError:
        return  # whatever it is, it is nothing of ours
    for key in ("tool", "gpumem", "forensics", "messages"):
        table = table.get(key) if isinstance(table, dict) else None
    if table is None:
        return
    if not isinstance(table, dict):
        raise ValueError(f"{str(path)!r}: [tool.gpumem.forensics.messages] is not a table")
    try:
        grammars.learn(table)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from None


def _nothing(found: Findings) -> str:
    """Return why there is nothing to tell."""
    empty = [each for each in found.sources if not each.size]
    names = ", ".join(repr(name) for name in found.files[:3]) or "what was given"
    more = f" and {len(found.files) - 3} more" if len(found.files) > 3 else ""
    why = (
        "empty"
        if found.sources and len(empty) == len(found.sources)
        else ("without a test run, and without a message about memory")
    )
    unread = f"; {len(found.notes)} could not be read: {found.notes[0]}" if found.notes else ""
    return f"{names}{more} is {why}{unread}"


def _names(found: Findings, cause: str | None) -> int:
    """Print nodeids, one a line, for ``pytest $(gpumem forensics LOG --cause CAUSE)``."""
    chosen = [each for each in found.events if cause is None or each.cause == cause]
    names = [
        name
        for event in chosen
        for name in (event.nodeid, *event.felled_tests)
        if name and (cause is not None or event.felled > 1)
    ]
    if not names:
        return _no_test(cause)
    for name in dict.fromkeys(names):
        sys.stdout.write(f"{printable(name) if sys.stdout.isatty() else name}\n")
    return 0


def _no_test(cause: str | None) -> int:
    what = f"by {cause}" if cause else "by the failure of another"
    sys.stderr.write(f"gpumem forensics: no test ran out of memory {what}\n")
    return 1


def _formatted(found: Findings, chosen: argparse.Namespace) -> Iterator[str]:
    if chosen.format == "json":
        return _json(found)
    from pytest_gpumem.reports import forensics as report
    from pytest_gpumem.reports import html, sections

    told = report.sections(found, chosen.top)
    if chosen.format == "html":
        return html.page(told, "GPU memory forensics")
    return sections.markdown(told) if chosen.format == "markdown" else sections.text(told)


def _json(told: Findings | compare.Comparison) -> Iterator[str]:
    """Return the lines of an object: its text as a whole took the most memory of all."""
    line = ""
    for piece in json.JSONEncoder(indent=1).iterencode(to_plain(told)):
        before, ends, rest = piece.rpartition("\n")
        if ends:
            yield line + before
        line = rest if ends else line + piece
    yield line


def _write(lines: Iterator[str], output: Path | None) -> None:
    if output is None:
        for line in lines:
            sys.stdout.write(f"{line}\n")
        return
    with files.replace(output) as file:
        file.writelines(f"{line}\n" for line in lines)


def _compare(chosen: argparse.Namespace, progress: _Progress) -> int:
    from pytest_gpumem.forensics import analysis

    _learn()
    limits = compare.Limits(
        chosen.max_oom,
        chosen.max_errors,
        chosen.min_pass_rate,
        chosen.max_peak_growth,
        chosen.max_leaks,
    )
    before = analysis.analyse([chosen.before], progress=progress)
    after = analysis.analyse([chosen.after], progress=progress)
    compare.check(before, after, limits, incomplete=chosen.allow_incomplete)
    told = compare.compare(before, after, limits)
    if chosen.format == "json":
        _write(_json(told), None)
    else:
        from pytest_gpumem.reports import sections
        from pytest_gpumem.reports.forensics import compared

        shown = compared(told, chosen.top)
        if chosen.format == "markdown":
            _write(sections.markdown(shown), None)
        else:
            sections.show(shown)
    return 1 if told.missed else 0

"""The ``gpumem`` command: what this machine has, what runs left behind, and archives."""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pytest_gpumem import __version__, records
from pytest_gpumem.cli import (
    archive,
    blame,
    doctor,
    forensics,
    groups,
    marks,
    monitor,
    plan,
    ps,
    run,
)
from pytest_gpumem.cli.arguments import read_count
from pytest_gpumem.cli.history import HISTORY, load_history
from pytest_gpumem.errors import LeaseError
from pytest_gpumem.reports import terminal
from pytest_gpumem.reports.fold import columns
from pytest_gpumem.units import format_mib, printable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence


class _Parser(argparse.ArgumentParser):
    """Refuses what it cannot use in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} -h tells more)\n")


class _Commands(argparse._SubParsersAction):  # type: ignore[type-arg]  # at run time it has none
    """Lets the ``-h`` of a command say what the list of commands says of it."""

    def add_parser(self, name: str, **more: Any) -> Any:
        return super().add_parser(name, **{"description": more.get("help"), **more})


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    made: argparse.ArgumentParser = _Parser(
        prog="gpumem",
        description="Look at cards, runs, logs and archives; share cards among tests and commands.",
    )
    made.add_argument("--version", action="version", version=f"pytest-gpumem {__version__}")
    commands = made.add_subparsers(
        dest="command", required=True, metavar="COMMAND", action=_Commands
    )
    doctor.add(commands)
    _add_report(commands.add_parser("report", help="Show, join or learn from finished runs."))
    archive.add_parser(commands)
    forensics.add_forensics(commands)
    forensics.add_compare(commands)
    groups.add(commands)
    blame.add(commands)
    plan.add(commands)
    marks.add(commands)
    monitor.add(commands)
    run.add(commands)
    ps.add(commands)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 for input that cannot be used.

    ``gpumem compare`` returns 1 when a threshold is missed.
    """
    chosen = parser().parse_args(arguments)
    # A nodeid may have what the terminal, or the file behind it, has no bytes for.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if hasattr(chosen, "run_command"):
            return int(chosen.run_command(chosen))
        for line in archive.run(chosen) if chosen.command == "archive" else _report(chosen):
            sys.stdout.write(f"{printable(line)}\n")
    except BrokenPipeError:  # whoever reads has seen enough
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115  # until the end
    except OSError as error:
        return _fail(chosen.command, f"{error.filename!r}: {error.strerror}")
    except (ValueError, LeaseError) as error:
        return _fail(chosen.command, str(error))
    return 0


def _fail(command: str, sentence: str) -> int:
    sys.stderr.write(f"gpumem {command}: error: {printable(sentence)}\n")
    return 2


def _add_report(report: argparse.ArgumentParser) -> None:
    report.usage = (
        "gpumem report RUN.json [--html FILE [--linked]]\n"
        "                     [--format FORMAT] [--base RUN.json]\n"
        "       gpumem report merge RUN.json ... [--output FILE]\n"
        "                     [--history FILE]\n"
        "       gpumem report --history [FILE] [--json]"
    )
    report.add_argument(
        "runs",
        nargs="*",
        metavar="RUN.json",
        help="Written by --gpumem-json. After the word merge: the shards of one suite.",
    )
    report.add_argument(
        "--top", type=read_count, default=10, metavar="N", help="Entries of each list; 0: all."
    )
    report.add_argument("-v", "--verbose", action="count", default=0, help="Longer; -vv: all.")
    report.add_argument("--output", type=Path, metavar="FILE", help="Write the joined run there.")
    report.add_argument(
        "--history",
        type=Path,
        nargs="?",
        const=HISTORY,
        metavar="FILE",
        help="Show what was learned; with merge: add what the runs teach. "
        "Default: the file in pytest's cache here.",
    )
    report.add_argument("--html", type=Path, metavar="FILE", help="Write the run as a page.")
    report.add_argument(
        "--linked",
        action="store_true",
        help="With --html: let the page load what draws its timeline from Plotly's server.",
    )
    report.add_argument(
        "--format",
        choices=("terminal", "markdown", "github", "gitlab"),
        default="terminal",
        help="markdown: for a comment or a job's summary; github: workflow commands that annotate "
        "lines; gitlab: a Code Quality report. Default: terminal.",
    )
    report.add_argument(
        "--base", type=Path, metavar="RUN.json", help="With markdown: set it against this run."
    )
    report.add_argument("--json", action="store_true", help="Show what was learned as JSON.")


def _report(chosen: argparse.Namespace) -> Iterator[str]:
    if chosen.runs[:1] == ["merge"]:
        yield from _merge(chosen)
    elif chosen.history is not None and not chosen.runs:
        yield from _history(chosen)
    elif len(chosen.runs) == 1:
        run = records.load_run(Path(chosen.runs[0]))
        if chosen.html is not None:
            _save_page(run, chosen.runs[0], chosen.html, linked=chosen.linked)
            yield f"written: {chosen.html}"
            return
        yield from _formatted(run, chosen)
    else:
        raise ValueError(
            f"{len(chosen.runs)} runs given; allowed are one, merge and several, or --history"
        )


def _save_page(run: records.RunRecord, name: str, path: Path, *, linked: bool) -> None:
    from pytest_gpumem.forensics import analysis
    from pytest_gpumem.reports import page

    if importlib.util.find_spec("plotly") is None:
        raise ValueError("--html: plotly is not installed: pip install plotly")
    page.save(run, analysis.of_record(run, name), path, linked=linked)


def _merge(chosen: argparse.Namespace) -> Iterator[str]:
    if len(chosen.runs) < 2:
        raise ValueError("merge: no run given; allowed are one or more RUN.json")
    shards = {text: records.load_run(Path(text)) for text in chosen.runs[1:]}
    run = records.merge({_shard(text, shards): shard for text, shard in shards.items()})
    if chosen.output is not None:
        records.save(run, chosen.output)
    if chosen.history is not None:
        history = load_history(chosen.history, new=True)
        history.learn(run.tests)
        history.save(chosen.history)
    yield from _formatted(run, chosen)


def _formatted(run: records.RunRecord, chosen: argparse.Namespace) -> Iterator[str]:
    from pytest_gpumem.reports import annotations as remarks
    from pytest_gpumem.reports import digest, sections

    if chosen.base is not None and chosen.format != "markdown":
        raise ValueError("--base: only --format markdown shows it; gpumem compare takes any two")
    if chosen.format == "markdown":
        base = None if chosen.base is None else records.load_run(chosen.base)
        yield from sections.markdown(digest.sections(run, chosen.top, base))
    elif chosen.format == "github":
        yield from remarks.github(remarks.of_run(run))
    elif chosen.format == "gitlab":
        yield remarks.gitlab(remarks.of_run(run, every=True))
    else:
        yield from _section(run, chosen) or ["no test touched a card"]


def _section(run: records.RunRecord, chosen: argparse.Namespace) -> list[str]:
    return [line.text for line in terminal.lines(run, chosen.top, chosen.verbose, columns())]


def _shard(text: str, all_of_them: Collection[str]) -> str:
    """Return what to call a shard: its file's name, or its path where names are equal."""
    name = Path(text).stem
    alone = sum(Path(each).stem == name for each in all_of_them) == 1
    return name if alone else text


def _history(chosen: argparse.Namespace) -> Iterator[str]:
    history = load_history(chosen.history)
    if chosen.json:
        yield history.text().rstrip()
        return
    yield f"{'expected MiB':>12} {'fixtures MiB':>12} {'seconds':>8} {'runs':>5}  test"
    for nodeid, known in sorted(history, key=lambda each: -each[1].peak):
        sizes = [format_mib(known.peak), format_mib(known.fixtures)] if known.gpu else ["", ""]
        yield f"{sizes[0]:>12} {sizes[1]:>12} {known.duration:>8.2f} {known.runs:>5}  {nodeid}"


if __name__ == "__main__":
    sys.exit(main())

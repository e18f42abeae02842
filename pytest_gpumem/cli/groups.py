"""``gpumem groups``: runs the groups of tests of ``[tool.gpumem.groups]`` and compares them."""

from __future__ import annotations

import re
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpumem import files, records
from pytest_gpumem.cli import subset
from pytest_gpumem.units import format_bytes, format_mib

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from pytest_gpumem.records.findings import Findings

MODES = ("isolated", "sequential", "parallel")
_SAVED = Path(".pytest_cache/d/gpumem/groups")


class Group(NamedTuple):
    """Tests that are run together, and how."""

    name: str
    paths: tuple[str, ...]
    args: tuple[str, ...]
    mode: str
    workers: str


class Result(NamedTuple):
    """What a group's run showed; sizes in bytes, times in seconds."""

    group: Group
    run: records.RunRecord | None
    found: Findings
    seconds: float
    status: int
    """0, or the first of pytest's that was not."""

    @property
    def peak(self) -> int:
        """The highest of any test."""
        return max((card.peak for test in self._tests for card in test.cards), default=0)

    @property
    def fallbacks(self) -> int:
        """Tests that worked on the CPU instead of a card: sent there, or after an OOM."""
        return sum(test.fell_back for test in self._tests)

    @property
    def growth(self) -> int:
        """How much higher the last test's baseline was than the first's, in the worst process."""
        if self.group.mode == "isolated":
            return 0  # each began with nothing
        first: dict[tuple[str, str, str], int] = {}
        most = 0
        for test in self._tests:
            for card in test.cards:
                key = (test.host, test.worker, card.card)
                most = max(most, card.baseline - first.setdefault(key, card.baseline))
        return most

    @property
    def processes(self) -> int:
        """The most processes that used a card at the same time."""
        spans: dict[tuple[str, ...], tuple[float, float]] = {}

        def note(key: tuple[str, ...], start: float, end: float) -> None:
            begin, before = spans.get(key, (start, end))
            spans[key] = min(begin, start), max(end, before)

        for test in self._tests:
            end = test.start + test.duration
            if test.start and any(card.peak > card.children_peak for card in test.cards):
                note((test.host, test.worker), test.start, end)
            for child in test.children:
                note((test.host, str(child.pid), str(child.start)), child.start, child.end or end)
        changes = sorted(
            change for begin, end in spans.values() for change in ((begin, 1), (end, -1))
        )
        now = most = 0
        for _, change in changes:
            now += change
            most = max(most, now)
        return most

    @property
    def _tests(self) -> Sequence[records.RecordedTest]:
        return self.run.tests if self.run is not None else ()


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Enter ``gpumem groups``."""
    parser = commands.add_parser(
        "groups",
        help="Run groups of tests, each in its way, and show one table.",
        epilog="Exit status: 0; 1 when tests failed or a group found none; 2 for bad input.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="Groups to run. Default: all.")
    parser.add_argument(
        "--config", type=Path, default=Path("pyproject.toml"), metavar="FILE",
        help="With [tool.gpumem.groups]. Default: pyproject.toml here.",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=_SAVED, metavar="DIR",
        help=f"Where runs and logs are kept for gpumem compare. Default: {_SAVED}.",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="Say which groups there are.")
    parser.set_defaults(run_command=_groups)


def read(path: Path) -> list[Group]:
    """Return the groups that a file defines.

    Raises:
        OSError: when it cannot be read.
        ValueError: in one sentence, when it is of no use.

    """
    table: Any = files.read_toml(path)
    for key in ("tool", "gpumem", "groups"):
        table = table.get(key) if isinstance(table, dict) else None
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{str(path)!r} has no [tool.gpumem.groups.NAME]")
    return [_group(path, name, values) for name, values in table.items()]


def _group(path: Path, name: str, values: Any) -> Group:
    place = f"{str(path)!r}: [tool.gpumem.groups.{name}]"
    if not re.fullmatch(r"[\w.-]+", name) or set(name) <= {"."}:
        raise ValueError(f"{place}: allowed in a name are letters, digits, '-', '_' and '.'")
    if not isinstance(values, dict):
        raise ValueError(f"{place} is not a table")
    if unknown := set(values) - {"paths", "args", "mode", "workers"}:
        raise ValueError(
            f"{place}: {min(unknown)!r} is unknown; allowed are paths, args, mode, workers"
        )
    lists = {}
    for key in ("paths", "args"):
        value = values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise ValueError(f"{place}: {key} = {value!r}; allowed is a list of texts")
        lists[key] = tuple(value)
    mode = values.get("mode", "sequential")
    if mode not in MODES:
        raise ValueError(f"{place}: mode = {mode!r}; allowed are {', '.join(MODES)}")
    workers = values.get("workers", "auto")
    valid = type(workers) is int and workers > 0
    if not (valid or workers in ("auto", "logical")):
        raise ValueError(f"{place}: workers = {workers!r}; allowed are 'auto' and numbers from 1")
    return Group(name, lists["paths"], lists["args"], mode, str(workers))


def _groups(chosen: argparse.Namespace) -> int:
    groups = {group.name: group for group in read(chosen.config)}
    for name in chosen.names:
        if name not in groups:
            raise ValueError(f"there is no group {name!r}; there are {', '.join(groups)}")
    wanted = [groups[name] for name in dict.fromkeys(chosen.names)] or list(groups.values())
    if chosen.list:
        for group in wanted:
            sys.stdout.write(f"{group.name}: {group.mode}, {' '.join(group.paths + group.args)}\n")
        return 0
    chosen.output.mkdir(parents=True, exist_ok=True)
    results = []
    for group in wanted:
        sys.stderr.write(f"gpumem groups: {group.name} ({group.mode}) ...\n")
        results.append(run(group, chosen.config.parent, chosen.output.absolute()))
    for line in _table(results, chosen.output):
        sys.stdout.write(f"{line}\n")
    return 1 if any(result.status for result in results) else 0


def run(group: Group, directory: Path, output: Path) -> Result:
    """Run a group's tests in ``directory`` and keep its run and its log in ``output``.

    What an earlier run left there is kept once, as ``NAME.before.json``.

    Raises:
        OSError: when something cannot be written.

    """
    from pytest_gpumem.forensics import analysis

    saved, log = output / f"{group.name}.json", output / f"{group.name}.log"
    begun = time.monotonic()
    whole, part = None, output / f".{group.name}.part.json"
    part.unlink(missing_ok=True)
    with log.open("w", encoding="utf-8") as file:
        words = [*_arguments(group), f"--gpumem-json={part}"]
        # What is isolated, or in sequence, is one process whatever addopts says.
        spread = group.mode == "parallel"
        status = subset.run(words, directory, file, spread=spread).status
    seconds = time.monotonic() - begun
    if part.exists():
        whole = records.load_run(part)
        part.unlink()
        if saved.exists():
            shutil.move(saved, saved.with_suffix(".before.json"))
        records.save(whole, saved)
        found = analysis.of_record(whole, str(saved))
    else:
        found = analysis.analyse([str(log)])
    return Result(group, whole, found, seconds, status)


def _arguments(group: Group) -> list[str]:
    how = {"parallel": ["-n", group.workers], "isolated": ["--gpumem-isolate=all"]}
    return ["-p", "gpumem", *group.args, *group.paths, *how.get(group.mode, ())]


def _table(results: Sequence[Result], output: Path) -> Iterator[str]:
    wide = max(5, *(len(result.group.name) for result in results))
    yield (
        f"{'group':<{wide}} {'mode':<10} {'tests':>6} {'failed':>6} {'OOMs':>5} {'fallbacks':>9} "
        f"{'peak MiB':>9} {'growth MiB':>10} {'processes':>9} {'seconds':>8}"
    )
    for result in results:
        totals = result.found.totals
        yield (
            f"{result.group.name:<{wide}} {result.group.mode:<10} {totals.tests:>6} "
            f"{totals.failed + totals.errors:>6} {totals.oom:>5} {result.fallbacks:>9} "
            f"{format_mib(result.peak):>9} {format_mib(result.growth):>10} "
            f"{result.processes:>9} {result.seconds:>8.1f}"
        )
    for result in results:
        if result.status:
            log = output / f"{result.group.name}.log"
            yield f"{result.group.name}: pytest ended with {result.status}, see {log}"
    leaked = [result for result in results if result.growth]
    for result in leaked:
        yield f"{result.group.name}: tests left {format_bytes(result.growth)} behind one another"
    yield f"kept in {output}; gpumem compare NAME.before.json NAME.json there says what changed"

"""``gpumem blame``: which of the tests before one make it fail, where it passes alone."""

from __future__ import annotations

import difflib
import math
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pytest_gpumem import records
from pytest_gpumem.cli import subset
from pytest_gpumem.cli.culprits import culprits
from pytest_gpumem.units import format_bytes, printable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Collection, Iterator, Sequence

NOBODY = 1
"""Exit status where no test is to blame."""
_SURE = 2
"""Runs that say once more what was found: after it, and without it."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Enter ``gpumem blame``."""
    parser = commands.add_parser(
        "blame",
        help="Find the test before another one that makes it fail, where that one passes alone.",
        epilog="Exit status: 0 when it was found, 1 when no test is to blame, 2 for bad input.",
    )
    parser.add_argument("nodeid", metavar="NODEID", help="The test that fails.")
    parser.add_argument(
        "--record",
        type=Path,
        metavar="RUN.json",
        help="A run in which it failed, written by --gpumem-json: those that came before it in "
        "its process are meant. Default: those before it in the suite's order.",
    )
    parser.add_argument(
        "arguments", nargs="*", metavar="ARGUMENT", help="After --: arguments for pytest."
    )
    parser.set_defaults(run_command=_blame)


def _blame(chosen: argparse.Namespace) -> int:
    try:
        return _search(chosen)
    except KeyboardInterrupt:
        sys.stderr.write("gpumem blame: ended by Ctrl-C\n")
        return 128 + signal.SIGINT


def _search(chosen: argparse.Namespace) -> int:
    there = subset.collect(chosen.arguments, Path.cwd())
    nodeid = _find(chosen.nodeid, there)
    before = list(there.collected[: there.collected.index(nodeid)])
    if chosen.record is not None:
        before = _recorded(chosen.record, nodeid, there.collected)
    with tempfile.TemporaryDirectory(prefix="gpumem-") as place, _progress() as show:
        search = _Search(nodeid, chosen.arguments, there, Path(place), show)
        try:
            found = search.find(before)
            lines = list(search.verdict(found))
            lines.append(f"  {subset.command(chosen.arguments, there, [*found, nodeid])}")
        except _NobodyError as error:
            found, lines = [], [str(error)]
    for line in lines:
        sys.stdout.write(f"{printable(line)}\n")
    return 0 if found else NOBODY


def _find(text: str, there: subset.Ended) -> str:
    """Return the node id that is meant.

    Raises:
        ValueError: in one sentence, when there is none, or there are several.

    """
    # From another directory than pytest's root, or named in full.
    file, apart, rest = text.partition("::")
    here = os.path.relpath(Path(file).absolute(), there.root).replace(os.sep, "/")
    exact = {nodeid for nodeid in there.collected if nodeid in (text, f"{here}{apart}{rest}")}
    matches = {nodeid for nodeid in there.collected if nodeid.endswith(f"/{text}")}
    found = sorted(exact or matches)
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{text!r} may be any of {', '.join(found[:5])}")
    if text in there.deselected:
        raise ValueError(f"{text!r} is deselected by pytest's arguments or configuration")
    close = difflib.get_close_matches(text, there.collected, 1)
    hint = f"; {close[0]!r} is" if close else ""
    raise ValueError(f"{text!r} is not among the {len(there.collected)} tests collected{hint}")


def _recorded(path: Path, nodeid: str, collected: Collection[str]) -> list[str]:
    """Return the tests that came before one in its process, as a run's records say.

    Raises:
        OSError, ValueError: when the record cannot be read, or does not have the test.

    """
    tests = records.load_run(path).tests
    mine = [test for test in tests if test.nodeid == nodeid]
    if not mine:
        raise ValueError(f"{str(path)!r} has no test {nodeid!r}")
    last = next((test for test in mine if test.outcome in ("failed", "error")), mine[-1])
    before = sorted(
        (
            test
            for test in tests
            if (test.host, test.worker) == (last.host, last.worker) and test.start < last.start
        ),
        key=lambda test: test.start,
    )
    names = dict.fromkeys(test.nodeid for test in before if test.nodeid != nodeid)
    there = set(collected)
    if gone := [name for name in names if name not in there]:
        sys.stderr.write(
            f"gpumem blame: left out, for pytest does not collect them here: {len(gone)} of the "
            f"{len(names)} tests before it, {printable(gone[0])} is the first\n"
        )
    return [name for name in names if name in there]


class _NobodyError(Exception):
    """No test is to blame; says why."""


class _Search:
    """The runs that find who is to blame for ``nodeid``."""

    def __init__(
        self, nodeid: str, arguments: Sequence[str], there: subset.Ended, place: Path, show: Any
    ) -> None:
        self._nodeid = nodeid
        self._words = [*arguments, "--maxfail=0"]
        self._there = there
        self._record = place / "run.json"
        self._show = show
        self._before: Sequence[str] = ()
        self.runs = 0
        self.why = ""
        """Of its last failure."""

    def find(self, before: Sequence[str]) -> list[str]:
        """Return the tests to blame.

        Raises:
            _NobodyError: when none is.

        """
        self._before = before
        self._show.expect(2 + math.ceil(math.log2(len(before) or 1)) + 1 + _SURE)
        name = self._nodeid
        if self._fails(()):
            raise _NobodyError(f"{name} fails alone: no test before it is to blame ({self.why})")
        if not before:
            raise _NobodyError(f"{name} passes alone, and no test comes before it")
        if not self._fails(before, record=self._there.measured):
            raise _NobodyError(
                f"{name} passes alone and after the {_tests(before)} before it; --record RUN.json "
                "takes the order of a run in which it failed"
            )
        return culprits(self._fails, before, self._suspects())

    def verdict(self, found: Sequence[str]) -> Iterator[str]:
        """Say who is to blame, once that was seen again."""
        name, why = self._nodeid, self.why
        names = " and ".join(found)
        flaky = f"{name} is flaky: it failed after {names} and passed alone, and then "
        if not self._fails(found, record=self._there.measured):
            raise _NobodyError(f"{flaky}passed after {names}")
        # Without what they do, seen again: alone, or rather with nothing of them but the import.
        apart = {each.partition("::")[0] for each in found} != {name.partition("::")[0]}
        by_import = apart and self._fails((), imported=found)
        if (by_import or not apart) and self._fails(()):
            raise _NobodyError(f"{flaky}failed alone")
        if len(found) == 1:
            yield f"{names} makes {name} fail"
        else:
            yield f"{names} make {name} fail together; without any one of them it passes"
        files = "its file" if len(found) == 1 else "their files"
        passes, twice = " and", ", each seen twice"
        if apart and not by_import:
            passes, twice = f", passes with {files} imported, and", ", seen twice"
        yield f"  it passes alone{passes} fails after {_them(found)}{twice}: {why}"
        if by_import:
            yield f"  to import {files} is enough"
        for each in found:
            yield from self._left(each)
        yield f"  {self.runs} runs for the {_tests(self._before)} before it; to see it again:"

    def _measured(self) -> Sequence[records.RecordedTest]:
        """Return what the plugin measured of the last run that was recorded, if any was."""
        return records.load_run(self._record).tests if self._record.exists() else ()

    def _suspects(self) -> frozenset[str]:
        """Return those of which was seen that they left something behind."""
        return frozenset(
            test.nodeid
            for test in self._measured()
            if test.left or any(card.leftover > 0 for card in test.cards)
        )

    def _left(self, culprit: str) -> Iterator[str]:
        """Say what a culprit left behind, as far as the plugin measured it."""
        for test in self._measured():
            if test.nodeid != culprit:
                continue
            for card in test.cards:
                if card.leftover > 0:
                    where = card.holders[0].where if card.holders else card.note
                    held = f": {where}" if where else ""
                    yield f"  {culprit} left {format_bytes(card.leftover)}{held}"
            for left in test.left:
                yield f"  {culprit} left {left.what} at {left.after}, it was {left.before}"

    def _fails(
        self, before: Sequence[str], *, imported: Sequence[str] = (), record: bool = False
    ) -> bool:
        """Run the test after ``before``; return whether it fails."""
        words = self._words
        if record:
            words = [*words, f"--gpumem-json={self._record}"]
        self.runs += 1
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
            wanted = [*before, self._nodeid]
            fresh = self._there.cached
            told = subset.run(words, Path.cwd(), log, wanted=wanted, imported=imported, fresh=fresh)
            ran = self._nodeid in told.failed or self._nodeid in told.passed
            if not ran and not before and not imported:
                raise _NobodyError(_not_run(self._nodeid, told, log))
        failed = self._nodeid in told.failed
        if failed:
            self.why = told.failed[self._nodeid]
        elif not ran and len(before) == len(self._before):
            raise _NobodyError(_ended_before(self._nodeid, told, before))
        how = "fails" if failed else "passes" if ran else "does not run"
        after = f"after {_tests(before)}" if before else "alone"
        self._show.step(f"{how} {after}")
        return failed


def _not_run(nodeid: str, told: subset.Ended, log: IO[str]) -> str:
    if nodeid in told.skipped:
        return f"{nodeid} is skipped, or expected to fail, alone"
    return f"{nodeid} does not run alone: {subset.trouble(log)}"


def _ended_before(nodeid: str, told: subset.Ended, before: Sequence[str]) -> str:
    """Say why a test was not reached."""
    if nodeid in told.skipped:
        return f"{nodeid} is skipped, or expected to fail, after the {_tests(before)} before it"
    reached = told.passed | told.failed.keys() | told.skipped
    last = [each for each in before if each in reached][-1:] or ["the first test"]
    return f"{nodeid} is not reached: the run ended with status {told.status} in {last[0]}"


def _tests(some: Sequence[str]) -> str:
    return f"{len(some)} test{'' if len(some) == 1 else 's'}"


def _them(found: Sequence[str]) -> str:
    return "that one" if len(found) == 1 else "these"


class _Lines:
    """Shows a line for each run, where there is no terminal."""

    def __init__(self) -> None:
        self._total = self._done = 0

    def expect(self, total: int) -> None:
        """Take note of how many runs it will be, if one test is to blame."""
        self._total = total

    def step(self, text: str) -> None:
        """Show what a run came to."""
        self._done += 1
        about = max(self._total, self._done)
        sys.stderr.write(f"gpumem blame: run {self._done} of about {about}: {text}\n")
        sys.stderr.flush()

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _Bar:
    """Shows a bar."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn("run"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}", markup=False),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("alone", total=None)

    def expect(self, total: int) -> None:
        """Take note of how many runs it will be, if one test is to blame."""
        self._bar.update(self._task, total=total)

    def step(self, text: str) -> None:
        """Show what a run came to."""
        task = self._bar.tasks[0]
        self._bar.update(self._task, total=max(task.total or 0, task.completed + 1))
        self._bar.update(self._task, advance=1, description=f"the last one {text}")

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _progress() -> _Lines | _Bar:
    return _Bar() if sys.stderr.isatty() else _Lines()

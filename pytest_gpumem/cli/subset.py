"""Pytest, run on some tests of a suite in a process of its own: the one way of all commands."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

NO_TESTS = 5
"""pytest's exit status where nothing was collected."""
_ERROR = re.compile(r"^ERROR:? (?!usage:)|: error: ")
"""Lines in which pytest says what is wrong with a file, or with its arguments."""
_PLUGIN = "pytest_gpumem.plugin.subset"
_VARIABLE = "GPUMEM_SUBSET"


class Ended(NamedTuple):
    """What one run told."""

    status: int
    """pytest's, negative where a signal ended it."""
    collected: tuple[str, ...]
    """In the order in which they run."""
    deselected: tuple[str, ...]
    failed: dict[str, str]
    """The first line of why, by test; also of one in which the process ended."""
    passed: frozenset[str]
    skipped: frozenset[str]
    root: str
    """pytest's root, to which node ids are relative."""
    paths: tuple[str, ...]
    """Which of the arguments name files, directories or tests."""
    measured: bool
    """Whether the plugin was there, and measured."""
    cached: bool
    """Whether pytest keeps a cache."""
    spread: bool
    """Whether xdist would have spread them, had it not been kept from it."""


def run(
    arguments: Sequence[str],
    directory: Path,
    log: IO[str],
    *,
    wanted: Sequence[str] | None = None,
    imported: Sequence[str] = (),
    spread: bool = False,
    fresh: bool = False,
) -> Ended:
    """Run pytest with ``arguments`` in ``directory``; what it prints goes into ``log``.

    ``wanted`` are node ids in the order in which they are to run; None runs all. Files of which
    none is wanted are not imported, but for those of ``imported``. It is one process whatever the
    configuration says, unless it may ``spread`` them over xdist's workers. With ``fresh``
    pytest's cache is an empty one, and stays as it was: no run knows of another one.
    """
    with tempfile.TemporaryDirectory(prefix="gpumem-") as place:
        wish, told = Path(place) / "wish.json", Path(place) / "told.jsonl"
        told.touch()
        asked = {
            "told": str(told),
            "wanted": None if wanted is None else list(wanted),
            "imported": list(imported),
            "spread": spread,
        }
        wish.write_text(json.dumps(asked), encoding="utf-8")
        words = ["-o", f"cache_dir={place}/cache"] if fresh else []
        done = subprocess.run(  # noqa: S603  # the user's own arguments
            [sys.executable, "-m", "pytest", "-p", _PLUGIN, *arguments, *words],
            cwd=directory,
            env=os.environ | {_VARIABLE: str(wish)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
        log.flush()
        return _read(done.returncode, told.read_text(encoding="utf-8").splitlines())


def _read(status: int, lines: Iterable[str]) -> Ended:
    there: dict[str, Any] = {}
    failed: dict[str, str] = {}
    began: set[str] = set()
    ended: set[str] = set()
    skipped: set[str] = set()
    for told in map(json.loads, lines):
        there = told if "collected" in told else there
        began |= {told["began"]} if "began" in told else set()
        ended |= {told["ended"]} if "ended" in told else set()
        skipped |= {told["skipped"]} if "skipped" in told else set()
        if "failed" in told:
            failed.setdefault(told["failed"], told["why"])
    for nodeid in began - ended:
        failed.setdefault(nodeid, f"its process ended with status {status}")
    passed = frozenset(ended - failed.keys() - skipped)
    return Ended(
        status,
        tuple(there.get("collected", ())),
        tuple(there.get("deselected", ())),
        failed,
        passed,
        frozenset(skipped),
        there.get("root", ""),
        tuple(there.get("paths", ())),
        there.get("measured", False),
        there.get("cached", False),
        there.get("spread", False),
    )


def collect(arguments: Sequence[str], directory: Path) -> Ended:
    """Return what pytest would run, in its order.

    Raises:
        ValueError: with pytest's line that says why, when that cannot be collected.

    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        words = [*arguments, "--collect-only", "-q", "--no-header"]
        found = run(words, directory, log)
        if found.status not in (0, NO_TESTS):
            raise ValueError(trouble(log))
        return found


def command(arguments: Sequence[str], there: Ended, nodeids: Sequence[str]) -> str:
    """Return how a shell runs these tests in this order, with ``arguments`` that collect more."""
    options = list(arguments)
    for path in there.paths:
        if path in options:
            options.remove(path)
    if there.spread:
        options += ["-n", "0"]
    names = []
    for nodeid in nodeids:
        file, apart, rest = nodeid.partition("::")
        names.append(f"{os.path.relpath(Path(there.root) / file)}{apart}{rest}")
    return shlex.join(["pytest", *options, *names])


def trouble(log: IO[str]) -> str:
    """Return the line of a log that says what went wrong, or else its last one."""
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    errors = [line for line in lines if _ERROR.search(line)]
    return [*(errors or lines), "pytest said nothing"][-1 if not lines else -2]

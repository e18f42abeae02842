"""GitHub Actions: remarks at the lines of tests, and the job's summary.

Only the process that reports speaks; the conventions are those of
pytest-github-actions-annotate-failures, so that both point at the same lines.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpumem import records
from pytest_gpumem.reports import annotations as remarks
from pytest_gpumem.reports import digest, sections
from pytest_gpumem.reports.counts import count_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pytest_gpumem.reports.annotations import Annotation
    from pytest_gpumem.reports.sections import Section

_LARGEST = 2**20
"""Bytes of a step's summary; GitHub refuses a larger one whole ("Workflow commands for GitHub
Actions", step isolation and limits)."""


def commands(found: Iterable[Annotation], rootdir: Path) -> Iterator[str]:
    """Return the workflow commands of remarks whose files are named from ``rootdir``."""
    return remarks.github(each._replace(file=_in_repository(rootdir, each.file)) for each in found)


def _in_repository(rootdir: Path, file: str) -> str:
    """Return the name of a file from the root of the repository, where that is known."""
    if not file:
        return ""
    if run_path := os.environ.get("PYTEST_RUN_PATH"):  # in a container, where paths differ
        return (Path(run_path) / file).as_posix()
    workspace = os.environ.get("GITHUB_WORKSPACE")
    if not workspace:
        return file
    named = os.path.relpath(rootdir / file, workspace)
    return file if named.startswith("..") else Path(named).as_posix()


def add_to_summary(path: Path, run: records.RunRecord, base: Path | None, top: int) -> str:
    """Append the run to the job's summary, if a test touched a card.

    Returns why it is not set against ``base``, or "".

    Raises:
        OSError: when the summary cannot be written.

    """
    if not count_up(run).touched:
        return ""
    earlier, problem = None, ""
    if base is not None:
        try:
            earlier = records.load_run(base)
        except OSError as error:
            problem = f"no base run: {str(base)!r}: {error.strerror}"
        except ValueError as error:
            problem = f"no base run: {error}"
    with path.open("a", encoding="utf-8") as file:
        # What earlier commands of the step wrote counts, too.
        room = _LARGEST - os.fstat(file.fileno()).st_size
        file.write(_fitting(lambda rows: digest.sections(run, rows, earlier), top, room))
    return problem


_FEW = 10
_CUT = sections.Section("More", ("the rest does not fit into a summary of at most a MiB",))


def _fitting(told: Callable[[int], Iterable[Section]], top: int, room: int) -> str:
    """Return what is told with ``top`` rows a table, or less of it that fits into so many bytes."""
    found = list(told(top))
    text = _markdown(found)
    if len(text.encode()) > room:
        found = list(told(_FEW))
        text = _markdown(found)
    while found and len(text.encode()) > room:
        found.pop()
        text = _markdown([*found, _CUT])
    return text if found else ""


def _markdown(found: Iterable[Section]) -> str:
    return "\n".join(sections.markdown(found)) + "\n"

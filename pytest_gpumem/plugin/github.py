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
from pytest_gpumem.reports.counted import count_up

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pytest_gpumem.reports.annotations import Annotation

_LARGEST = 2**20 - 2**14
"""Bytes of a summary; GitHub refuses one of more than a MiB whole ("Workflow commands for GitHub
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
    told = "\n".join(sections.markdown(digest.sections(run, top, earlier))) + "\n"
    if len(told.encode()) > _LARGEST:
        told = "\n".join(sections.markdown(digest.sections(run, _FEW, earlier))) + "\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(told)
    return problem


_FEW = 10

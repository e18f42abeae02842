"""Where commands find what earlier runs taught."""

from __future__ import annotations

import argparse
from pathlib import Path

from pytest_gpumem.scheduling.history import History

HISTORY = Path(".pytest_cache/d/gpumem/history.json")
"""In pytest's cache here, where the suite keeps it."""


def load_history(path: Path, *, new: bool = False) -> History:
    """Return the history in a file, an empty one where there is none and it may be ``new``.

    Raises:
        ValueError: in one sentence, when there is none, or it is of no use.

    """
    if not new and not path.exists():
        raise ValueError(f"there is no history {str(path)!r}")
    history = History.load(path)
    if history.problem:
        raise ValueError(history.problem)
    return history


def ask_where(parser: argparse.ArgumentParser) -> None:
    """Let a command be told a run, or else the history, to go by."""
    parser.add_argument(
        "run", type=Path, nargs="?", metavar="RUN.json", help="Written by --gpumem-json."
    )
    parser.add_argument(
        "--history", type=Path, default=HISTORY, metavar="FILE",
        help="What was learned, where no run is given. Default: the file in pytest's cache here.",
    )  # fmt: skip

"""What earlier runs taught of the tests of this one, kept in pytest's cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpumem.scheduling.history import History

if TYPE_CHECKING:
    import pytest

    from pytest_gpumem.plugin.state import State
    from pytest_gpumem.records import RunRecord


def history_path(config: pytest.Config, state: State) -> Path | None:
    """Return the file of learned peaks and durations, None where pytest keeps no cache.

    The one that ``config.cache.mkdir("gpumem")`` leads to; ``-n auto`` needs it before there is
    a ``config.cache``.
    """
    if state.settings.history is not None:
        return state.settings.history
    if config.pluginmanager.is_blocked("cacheprovider"):
        return None  # whose setting may be known all the same
    try:
        cache = os.path.expandvars(config.getini("cache_dir"))
    except ValueError:  # -p no:cacheprovider
        return None
    return config.rootpath / Path(cache).expanduser() / "d" / "gpumem" / "history.json"


def load_history(config: pytest.Config, state: State) -> History:
    """Return what earlier runs taught; a file that cannot be used is a note of the run."""
    path = history_path(config, state)
    history = History() if path is None else History.load(path)
    if history.problem and history.problem not in state.notes:
        state.notes.append(history.problem)
    return history


def save_history(config: pytest.Config, state: State, run: RunRecord) -> None:
    """Add what a run taught.

    Read again and not kept from the beginning: another run may have ended meanwhile.

    Raises:
        OSError: when the file cannot be written.

    """
    path = history_path(config, state)
    if path is None or not (run.worker_ram or any(test.cards for test in run.tests)):
        return
    if state.settings.history is None:
        config.cache.mkdir("gpumem")  # with the files by which others know a cache
    history = History.load(path)
    history.learn(run.tests, run.worker_ram)
    history.save(path)

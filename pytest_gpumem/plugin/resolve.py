"""The settings of a run: command line over environment over ini file over default."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

from pytest_gpumem.plugin.settings import OPTIONS, Settings
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path


class BadSettingError(Exception):
    """One sentence that names the option, where it stands, and what is allowed."""


def check_files(settings: Settings) -> None:
    """Make sure that the files which the user asked for can be written.

    Before the first test runs, so that an hour's results are not lost at its end. Only where they
    will be written: a worker of xdist on another machine need not have their directories.

    Raises:
        BadSettingError: when one cannot be written, or is to be read and is of another kind.

    """
    for field, path in (
        ("json", settings.json),
        ("trace", settings.trace),
        ("html", settings.html),
        ("history", settings.history),
    ):
        if path is not None:
            problem = why_not_written(path)
            if field == "html" and importlib.util.find_spec("plotly") is None:
                problem = "plotly is not installed: pip install plotly"
            if field == "history" and not problem:
                from pytest_gpumem.scheduling.history import History

                problem = History.load(path).problem
            if problem:
                raise BadSettingError(f"--gpumem-{field}: {problem}")
    if settings.snapshots is not None and (problem := why_no_directory(settings.snapshots)):
        raise BadSettingError(f"--gpumem-snapshots: {problem}")


def why_no_directory(path: Path) -> str:
    """Return in one sentence why files cannot be written into a directory, "" if they can."""
    if path.exists() and not path.is_dir():
        return f"{str(path)!r} is a file; allowed is the name of a directory"
    there = next(each for each in (path, *path.parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return f"cannot write into {str(path)!r}: {str(there)!r} is not writable"
    return ""


def why_not_written(path: Path) -> str:
    """Return in one sentence why a file cannot be written there, "" if it can."""
    if path.is_dir():
        return f"{str(path)!r} is a directory; allowed is the name of a file"
    if not path.parent.is_dir():
        return f"cannot write {str(path)!r}: there is no directory {str(path.parent)!r}"
    # The file is replaced by a rename, so the directory must be writable.
    if not os.access(path.parent, os.W_OK):
        return f"cannot write {str(path)!r}: {str(path.parent)!r} is not writable"
    return ""


def resolve(
    options: Mapping[str, Any],
    environ: Mapping[str, str],
    ini: Callable[[str], str | None],
    *,
    asked: bool,
) -> Settings:
    """Return the settings that hold.

    Args:
        options: values from the command line by ``Option.dest``, None where not given.
        environ: the environment.
        ini: returns the ini file's text for a name, None or ``""`` where not given.
        asked: whether the plugin was asked for by name (``-p gpumem``), which makes the
            mode ``on`` unless it is given outright.

    Raises:
        BadSettingError: when a value cannot be used.

    """
    found: dict[str, Any] = {"mode": "on"} if asked else {}
    places: dict[str, str] = {}
    for option in OPTIONS:
        for place, value in (
            (option.flag, options.get(option.dest)),
            (f"{option.env} in the environment", environ.get(option.env)),
            (f"{option.dest} in the ini file", ini(option.dest)),
        ):
            if value is None or value == "":
                continue
            try:
                found[option.field] = option.parse(value)
            except ValueError as error:
                raise BadSettingError(f"{place}: {error}") from None
            places[option.field] = place
            break
    settings = Settings(**found)
    if settings.mode != "on":
        idle = {option.field for option in OPTIONS if option.needs_on}
        without = tuple(place for field, place in places.items() if field in idle)
        settings = settings.replace(without_effect=without)
    if settings.simulate is not None and settings.simulate_context >= min(settings.simulate):
        raise BadSettingError(
            f"--gpumem-simulate: a card of {format_bytes(min(settings.simulate))} has no room for "
            f"a context of {format_bytes(settings.simulate_context)}; "
            "make --gpumem-simulate-context smaller"
        )
    if settings.simulate is not None and (
        settings.simulate_context + settings.simulate_workspace > min(settings.simulate)
    ):
        raise BadSettingError(
            f"--gpumem-simulate-workspace: a card of {format_bytes(min(settings.simulate))} has no "
            f"room for {format_bytes(settings.simulate_workspace)} beside a context of "
            f"{format_bytes(settings.simulate_context)}"
        )
    return settings

"""What isolated tests cover, counted by a ``coverage run`` around pytest as if they ran in it.

pytest-cov sees to that itself, and so does coverage where it patches ``subprocess``.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

_SETTINGS = (
    *("branch", "concurrency", "context", "core", "cover_pylib", "dynamic_context", "include"),
    *("omit", "patch", "plugins", "relative_files", "source", "source_dirs", "source_pkgs"),
    "timid",
)
"""Of what coverage's documentation calls the section ``run``, those that say what is counted."""
_BY_ITSELF = ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG")
"""Variables by which coverage begins in every process."""

Wish = tuple[dict[str, Any], str]
"""What a fresh process is to count by, and the file that it writes."""


class Covering:
    """Gathers what processes of tests counted, for the ``coverage.Coverage`` of this process."""

    def __init__(self, current: Any) -> None:
        coverage: Any = sys.modules["coverage"]
        self._current = current
        self._place = tempfile.TemporaryDirectory(prefix="gpumem-")
        self._settings: dict[str, Any] = {}
        for name in _SETTINGS:
            # Of a coverage that does not know it.
            with suppress(coverage.CoverageException):
                self._settings[name] = current.get_option(f"run:{name}")

    def wish(self, number: int) -> Wish:
        """Return what the process of this number is told."""
        return self._settings, str(Path(self._place.name) / str(number))

    def gather(self) -> None:
        """Take over what was counted, once all processes have ended."""
        coverage: Any = sys.modules["coverage"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what there is to warn of, coverage says at its end
            for file in Path(self._place.name).iterdir():
                data = coverage.CoverageData(str(file))
                # Of a process that was killed while it wrote.
                with suppress(coverage.CoverageException):
                    data.read()
                    self._current.get_data().update(data)
                data.close()
        self._place.cleanup()


def covering() -> Covering | None:
    """Return what gathers for the coverage that counts this process alone, if one does."""
    coverage = sys.modules.get("coverage")
    current = getattr(getattr(coverage, "Coverage", None), "current", lambda: None)()
    if current is None or any(name in os.environ for name in _BY_ITSELF):
        return None
    return Covering(current)


def count(wish: Wish) -> Any:
    """Begin to count in this process, which is to stop and save what is returned."""
    coverage: Any = importlib.import_module("coverage")
    settings, file = wish
    found = coverage.Coverage(data_file=file, config_file=False)
    for name, value in settings.items():
        found.set_option(f"run:{name}", value)
    every = ["already-imported", "module-not-imported", "module-not-measured", "no-data-collected"]
    found.set_option("run:disable_warnings", every)
    found.start()
    return found

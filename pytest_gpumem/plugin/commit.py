"""Which commit a run is of."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_GIT_TIMEOUT = 10
"""Seconds; a large working tree on a slow disk takes some to be compared."""


def commit_of(directory: Path) -> str:
    """Return the commit that is checked out, with ``-dirty`` where files differ from it.

    Empty where git, or a repository, is missing, or git does not answer in ten seconds.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(  # noqa: S603  # a fixed command
            command,
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""

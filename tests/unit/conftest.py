"""What tests of several rooms need."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def run_on_card(tmp_path: Path) -> Callable[..., str]:
    """Run a suite, which passes, in a process of its own on a simulated card almost of its size.

    Called with the card's size, the suite's text and further arguments, it returns the output. Keys
    and archives lie in the test's own directory.
    """

    def run(size: str, source: str, *arguments: str) -> str:
        (tmp_path / "test_it.py").write_text(textwrap.dedent(source))
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        environment = {name: value for name, value in os.environ.items() if "PYTEST_" not in name}
        environment |= {
            "XDG_CONFIG_HOME": str(tmp_path / "config"),
            "GPUMEM_ARCHIVE": str(tmp_path / "store"),
        }
        card = (f"--gpumem-simulate={size}", "--gpumem-simulate-context=1MiB")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "gpumem", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, *card, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run

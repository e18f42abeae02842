from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform == "win32", reason="the simulated card needs POSIX locks")
def test_no_model_is_lost_or_silently_wrong(tmp_path):
    shutil.copy(Path(__file__).with_name("lost_models.py"), tmp_path / "test_it.py")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    environment = {name: value for name, value in os.environ.items() if "PYTEST_" not in name}
    card = ["--gpumem-simulate=400MiB", "--gpumem-simulate-context=1MiB"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "gpumem", *card, "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env=environment | {"XDG_CONFIG_HOME": str(tmp_path / "config")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr

from __future__ import annotations

import pytest
from harness import SIMULATE, TAKE, run_pytest, write_suite


@pytest.fixture
def run(tmp_path):
    """Run a suite that begins with TAKE on the simulated card; more files by keyword."""

    def _run(source, *arguments, **files):
        write_suite(tmp_path, test_it=TAKE + source, **files)
        return run_pytest(tmp_path, *SIMULATE, "--gpumem-json=run.json", *arguments)

    return _run

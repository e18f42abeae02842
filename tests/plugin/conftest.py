from __future__ import annotations

import pytest
from harness import SIMULATE, run_pytest, write_suite

TAKE = """
import os, signal
import pytest, torch

KEPT = []

def take(kib=64):
    return torch.zeros(kib * 1024, dtype=torch.uint8, device="cuda")
"""


@pytest.fixture
def run(tmp_path):
    """Run a suite that begins with TAKE on the simulated card; more files by keyword."""

    def _run(source, *arguments, **files):
        write_suite(tmp_path, test_it=TAKE + source, **files)
        return run_pytest(tmp_path, *SIMULATE, "--gpumem-json=run.json", *arguments)

    return _run

from __future__ import annotations

import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform == "win32", reason="the simulated card needs POSIX locks")
def test_no_model_is_lost_or_silently_wrong(run_on_card):
    run_on_card("400MiB", Path(__file__).with_name("lost_models.py").read_text())

from __future__ import annotations

import shutil

import pytest
from harness import (
    CARD,
    SIMULATE,
    TAKE,
    TAKE_WITHOUT_TORCH,
    WITHOUT_TORCH,
    run_pytest,
    write_suite,
)

from pytest_gpumem.simulator.card import SharedCard


@pytest.fixture
def run(tmp_path):
    """Run a suite that begins with TAKE on the simulated card; more files by keyword."""

    def _run(source, *arguments, beside=("xdist",), **files):
        write_suite(tmp_path, test_it=TAKE + source, **files)
        return run_pytest(tmp_path, *SIMULATE, "--gpumem-json=run.json", *arguments, beside=beside)

    return _run


@pytest.fixture
def run_without_torch(tmp_path):
    """Run a suite on a card without torch, whose import would be most of the time."""

    def _run(source, *arguments, beside=("xdist",), **files):
        for name in ("card", "card.lock"):
            (tmp_path / name).unlink(missing_ok=True)
        SharedCard.create(tmp_path / "card", total=CARD, context=384 * 2**20).close()
        write_suite(tmp_path, test_it=TAKE_WITHOUT_TORCH + source, **files)
        shutil.copy(WITHOUT_TORCH, tmp_path)
        card = f"--gpumem-simulate-card={tmp_path / 'card'}"
        return run_pytest(
            tmp_path,
            *("-p", "gpumem", card, "--gpumem-json=run.json", *arguments),
            beside=beside,
            env={"GPUMEM_SIMULATE_CARD": str(tmp_path / "card")},
        )

    return _run

"""What tests of models that sleep on the host share."""

from __future__ import annotations

import pytest

from pytest_gpumem.archive import sleep
from pytest_gpumem.archive.consolidator import GpuConsolidator
from pytest_gpumem.archive.store import ArchiveStore


@pytest.fixture
def host_is_a_card(monkeypatch):
    """Let tensors of the host sleep: every part of torch works there, and at full speed."""
    monkeypatch.setattr(sleep, "is_on_card", lambda tensor: not tensor.is_meta)


@pytest.fixture
def consolidator(tmp_path):
    return GpuConsolidator(ArchiveStore(tmp_path / "store", key=b"k" * 32))

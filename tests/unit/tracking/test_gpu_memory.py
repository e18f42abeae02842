"""What the fixture ``gpumem`` answers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pytest_gpumem.records import CardUsage
from pytest_gpumem.tracking.memory import GpuMemory

CARDS = tuple(CardUsage(f"GPU-{peak}", 0, peak, *(0,) * 5, process=None) for peak in (3, 4))


TRACKER = SimpleNamespace(usage=lambda: CARDS, meters=SimpleNamespace(allocated=5))


@pytest.mark.parametrize(
    ("tracker", "usage", "allocated", "peak"),
    [(None, (), 0, 0), (TRACKER, CARDS, 5, 7)],
    ids=["no card", "two cards"],
)
def test_it_sums_over_the_cards(tracker, usage, allocated, peak):
    memory = GpuMemory(tracker)
    assert (memory.usage(), memory.allocated, memory.peak) == (usage, allocated, peak)

"""The cap on what each process may reserve, on a card of the tests' own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pytest_gpumem.plugin import memory_fraction
from pytest_gpumem.plugin.memory_fraction import SMALLEST, Capping, even_share


@pytest.mark.parametrize(
    ("total", "workers", "context", "headroom", "share"),
    [
        (1000, 1, 0, 0, 1.0),
        (1000, 2, 100, 200, 0.3),
        (1000, 8, 200, 0, SMALLEST),
    ],
)
def test_an_even_share_is_what_the_contexts_leave(total, workers, context, headroom, share):
    assert even_share(total, workers, context, headroom) == pytest.approx(share)


@pytest.mark.parametrize("tells", [True, False], ids=["torch tells it", "an older one does not"])
def test_each_test_begins_with_the_fraction_that_was_asked_for(monkeypatch, tells):
    limits, notes = {0: 1.0}, []
    cuda = SimpleNamespace(
        device_count=lambda: 1,
        set_per_process_memory_fraction=lambda part, index: limits.update({index: part}),
    )
    if tells:
        cuda.get_per_process_memory_fraction = limits.get
    monkeypatch.setattr(memory_fraction.torch_state, "cuda", lambda: cuda)
    monkeypatch.setattr(memory_fraction.torch_private, "has_context", lambda index: True)
    capping = Capping(
        SimpleNamespace(
            settings=SimpleNamespace(fraction=0.25), found=SimpleNamespace(cards=()), notes=notes
        )
    )
    for name, left in (("test_a", 0.25), ("test_b", 1.0), ("test_c", 0.25)):
        capping.pytest_runtest_setup(SimpleNamespace(nodeid=name))
        assert limits == {0: 0.25}
        limits[0] = left

    changed = "test_b changed the memory fraction to 1; it was set to 0.25 again"
    assert notes == ([changed] if tells else [])

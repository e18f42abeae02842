"""What becomes known of a test after its report was made."""

from __future__ import annotations

from pytest_gpumem.plugin.report import _once
from pytest_gpumem.records import ChildUsage


def test_a_process_told_of_again_is_one_process_with_its_end():
    child = ChildUsage(7, "serve", "GPU-1", "a.py::test", used_peak=8, start=1.0)
    other, ended = child._replace(card="GPU-2"), child._replace(end=2.0)
    assert _once((child, other, ended)) == (ended, other)

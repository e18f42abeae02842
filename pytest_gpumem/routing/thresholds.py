"""From which on a task goes to the CPU."""

from __future__ import annotations

from pytest_gpumem.tuples import NamedTuple


class Thresholds(NamedTuple):
    """Parts of a card in use, 0 to 1, and bytes; the defaults are the plan's."""

    full: float = 0.85
    """Everything, above this."""
    busy: float = 0.70
    """What wants more than ``large``, above this."""
    large: int = 200 * 2**20
    transformers: float = 0.80
    """Sentence transformers, above this part reserved."""


in_force = Thresholds()
"""Those that hold in this process where a manager was given none; under pytest, the run's."""
context = 512 * 2**20
"""Bytes that a process is taken to cost once it uses a card; under pytest, the run's."""

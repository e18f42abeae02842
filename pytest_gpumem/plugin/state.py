"""What the plugin keeps with pytest's configuration and items, and the names it sends home by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_gpumem import records
    from pytest_gpumem.devices import CardsFound
    from pytest_gpumem.plugin import marks
    from pytest_gpumem.plugin.settings import Settings
    from pytest_gpumem.simulator import Simulation
    from pytest_gpumem.tracking.tracker import Usage

STATE = pytest.StashKey["State"]()
ITEM_MARKS = pytest.StashKey["ItemMarks"]()
USAGE: pytest.StashKey[Usage] = pytest.StashKey()
"""What a test did, once it is over."""
GRANT: pytest.StashKey[records.Grant] = pytest.StashKey()
"""What a test was granted."""


@dataclass
class State:
    """What the plugin keeps with pytest's configuration."""

    settings: Settings
    found: CardsFound
    visible: str | None = None
    """What ``CUDA_VISIBLE_DEVICES`` said when they were found."""
    simulation: Simulation | None = None
    borrowed: bool = False
    """Whether that is the simulation of a run that started this one in its own process."""
    exported: bool = False
    """Whether this process put ``CARD_VARIABLE`` into the environment."""
    notes: list[str] = field(default_factory=list)
    """Sentences about the run as a whole, from the plugin's parts."""
    worker_reason: str = ""
    """Why ``-n auto`` starts as many workers as it does."""


@dataclass
class ItemMarks:
    """What the marks of one test mean; None where it has no such mark."""

    need: marks.Need | None = None
    vram_limit: int | None = None
    vram_leak_limit: int | None = None
    off: bool = False


NO_MARKS = ItemMarks()
PROPERTIES = ("gpumem_peak", "gpumem_leftover", "gpumem_leaked", "gpumem_record")
"""A test's user properties: bytes over all cards, and the whole record as JSON text."""
ROUTES = "gpumem_routes"
STEP = "gpumem_step"
"""User properties too: where the test's tasks were sent, and why it is a further attempt."""
USAGE_ERROR = "gpumem_usage_error"
CARDS = "gpumem_cards"
HOST = "gpumem_host"
NOTES = "gpumem_notes"
LATE = "gpumem_late"
"""Keys under which a worker leaves things for the controller when it ends: ``LATE`` is what
was torn down after its test was reported: the test, the fixtures, what became known of children,
the bytes reserved since by card."""
HISTORY = "gpumem_history"
"""Key under which a worker finds what is known of the tests when it begins."""


def is_worker(config: pytest.Config) -> bool:
    """Return whether this process is one of xdist's workers."""
    return hasattr(config, "workerinput")

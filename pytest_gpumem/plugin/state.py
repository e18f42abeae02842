"""What the plugin keeps with pytest's configuration and items, and the names it sends home by."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeVar

import pytest

if TYPE_CHECKING:
    from pytest_gpumem import records
    from pytest_gpumem.devices import CardsFound
    from pytest_gpumem.plugin import marks
    from pytest_gpumem.plugin.settings import Settings
    from pytest_gpumem.simulator import Simulation
    from pytest_gpumem.tracking.accounts import Usage

T = TypeVar("T")
STATE = pytest.StashKey["State"]()
ITEM_MARKS = pytest.StashKey["ItemMarks"]()
USAGE: pytest.StashKey[Usage] = pytest.StashKey()
"""What a test did, once it is over."""
GRANT: pytest.StashKey[records.LeaseUsage] = pytest.StashKey()
"""What a test was granted."""


class State:
    """What the plugin keeps with pytest's configuration.

    Args:
        settings: of this run.
        found: the cards.
        simulation: of a card, if there is one.
        borrowed: whether that is of a run that started this one in its own process.
        exported: whether this process put ``CARD_VARIABLE`` into the environment.

    """

    # No data class, which would take half a millisecond of every run's start.
    def __init__(
        self,
        settings: Settings,
        found: CardsFound,
        *,
        simulation: Simulation | None = None,
        borrowed: bool = False,
        exported: bool = False,
    ) -> None:
        self.settings = settings
        self.found = found
        self.simulation = simulation
        self.borrowed = borrowed
        self.exported = exported
        self.environ_before: dict[str, str | None] = {}
        """What variables were that are set for this run, None where they were not."""
        self.visible: str | None = None
        """What ``CUDA_VISIBLE_DEVICES`` said when they were found."""
        mine = None if borrowed else simulation
        self.notes: list[str] = [] if mine is None else mine.notes
        """Sentences about the run as a whole, from the plugin's parts."""
        self.isolates = settings.mode == "on" and settings.isolate in ("failed", "all")
        """Whether tests may run in processes of their own."""
        self.worker_reason = ""
        """Why ``-n auto`` starts as many workers as it does."""
        self.lost: list[records.LostWorker] = []
        """Workers that were replaced or killed, as far as the process that reports knows."""
        self.worker_ram = 0
        """The most main memory that a process which runs tests kept to itself, as far as told."""

    def set_environ(self, name: str, value: str) -> None:
        """Set a variable for this process and what it starts, until the run ends."""
        self.environ_before.setdefault(name, os.environ.get(name))
        os.environ[name] = value

    def restore_environ(self) -> None:
        """Set all such variables back."""
        for name, before in self.environ_before.items():
            if before is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = before
        self.environ_before.clear()

    def ask_driver(self) -> None:
        """Let whoever asks the driver about simulated cards find one."""
        if self.simulation is not None:
            self.simulation.load_driver()


class ItemMarks:
    """What the marks of one test mean; None where it has no such mark."""

    need: marks.MarkedNeed | None = None
    ram: int | None = None
    vram_limit: int | None = None
    vram_leak_limit: int | None = None
    off: bool = False


NO_MARKS = ItemMarks()
"""Of most tests."""


def stashed(item: pytest.Item, key: pytest.StashKey[T]) -> T | None:
    """Return what is kept with a test, None if nothing is, as for most.

    ``Stash.get`` raises and catches an error then, which takes ten times as long.
    """
    if key in item.stash:
        return item.stash[key]
    return None


def marks_of(item: pytest.Item) -> ItemMarks:
    """Return what the marks of a test mean."""
    if ITEM_MARKS in item.stash:
        return item.stash[ITEM_MARKS]
    return NO_MARKS


def is_isolated(item: pytest.Item, which: str) -> bool:
    """Return whether a test is to run in a process of its own, by ``--gpumem-isolate``."""
    if which in ("off", "all"):
        return which == "all"
    need = marks_of(item).need
    return need is not None and need.isolated


USAGE_ERROR = "gpumem_usage_error"
CARDS = "gpumem_cards"
HOST = "gpumem_host"
PID = "gpumem_pid"
NOTES = "gpumem_notes"
LATE = "gpumem_late"
"""Keys under which a worker leaves things for the controller when it ends: ``LATE`` is what
was torn down after its test was reported: the test, the fixtures, what became known of children,
what modules and the run left, the bytes reserved since by card."""
ALIVE = "gpumem_alive"
"""Key under which a worker tells what was alive in tests that ran once more for that."""
RAM = "gpumem_ram"
"""Key under which it leaves the most main memory that it kept to itself."""
GONE = "gpumem_gone"
"""Key under which a worker tells the budgets that have no test any more."""
HISTORY = "gpumem_history"
"""Key under which a worker finds what is known of the tests when it begins."""
BUDGET = "gpumem_budget"
"""Key under which it finds their budgets."""
APART = "gpumem_apart"
"""Key by which a process knows that it was started for one test alone, see ``isolate``."""


def is_worker(config: pytest.Config) -> bool:
    """Return whether this process is one of xdist's workers, or was started for one test."""
    return hasattr(config, "workerinput")


def is_apart(config: pytest.Config) -> bool:
    """Return whether this process was started for one test, of which another one reports."""
    return APART in getattr(config, "workerinput", ())

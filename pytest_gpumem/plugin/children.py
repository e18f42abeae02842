"""Begins to know the processes that the tests of this process start."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pytest_gpumem.errors import LeaseError
from pytest_gpumem.leases.family import books, new_book

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pytest_gpumem.plugin.state import State
    from pytest_gpumem.records import Card
    from pytest_gpumem.tracking.children import Children
    from pytest_gpumem.tracking.sampler import Sampler


def watch(state: State) -> tuple[Children, Sampler] | None:
    """Return what knows the children and what looks at them; None where that cannot be.

    Their book lies beside the leases, which any process of the user finds.
    """
    settings = state.settings
    if settings.children == "off" or sys.platform == "win32":  # which has no fork and no fcntl
        return None
    from pytest_gpumem import agent
    from pytest_gpumem.tracking.children import Children
    from pytest_gpumem.tracking.sampler import Sampler
    from pytest_gpumem.tracking.starters import Starters

    def cards() -> Sequence[Card]:
        state.ask_driver()
        return state.found.cards

    try:
        state.notes += _left_behind(books())
        starters = Starters(lambda: new_book(settings.context_cost))
        children = Children(starters, cards, settings.context_cost)
    except (LeaseError, OSError) as error:
        state.notes.append(f"child processes of tests are not known: {error}")
        return None
    agent.begin()  # in what this process forks
    sampler = Sampler(children.look, children.worth_a_look, settings.sample_interval)
    if settings.sample_interval:
        sampler.start()
    return children, sampler


def _left_behind(directory: Path) -> list[str]:
    """Return a sentence for each child that lives of tests whose process was killed."""
    from pytest_gpumem.devices.book import left_behind
    from pytest_gpumem.units import format_bytes

    found = []
    for told in left_behind(directory):
        size = sum(figures.reserved for figures in told.cards.values())
        found.append(
            f"process {told.pid} ({told.command}) still runs and holds {format_bytes(size)}: "
            f"{told.name} started it, whose own process was ended"
        )
    return found

"""Simulated cards, as commands find and make them: the one place of ``cli`` that knows them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpumem import devices
from pytest_gpumem.agent import CARD
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import ExitStack

    from pytest_gpumem.simulator.card import SharedCard

CONTEXT = 384 * 2**20
"""Bytes that a process costs on a card that is made here, as in pytest's runs."""

_opened: dict[Path, Sequence[SharedCard]] = {}


def cards() -> list[SharedCard]:
    """Return the simulated cards of this user; they lie where runs keep them until they end."""
    if sys.platform == "win32":
        return []
    from pytest_gpumem.simulator import Simulation

    paths = Simulation.card_files()
    named = Path(os.environ.get(CARD) or os.devnull)
    if named.is_file() and named not in paths:
        paths.append(named)
    for gone in set(_opened) - set(paths):
        for card in _opened.pop(gone):
            card.close()
    for path in paths:
        if path not in _opened:
            try:
                _opened[path] = Simulation.attach(str(path)).cards
            except (OSError, ValueError):  # being made, or being removed
                continue
    return [card for path in paths for card in _opened.get(path, ())]


def use(size: int | None, stack: ExitStack) -> int | None:
    """Let this process, and what it starts, have a simulated card; return a context's bytes.

    It is the one that the environment names, or else a new one of ``size`` bytes until ``stack``
    is closed. None if there is neither.

    Raises:
        ValueError: in one sentence, when it cannot be had, or a real card is visible.

    """
    named = os.environ.get(CARD, "")
    if not named and size is None:
        return None
    from pytest_gpumem.simulator import Simulation

    if named:
        try:
            simulation = Simulation.attach(named)
        except (OSError, ValueError) as error:
            raise ValueError(f"{CARD}: {error}") from None
    else:
        if size is None or size <= CONTEXT:
            raise ValueError(
                f"--simulate: a card of {format_bytes(size or 0)} has no room for a context of "
                f"{format_bytes(CONTEXT)}"
            )
        if real := devices.find_cards().cards:
            raise ValueError(f"--simulate: a real card is visible ({real[0].name})")
        simulation = Simulation.start([size], CONTEXT)
        os.environ[CARD] = simulation.path
    stack.callback(simulation.close)
    simulation.install()
    simulation.load_driver()
    return simulation.cards[0].context

"""The simulated cards of a run: made or joined as it begins, and handed to its workers."""

from __future__ import annotations

import functools
import os
import sys
from typing import TYPE_CHECKING

from pytest_gpumem.devices.family import NO_TEST, VARIABLE
from pytest_gpumem.plugin.resolve import BadSettingError
from pytest_gpumem.plugin.state import State

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_gpumem.devices import CardsFound
    from pytest_gpumem.plugin.settings import Settings
    from pytest_gpumem.simulator import Simulation

CARD_VARIABLE = "GPUMEM_SIMULATE_CARD"
"""Carries the simulated card's file to xdist's workers, which start from the environment."""
SIMULATED_AS = "GPUMEM_SIMULATED_AS"
"""Carries the simulated card's name to workers on other machines, which share one there."""


def begin(settings: Settings, real: CardsFound) -> State:
    """Give this process the simulated cards.

    Raises:
        BadSettingError: when a real card is visible and the user did not ask twice, or the card
            file that was named cannot be used, or the system has no means to share a card, or an
            earlier run in this process simulated one.

    """
    if sys.platform == "win32":
        raise BadSettingError("--gpumem-simulate: not on Windows, which has no POSIX file locks")
    from pytest_gpumem.simulator import Simulation

    notes: list[str] = []
    # A run within a test, as of pytester: torch has the card of the run around it.
    if (around := Simulation.installed) is not None:
        if around.closed:
            raise BadSettingError(
                "--gpumem-simulate: an earlier run in this process simulated a card, which cannot "
                "be undone; start a new process for each run"
            )
        settings = settings.replace(simulate_context=around.cards[0].context)
        return State(settings, _cards_of(around), simulation=around, borrowed=True)
    if real.cards and not settings.simulate_anyway:
        raise BadSettingError(
            f"--gpumem-simulate: a real card is visible ({real.cards[0].name}); "
            "add --gpumem-simulate-anyway to simulate one all the same"
        )
    sizes = settings.simulate or (), settings.simulate_context, settings.simulate_workspace
    if settings.simulate_card is not None:
        try:
            simulation = Simulation.attach(str(settings.simulate_card))
        except (OSError, ValueError) as error:
            raise BadSettingError(f"--gpumem-simulate-card: {error}") from None
    else:
        library = _compiled(settings, notes)
        name = os.environ.pop(SIMULATED_AS, "")
        make = functools.partial(Simulation.join, name) if name else Simulation.start
        simulation = make(*sizes, library=library)
        simulation.notes += notes
    simulation.install()
    exported = CARD_VARIABLE not in os.environ
    os.environ.setdefault(CARD_VARIABLE, simulation.path)
    # Whoever made the cards decided what a context costs.
    settings = settings.replace(simulate_context=simulation.cards[0].context)
    state = State(settings, _cards_of(simulation), simulation=simulation, exported=exported)
    if settings.children != "off" and VARIABLE not in os.environ:
        # What a conftest starts as it is imported has the card as what a test starts.
        state.set_environ(VARIABLE, NO_TEST)
    return state


def _compiled(settings: Settings, notes: list[str]) -> Path | None:
    """Return the library of the compiled card where it is asked for and can be made."""
    if not settings.simulate_compiled:
        return None
    from pytest_gpumem.simulator.torch_face import compilation

    try:
        return compilation.library()
    except compilation.CannotCompileError as error:
        notes.append(f"the simulated card is not compiled, but simulated in Python: {error}")
        return None


def _cards_of(simulation: Simulation) -> CardsFound:
    """Return the simulated cards that are visible to this process."""
    from pytest_gpumem import devices
    from pytest_gpumem.records import Card

    if len(simulation.cards) == 1 and "CUDA_VISIBLE_DEVICES" not in os.environ:
        (card,) = simulation.cards
        return devices.CardsFound((Card(card.uuid, card.name, card.total),))
    simulation.load_driver()  # which tells which of them are visible
    return devices.find_cards()

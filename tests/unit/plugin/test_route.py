from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pytest_gpumem.devices import CardsFound
from pytest_gpumem.plugin import route
from pytest_gpumem.plugin.resolve import resolve
from pytest_gpumem.plugin.state import STATE, State
from pytest_gpumem.routing import thresholds


def test_after_a_run_within_a_test_the_thresholds_are_those_of_the_run_around_it() -> None:
    before = thresholds.in_force, thresholds.context
    config: Any = SimpleNamespace(stash=pytest.Stash())
    settings = resolve({}, {}, lambda _name: "", asked=False).replace(route_full=0.5)
    config.stash[STATE] = State(settings, CardsFound((), "a test"))
    route.configure(config)
    assert thresholds.in_force.full == 0.5
    route.unconfigure(config)
    assert (thresholds.in_force, thresholds.context) == before

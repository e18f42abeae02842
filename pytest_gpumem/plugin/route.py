"""Routing under pytest: the fixtures, and what a test's routing leaves in its report."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpumem import devices
from pytest_gpumem.plugin.state import STATE, marks_of
from pytest_gpumem.routing import thresholds

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_gpumem.records import Route
    from pytest_gpumem.routing.model_pool import ModelPool

MANAGER = "pytest_gpumem.routing.resource_manager"
"""The module that is loaded once anything is routed."""
_BEFORE = pytest.StashKey[tuple[int, thresholds.Thresholds]]()
"""What was in force before this run."""
_pool: list[ModelPool] = []
"""The process's pool, once somebody asked for it."""


@pytest.fixture
def gpu_device(request: pytest.FixtureRequest) -> str:
    """Return ``"cuda"`` or ``"cpu"``: where this test should work.

    The CPU where there is no card, where the card is too full by the run's thresholds, or when
    the test ran out of memory there. A test marked ``gpu`` without ``fallback="cpu"`` works on
    the card, or is skipped where there is none.
    """
    need = marks_of(request.node).need
    if need is not None and need.fallback is None:
        if not devices.find_cards().cards:
            pytest.skip("marked gpu without fallback='cpu', and there is no card")
        return "cuda"
    from pytest_gpumem.routing.resource_manager import get_resource_manager

    size = need.vram if need is not None else None
    return str(get_resource_manager().route("test", size or 0, gpu=True).device)


@pytest.fixture(scope="session")
def model_pool() -> ModelPool:
    """Return the models that this process's tests share."""
    from pytest_gpumem.routing.model_pool import ModelPool

    if not _pool:
        _pool.append(ModelPool())
    return _pool[0]


@pytest.fixture
def embedding_model(model_pool: ModelPool, pytestconfig: pytest.Config) -> Iterator[Any]:
    """Lend the shared embedding model: all-MiniLM-L6-v2, or ``gpumem_embedding_model``."""
    name = pytestconfig.stash[STATE].settings.embedding_model
    with model_pool.use(name) as model:
        yield model


def configure(config: pytest.Config) -> None:
    """Route by this run's settings."""
    settings = config.stash[STATE].settings
    config.stash[_BEFORE] = thresholds.context, thresholds.in_force
    thresholds.context = settings.context_cost
    thresholds.in_force = thresholds.Thresholds(
        settings.route_full, settings.route_busy, settings.route_large, settings.route_transformers
    )


def unconfigure(config: pytest.Config) -> None:
    """Leave the run around this one, if there is one, its own settings."""
    if _BEFORE in config.stash:
        thresholds.context, thresholds.in_force = config.stash[_BEFORE]


def tests_begin() -> None:
    """Lay what was routed while tests were collected at no test's door."""
    if MANAGER in sys.modules:
        sys.modules[MANAGER].shared.take_routes()


def test_ended(item: pytest.Item) -> None:
    """Take note of where the tasks of a test went, and end what was set aside for them."""
    shared = sys.modules[MANAGER].shared
    shared.give_back()
    routes = shared.take_routes()
    if routes or item.user_properties:  # which may be of an earlier attempt
        _tell(item, routes)


def _tell(item: pytest.Item, routes: Sequence[Route]) -> None:
    from pytest_gpumem.records import properties  # most suites route nothing

    properties.tell_routes(item.user_properties, routes)


def session_ended() -> None:
    """Let go of the models."""
    while _pool:
        _pool.pop().clear()


def may_fall_back(item: pytest.Item, *, routed: bool = False) -> bool:
    """Return whether the test takes the CPU if it is sent there.

    ``routed`` says that a task of it was sent to a place by another process, which ran it.
    """
    need = marks_of(item).need
    if need is not None and need.fallback == "cpu":
        return True
    manager = sys.modules.get(MANAGER)
    routed = routed or (manager is not None and bool(manager.shared.routes))
    strict = need is not None and "gpu_device" in getattr(item, "fixturenames", ())
    return routed and not strict

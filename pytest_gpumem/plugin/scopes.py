"""The fixtures that judge what a module, and the whole run, leave on the card.

They are set up before all others of their scope, by its first test, and torn down after them.
Registered only where there is a card, and not in a run within a test: what is tried there is
somebody's plugin, which may count fixtures.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from pytest_gpumem.tracking.accounts import Scope

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

NAME = "gpumem-scopes"
NAMES = ("gpumem_module", "gpumem_session")
MEASURING = "gpumem-measuring"
"""Name of the plugin that measures."""
_SHOWS_PLANS = ("setuponly", "setupplan", "setupshow", "show_fixtures_per_test")


_ASKED: pytest.StashKey[set[pytest.Collector]] = pytest.StashKey()
"""The modules, and the session, whose fixture stands, or was asked for in vain."""


def wanted(config: pytest.Config) -> bool:
    """Return whether the fixtures are of use: not where a suite's own plan is to be shown."""
    shows = any(config.getoption(name, default=False) for name in _SHOWS_PLANS)
    return not shows and "PYTEST_CURRENT_TEST" not in os.environ


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    """Let the first test of a module, and of the run, ask for the fixture of that scope.

    If each test named them, as it does with autouse fixtures, pytest would look them up for each:
    80 us a test.
    """
    names: list[str] | None = getattr(item, "fixturenames", None)
    if names is None:
        return (yield)
    asked, module = item.config.stash.setdefault(_ASKED, set()), item.getparent(pytest.Module)
    if module in asked or (module is None and item.session in asked):
        return (yield)
    nodes: dict[str, pytest.Collector | None]
    nodes = {"gpumem_session": item.session, "gpumem_module": module}
    new = [name for name, node in nodes.items() if node is not None and node not in asked]
    names[:0] = new
    try:
        result = yield
        asked.update(node for node in nodes.values() if node is not None)
        return result
    finally:
        # Parametrised tests share the list.
        for name in new:
            names.remove(name)


@pytest.fixture(scope="session")
def gpumem_session(request: pytest.FixtureRequest) -> Iterator[None]:
    """Judge what the run leaves on the card; override it in a conftest to switch that off."""
    yield from _judged(request, Scope("", "session"))


@pytest.fixture(scope="module")
def gpumem_module(request: pytest.FixtureRequest) -> Iterator[None]:
    """Judge what a module leaves on the card; override it in a conftest to switch that off."""
    yield from _judged(request, Scope(request.node.nodeid, "module"))


def _judged(request: pytest.FixtureRequest, scope: Scope) -> Iterator[None]:
    measuring = request.config.pluginmanager.get_plugin(MEASURING)
    if measuring is None:  # a suite that asks for the fixture where nothing is measured
        yield
        return
    asked = request.config.stash.setdefault(_ASKED, set())
    measuring.tracker.scopes.begin(scope)
    asked.add(request.node)
    yield
    asked.discard(request.node)
    measuring.end_scope(scope)

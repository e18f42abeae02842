"""The fixtures that judge what a module, and the whole run, leave on the card.

They are set up before all others of their scope and torn down after them. Registered only where
there is a card, and not in a run within a test: what is tried there is somebody's plugin, which
may count fixtures.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from pytest_gpumem.tracking.accounts import Scope

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NAME = "gpumem-scopes"
NAMES = ("gpumem_module", "gpumem_session")
MEASURING = "gpumem-measuring"
"""Name of the plugin that measures."""
_SHOWS_PLANS = ("setuponly", "setupplan", "setupshow", "show_fixtures_per_test")


_NAMED: pytest.StashKey[dict[pytest.Collector, dict[int, list[str]]]] = pytest.StashKey()
"""The names of fixtures of the tests below a node, by identity: parametrised tests share a list."""


def wanted(config: pytest.Config) -> bool:
    """Return whether the fixtures are of use: not where a suite's own plan is to be shown."""
    shows = any(config.getoption(name, default=False) for name in _SHOWS_PLANS)
    return not shows and "PYTEST_CURRENT_TEST" not in os.environ


def pytest_collection_finish(session: pytest.Session) -> None:
    """Note which tests name the fixtures, by the node with which these end.

    Tests that are in no module are spared: pytest cannot set up a fixture of a module for them.
    """
    named: dict[pytest.Collector, dict[int, list[str]]] = {session: {}}
    for item in session.items:
        names: list[str] = getattr(item, "fixturenames", [])
        if "gpumem_session" in names:
            named[session][id(names)] = names
        if "gpumem_module" in names:
            module = item.getparent(pytest.Module)
            if module is None:
                names.remove("gpumem_module")
            else:
                named.setdefault(module, {})[id(names)] = names
    session.config.stash[_NAMED] = named


@contextmanager
def _standing(request: pytest.FixtureRequest, name: str, own: Sequence[str]) -> Iterator[None]:
    """Let no test but the one whose names are ``own`` ask for a fixture of ours while it stands.

    pytest looks up each fixture that a test names, also one that is set up, which takes some 50 us
    for both. Its walk through the names of the running test must not be disturbed.
    """
    lists = request.config.stash[_NAMED].get(request.node, {}).values()
    others = [names for names in lists if names is not own and name in names]
    for names in others:
        names.remove(name)
    yield
    for names in others:
        names.insert(0, name)


@pytest.fixture(scope="session", autouse=True)
def gpumem_session(request: pytest.FixtureRequest) -> Iterator[None]:
    """Judge what the run leaves on the card; override it in a conftest to switch that off."""
    yield from _judged(request, Scope("", "session"))


@pytest.fixture(scope="module", autouse=True)
def gpumem_module(request: pytest.FixtureRequest) -> Iterator[None]:
    """Judge what a module leaves on the card; override it in a conftest to switch that off."""
    yield from _judged(request, Scope(request.node.nodeid, "module"))


def _judged(request: pytest.FixtureRequest, scope: Scope) -> Iterator[None]:
    measuring = request.config.pluginmanager.get_plugin(MEASURING)
    if measuring is None:  # a suite that asks for the fixture where nothing is measured
        yield
        return
    own = getattr(measuring.running, "fixturenames", ())
    measuring.tracker.scopes.begin(scope)
    with _standing(request, f"gpumem_{scope.scope}", own):
        yield
    measuring.end_scope(scope)

"""The fixtures that judge what a module, and the whole run, leave on the card.

They are set up before all others of their scope, by its first test, and torn down after them.
Registered only where there is a card, and not in a run within a test: what is tried there is
somebody's plugin, which may count fixtures.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, cast

import pytest

from pytest_gpumem.tracking.accounts import Scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

NAMES = ("gpumem_module", "gpumem_session")
_SHOWS_PLANS = ("setuponly", "setupplan", "setupshow", "show_fixtures_per_test")


def wanted(config: pytest.Config) -> bool:
    """Return whether the fixtures are of use: not where a suite's own plan is to be shown."""
    shows = any(config.getoption(name, default=False) for name in _SHOWS_PLANS)
    return not shows and "PYTEST_CURRENT_TEST" not in os.environ


class Judging:
    """Has the first test of each scope ask for its fixture; told by who measures.

    If each test named them, as it does with autouse fixtures, pytest would look them up for each:
    80 us a test.
    """

    NAME = "gpumem-judging"

    def __init__(self, begin: Callable[[Scope], None], end: Callable[[Scope], None]) -> None:
        self._begin, self._end = begin, end
        self._asked: set[pytest.Collector | None] = set()
        """The modules, and the session, whose fixture stands, or was asked for in vain."""
        self.last: pytest.Collector | None = None
        """A collector all of whose tests have nothing to ask for: that of the last test."""
        self.asking: list[str] | None = None
        """What the test that is set up asks for in their name."""

    def ask(self, item: pytest.Item) -> None:
        """Let the first test of a module, and of the run, ask for the fixture of that scope."""
        names: list[str] | None = getattr(item, "fixturenames", None)
        if names is not None:
            stands = {None, *self._asked}
            self.asking = [name for name, node in _nodes(item).items() if node not in stands]
            names[:0] = self.asking

    def asked(self, item: pytest.Item, asking: Sequence[str], *, set_up: bool) -> None:
        """Take back what the test asked for, whose set-up is over."""
        names: list[str] = getattr(item, "fixturenames", [])
        for name in asking:  # parametrised tests share the list
            names.remove(name)
        self.asking = None
        if set_up:
            self._asked.update(_nodes(item).values())
            self.last = item.parent

    def around(self, request: pytest.FixtureRequest, scope: Scope) -> Iterator[None]:
        """Judge what is left when all that was set up after this is gone."""
        self._begin(scope)
        self._asked.add(request.node)
        yield
        self._asked.discard(request.node)
        self.last = None
        self._end(scope)


def _nodes(item: pytest.Item) -> dict[str, pytest.Collector | None]:
    return {"gpumem_session": item.session, "gpumem_module": item.getparent(pytest.Module)}


@pytest.fixture(scope="session")
def gpumem_session(request: pytest.FixtureRequest) -> Iterator[None]:
    """Judge what the run leaves on the card; override it in a conftest to switch that off."""
    yield from _judging(request).around(request, Scope("", "session"))


@pytest.fixture(scope="module")
def gpumem_module(request: pytest.FixtureRequest) -> Iterator[None]:
    """Judge what a module leaves on the card; override it in a conftest to switch that off."""
    yield from _judging(request).around(request, Scope(request.node.nodeid, "module"))


def _judging(request: pytest.FixtureRequest) -> Judging:
    return cast("Judging", request.config.pluginmanager.get_plugin(Judging.NAME))


def register(manager: pytest.PytestPluginManager, judging: Judging) -> None:
    """Let there be the fixtures, and tests that ask for them."""
    manager.register(sys.modules[__name__], "gpumem-scopes")
    manager.register(judging, Judging.NAME)

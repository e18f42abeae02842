"""Which fixtures of a wider scope a test uses, and how fixtures are called.

``Function._fixtureinfo`` says it before a test is set up, which pytest has no public word for.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Told = tuple[tuple[str, str, int | None], ...]
"""Wide fixtures, each with its node, its identity and the index of its parameter."""


def identity(fixture: pytest.FixtureDef[Any]) -> str:
    """Return what tells a fixture from others of its name: several files may have a ``model``."""
    return f"{fixture.baseid}::{fixture.argname}" if fixture.baseid else fixture.argname


_SETUPS = {
    "_xunit_setup_module_fixture_": (
        "setUpModule", "setup_module", "tearDownModule", "teardown_module"
    ),
    "_xunit_setup_class_fixture_": ("setup_class", "teardown_class"),
    "_xunit_setup_method_fixture_": ("setup_method", "teardown_method"),
    "_xunit_setup_function_fixture_": ("setup_function", "teardown_function"),
    "_unittest_setUpClass_fixture_": ("setUpClass", "tearDownClass"),
    "_unittest_setup_method_fixture_": ("setup_method", "teardown_method"),
}  # fmt: skip
"""How the names of fixtures begin that pytest makes of a suite's functions, and of which."""


def called(fixture: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> str:
    """Return what a fixture is called in a report: ``model``, ``test_a.py::TestA::setUpClass``."""
    for start, functions in _SETUPS.items() if fixture.argname.startswith("_") else ():
        if fixture.argname.startswith(start):
            where = request.module if "_setup_module_" in start else request.cls or request.module
            written = (name for name in functions if _is_written(getattr(where, name, None)))
            return f"{fixture.baseid}::{next(written, functions[0])}"
    return fixture.argname


def _is_written(function: object) -> bool:
    """Whether it is the suite's: every ``TestCase`` has a ``setUpClass``, which does nothing."""
    return function is not None and getattr(function, "__module__", "") != "unittest.case"


def used_by(item: pytest.Item) -> set[str]:
    """Return the identities of the wide fixtures that a test is known to use."""
    info = getattr(item, "_fixtureinfo", None)
    return set() if info is None else {identity(each) for each in _wide(info)}


def wide_fixtures(items: Sequence[pytest.Item]) -> tuple[list[Told], list[int], list[str]]:
    """Return which fixtures of a wider scope the tests use: every set once, each test's place.

    And the identities of those that take a lease. What a test asks for as late as it runs is not
    known. pytest's own fixtures, and those that judge scopes, hold nothing that others could wait
    for.
    """
    known: dict[int, list[pytest.FixtureDef[Any]]] = {}
    sets: dict[Told, int] = {}
    places = []
    for item in items:
        info = getattr(item, "_fixtureinfo", None)  # doctests have one, other items need not
        if id(info) not in known:
            known[id(info)] = [*_wide(info)] if info is not None and info.names_closure else []
        told: Told = ()
        if found := known[id(info)]:
            params = getattr(getattr(item, "callspec", None), "indices", {})
            told = tuple(
                (_node_of(item, each), identity(each), params.get(each.argname)) for each in found
            )
        places.append(sets.setdefault(told, len(sets)))
    leasing = {identity(each) for found in known.values() for each in found if _leases(each.func)}
    return [*sets], places, sorted(leasing)


_LEASE = "gpu_lease"
_DECORATORS = 20
"""How many around a function are looked through."""


def _leases(function: Any) -> bool:
    """Return whether a fixture takes a lease, by the names in its code or in that of a helper.

    What it hides deeper is known once it asks for one.
    """
    own = _plain(function)
    if own is None:
        return False
    names = own.__code__.co_names
    helpers = [_plain(own.__globals__.get(name)) for name in names]
    return _LEASE in names or any(each and _LEASE in each.__code__.co_names for each in helpers)


def _plain(function: Any) -> types.FunctionType | None:
    """Return the function below decorators, None for what is no function.

    Nobody's code runs: ``unittest.mock.call`` is wrapped for ever, a lazy module loads itself.
    """
    for _ in range(_DECORATORS):
        if type(function) is types.MethodType:
            function = function.__func__
        elif type(function) is not types.FunctionType:
            return None
        elif "__wrapped__" not in vars(function):
            return function
        else:
            function = vars(function)["__wrapped__"]
    return None


_HOLD_NOTHING = ("_pytest.", "pytest_gpumem.plugin.scopes")
"""Modules of fixtures."""


def _wide(info: Any) -> Iterator[pytest.FixtureDef[Any]]:
    for name in info.names_closure:
        definitions = [*info.name2fixturedefs.get(name, ())]
        while definitions:
            last = definitions.pop()
            own = last.func.__module__.startswith(_HOLD_NOTHING) and not name.startswith("_")
            if last.scope != "function" and not own:  # setup_module and the like begin with "_"
                yield last
            if name not in last.argnames:  # it overrides the one before without using it
                break


def _node_of(item: pytest.Item, fixture: pytest.FixtureDef[Any]) -> str:
    """Return the node with which a wide fixture of ``item`` is torn down; "" is the session."""
    around = [*reversed(item.listchain()[1:-1])]
    kinds = {"class": (pytest.Class, pytest.Module), "module": (pytest.Module,)}
    for kind in kinds.get(fixture.scope, ()):
        for node in around:
            if isinstance(node, kind):
                return node.nodeid
    packages = (node.nodeid for node in around if isinstance(node, pytest.Package))
    scoped = fixture.scope == "package" and fixture.baseid in packages
    return fixture.baseid if scoped and fixture.baseid != "." else ""

"""What pytest itself keeps of a test that is over, a moment longer than the test."""

from __future__ import annotations

import pytest

from pytest_gpumem.tracking.reach import holds_memory

_RUN = (pytest.FixtureRequest, pytest.Config, pytest.Item, pytest.Collector)
"""What leads to all of the run: a model of the session, by way of another test."""


def keepers(item: pytest.Item) -> dict[int, str]:
    """Return what pytest itself keeps of a test that ran: the instance of its class."""
    instance = getattr(item, "instance", None)
    if instance is None:
        return {}
    return {id(instance): f"pytest's {type(instance).__name__} instance: self"}


def drop_arguments(item: pytest.Item) -> dict[int, str]:
    """Let go of the test's fixture values, which pytest would drop right after the teardown.

    Judged a moment earlier than that, they would look like a leftover. Only those that hold
    memory of a card are let go, and their names stay: other plugins read values, a browser's
    page say, when they make the teardown's report. ``request``, and what has it, leads to all of
    the run, which goes on. Returns the identities of all else that is left.
    """
    arguments = getattr(item, "funcargs", None)
    if not isinstance(arguments, dict):
        return {}
    found = {name: holds_memory(value, _RUN) for name, value in arguments.items()}
    arguments.update((name, None) for name, holds in found.items() if holds)
    left = (arguments[name] for name, holds in found.items() if holds is False)
    return {id(value): "the test's arguments" for value in left}

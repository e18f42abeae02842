"""Fails tests and modules that took or left more VRAM than they may."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_gpumem.plugin.state import STATE, marks_of
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pytest_gpumem import records
    from pytest_gpumem.tracking.accounts import Usage
    from pytest_gpumem.tracking.tracker import Tracker


class Limiting:
    """Fails tests that peak above their limit; only in a run in which some have one."""

    NAME = "gpumem-limiting"

    def __init__(self, tracker: Tracker, limit: int | None) -> None:
        self._tracker = tracker
        self._limit = limit
        """Of tests without a mark."""

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_call(self, item: pytest.Item) -> None:
        """Fail a test that passed but peaked above its limit; not called for one that failed."""
        limit = _limit(marks_of(item).vram_limit, self._limit)
        if limit is not None:
            took = [(card, card.peak - card.baseline) for card in self._tracker.usage()]
            _enforce(item, "call", "allowed {}, took {} at its peak", limit, took)


def enforce_leaks(item: pytest.Item, usage: Usage, suite: int | None) -> None:
    """Fail the teardown of a test that leaked more than its mark, or the ``suite``, allows."""
    limit = _limit(marks_of(item).vram_leak_limit, suite)
    if limit is not None:
        leaked = [(card, card.leaked) for card in usage.cards]
        _enforce(item, "teardown", "allowed to leak {}, leaked {}", limit, leaked)
        _enforce_of_fixtures(usage, limit)


def enforce_of_module(name: str, left: Iterable[records.ScopeUsage], limit: int) -> None:
    """Fail the teardown in which a module ends that left more than ``limit``."""
    for each in left:
        if each.left > limit:
            held = f", held by {each.holders[0].where}" if each.holders else ""
            sizes = f"{format_bytes(limit)}, left {format_bytes(each.left)}"
            pytest.fail(f"module {name} is allowed to leave {sizes}{held}", pytrace=False)


def _limit(marked: int | None, suite: int | None) -> int | None:
    return suite if marked is None else marked


def _enforce(
    item: pytest.Item,
    when: str,
    sentence: str,
    limit: int,
    sizes: Sequence[tuple[records.CardUsage, int]],
) -> None:
    """Fail the test with ``sentence`` where a size is above ``limit``."""
    for card, size in sizes:
        if size > limit:
            from pytest_gpumem.reports import terminal

            cards = item.config.stash[STATE].found.cards
            names = (each.called(cards) for each in cards if each.uuid == card.card)
            name = next(names, card.card)
            item.add_report_section(when, "GPU memory", "\n".join(terminal.usage_lines(card, name)))
            # Without the traceback, which would show this plugin's lines and not the test's.
            pytest.fail(sentence.format(format_bytes(limit), format_bytes(size)), pytrace=False)


def _enforce_of_fixtures(usage: Usage, limit: int) -> None:
    """Fail the test after which a wider fixture left processes that hold more than ``limit``."""
    for fixture in usage.fixtures:
        if fixture.orphaned > limit:
            size = f"{format_bytes(fixture.orphaned)} of {fixture.name!r} ({fixture.scope})"
            text = f"allowed to leak {format_bytes(limit)}, processes of a fixture hold {size}"
            pytest.fail(text, pytrace=False)

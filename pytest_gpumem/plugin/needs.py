"""What the test that begins is to be granted: by its marks, by what was learned, as scheduled."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pytest_gpumem import admission
from pytest_gpumem.plugin import marks, retry
from pytest_gpumem.plugin.state import ItemMarks, State, marks_of
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pytest

    from pytest_gpumem.leases.ask import Need
    from pytest_gpumem.plugin.settings import Settings
    from pytest_gpumem.records import Card
    from pytest_gpumem.scheduling.history import Expectation, History

ANY = marks.MarkedNeed(vram=None, cards=1, exclusive=False)
"""What a test without a mark asks for."""


class Needs:
    """Tells what tests are to be granted.

    Args:
        state: the plugin's.
        history: what is known of the tests.
        granted: as for ``Leases``.

    """

    def __init__(
        self, state: State, history: History, granted: Callable[[], Need | None] | None
    ) -> None:
        self._state = state
        self._settings = state.settings
        self._history = history
        self._granted = granted
        self.expected: Expectation | None = None
        """Of the test that was asked for last, if it has no mark."""

    def of(self, item: pytest.Item, marked: ItemMarks, step: str) -> Need | None:
        """Return what a test is to be granted, None for one that asks for nothing."""
        self.expected = None
        if marked.off:
            return None
        if self._granted is not None and not step:
            return self._granted()
        need = self._of_cards(item, marked, step) if self._state.found.cards else None
        if marked.ram is None and not self._settings.ram:
            return need
        if ram := self._of_main_memory(item, marked):
            from pytest_gpumem.leases.ask import Need

            need = (need or Need(0, 0))._replace(ram=ram)
        return need

    def _of_main_memory(self, item: pytest.Item, marked: ItemMarks) -> int:
        from pytest_gpumem.scheduling.estimates import to_set_aside
        from pytest_gpumem.scheduling.ram import WORTH_A_LEASE

        size = marked.ram or 0
        if self._settings.ram:
            size = to_set_aside(marked.ram, self._history.expect(item.nodeid))
        return size if size >= WORTH_A_LEASE else 0

    def _of_cards(self, item: pytest.Item, marked: ItemMarks, step: str) -> Need | None:
        if step == retry.CPU:
            return None
        asked = marked.need or ANY
        if step:
            from pytest_gpumem.leases.ask import Need

            return Need(None, asked.cards)
        if not self._history and marked.need is None and "torch" not in sys.modules:
            return None  # as for each test of a suite that uses no card
        expected = self._history.expect(item.nodeid, asked.vram)
        self.expected = expected if asked.vram is None else None
        known = expected.peak is not None or expected.gpu or marked.need is not None
        if not known and (expected.source != "guess" or "torch" not in sys.modules):
            return None
        return _need_of(expected, marked.need, known=known)


def _need_of(expected: Expectation, mark: marks.MarkedNeed | None, *, known: bool) -> Need:
    """Return what to grant a test of which this is known, or which may use a card."""
    from pytest_gpumem.leases.ask import SOMETHING, Need  # many runs never ask for a lease

    asked = mark or ANY
    if expected.source == "mark":  # which is for all that the test works with
        return Need(0, asked.cards, asked.exclusive, expected.peak or 0)
    if expected.peak is not None:
        return Need(expected.peak, asked.cards, asked.exclusive, expected.fixtures)
    return Need(None if known else SOMETHING, asked.cards)


def too_large(item: pytest.Item, need: Need, cards: Sequence[Card], settings: Settings) -> str:
    """Return in one sentence why no card can ever grant what a test's mark asks for."""
    if need.cards > len(cards):
        return admission.why_too_many(item.nodeid, need.cards, len(cards))
    asked = marks_of(item).need
    vram = asked.vram if asked is not None else None
    besides = settings.context_cost + settings.headroom
    for card in cards[: need.cards]:
        if vram is not None and vram + besides > card.total:
            return admission.why_too_large(
                item.nodeid,
                vram,
                need.cards,
                f"{card.name} has {format_bytes(card.total)}",
                context=settings.context_cost,
                headroom=settings.headroom,
            )
    return ""

"""What workers and reports tell the controller, in the planner's terms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpumem.records import properties
from pytest_gpumem.scheduling.estimates import PlannedTest
from pytest_gpumem.scheduling.fixtures import WideFixture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from pytest_gpumem.plugin.xdist.worker import Told
    from pytest_gpumem.scheduling.commands import CardKey
    from pytest_gpumem.scheduling.history import Expectation


class Taken(NamedTuple):
    """What a test took, on the card where that is most; bytes."""

    peak: int = 0
    """Beyond what its process kept before it."""
    fixtures: int = 0
    """What the wider fixtures that it uses hold."""


def planned_tests(
    collection: Sequence[str],
    needs: Iterable[tuple[int, int | None, int, bool]],
    expect: Callable[[str, int | None], Expectation],
    *,
    most: int,
    any_card: bool,
    wide: tuple[Sequence[Told], Sequence[int]] = ((), ()),
) -> list[PlannedTest]:
    """Return the collected tests with what is expected of them.

    ``needs`` are the marked tests: index, bytes (None: not said), cards, exclusive. Without any
    card they are tests like others, which find out for themselves. ``most`` are the bytes that a
    test can have: only a mark may ask for more, an estimate with its margin may not. ``wide`` are
    the wide fixtures, as ``worker.wide_fixtures`` tells.
    """
    sets = [tuple(WideFixture(*each) for each in told) for told in wide[0]]
    wide_of = dict(enumerate(sets[place] for place in wide[1]))
    marked = {need[0]: need for need in needs}
    planned = []
    for index, nodeid in enumerate(collection):
        _, vram, cards, exclusive = marked.get(index, (index, None, 1, False))
        expected = expect(nodeid, vram)
        peak, held = expected.peak, expected.fixtures
        if peak is not None and expected.source != "mark":
            peak = min(peak, max(0, most))
            held = min(held, max(0, most - peak))
        planned.append(
            PlannedTest(
                nodeid=nodeid,
                gpu=any_card and (expected.gpu or index in marked),
                peak=peak,
                duration=expected.duration,
                group=nodeid.split("::")[0],
                cards=cards,
                exclusive=exclusive,
                seen=expected.source == "learned",
                fixtures=held,
                wide=wide_of.get(index, ()),
            )
        )
    return planned


def cards_of(
    hellos: Iterable[Mapping[str, Any]],
) -> tuple[dict[CardKey, int], dict[CardKey, int]]:
    """Return each card's total, and what anybody uses of it, in bytes.

    Each worker told of its host and cards: uuid, total, used.
    """
    totals: dict[CardKey, int] = {}
    used: dict[CardKey, int] = {}
    for hello in hellos:
        for uuid, total, by_all in hello["cards"]:
            card = hello.get("host", ""), uuid
            totals[card] = total
            used[card] = max(used.get(card, 0), by_all)
    return totals, used


def taken(told: Iterable[tuple[str, object]]) -> Taken:
    """Return what a test took, from its report."""
    cards = properties.read(told).cards
    return Taken(
        max((usage.extra for usage in cards), default=0),
        max((usage.fixture_bytes for usage in cards), default=0),
    )

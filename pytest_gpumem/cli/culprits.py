"""Which of the tests before one make it fail: a search in as few runs as it takes.

A run is asked for by the tests that are to come before it. All of them together make it fail, none
of them does not. So somewhere in the list stands a last place from which on they make it fail: the
test at that place matters, and halving finds it in log2 of their number of runs. If it makes the
test fail by itself, it was the one. Otherwise others behind it are needed as well, and the same
search, with what was found at the head of each run, finds the next one. Each step is certain
whatever the tests do to one another; nothing is taken for granted of those that undo what others
did.

Tests that were seen to leave something behind are looked at first: together they weigh as much as
all others, and it is the weight that is halved. One of a few of them is found in two or three runs,
and any other test in one or two runs more than without.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    Fails = Callable[[Sequence[str]], bool]


def remembered(fails: Fails) -> Fails:
    """Return ``fails`` so that the same question is asked once."""
    known: dict[tuple[str, ...], bool] = {}

    def ask(before: Sequence[str]) -> bool:
        key = tuple(before)
        if key not in known:
            known[key] = fails(before)
        return known[key]

    return ask


def culprits(
    fails: Fails, before: Sequence[str], suspects: Collection[str] = frozenset()
) -> list[str]:
    """Return the tests of ``before`` that make it fail together, of which none can be missed.

    Args:
        fails: whether it fails after some of them, in their order; it does after all, and does not
            after none.
        before: the tests before it, in their order.
        suspects: those of them that are more likely than others.

    """
    fails = remembered(fails)
    found: list[str] = []
    rest = list(before)
    while True:
        # With what was found it fails after those from ``low`` on, not after those from ``high``.
        low, high = 0, len(rest)
        weights = _weights(rest, suspects)
        while high - low > 1:
            middle = _middle(weights, low, high)
            if fails([*found, *rest[middle:]]):
                low = middle
            else:
                high = middle
        found.append(rest[low])
        # The last one left needs no run: it is what the search ended with.
        if (rest := rest[low + 1 :]) == [] or fails(found):
            return _needed(fails, found)


def _weights(rest: Sequence[str], suspects: Collection[str]) -> list[int]:
    """Return by place what all before it weigh, and at the end what all weigh."""
    some = sum(each in suspects for each in rest)
    suspect, other = (len(rest) - some or 1, some) if some else (1, 1)
    return [0, *itertools.accumulate(suspect if each in suspects else other for each in rest)]


def _middle(weights: Sequence[int], low: int, high: int) -> int:
    """Return the place between two others that parts what is between them most evenly."""
    half = (weights[low] + weights[high]) / 2
    at = bisect_left(weights, half, low + 1, high - 1)
    nearer = at > low + 1 and half - weights[at - 1] <= weights[at] - half
    return at - 1 if nearer else at


def _needed(fails: Fails, found: Sequence[str]) -> list[str]:
    """Return ``found`` without those that turn out not to matter beside the others."""
    kept = list(found)
    for each in found if len(found) > 1 else ():
        without = [one for one in kept if one != each]
        if without and fails(without):
            kept = without
    return kept

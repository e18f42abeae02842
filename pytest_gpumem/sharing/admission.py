"""The one rule of who may use a card now; leases and the planner both ask it. Sizes are bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

_MOST_SUMS = 512
"""Up to here the sums that a queue can reach are counted; beyond it nobody passes anybody."""


class Claim(NamedTuple):
    """What one process may use of one card."""

    resident: int
    """What it keeps anyway: its context and its wider fixtures."""
    extra: int
    """What its running test may take beyond that."""
    exclusive: bool
    """Whether nobody else's test may use the card meanwhile."""


def room(total: int, others: int, headroom: int, claims: Iterable[Claim]) -> int:
    """Return what a new claim may take of a card; zero or less: nothing.

    ``total`` is the card's capacity, ``others`` what foreign processes use, ``headroom`` what is
    never given out.
    """
    return total - others - headroom - sum(claim.resident + claim.extra for claim in claims)


def fits(total: int, others: int, headroom: int, claims: Sequence[Claim], new: Claim) -> bool:
    """Return whether ``new`` may run beside ``claims``."""
    if any(_conflict(new, claim) for claim in claims):
        return False
    return new.resident + new.extra <= room(total, others, headroom, claims)


def missing(fixtures: int, context: int, kept: int, standing: int) -> int:
    """Return what a process that keeps ``kept`` lacks before a test: of context and fixtures.

    ``fixtures`` is what the test's wider fixtures hold. Those that are set up, ``standing``, are
    taken for them, if any: others would be torn down before the test's own are set up. What the
    process keeps besides, such as leaks, makes no room. It may keep less than its fixtures held:
    models that were archived come back.
    """
    there = min(standing, max(0, kept - context))
    return max(0, context - kept) + max(0, fixtures - there)


def never_fits(total: int, headroom: int, new: Claim) -> bool:
    """Return whether ``new`` asks for more than there is on an empty card."""
    return new.resident + new.extra + headroom > total


def may_start(
    total: int,
    others: int,
    headroom: int,
    claims: Sequence[Claim],
    new: Claim,
    *,
    ahead: Sequence[Claim],
) -> bool:
    """Return whether ``new`` may run beside ``claims`` without delaying those ``ahead`` of it.

    Passing a request that waits is safe only with bytes that it could not use whichever of the
    claims end first, see ``spare``: so nobody waits longer than in plain first come, first
    served. A request that only foreign processes keep waiting is no reason to wait.
    """
    if not fits(total, others, headroom, claims, new):
        return False
    if not ahead:
        return True
    kept = sum(claim.resident for claim in claims)
    capacity = total - others - headroom - kept
    waiting = (claim for claim in ahead if not capacity < claim.extra <= capacity + others)
    sizes = (_size(claim, capacity) for claim in (*claims, *waiting))
    return _size(new, capacity) <= spare(capacity, sizes)


def waits_in_vain(
    total: int, headroom: int, claims: Sequence[Claim], new: Claim, *, ahead: Sequence[Claim]
) -> bool:
    """Return whether ``new`` is next, nobody runs, and what idle processes keep leaves no room.

    Nothing would change by waiting: it has to run alone, with less than it asked for.
    """
    idle = not any(claim.extra or claim.exclusive for claim in claims)
    return idle and not ahead and not fits(total, 0, headroom, claims, new)


def spare(capacity: int, sizes: Iterable[int]) -> int:
    """Return how much of ``capacity`` no combination of ``sizes`` that fits in it could use.

    Zero when there are too many combinations to count.
    """
    sums = {0}
    for size in sizes:
        sums |= {reached + size for reached in sums if reached + size <= capacity}
        if capacity in sums or len(sums) > _MOST_SUMS:
            return 0
    return capacity - max(sums)


def _size(claim: Claim, capacity: int) -> int:
    return capacity if claim.exclusive else min(claim.extra, capacity)


def _conflict(one: Claim, other: Claim) -> bool:
    return (one.exclusive and (other.exclusive or other.extra > 0)) or (
        other.exclusive and one.extra > 0
    )

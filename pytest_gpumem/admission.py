"""The one rule of who may use a card now; leases and the planner both ask it. Sizes are bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pytest_gpumem.tuples import NamedTuple
from pytest_gpumem.units import format_bytes

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

    def beside(self, other: Claim) -> Claim:
        """Return the claim of one process that has both."""
        return Claim(
            self.resident + other.resident,
            self.extra + other.extra,
            self.exclusive or other.exclusive,
        )


NOTHING = Claim(0, 0, exclusive=False)


def foreign(used: int, ours: Iterable[tuple[int, int]], before: int = 0) -> int:
    """Return what others than our processes use of a card; never negative.

    ``used`` is what the driver says of the whole card. ``ours`` are, for each of our processes,
    the least and the most that it may be using of it, see ``bounds``. Where that leaves a choice,
    what was found ``before`` still holds as far as it can; so, at first, what cannot be told
    apart is ours.
    """
    known = list(ours)
    least = used - sum(most for _, most in known)
    most = used - sum(least for least, _ in known)
    return max(0, min(max(before, least), most))


def bounds(claim: Claim, limit: int, told: int | None = None) -> tuple[int, int]:
    """Return the least and the most that a process with ``claim`` may be using of a card.

    It has what it keeps, and of the rest of its claim nobody knows, but for ``limit``: the card,
    or what is used by none of the processes that the driver lists. What the driver has ``told``
    of the process's number decides, within the claim: beyond it, it may be another's in another
    pid namespace, and what a process takes beyond its claim is not there for others either.
    """
    granted = claim.resident + claim.extra
    if told is None:
        most = limit if claim.exclusive else min(granted, limit)
        return claim.resident, max(claim.resident, most)
    exact = max(told, claim.resident)
    exact = exact if claim.exclusive else min(exact, granted)
    return exact, exact


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
    total: int,
    others: int,
    headroom: int,
    claims: Sequence[Claim],
    new: Claim,
    *,
    ahead: Sequence[Claim],
) -> bool:
    """Return whether ``new`` is next, nobody runs, and what is kept all the same leaves no room.

    Idle processes and foreign ones keep it, and no lease that ends gives it back: after a while
    ``new`` has to run alone, with less than it asked for.
    """
    idle = not any(claim.extra or claim.exclusive for claim in claims)
    return idle and not ahead and not fits(total, others, headroom, claims, new)


def spare(capacity: int, sizes: Iterable[int]) -> int:
    """Return how much of ``capacity`` no combination of ``sizes`` that fits in it could use.

    Zero when there are too many combinations to count.
    """
    known = list(sizes)
    if (whole := sum(known)) <= capacity:
        return capacity - whole
    sums = {0}
    for size in known:
        sums |= {reached + size for reached in sums if reached + size <= capacity}
        if capacity in sums or len(sums) > _MOST_SUMS:
            return 0
    return capacity - max(sums)


def why_too_large(
    nodeid: str, size: int, cards: int, there_is: str, *, context: int, headroom: int
) -> str:
    """Return in one sentence why a test can never run; ``there_is`` says what each card has."""
    each = "" if cards == 1 else f" on each of {cards} cards"
    return (
        f"{nodeid} needs {format_bytes(size)}{each}; {there_is}, of which a process costs "
        f"{format_bytes(context)} and {format_bytes(headroom)} are never given out"
    )


def why_too_many(nodeid: str, cards: int, most: int) -> str:
    """Return in one sentence why a test on ``cards`` cards can never run."""
    wanted, seen = (f"{count} card{'s' * (count != 1)}" for count in (cards, most))
    return f"{nodeid} needs {wanted}; no process that runs tests sees more than {seen}"


def _size(claim: Claim, capacity: int) -> int:
    return capacity if claim.exclusive else min(claim.extra, capacity)


def _conflict(one: Claim, other: Claim) -> bool:
    return (one.exclusive and (other.exclusive or other.extra > 0)) or (
        other.exclusive and one.extra > 0
    )

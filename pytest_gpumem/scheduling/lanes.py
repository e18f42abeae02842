"""In which lane a test waits: what is known of it, and what the cards have, decide."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gpumem.scheduling import contexts
from pytest_gpumem.scheduling.backlog import Lane
from pytest_gpumem.scheduling.commands import Fail
from pytest_gpumem.scheduling.history import family

if TYPE_CHECKING:
    from pytest_gpumem.scheduling.state import State

LONG = 0.01
"""Tests longer than this part of the shortest possible run are long..."""
OUTLIER = 2
"""... if they last this many times the average; else all tests of a small suite would be."""


def lane_of(state: State, test: int) -> Lane:
    """Return how ``test`` has to run, as far as is known now.

    Which of those that share a card are large is decided once, by ``open_lanes``.
    """
    if not uses_card(state, test):
        return Lane.RAM if state.ram.packs(test) else Lane.CPU
    if state.seen.ooms[test] > 1:
        return Lane.LAST
    if not _may_share(state, test) or state.seen.whole(test) > state.cluster.roomiest():
        return Lane.ALONE
    return Lane.SHARED if state.tests[test].cards == 1 else Lane.WIDE


def uses_card(state: State, test: int) -> bool:
    """Return whether ``test`` uses a card, or is better not taken for one that does not.

    Where not every worker has room for a context, never-seen tests of a module that uses a
    card would run out of memory in those that have none.
    """
    seen = state.seen
    return seen.on_card(test) or (seen.suspect(test) and state.cluster.crowded())


def _may_share(state: State, test: int) -> bool:
    """Return whether ``test`` may run beside others where there is room."""
    unknown = state.seen.need(test) is None and not state.optimistic
    return not (unknown or state.tests[test].exclusive or test in state.seen.ooms)


def admit(state: State, test: int) -> None:
    """Let ``test`` wait where it belongs, or for the scout of its family."""
    lane = lane_of(state, test)
    if lane is Lane.ALONE and _scouts(state, test):
        kin = family(state.tests[test].nodeid)
        if test not in state.seen.ooms and state.backlog.follow(test, kin):
            return
        state.backlog.scouts(kin)
    state.backlog.add(test, lane)


def _scouts(state: State, test: int) -> bool:
    """Return whether the peak of ``test`` would tell what others of its family need."""
    planned = state.tests[test]
    if state.optimistic or planned.exclusive or state.seen.need(test) is not None:
        return False
    return not state.seen.scouted(family(planned.nodeid))


def scout_ended(state: State, kin: str) -> None:
    """Let a family's tests go whose scout ended; send the next one if it told nothing."""
    backlog = state.backlog
    if not backlog.has_scout(kin):
        return
    if state.seen.scouted(kin) or not backlog.next_scout(kin):
        for test in backlog.released(kin):
            admit(state, test)
    if not backlog.scouting:
        state.until_replan = 0


def give_up(state: State, test: int) -> None:
    """Fail ``test``, which waits nowhere and can never run."""
    state.out.append(Fail(test, state.cluster.why_never(test)))
    state.left -= 1
    state.changed = True
    scout_ended(state, family(state.tests[test].nodeid))


def open_lanes(state: State) -> None:
    """Sort all tests, now that the workers are known."""
    state.ram.open(state.cluster.workers.values())
    on_cpu: list[int] = []
    in_ram: list[int] = []
    sharing: list[int] = []
    for test, planned in enumerate(state.tests):
        if not planned.gpu:
            (in_ram if state.ram.packs(test) else on_cpu).append(test)
        elif not state.cluster.possible_anywhere(test):
            give_up(state, test)
        elif planned.cards == 1 and _may_share(state, test):
            sharing.append(test)
        else:
            admit(state, test)
    state.backlog.expect(sharing)
    for test in in_ram:
        state.backlog.add(test, Lane.RAM)
    long = _long(state)
    state.backlog.cpu.fill(on_cpu, long)
    contexts.replan(state)
    rooms = [state.cluster.capacity(card, card.contexts) for card in state.cluster.cards.values()]
    state.backlog.fill_shared(sharing, long, min(rooms, default=0))


def _long(state: State) -> float:
    """Return the seconds beyond which a test is long."""
    cluster, count = state.cluster, len(state.tests)
    total = sum(test.duration for test in state.tests)
    longest = max((test.duration for test in state.tests), default=0.0)
    space = sum(cluster.capacity(card, 1) for card in cluster.cards.values())
    packed = state.backlog.area / max(1, space)
    bound = max(total / max(1, len(cluster.workers)), longest, packed)
    return max(LONG * bound, OUTLIER * total / max(1, count))

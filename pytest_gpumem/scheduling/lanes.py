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
    if state.cluster.is_exclusive(test) or state.seen.whole(test) > state.cluster.roomiest():
        return Lane.ALONE
    return Lane.SHARED if state.tests[test].cards == 1 else Lane.WIDE


def uses_card(state: State, test: int) -> bool:
    """Return whether ``test`` uses a card, or is better not taken for one that does not.

    Where not every worker has room for a context, never-seen tests of a module that uses a
    card would run out of memory in those that have none.
    """
    seen = state.seen
    return seen.on_card(test) or (seen.suspect(test) and state.cluster.crowded())


def admit(state: State, test: int) -> None:
    """Let ``test`` wait where it belongs, or for a scout: of its fixture, or of its family."""
    lane, backlog = lane_of(state, test), state.backlog
    if fixture := state.seen.untold(test):
        if backlog.holders.follow(fixture, test):
            return
        backlog.holders.send(fixture, test)
    elif lane is Lane.ALONE and _scouts(state, test):
        kin = family(state.tests[test].nodeid)
        if test not in state.seen.ooms and backlog.families.follow(kin, test):
            return
        backlog.families.send(kin, test)
    backlog.add(test, lane)


def _scouts(state: State, test: int) -> bool:
    """Return whether the peak of ``test`` would tell what others of its family need."""
    planned = state.tests[test]
    if planned.exclusive or state.seen.need(test) is not None:
        return False
    return not state.seen.scouted(family(planned.nodeid))


def scout_ended(state: State, kin: str) -> None:
    """Let a family's tests go whose scout ended; send the next one if it told nothing."""
    families = state.backlog.families
    if kin not in families.scouts:
        return
    following = None if state.seen.scouted(kin) else families.next(kin)
    if following is not None:
        state.backlog.add(following, Lane.ALONE)
    else:
        for test in families.release(kin):
            admit(state, test)
    if not families.scouts:
        state.until_replan = 0


def begins(state: State, fixture: str, test: int) -> None:
    """Let all tests but ``test`` wait until a wide fixture stands that it sets up."""
    state.seen.begins(fixture)
    if state.seen.untold(test) and fixture not in state.backlog.holders.scouts:
        state.backlog.holders.send(fixture, test)
    _leave_cpu(state, fixture)


def stands(state: State, fixture: str, *, leases: bool) -> None:
    """Let the tests go that waited for what a wide fixture holds.

    ``leases`` says whether it took a lease, which they run within.
    """
    state.seen.told(fixture, leases=leases)
    for test in state.backlog.holders.release(fixture):
        admit(state, test)
    _leave_cpu(state, fixture)
    state.changed = True
    state.until_replan = 0


def _leave_cpu(state: State, fixture: str) -> None:
    """Let tests of a fixture that turned out to use a card no longer wait as CPU tests.

    Whoever has set it up had better find those of its module among the GPU tests.
    """
    if fixture in state.moved or not state.seen.is_on_card(fixture):
        return
    state.moved.add(fixture)

    def uses_it(test: int) -> bool:
        return any(each.name == fixture for each in state.tests[test].wide)

    for test in state.backlog.cpu.extract(
        state.modules_of.get(fixture, ()), lambda each: uses_it(each) and state.seen.on_card(each)
    ):
        admit(state, test)


def setter_ended(state: State, test: int) -> None:
    """Let those go that waited for a fixture to stand which ``test`` was to set up.

    What it holds that did not come to stand, if anything, its next tests find out.
    """
    for each in state.tests[test].wide:
        if state.backlog.holders.scouts.get(each.name) == test:
            stands(state, each.name, leases=False)


def give_up(state: State, test: int) -> None:
    """Fail ``test``, which waits nowhere and can never run."""
    state.out.append(Fail(test, state.cluster.why_never(test)))
    state.left -= 1
    state.changed = True
    scout_ended(state, family(state.tests[test].nodeid))
    setter_ended(state, test)


def open_lanes(state: State) -> None:
    """Sort all tests, now that the workers are known."""
    state.ram.open(state.cluster.workers.values())
    on_cpu: list[int] = []
    in_ram: list[int] = []
    sharing: list[int] = []
    for test, planned in enumerate(state.tests):
        if not state.seen.on_card(test):
            (in_ram if state.ram.packs(test) else on_cpu).append(test)
        elif not state.cluster.possible_anywhere(test):
            give_up(state, test)
        elif planned.cards > 1 or state.cluster.is_exclusive(test) or state.seen.untold(test):
            admit(state, test)
        else:
            sharing.append(test)
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

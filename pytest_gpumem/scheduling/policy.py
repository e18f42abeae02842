"""Why a worker is given a test: the rules in the order in which they are asked, see ``RULES``.

- GPU tests come first. As many workers hold a CUDA context as make the run shortest (see
  ``contexts``); the others run CPU tests, which also fill the waits of the former.
- Long tests come first, longest first; the others go module by module, so that module fixtures
  are set up rarely. A worker whose module is done takes the largest next (of those that nobody
  has run the smallest), and at the end half of what another still has (see ``piles``). While GPU
  tests are not what the run waits for, it ends its module before it goes to GPU tests elsewhere.
- A worker whose module fixtures leave no room for as much at another worker, such as an engine,
  ends its module first: these tests run one by one in any order.
- The first test that does not fit gets a reservation of its cards and may be passed by a limited
  number of smaller ones (backfill), so that none starves.
- A GPU test of which nothing is known runs alone. One of each family goes first; its peak is
  then expected of the others (see ``lanes``).
- Where not every worker has room for a context, a test of which nothing is known but that others
  of its module turned out to use a card counts as a GPU test, until one of its family used none.
- Short CPU tests are handed out ahead (prefetch), many at once, to workers that no GPU test can
  want. A worker in which one of them uses a card all the same returns those behind it.
- A test that runs out of memory beside others, or beside what they keep, runs again, alone on its
  cards. A test never seen before may use a card although nobody said so: if one ran beside it,
  and memory was short once more, it runs a last time when no such test is left.
- A test that catches its own OutOfMemoryError cannot be seen to have run out of memory: it is not
  run again, and on the first run without marks it may have shared the card unexpectedly.
- When no GPU test runs on a card and none fits, idle workers give back module fixtures, then
  session fixtures, as many of them as it takes (eviction); after that the test runs alone whatever
  the numbers say. What a worker kept even then, such as leaks, it is not asked for again.
- A worker sets up no wide fixture beside one that it would never find beside it in plain xdist
  (see ``fixtures``). It takes other tests first, and gives back what it has if there are none.
- Tests that would not all fit into main memory are packed by what they take of it, largest first
  (see ``ram``); a GPU test among them waits for both. Nothing is handed out ahead of its room.
- A worker that has grown too large is replaced when it has ended its module.
- A running test may wait for something that the fixtures of an idle worker hold: a lock, a port, a
  database. A worker is stopped as soon as no test waits for one, as in plain xdist; one that is
  idle before gives its fixtures back whenever a test beside it stalls.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from pytest_gpumem.scheduling import lanes
from pytest_gpumem.scheduling.actions import give_back, in_order, launch, run
from pytest_gpumem.scheduling.ahead import next_portion, prefetch
from pytest_gpumem.scheduling.commands import Replace, Stop
from pytest_gpumem.scheduling.contexts import may_use
from pytest_gpumem.scheduling.places import Reservation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_gpumem.scheduling.estimates import PlannedTest
    from pytest_gpumem.scheduling.piles import Portion
    from pytest_gpumem.scheduling.places import Card, Worker
    from pytest_gpumem.scheduling.state import State

LOOK = 8
"""Tests of a queue that are looked at for one that fits."""
BACKFILL = 64
"""Tests that may pass one that waits for room on a card."""
DRAIN = 4
"""Tests that must run alone, per card, for which the card stops taking others."""


def serve(state: State, worker: Worker) -> None:
    """Give ``worker`` something to do, if there is anything."""
    if worker.idle:
        worker.out_of_order = False
        for rule in RULES:
            if rule(state, worker):
                break
        else:
            return
    del state.asking[worker.name]
    if worker.given and not worker.using:
        prefetch(state, worker)


# The rules: each does what it is named for and returns True, or does nothing.


def replace(state: State, worker: Worker) -> bool:
    """Replace a worker that has grown too large, unless its module goes on or nothing waits."""
    if not worker.too_large or state.all_given:
        return False
    # One that gave its fixtures back has ended its module whatever waits.
    group, backlog = worker.ran.group if worker.group and worker.ran else "", state.backlog
    own = any(each and each.group == group and each.tests for each in (worker.cpu, worker.gpu))
    if group and (own or backlog.cpu.free(group) or backlog.shared.free(group)):
        return False
    state.out.append(Replace(worker.name))
    return True


def run_gpu_test(state: State, worker: Worker) -> bool:
    """Run a GPU test that may go now: the reserved one, else the first of the lanes that fits."""
    card = worker.card
    if card.exclusive or not may_use(state, worker):
        return False
    closed = _drains(state, card)
    if _run_reserved(state, worker, closed=closed):
        return True
    if not closed and _run_from_lanes(state, worker):
        return True
    return _run_from_elsewhere(state, worker)


def evict_for_waiting(state: State, worker: Worker) -> bool:
    """Have fixtures given back that keep a GPU test from running at all."""
    return _held_up(state, worker.card) and evict(state, worker)


def make_way_for_gpu_test(state: State, worker: Worker) -> bool:
    """Have fixtures given back that an urgent GPU test may not follow."""
    return worker.out_of_order and worker.card.urgent and give_back(state, worker)


def run_ram_test(state: State, worker: Worker) -> bool:
    """Run the largest test without a card for which there is main memory, one of its module first.

    Whoever ends makes as much room as it had: the next of its size takes it before smaller ones.
    """
    lane = state.backlog.ram
    first = state.backlog.first_within(state.ram.room(worker)) if lane.tests else 0
    fitting = itertools.islice(lane.tests, first, first + LOOK)
    for test in sorted(fitting, key=lambda each: state.tests[each].group != worker.group):
        if in_order(state, worker, test):
            return run(state, worker, state.backlog.take(lane, test))
    return False


def run_cpu_test(state: State, worker: Worker) -> bool:
    """Run the next CPU test."""
    cpu = state.backlog.cpu
    while len(cpu):
        portion = next_portion(state, worker)
        if portion is None:
            worker.out_of_order = True
            break
        test = cpu.take(portion, portion.tests[0])
        if not lanes.uses_card(state, test):
            return run(state, worker, test)
        lanes.admit(state, test)
        state.changed = True  # it may be what a worker has room for that was asked before
    return False


def evict(state: State, worker: Worker) -> bool:
    """Have a worker that has nothing else to do give back its fixtures, if a GPU test waits.

    The last resort waits for that.
    """
    if worker.card.running or not worker.owes:
        return False
    if not state.gpu_waits and not state.backlog.last.tests:
        return False
    return not _enough_comes_back(state, worker) and give_back(state, worker)


def last_resort(state: State, worker: Worker) -> bool:
    """Run a GPU test alone although it does not fit, when all else was tried.

    Tests that can never run are given up.
    """
    able = may_use(state, worker) or not worker.sees_card
    if not able or not worker.card.idle:
        return False
    reserved = worker.card.own_reservation
    if (
        reserved
        and all(card.idle for card in reserved.cards)
        and in_order(state, worker, reserved.test)
    ):
        return launch(state, worker, reserved.end(), alone=True)
    for portion in _lanes(state, worker):
        for test in list(itertools.islice(portion.tests, LOOK)):
            cards = state.cluster.cards_for(worker, test)
            free = state.cluster.possible(cards, test) and all(card.idle for card in cards)
            if free and in_order(state, worker, test):
                return launch(state, worker, state.backlog.take(portion, test), alone=True)
            if not state.cluster.possible_anywhere(test):
                lanes.give_up(state, state.backlog.take(portion, test))
    return False


def make_way(state: State, worker: Worker) -> bool:
    """Have fixtures given back that another test may wait for, or no test here may follow."""
    # It had better keep them for a GPU test that waits until one beside it has ended.
    room_comes = worker.kept and worker.card.running and state.gpu_waits
    return (worker.stalled or (worker.out_of_order and not room_comes)) and give_back(state, worker)


def stop(state: State, worker: Worker) -> bool:
    """Stop a worker that no test waits for."""
    if not state.all_given:
        return False
    state.cluster.stop(worker)
    state.out.append(Stop(worker.name))
    return True


RULES: tuple[Callable[[State, Worker], bool], ...] = (
    replace,
    run_gpu_test,
    evict_for_waiting,
    make_way_for_gpu_test,
    run_ram_test,
    run_cpu_test,
    evict,
    last_resort,
    make_way,
    stop,
)
"""What an idle worker does: the first rule that answers. If none does, it waits for a report."""


# Which GPU test


def _run_reserved(state: State, worker: Worker, *, closed: bool) -> bool:
    """Run the test that the card is kept for; a card that drains takes it whatever else waits."""
    reserved = worker.card.own_reservation
    if reserved is None or not (closed or _suits(state, worker, reserved.test)):
        return False
    if not state.cluster.may_go(worker, reserved.test):
        return False
    return in_order(state, worker, reserved.test) and launch(state, worker, reserved.end())


def _run_from_lanes(state: State, worker: Worker) -> bool:
    """Run the first test that fits; the first that does not gets a reservation."""
    cluster, backlog = state.cluster, state.backlog
    for portion in _lanes(state, worker):
        if not portion.tests:
            continue
        lone = portion is backlog.alone or portion is backlog.last
        may_go = cluster.may_go if lone else cluster.fits
        tests = list(itertools.islice(portion.tests, LOOK))
        if lone or (portion.group and worker.standing):  # in any order: fixtures stand longest so
            tests.sort(key=lambda each: _leads_away(state, worker, each))
        for test in tests:
            if not may_go(worker, test):
                _reserve(state, worker, portion, test)
            elif in_order(state, worker, test):
                return launch(state, worker, backlog.take(portion, test))
    if worker.gpu is not None and worker.gpu.group != worker.group:
        backlog.shared.release(worker.gpu)  # who begins with the module is to have the rest of it
        worker.gpu = None
    return False


def _leads_away(state: State, worker: Worker, test: int) -> int:
    """Return how far ``test`` is from what ``worker`` ran last: 0 in its class, 1 in its module."""
    planned, ran = state.tests[test], worker.ran
    elsewhere = ran is None or _around(planned) != _around(ran)
    return elsewhere + (planned.group != worker.group)


def _around(test: PlannedTest) -> str:
    """Return the class of ``test``, or its module."""
    return test.nodeid.partition("[")[0].rpartition("::")[0]


def _run_from_elsewhere(state: State, worker: Worker) -> bool:
    """Run a test that waits for another card, if it fits here and nothing else is left."""
    if len(state.backlog.shared):
        return False
    for card in state.cluster.cards.values():
        reserved = card.reserved
        fits = reserved and state.cluster.fits(worker, reserved.test)
        if reserved and fits and in_order(state, worker, reserved.test):
            return launch(state, worker, reserved.end())
    return False


def _lanes(state: State, worker: Worker) -> Iterator[Portion]:
    """Yield where to look for a GPU test, best first."""
    backlog = state.backlog
    if _settled(state, worker):
        if backlog.shared.free(worker.group):
            worker.gpu = _gpu_portion(state, worker)
        if worker.gpu is not None and worker.gpu.group == worker.group:
            yield worker.gpu
        return
    empty = not worker.card.running
    # Where one worker does all, its module's tests come first.
    if empty and max(worker.card.contexts, len(worker.card.claims)) > 1:
        yield backlog.alone
    yield backlog.wide
    yield backlog.large
    yield backlog.shared.long
    worker.gpu = _gpu_portion(state, worker)
    if worker.gpu is not None:
        yield worker.gpu
    if empty:
        yield backlog.alone
    if (
        backlog.last.tests
        and empty
        and not (len(backlog.cpu) or backlog.ram.tests or state.cluster.disturbed(worker.card))
    ):
        yield backlog.last


def _settled(state: State, worker: Worker) -> bool:
    """Return whether ``worker`` had better end its module before it goes elsewhere."""
    if _has_engine(state, worker) and _may_go_on(state, worker):
        return True
    if worker.card.urgent:
        return False
    cpu = worker.cpu
    if cpu is not None and cpu.tests and cpu.group == worker.group:
        return True
    # Scouts hurry on: others of their families wait for them.
    return state.backlog.cpu.free(worker.group) and not state.backlog.families.scouts


def _has_engine(state: State, worker: Worker) -> bool:
    """Return whether its module's fixtures leave no room for as much at another worker.

    The tests of such modules run one after the other, in whatever order.
    """
    cluster, card = state.cluster, worker.card
    return 2 * worker.holds(card, but=cluster.lasting) > cluster.capacity(card, 1)


def _may_go_on(state: State, worker: Worker) -> bool:
    """Return whether the next GPU test of the module that ``worker`` has begun fits now."""
    if state.backlog.shared.free(worker.group):
        worker.gpu = _gpu_portion(state, worker)
    gpu = worker.gpu
    if gpu is None or gpu.group != worker.group or not gpu.tests:
        return False
    return state.cluster.fits(worker, gpu.tests[0])


def _suits(state: State, worker: Worker, test: int) -> bool:
    """Return whether ``test`` would not take ``worker`` out of a module too early."""
    return state.tests[test].group == worker.group or not _settled(state, worker)


def _gpu_portion(state: State, worker: Worker) -> Portion | None:
    shared, order = state.backlog.shared, state.order
    suits = order.suits(worker.to_set_up)
    # The fixtures of late modules would keep the worker from those that are to be begun before.
    if order.late_modules and not worker.card.urgent and state.backlog.cpu.begins(suits):
        suits = order.unless_late(suits)
    portion = shared.adopt(worker.group, worker.gpu, suits)
    if portion is None and len(shared) > len(shared.long.tests):
        worker.out_of_order = True
    return portion


# Reservations


def _reserve(state: State, worker: Worker, portion: Portion, test: int) -> None:
    """Keep cards for the first test that does not fit, so that it cannot starve."""
    cluster = state.cluster
    cards = cluster.cards_for(worker, test)
    shared = state.seen.need(test) is not None and portion is not state.backlog.alone
    taken = any(card.reserved for card in cards)
    # Not for one that waits for other programs to end: smaller ones may as well go first.
    if shared and not taken and cluster.possible(cards, test, beside_others=True):
        reservation = Reservation(state.backlog.take(portion, test), cards)
        for card in cards:
            card.reserved = reservation


def _drains(state: State, card: Card) -> bool:
    """Return whether the card must empty before it takes further tests."""
    alone = state.backlog.alone.tests
    if card.reserved:
        return card.reserved.passed >= BACKFILL
    if not card.running or len(alone) < DRAIN * len(state.cluster.cards):
        return False
    # Not for tests that what the workers keep would hold up all the same: the others would
    # run one by one.
    return any(state.cluster.would_go(card, test) for test in itertools.islice(alone, LOOK))


# When nothing fits


def _held_up(state: State, card: Card) -> bool:
    """Return whether a GPU test waits for what idle workers keep on ``card``.

    Others may wait only until a worker has ended its module.
    """
    if card.reserved:
        return True
    alone, last = state.backlog.alone.tests, state.backlog.last.tests
    lone = [*itertools.islice(alone, LOOK), *itertools.islice(last, LOOK)]
    return bool(lone) and not any(state.cluster.would_go(card, test) for test in lone)


def _enough_comes_back(state: State, worker: Worker) -> bool:
    """Return whether what was asked of others may do for the test that waits for room.

    Each flush costs a worker the set-up of its fixtures, and a collection of garbage.
    """
    card, reserved, backlog = worker.card, worker.card.reserved, state.backlog
    if reserved is None or len(reserved.cards) > 1 or backlog.alone.tests or backlog.last.tests:
        return False
    cluster = state.cluster
    lacks = cluster.asks(worker, card, reserved.test) - cluster.room(worker, card)
    return lacks <= sum(each.owed for each in card.workers if each.waiting)

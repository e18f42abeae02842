"""Which CPU tests a worker is handed, and how many of them ahead of the time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gpumem.scheduling import lanes
from pytest_gpumem.scheduling.actions import run
from pytest_gpumem.scheduling.contexts import may_use

if TYPE_CHECKING:
    from pytest_gpumem.scheduling.piles import Portion
    from pytest_gpumem.scheduling.places import Worker
    from pytest_gpumem.scheduling.state import State

AHEAD = 0.5
"""Seconds of CPU tests that wait at a worker. They are handed out in one message, and the next
ones when half of them are done: a round trip for each would cost more than a short test."""
AHEAD_TESTS = 256


def next_portion(state: State, worker: Worker) -> Portion | None:
    """Return where the next CPU test of ``worker`` waits, None if all are out of order."""
    cpu, suits = state.backlog.cpu, state.order.suits(worker.to_set_up)
    long = cpu.long if cpu.long.tests and suits(cpu.long.tests[0]) else None
    # A long test would keep a worker with a context from the GPU tests.
    if long is not None and not (worker.kept and state.gpu_waits):
        return long
    worker.cpu = cpu.adopt(worker.group, worker.cpu, suits)
    return worker.cpu or long


def prefetch(state: State, worker: Worker) -> None:
    """Hand out further CPU tests, unless the worker may get a GPU test next.

    Not the last ones: another worker may be free earlier.
    """
    if len(worker.given) > worker.refill or (state.gpu_waits and may_use(state, worker)):
        return
    if worker.too_large:
        return  # it may be replaced next
    cpu, pace = state.backlog.cpu, state.seen.pace(gpu=False)
    first, *rest = (pace * state.tests[test].duration for test in worker.given)
    ahead = sum(rest)
    portion = None
    while len(cpu) and len(worker.given) < AHEAD_TESTS:
        # Once it is chosen, only what the worker will have set up can speak against its next test.
        if portion is None or not portion.tests or worker.to_set_up:
            portion = next_portion(state, worker)
        if portion is None:
            break
        test = portion.tests[0]
        duration = pace * state.tests[test].duration
        last = first + ahead > pace * cpu.time / len(state.cluster.workers)
        if ahead + duration > AHEAD or last or lanes.uses_card(state, test):
            break
        run(state, worker, cpu.take(portion, test))
        ahead += duration
    worker.refill = max(1, len(worker.given) // 2)

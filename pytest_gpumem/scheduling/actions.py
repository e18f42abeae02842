"""What a rule does once it has answered: run a test, alone or not, or have fixtures given back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gpumem.scheduling.commands import Allotment, Flush, Reset, Run

if TYPE_CHECKING:
    from pytest_gpumem.scheduling.places import Worker
    from pytest_gpumem.scheduling.state import State


def in_order(state: State, worker: Worker, test: int) -> bool:
    """Return whether ``test`` may follow what ``worker`` will have set up, and has main memory."""
    if not state.ram.fits(worker, test):
        return False
    if not worker.to_set_up or state.order.permits(test, worker.to_set_up):
        return True
    worker.out_of_order = True
    return False


def launch(state: State, worker: Worker, test: int, *, alone: bool = False) -> bool:
    """Run GPU test ``test`` with what it needs set aside, or alone on its cards."""
    state.cluster.start(worker, test, alone=alone)
    size = None if state.seen.need(test) is None else worker.asked
    grant = Allotment(size, len(worker.using), worker.using[0].exclusive)
    return run(state, worker, test, grant)


def run(state: State, worker: Worker, test: int, grant: Allotment | None = None) -> bool:
    """Run ``test``, after those that ``worker`` was given before."""
    if not worker.given:
        state.ram.start(worker, test)
    worker.given.append(test)
    worker.to_set_up = state.order.after(test, worker.to_set_up)
    worker.group = state.tests[test].group
    worker.given_back = 0
    worker.stalled = False
    if grant is None and not state.tests[test].seen:
        state.cluster.surprises(worker)
    if ram := state.ram.to_lease(worker, test):
        grant = (grant or Allotment(0, 0, alone=False))._replace(ram=ram)
    state.out.append(Run(worker.name, test, grant))
    return True


def give_back(state: State, worker: Worker) -> bool:
    """Let a worker tear down what it keeps: fixtures of modules first, then all."""
    state.out.append((Reset if worker.given_back else Flush)(worker.name))
    worker.given_back += 1
    worker.waiting = True
    worker.stalled = False
    worker.group = ""
    return True

"""How many workers of each card hold a context: as many as make the run shortest."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from pytest_gpumem.tuples import NamedTuple

if TYPE_CHECKING:
    from pytest_gpumem.scheduling.places import Card, Worker
    from pytest_gpumem.scheduling.state import State

SLACK = 0.7
"""Part of the shortest possible run beyond which GPU tests are urgent. As many contexts are opened
as keep them below it, where that can be."""
REPLAN = 32
"""Tests after which the number of contexts is thought over."""


def replan(state: State) -> None:
    """Choose how many workers of each card hold a context, and whether its tests are urgent."""
    state.until_replan = REPLAN
    state.changed = True
    rest = _rest(state)
    for card in state.cluster.cards.values():
        counts = range(1, max(1, len(card.workers)) + 1)
        card.contexts = min(counts, key=functools.partial(_makespan, state, rest, card))
        card.urgent = _gpu_bound(state, rest, card, card.contexts) > SLACK * rest.even


class _Rest(NamedTuple):
    """What waits, in seconds as tests last now."""

    alone: float
    """Of GPU tests that run alone."""
    packed: float
    """Of those that share a card."""
    area: float
    """The same in byte-seconds."""
    even: float
    """Of all tests, at each worker."""


def _rest(state: State) -> _Rest:
    backlog = state.backlog
    cpu, gpu = state.seen.pace(gpu=False), state.seen.pace(gpu=True)
    alone = gpu * backlog.alone.work
    packed = gpu * (backlog.work + max(0.0, backlog.families.work + backlog.holders.work))
    every = cpu * (backlog.cpu.time + backlog.ram.work) + alone + packed
    return _Rest(alone, packed, gpu * backlog.area, every / max(1, len(state.cluster.workers)))


def _makespan(state: State, rest: _Rest, card: Card, contexts: int) -> float:
    """Return the seconds that the rest may take with so many contexts on ``card``."""
    return max(_gpu_bound(state, rest, card, contexts) / SLACK, rest.even)


def _gpu_bound(state: State, rest: _Rest, card: Card, contexts: int) -> float:
    """Return the least seconds for the GPU tests of ``card`` with so many contexts.

    The larger of GPU time / contexts and VRAM-time / room beside the contexts, after what runs
    alone.
    """
    room = state.cluster.capacity(card, contexts)
    if room <= 0:
        return float("inf")
    part = len(card.workers) / max(1, len(state.cluster.workers))
    return part * (rest.alone + max(rest.packed / contexts, rest.area / room))


def may_use(state: State, worker: Worker) -> bool:
    """Return whether ``worker`` has a context on its card or may open one."""
    card, backlog = worker.card, state.backlog
    if not worker.sees_card:
        return False
    if worker.kept:
        return True
    holders = card.holders
    if not holders:
        return True
    # A test of unknown peak runs alone and should find as much room as there can be.
    if holders >= card.contexts or backlog.families.scouts:
        return False
    large = backlog.large.tests
    tallest = state.seen.whole(large[0]) if large else backlog.tallest
    return state.cluster.capacity(card, len(card.claims) + 1) >= tallest

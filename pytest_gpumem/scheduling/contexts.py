"""How many workers of each card hold a context: as many as make the run shortest."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

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
    for card in state.cluster.cards.values():
        counts = range(1, max(1, len(card.workers)) + 1)
        card.contexts = min(counts, key=functools.partial(_makespan, state, card))
        gpu, even = _bounds(state, card, card.contexts)
        card.urgent = gpu > SLACK * even


def _makespan(state: State, card: Card, contexts: int) -> float:
    """Return the seconds that the rest may take with so many contexts on ``card``."""
    gpu, even = _bounds(state, card, contexts)
    return max(gpu / SLACK, even)


def _bounds(state: State, card: Card, contexts: int) -> tuple[float, float]:
    """Return the least seconds for its GPU tests with so many contexts, and for all tests.

    The first are the larger of GPU time / contexts and VRAM-time / room beside the contexts,
    after what runs alone; the second are all time / workers.
    """
    backlog, pace = state.backlog, state.seen.pace
    workers = max(1, len(state.cluster.workers))
    room = state.cluster.capacity(card, contexts)
    gpu = pace(gpu=True)
    alone = gpu * backlog.alone.work
    packed = gpu * (backlog.work + max(0.0, backlog.families.work + backlog.holders.work))
    even = (pace(gpu=False) * (backlog.cpu.time + backlog.ram.work) + alone + packed) / workers
    if room <= 0:
        return float("inf"), even
    part = len(card.workers) / workers
    return part * (alone + max(packed / contexts, gpu * backlog.area / room)), even


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
    if holders >= card.contexts or backlog.families:
        return False
    large = backlog.large.tests
    tallest = state.seen.whole(large[0]) if large else backlog.tallest
    return state.cluster.capacity(card, len(card.claims) + 1) >= tallest

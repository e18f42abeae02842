"""What a test asks for of cards and of main memory, by what is known of it and its process."""

from __future__ import annotations

import functools
import os

from pytest_gpumem import admission
from pytest_gpumem.devices import host
from pytest_gpumem.leases.request import Want
from pytest_gpumem.tuples import NamedTuple

SOMETHING = 1
"""Bytes for a test that may use a card and of which nothing is known: it shares the card with
anybody, but not with a test that has to be alone."""


class Need(NamedTuple):
    """What one test is to be granted on each of its cards."""

    size: int | None
    """Bytes beyond what its process keeps; None when unknown: then it has to be alone."""
    cards: int = 1
    alone: bool = False
    fixtures: int = 0
    """Bytes more, as far as the process does not keep the test's wider fixtures already."""
    ram: int = 0
    """Bytes of main memory beyond what its process has; 0: too few, or too little known, to ask."""


class Place(NamedTuple):
    """A card, and what the process that asks has of it; in bytes."""

    total: int
    headroom: int = 0
    context: int = 0
    """What a process costs."""
    kept: int = 0
    """What it keeps now, context and fixtures included."""
    standing: int = 0
    """What its wider fixtures hold now."""


def in_main_memory(size: int, headroom: int) -> tuple[dict[str, Want], dict[str, int]]:
    """Return by pool what to ask for ``size`` bytes more than this process has, and what there is.

    What it has, and what a fixture's server has, is a part of it: others then see in its lease what
    it takes of that meanwhile.
    """
    size += host.family_of(os.getpid(), ()) if host.has_children() else host.own()
    totals = {pool.name: pool.total for pool in _pools()}
    most = {name: max(SOMETHING, total - headroom) for name, total in totals.items()}
    return {name: Want(min(size, most[name])) for name in totals}, totals


@functools.cache
def _pools() -> list[host.Pool]:
    return host.pools()


def want_of(need: Need, place: Place) -> Want:
    """Return what to ask for."""
    if need.size is None:
        return Want(None)
    if need.size == SOMETHING:
        return Want(SOMETHING)
    missing = admission.missing(need.fixtures, place.context, place.kept, place.standing)
    # What was learned has a margin, which the card need not have.
    most = max(SOMETHING, place.total - place.headroom - place.kept)
    return Want(max(SOMETHING, min(need.size + missing, most)), need.alone)

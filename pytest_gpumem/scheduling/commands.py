"""What the planner wants done; workers are known by their names, tests by their indexes."""

from __future__ import annotations

from pytest_gpumem.tuples import NamedTuple

CardKey = tuple[str, str]
"""Host and UUID of a card: simulated ones and MIG slices may have equal UUIDs on two hosts."""
STALL = 0.05
"""Seconds without a word of any test after which a worker that has been idle as long is told to
the planner as stalled, at the earliest."""


class Allotment(NamedTuple):
    """What is set aside for a test on each of its cards, and of main memory."""

    size: int | None
    """Bytes beyond what its worker keeps; None: the whole card."""
    cards: int
    alone: bool
    ram: int = 0
    """Bytes of main memory beyond what its worker has, if it takes a lease for them."""


class Run(NamedTuple):
    """Let ``worker`` run ``test`` after those it was given before."""

    worker: str
    test: int
    grant: Allotment | None = None
    """None for a test that is expected to use no card, nor much main memory."""


class Flush(NamedTuple):
    """Let idle ``worker`` tear down module and class fixtures, then report ``flushed``."""

    worker: str


class Reset(NamedTuple):
    """Let idle ``worker`` tear down session fixtures too, then report ``flushed``."""

    worker: str


class Stop(NamedTuple):
    """Every test has ended or is with another worker; ``worker`` shall tear everything down."""

    worker: str


class Replace(NamedTuple):
    """Idle ``worker`` has grown too large: it shall end as by ``Stop``, and another one begin."""

    worker: str


class Fail(NamedTuple):
    """``test`` can never run."""

    test: int
    why: str


Command = Run | Flush | Reset | Stop | Replace | Fail

"""What was on each card at each moment of a run, from the records of its tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_gpumem.records import ChildUsage, RecordedTest, RunRecord

CardKey = tuple[str, str]
"""Host ("" for the one that reports) and UUID."""


class Level(NamedTuple):
    """What the tests' processes held of a card from a moment on."""

    time: float
    """Seconds since the epoch."""
    size: int
    """Bytes: contexts, and the most that each process reserved during its test, or kept after."""


def levels(run: RunRecord) -> dict[CardKey, list[Level]]:
    """Return the steps of what was held on each card, in the order of time.

    A process counts from its first test on the card; that a crashed one gave everything back is
    not seen. Within a test the most that it held counts; as several tests are not at their most
    at one moment, what is held together counts up to the size of the card.
    """
    totals = {(card.host, card.uuid): card.total for card in run.cards if card.total}
    changes: dict[CardKey, list[tuple[float, str, int]]] = {}
    for test in run.tests:
        for card in test.cards:
            steps = changes.setdefault((test.host, card.card), [])
            most = max(card.reserved_peak, card.reserved)
            steps.append((test.start, test.worker, run.context + most))
            steps.append((test.start + test.duration, test.worker, run.context + card.reserved))
    for (host, *_), child in children(run).items():
        most = child.used_peak or run.context + (child.reserved_peak or 0)
        steps = changes.setdefault((host, child.card), [])
        steps.append((child.start, f"process {child.pid} {child.start}", most))
        if child.end:
            steps.append((child.end, f"process {child.pid} {child.start}", 0))
    found: dict[CardKey, list[Level]] = {}
    for key, steps in changes.items():
        held: dict[str, int] = {}
        found[key] = []
        for time, worker, size in sorted(steps):
            held[worker] = size
            together = sum(held.values())
            found[key].append(Level(time, min(together, totals.get(key, together))))
    return found


def children(run: RunRecord) -> dict[tuple[str, int, float, str], ChildUsage]:
    """Return what is known last of each process that tests started: by host, pid, start, card."""
    return {
        (test.host, child.pid, child.start, child.card): child
        for test in run.tests
        for child in test.children
    }


def window(tests: Sequence[RecordedTest]) -> tuple[float, float]:
    """Return when the first of ``tests`` began and the last one ended; zeros without any."""
    timed = [test for test in tests if test.start]
    if not timed:
        return (0.0, 0.0)
    return (
        min(test.start - _waited(test) for test in timed),
        max(test.start + test.duration for test in timed),
    )


def idle(run: RunRecord) -> float:
    """Return the part of the workers' time in which they ran no test; waiting is idle too."""
    busy = available = 0.0
    for host in {test.host for test in run.tests}:
        tests = [test for test in run.tests if test.host == host and test.start]
        begin, end = window(tests)
        busy += sum(test.duration for test in tests)
        available += (end - begin) * len({test.worker for test in tests})
    return max(0.0, 1 - busy / available) if available else 0.0


def mean(steps: Sequence[Level], end: float) -> float:
    """Return the average of ``steps`` in bytes, from the first one to ``end``."""
    if not steps or end <= steps[0].time:
        return 0.0
    ends = [step.time for step in steps[1:]] + [end]
    area = sum(step.size * (until - step.time) for step, until in zip(steps, ends, strict=True))
    return area / (end - steps[0].time)


def _waited(test: RecordedTest) -> float:
    return test.lease.waited if test.lease is not None else 0.0

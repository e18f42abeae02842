"""The suite that the scheduling benchmarks share: what its tests really take.

4,479 tests in 150 modules: families of six parametrisations, log-normal durations, 15 % of the
tests on the card, with peaks of 50 MiB to 2 GiB, log-uniform. They share a card of 3.81 GiB, where
each process that used it keeps a context of 384 MiB.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

MIB = 2**20
CARD = 3_901 * MIB
CONTEXT = 384 * MIB
FAMILY = 6
ON_CARD = 0.15
SMALLEST, LARGEST = 50 * MIB, 2048 * MIB
SPREAD = 1.2
"""Standard deviation of the logarithm of durations."""
LIKENESS = 0.1
"""Standard deviation of the logarithm of peaks within a family."""


class Case(NamedTuple):
    """One test as it really is; seconds, and bytes beyond the context (0: not on the card)."""

    module: str
    family: str
    duration: float
    peak: int


@dataclass(frozen=True)
class Scenario:
    """Which suite."""

    factor: float = 1.0
    """Times that tests on the card last longer than the others."""
    shuffled: bool = False
    """Whether families on the card stand in any module, instead of in modules of their own."""
    unrelated: bool = False
    """Whether the peaks of a family have nothing to do with each other."""
    tests: int = 4_479
    modules: int = 150
    seed: int = 1

    def __str__(self) -> str:
        """Return it in words."""
        place = "in any module" if self.shuffled else "in modules of their own"
        return f"tests on the card {self.factor:g}x as long as others, {place}"

    def cases(self, workers: int, seconds: float) -> list[Case]:
        """Return the tests by module, scaled so that their lower bound is ``seconds``."""
        found = self._unscaled()
        scale = seconds / lower_bound(found, workers)
        return [case._replace(duration=case.duration * scale) for case in found]

    def _unscaled(self) -> list[Case]:
        rng = random.Random(self.seed)  # noqa: S311  # the same suite every time
        families = -(-self.tests // FAMILY)
        per_module = -(-families // self.modules)
        on_card = set(rng.sample(range(self.modules), round(self.modules * ON_CARD)))
        cases = []
        for family in range(families):
            module = family // per_module
            gpu = rng.random() < ON_CARD if self.shuffled else module in on_card
            peak = _peak(rng)
            for _ in range(min(FAMILY, self.tests - family * FAMILY)):
                peak = _peak(rng) if self.unrelated else peak
                own = min(LARGEST, round(peak * rng.lognormvariate(0, LIKENESS)))
                duration = rng.lognormvariate(0, SPREAD) * (self.factor if gpu else 1)
                names = f"test_module_{module:03}", f"test_family_{family:03}"
                cases.append(Case(*names, duration, own if gpu else 0))
        return cases


def _peak(rng: random.Random) -> int:
    return int(SMALLEST * math.pow(LARGEST / SMALLEST, rng.random()))


def lower_bound(cases: Sequence[Case], workers: int) -> float:
    """Return the seconds that no schedule can go below.

    The largest of all time / workers, VRAM-time / room beside one context, and the longest test.
    """
    work = sum(case.duration for case in cases) / workers
    area = sum(case.duration * case.peak for case in cases) / (CARD - CONTEXT)
    return max(work, area, *(case.duration for case in cases))

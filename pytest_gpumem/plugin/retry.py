"""What is tried with a test that ran out of memory: the ladder, as a decision without effects."""

from __future__ import annotations

from pytest_gpumem.tuples import NamedTuple

ALONE, RELEASED, FRESH, CPU = "alone", "released", "fresh", "cpu"
"""Steps, see ``RecordedTest.step``: with the card to itself, once models were archived, in a fresh
process, without the card."""
ELSEWHERE = "elsewhere"
"""What is left to the controller, which alone knows if others were on the card and will see to it
that the next attempt is alone there."""


class Situation(NamedTuple):
    """What is known when a test ran out of memory."""

    answer: str
    """Of ``--gpumem-oom``."""
    step: str
    """The step that was being taken; "" at first."""
    may_fall_back: bool = False
    """Whether the test can do without the card."""
    fits_nowhere: bool = False
    """Whether what it asked for is more than any card has."""
    was_alone: bool = False
    """Whether no other test was on the card, by its lease."""
    is_shared: bool = False
    """Whether somebody else uses the card."""
    can_release: bool = False
    """Whether there are models that can be archived."""
    may_isolate: bool = False
    """Whether it may be tried in a fresh process, and was not run in one."""
    is_lost: bool = False
    """Whether it did not run out of memory, but lost the CUDA context of its process."""
    is_scheduled: bool = False
    """Whether xdist's controller decides what is tried again."""


def next_step(now: Situation) -> str:
    """Return what to try next; "" for nothing."""
    fresh = FRESH if now.may_isolate and now.step not in (FRESH, CPU) else ""
    if now.is_lost:
        return fresh
    if now.answer == "fail" or now.step == CPU:
        return ""
    cpu = CPU if now.answer == "cpu" and now.may_fall_back else ""
    if now.fits_nowhere:
        return cpu  # also if it were alone there
    elsewhere = ELSEWHERE if now.is_scheduled else ""
    if not now.step and not now.was_alone and now.is_shared:
        return elsewhere or ALONE
    if now.step not in (RELEASED, FRESH) and now.can_release:
        return RELEASED
    return fresh or cpu or elsewhere

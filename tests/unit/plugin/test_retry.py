from __future__ import annotations

import pytest

from pytest_gpumem.plugin.retry import (
    ALONE,
    CPU,
    ELSEWHERE,
    FRESH,
    RELEASED,
    Situation,
    next_step,
)

FIRST = Situation("cpu", "", may_fall_back=True)


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({}, CPU),
        ({"answer": "retry"}, ""),
        ({"may_fall_back": False}, ""),
        ({"answer": "fail", "is_shared": True, "can_release": True}, ""),
        ({"is_shared": True}, ALONE),
        ({"is_shared": True, "is_scheduled": True}, ELSEWHERE),
        # It had what there is, beside foreign programs: alone it would have no more.
        ({"is_shared": True, "was_alone": True}, CPU),
        ({"is_shared": True, "was_alone": True, "answer": "retry"}, ""),
        ({"is_shared": True, "was_alone": True, "can_release": True}, RELEASED),
        ({"step": ALONE, "is_shared": True}, CPU),
        ({"step": ALONE, "can_release": True}, RELEASED),
        ({"step": RELEASED, "can_release": True}, CPU),
        ({"step": RELEASED, "can_release": True, "may_fall_back": False}, ""),
        ({"step": CPU, "is_shared": True, "can_release": True}, ""),
        ({"fits_nowhere": True, "is_shared": True, "can_release": True}, CPU),
        ({"fits_nowhere": True, "is_scheduled": True, "may_fall_back": False}, ""),
        ({"is_scheduled": True}, CPU),
        ({"is_scheduled": True, "may_fall_back": False}, ELSEWHERE),
        ({"may_isolate": True}, FRESH),
        ({"may_isolate": True, "is_shared": True}, ALONE),
        ({"may_isolate": True, "can_release": True}, RELEASED),
        ({"may_isolate": True, "step": RELEASED, "can_release": True}, FRESH),
        ({"may_isolate": True, "step": FRESH, "can_release": True}, CPU),
        ({"may_isolate": True, "step": FRESH, "may_fall_back": False}, ""),
        ({"may_isolate": True, "answer": "fail"}, ""),
        ({"may_isolate": True, "fits_nowhere": True}, CPU),
        ({"may_isolate": True, "is_lost": True, "answer": "fail"}, FRESH),
        ({"may_isolate": True, "is_lost": True, "step": FRESH}, ""),
        ({"is_lost": True, "is_shared": True, "can_release": True}, ""),
    ],
)
def test_what_is_tried_next(changes, step):
    assert next_step(FIRST._replace(**changes)) == step

from __future__ import annotations

import pytest

from pytest_gpumem.leases.ask import SOMETHING, Need, Place, want_of
from pytest_gpumem.leases.request import Want


@pytest.mark.parametrize(
    ("need", "place", "want"),
    [
        (Need(None), Place(1000, kept=300), Want(None)),
        (Need(SOMETHING), Place(1000, context=100), Want(SOMETHING)),
        (Need(400), Place(1000), Want(400)),
        (Need(400, alone=True), Place(1000), Want(400, exclusive=True)),
        # A process that has opened no context yet pays for it.
        (Need(400), Place(1000, context=100), Want(500)),
        (Need(400), Place(1000, context=100, kept=60), Want(440)),
        (Need(400), Place(1000, context=100, kept=300), Want(400)),
        # So it is with fixtures that are not set up.
        (Need(400, fixtures=200), Place(1000, context=100), Want(700)),
        (Need(400, fixtures=200), Place(1000, context=100, kept=300, standing=200), Want(400)),
        (Need(400, fixtures=200), Place(1000, context=100, kept=300), Want(600)),
        # The margin of what was learned is no reason to ask for more than there is.
        (Need(990), Place(1000, headroom=50), Want(950)),
        (Need(900), Place(1000, kept=300), Want(700)),
        (Need(900), Place(1000, kept=1200), Want(SOMETHING)),
    ],
)
def test_what_a_test_asks_for(need, place, want):
    assert want_of(need, place) == want

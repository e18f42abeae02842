"""What is told to have been alive, set against programs that know it."""

from __future__ import annotations

import alive_programs
from card_process import on_card


@on_card
def test_each_line_has_what_it_had_alive_at_the_peak():
    alive_programs.check(range(5))

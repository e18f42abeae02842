"""A simulated card that is full from one allocation of a process on."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ENDLESS = 20
"""Refusals in a row, none for less than the one before, from which on it is an endless trial."""


class Refusing:
    """Counts allocations, and refuses the one of number ``at`` (from 1; 0: none).

    From then on the card has no more room than was in use at that moment: whoever asks for as much
    again is refused again, whoever asks for less or gives something back may have it. A program
    that goes on trying without either is let in after ``ENDLESS`` refusals, so that it ends.
    """

    def __init__(self, at: int = 0) -> None:
        self.at = at
        self.counted = 0
        """Allocations that were asked for, refused ones too."""
        self.refused = 0
        self.endless = False
        self.on = True
        """Whether it counts."""
        self._device = -1
        self._ceiling = 0
        """Bytes below which the allocated ones stay, once ``at`` was reached."""
        self._row = 0
        self._smallest = 0
        """Bytes of the last refusal."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Neither count nor refuse meanwhile."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    def refuses(self, device: int, allocated: int, size: int) -> bool:
        """Return whether a device, of which so much is allocated, has no room for ``size``."""
        if not self.on:
            return False
        self.counted += 1
        if self.counted == self.at:
            self._device, self._ceiling = device, allocated + size
        elif device != self._device or self.endless or allocated + size < self._ceiling:
            return False
        self.refused += 1
        self._row = self._row + 1 if size >= self._smallest else 1
        self._smallest = size
        self.endless = self._row >= ENDLESS
        return True

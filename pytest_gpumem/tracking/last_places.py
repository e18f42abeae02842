"""Where memory that stayed was found to be held last: where the next is likely to be.

Leaks come in series, and a pool gets one model after the other. To look down from there costs what
lies below; to search upwards from the memory costs passes over all objects.
"""

from __future__ import annotations

import operator
from collections import deque
from itertools import compress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
    from pathlib import Path

    from pytest_gpumem.tracking.holders import Holding

_MANY = 8


class LastPlaces:
    """Knows the roots that held what was searched last, and keeps none of them alive."""

    def __init__(self) -> None:
        self._tops: deque[Callable[[], object]] = deque(maxlen=_MANY)
        self._standing: frozenset[int] = frozenset()
        """The wider fixtures, by identity, that were set up then."""

    def note(self, found: Iterable[Holding], standing: Collection[int]) -> None:
        """Note who holds what was ``found`` by a search of all objects."""
        if self._standing != frozenset(standing):
            self._standing = frozenset(standing)
            kept = [each for each in self._tops if id(each()) in self._standing]
            self._tops = deque(kept, _MANY)
        known = {id(each()) for each in self._tops}
        for each in found:
            if each.top is not None and id(each.top()) not in known:
                known.add(id(each.top()))
                self._tops.append(each.top)

    def find(
        self,
        addresses: set[int],
        labels: Mapping[int, str],
        standing: Collection[int],
        root: Path | None,
    ) -> list[Holding]:
        """Return who holds the storages at ``addresses``, the last places only; or nothing.

        A fixture that was set up since might hold them as well, and rightfully: then only
        fixtures are looked at.
        """
        from pytest_gpumem.tracking.holders import find_below

        tops = list(self._living(labels, same=self._standing == frozenset(standing)))
        if not tops or not addresses:
            return []
        return find_below(tops, addresses, fixtures=labels, root=root)

    def _living(self, labels: Mapping[int, str], *, same: bool) -> Iterator[object]:
        """Yield what still stands, the fixtures first: what one of them holds is no leak."""
        from pytest_gpumem.tracking.sentences import suspended_code

        living = [each for each in (top() for top in self._tops) if each is not None]
        fixtures = [id(each) in labels or id(suspended_code(each)) in labels for each in living]
        yield from compress(living, fixtures)
        if same:
            yield from compress(living, map(operator.not_, fixtures))

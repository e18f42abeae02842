"""Which thread waits for which others: a circle is an error, and never a standstill."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Waits:
    """The waits of all threads that share something; every wait goes through ``waiting``."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waits: dict[int, Callable[[], set[int]]] = {}

    @contextmanager
    def waiting(self, awaited: Callable[[], set[int]], refusal: str) -> Iterator[None]:
        """Say that this thread waits, within, for those whose idents ``awaited`` returns.

        Raises:
            RuntimeError: one of them waits for this thread; the text is ``refusal``.

        """
        here = threading.get_ident()
        with self._mutex:
            # Whoever completes a circle finds it: the others' waits are all entered by then.
            if self._reaches(awaited(), here):
                raise RuntimeError(refusal)
            self._waits[here] = awaited
        try:
            yield
        finally:
            with self._mutex:
                del self._waits[here]

    def _reaches(self, threads: set[int], goal: int) -> bool:
        seen: set[int] = set()
        while threads - seen:
            seen |= threads
            threads = {
                far for near in threads if near in self._waits for far in self._waits[near]()
            }
        return goal in seen

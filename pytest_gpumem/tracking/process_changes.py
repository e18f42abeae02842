"""What a test sets for its whole process and leaves so: whose doing it is, and put back or named.

What wider fixtures and the suite's hooks between tests set is meant to last, and is no test's.
"""

from __future__ import annotations

import os
import sys

from pytest_gpumem.devices import process_state
from pytest_gpumem.records import Left


class ProcessChanges:
    """Compares what is set whenever another owner begins to run.

    Args:
        put_back: whether to set back what a test left, as far as that is safe.
        fractions: whether to watch torch's memory fraction.

    """

    def __init__(self, *, put_back: bool = False, fractions: bool = True) -> None:
        self._put_back = put_back
        self._fractions = fractions
        self._last: process_state.Values | None = None
        self._before: dict[str, object] = {}
        """What the running test changed, and the value before its first change."""

    def look(self, *, by_test: bool) -> bool:
        """Charge what changed since the last look to the test, or to nobody.

        Returns whether the running test has changed anything.
        """
        variables, last = process_state.variables(), self._last
        if last is not None and last[0] == variables and "torch" not in sys.modules:
            return bool(self._before)  # as in most tests
        now = process_state.read(variables, fractions=self._fractions)
        if now == last:
            return bool(self._before)
        self._last = now
        changed = () if last is None else process_state.changes(last, now).items()
        for what, (old, _) in changed:
            if by_test:
                self._before.setdefault(what, old)
            else:
                self._before.pop(what, None)
        return bool(self._before)

    def settle(self) -> tuple[Left, ...]:
        """Return what the test that ends changed and left, put back where that is wanted."""
        self.look(by_test=True)  # its fixtures' teardowns are over
        if not self._before or self._last is None:
            return ()
        # What is put back is read again.
        now, self._last = process_state.named(self._last), None
        left = tuple(
            Left(what, _text(old), _text(now[what]), self._set_back(what, old))
            for what, old in self._before.items()
            if what in now and now[what] != old
        )
        self._before.clear()
        return left

    def _set_back(self, what: str, old: object) -> bool:
        return self._put_back and process_state.put_back(what, old)


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return os.fsdecode(value)
    return "unset" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

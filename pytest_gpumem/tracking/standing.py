"""The fixtures that are set up, by which memory may be held until their teardown."""

from __future__ import annotations

import contextlib
import gc
import sys
import weakref
from typing import TYPE_CHECKING

from pytest_gpumem.tracking.reach import storages_below

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_gpumem.tracking.holders import Holding


class Standing:
    """Knows wider fixtures by their values and code, of which it keeps none alive."""

    def __init__(self) -> None:
        self._labels: dict[int, str] = {}
        """Labels by the identity of values and code."""
        self._values: weakref.WeakValueDictionary[int, object] = weakref.WeakValueDictionary()
        """By identity, the values to which there can be a weak reference."""

    def add(self, label: str, value: object, function: object) -> tuple[int, ...]:
        """Note what a fixture holds its memory by; return the identities for its end.

        Besides the value that is the code of a generator function, whose local variables live
        until the teardown.
        """
        code = getattr(function, "__code__", None)
        roots: tuple[int, ...] = ()
        if gc.is_tracked(value) or isinstance(value, dict | list):
            roots = (id(value),)
            with contextlib.suppress(TypeError):
                self._values[id(value)] = value
        roots += (id(code),) if code is not None else ()
        self._labels.update(dict.fromkeys(roots, label))
        return roots

    def drop(self, roots: tuple[int, ...]) -> None:
        """Forget a fixture whose teardown begins."""
        for root in roots:
            self._labels.pop(root, None)
            self._values.pop(root, None)

    def rightful(self, passing: Mapping[int, str]) -> dict[int, str]:
        """Return the labels of all that may hold memory, what is ``passing`` as well."""
        rightful = self._labels | _last_errors()
        return rightful | {key: label for key, label in passing.items() if key not in rightful}

    def still_hold(self, found: Mapping[str, set[int]]) -> list[Holding] | None:
        """Return who holds the storages that fixtures, by label, were found to hold, if all do yet.

        None: of some they were not found to, or do not any more. The way down from a fixture is
        short, where the way up from a storage passes over all objects again and again.
        """
        from pytest_gpumem.tracking.holders import held_by

        values = {self._labels[root]: value for root, value in self._values.items()}
        held: list[Holding] = []
        for label, addresses in found.items():
            below = storages_below(values.get(label), addresses)
            if len(below) < len(addresses):
                return None
            held += held_by(label, below.values())
        return held


def _last_errors() -> dict[int, str]:
    """Return what pytest keeps of the last failure until the next test is called."""
    errors = (getattr(sys, name, None) for name in ("last_exc", "last_value"))
    return {id(each): "sys.last_value, until the next test" for each in errors if each is not None}

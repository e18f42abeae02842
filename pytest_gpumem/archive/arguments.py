"""What callers give, looked at once: the right kind of value, within its range."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pytest_gpumem.errors import ArgumentError


def text(name: str, value: Any) -> str:
    """Return ``value``, which must be a string."""
    if not isinstance(value, str):
        raise _refused(name, value, "a string")
    return value


def words(name: str, value: Any) -> tuple[str, ...]:
    """Return the strings of ``value``, any iterable of them but a string."""
    try:
        found = (value,) if isinstance(value, (str, bytes)) else tuple(value)
    except TypeError:
        found = (value,)
    if isinstance(value, (str, bytes)) or not all(isinstance(each, str) for each in found):
        raise _refused(name, value, "a list of strings")
    return found


def mapping(name: str, value: Any) -> dict[Any, Any]:
    """Return ``value``, which must be a dict or None."""
    if value is not None and not isinstance(value, dict):
        raise _refused(name, value, "a dict")
    return value or {}


def whole(name: str, value: Any) -> int | None:
    """Return ``value``, which must be an int of 0 or more, or None."""
    if value is not None and (type(value) is not int or value < 0):
        raise _refused(name, value, "a whole number, 0 or more")
    return value


def seconds(name: str, value: Any) -> float | None:
    """Return ``value``, which must be a number of 0 or more, or None."""
    fine = type(value) in {int, float} and math.isfinite(value) and value >= 0
    if value is not None and not fine:
        raise _refused(name, value, "a number of seconds, 0 or more")
    return value  # type: ignore[no-any-return]


def path(name: str, value: Any) -> Path:
    """Return the path that ``value`` is or names."""
    if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value):
        raise _refused(name, value, "a path")
    return Path(value)


def device(name: str, value: Any) -> str:
    """Return the name of a device on which tensors can be made."""
    import torch

    try:
        found = torch.device(value)
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        first = str(error).partition("\n")[0]
        raise ArgumentError(f"{name}={value!r} cannot be used: {first}") from None
    return str(found)


def _refused(name: str, value: Any, wanted: str) -> ArgumentError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"a {type(value).__name__}"
    return ArgumentError(f"{name}={shown} is not {wanted}")

"""What callers give, looked at once: the right kind of value, within its range."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pytest_gpumem.errors import ArgumentError


def text(name: str, value: Any) -> str:
    """Return ``value``, which must be a string, as one of no class of its own."""
    if not isinstance(value, str):
        raise _refused(name, value, "a string")
    return str.__str__(value)


def words(name: str, value: Any) -> tuple[str, ...]:
    """Return the strings of ``value``, any iterable of them but a string."""
    found = []
    # Looked at as they come: what is no list of strings need not end.
    for each in value if isinstance(value, Iterable) and not isinstance(value, str) else (None,):
        if not isinstance(each, str):
            raise _refused(name, value, "a list of strings")
        found.append(str.__str__(each))
    return tuple(found)


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


def places(name: str, value: Any) -> list[int]:
    """Return ``value``, which must be a list of whole numbers of 0 or more."""
    fine = isinstance(value, (list, tuple))
    if not fine or not all(type(each) is int and each >= 0 for each in value):
        raise _refused(name, value, "a list of whole numbers, 0 or more")
    return list(value)


def seconds(name: str, value: Any) -> float | None:
    """Return ``value``, which must be a number of 0 or more, or None."""
    fine = type(value) in {int, float} and 0 <= value <= sys.float_info.max  # nor nan
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


def shown(value: Any) -> str:
    """Return what a message calls ``value``."""
    # Of an int of 5,000 digits there is no repr, nor of some objects.
    with contextlib.suppress(Exception):
        if len(told := repr(value)) <= 60:
            return told
    return f"<{type(value).__name__}>"


def _refused(name: str, value: Any, wanted: str) -> ArgumentError:
    return ArgumentError(f"{name}={shown(value)} is not {wanted}")

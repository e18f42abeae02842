"""What a fresh process tells, as builtin values, and read back."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any, NamedTuple

_ATOMS = (bool, int, float, str, bytes, type(None))


def plain(value: Any) -> Any:
    """Return ``value`` with whatever is no builtin value in it as text, as JUnit would show it."""
    if type(value) in _ATOMS:
        return value
    if isinstance(value, dict):
        return {plain(key): plain(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    if isinstance(value, list):
        return list(map(plain, value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return str(value)


class ToldWarning(NamedTuple):
    """A warning, its class by name: this one may not be in the process that reports."""

    text: str
    module: str
    category: str
    file: str
    line: int
    source: str | None


def told_warning(message: warnings.WarningMessage) -> tuple[Any, ...]:
    """Return what has to be told of a warning."""
    kind = message.category
    return tuple(
        plain(
            ToldWarning(
                str(message.message),
                kind.__module__,
                kind.__qualname__,
                message.filename,
                message.lineno,
                message.line,
            )
        )
    )


def read_warning(told: tuple[Any, ...]) -> warnings.WarningMessage:
    """Return the warning that was told of."""
    text, module, name, file, line, source = ToldWarning(*told)
    kind: Any = sys.modules.get(module)
    for part in name.split("."):
        kind = getattr(kind, part, None)
    if not (isinstance(kind, type) and issubclass(kind, Warning)):
        kind = type(name.rpartition(".")[2], (Warning,), {"__module__": module})
    return warnings.WarningMessage(text, kind, file, line, line=source)

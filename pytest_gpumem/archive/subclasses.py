"""Which classes of tensors archives may hold beside torch's own two."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {"torch", "torchao"}
_allowed: set[type] = set()


def allow_subclass(kind: type) -> None:
    """Let archives hold this tensor subclass, which has ``__tensor_flatten__`` and its inverse.

    Those of torch and torchao are allowed already. The process that restores must allow it too.
    """
    _allowed.add(kind)


def is_allowed(kind: type) -> bool:
    """Return whether archives may hold tensors of a class."""
    return kind in _allowed or kind.__module__.partition(".")[0] in _HOMES


def named(name: str) -> Any:
    """Return the class of that name if it may be used; imports only from torch and torchao."""
    import torch

    for kind in _allowed:
        if f"{kind.__module__}:{kind.__qualname__}" == name:
            return kind
    module, _, qualified = name.partition(":")
    if module.partition(".")[0] not in _HOMES:
        raise ValueError(f"the class {name} is not allowed; allow_subclass() would allow it")
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"the class {name} cannot be imported: {error}") from None
    for part in qualified.split("."):
        found = getattr(found, part)
    if not (isinstance(found, type) and issubclass(found, torch.Tensor)):
        raise ValueError(f"{name} is no tensor class")
    return found

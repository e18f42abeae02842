"""What the nodes and records of a state have in common, see ``docs/archive-format.md``."""

from __future__ import annotations

import contextlib
import struct
from typing import TYPE_CHECKING, Final

from pytest_gpumem.errors import DamagedError

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

DEEPEST: Final = 100
"""Containers inside one another; more is refused, so that recursion stays within Python's own."""
DOUBLE: Final = struct.Struct("<d")
BITS: Final = {"quint4x2": 4, "quint2x4": 2}
"""Bits of an element where that is no whole byte; such tensors have a storage of their own."""
UNREADABLE: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)
"""What reading nodes and records that are none comes to; checks of torch and classes included."""


@contextlib.contextmanager
def checked() -> Generator[None, None, None]:
    """Take whatever nodes and records that are none lead to for what it is.

    Raises:
        DamagedError: in place of errors of Python and torch, memory running out excepted.

    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        raise DamagedError(f"a value cannot be read: {error}") from None


def last_element(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Return how many elements the last one lies behind the first."""
    return sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def contiguous_stride(shape: Sequence[int]) -> list[int]:
    """Return the strides of a contiguous tensor."""
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return stride[::-1]

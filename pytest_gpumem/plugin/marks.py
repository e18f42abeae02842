"""The marks: each is a function whose signature is the mark's signature.

Calling it with a mark's arguments validates them and returns what they mean, so that a bad mark
is found at collection and not in the middle of a run.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from pytest_gpumem.tuples import NamedTuple
from pytest_gpumem.units import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class MarkedNeed(NamedTuple):
    """What a test asks: bytes (None: not said), how many cards, alone or not, where else."""

    vram: int | None
    cards: int
    exclusive: bool
    fallback: str | None = None
    isolated: bool = False
    """Whether it runs in a process of its own."""
    ram: int | None = None
    """Bytes of main memory that it takes beside that; None: not said."""


def gpu(
    vram: str | int | None = None,
    count: int = 1,
    exclusive: bool = False,
    fallback: str | None = None,
    isolated: bool = False,
    *,
    ram: str | int | None = None,
) -> MarkedNeed:
    """Say how the test uses VRAM: peak, cards, alone, or on the "cpu"; in a process of its own.

    With ``ram`` also what it takes of main memory, as the mark of that name says of any test.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"count={count!r} is not a number of cards; allowed is 1 or more")
    for name, value in (("exclusive", exclusive), ("isolated", isolated)):
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} is neither True nor False")
    if fallback not in (None, "cpu"):
        raise ValueError(f"fallback={fallback!r} is not a device to fall back to; allowed is 'cpu'")
    size = None if vram is None else _size("vram", vram)
    in_ram = None if ram is None else _size("ram", ram)
    return MarkedNeed(size, count, exclusive, fallback, isolated, in_ram)


def ram(size: str | int) -> int:
    """Say how much main memory the test takes at its peak, with what it starts."""
    return _size("size", size)


def vram_limit(limit: str | int) -> int:
    """Fail the test when it takes more VRAM than this size above what was there before."""
    return _size("limit", limit)


def vram_leak_limit(limit: str | int = 0) -> int:
    """Fail the test when it leaks more VRAM than this size (nothing, when no size is given)."""
    return _size("limit", limit)


def gpumem_off() -> None:
    """Leave the test alone: nothing is measured, limited or cleaned."""


def _size(name: str, value: object) -> int:
    if not isinstance(value, str | int):
        raise ValueError(f"{name}={value!r} is not a size")
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise ValueError(f"{name}={value!r}: {error}") from None


MARKS: dict[str, Callable[..., Any]] = {
    mark.__name__: mark for mark in (gpu, ram, vram_limit, vram_leak_limit, gpumem_off)
}


def describe(name: str) -> str:
    """Return the line that ``pytest --markers`` shows for the mark ``name``."""
    mark = MARKS[name]
    parameters = inspect.signature(mark).parameters.values()
    shown = ", ".join(
        p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters
    )
    meaning = (inspect.getdoc(mark) or "").partition("\n")[0]
    return f"{name}({shown}): {meaning}" if shown else f"{name}: {meaning}"


def read(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what the mark ``name`` with these arguments means.

    Raises:
        ValueError: in one sentence, when the arguments are not the mark's.

    """
    mark = MARKS[name]
    try:
        inspect.signature(mark).bind(*args, **kwargs)
    except TypeError as error:
        allowed = describe(name).split(":")[0]
        raise ValueError(f"mark {name}: {error}; allowed is {allowed}") from None
    try:
        return mark(*args, **kwargs)
    except ValueError as error:
        raise ValueError(f"mark {name}: {error}") from None

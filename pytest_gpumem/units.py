"""Bytes to text and back, and seconds to text; text like ``"2GiB"`` exists only at the edges."""

from __future__ import annotations

import re

_FACTORS = {
    "b": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_SIZE = r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]+)\s*"

SIZE_FORM = 'a size like "350 MiB" or "2GiB" (B, KiB, MiB, GiB, TiB, KB, MB, GB, TB)'
"""How messages describe what is allowed."""


def parse_bytes(text: str | int) -> int:
    """Return the number of bytes that ``text`` names; an ``int`` is taken as bytes already.

    KiB, MiB, GiB and TiB are powers of 1024; KB, MB, GB and TB are powers of 1000. A fraction
    of a byte is dropped.

    Raises:
        ValueError: in one sentence, when ``text`` is no size or is negative.

    """
    if isinstance(text, int) and not isinstance(text, bool):
        if text < 0:
            raise ValueError(f"{text} is negative; allowed is {SIZE_FORM}")
        return text
    match = re.fullmatch(_SIZE, text, re.ASCII) if isinstance(text, str) else None
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a size; allowed is {SIZE_FORM}")
    whole, _, fraction = match[1].partition(".")
    # Integer arithmetic: a float would lose bytes above 2**53.
    scaled = int((whole + fraction) or "0") * factor
    return scaled // int("1" + "0" * len(fraction))


def format_bytes(size: int) -> str:
    """Return ``size`` bytes as text: ``512 B``, ``2.00 MiB``, ``3.81 GiB``.

    Two decimals from a KiB on and no unit above GiB, as PyTorch prints sizes; the sign is kept.
    """
    sign, size = ("-", -size) if size < 0 else ("", size)
    if size < 2**10:
        return f"{sign}{size} B"
    for unit in ("KiB", "MiB", "GiB"):
        if size < 2 ** (20 if unit == "KiB" else 30 if unit == "MiB" else 60):
            break
    return f"{sign}{size / _FACTORS[unit.lower()]:.2f} {unit}"


def format_mib(size: int) -> str:
    """Return ``size`` bytes as bare MiB with one decimal, for table columns that name the unit."""
    return f"{size / 2**20:.1f}"


def format_seconds(seconds: float) -> str:
    """Return a duration as text: ``3.20 s``, ``4 min 51 s``, ``1 h 31 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.2f} s"


def printable(text: str) -> str:
    """Return ``text`` with its control characters written out, so that a terminal obeys none."""
    return re.sub(_CONTROL, lambda match: f"\\x{ord(match[0]):02x}", text)


_CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"

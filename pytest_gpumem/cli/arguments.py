"""What commands take as arguments: numbers and sizes, refused in one sentence."""

from __future__ import annotations

import argparse
import re

from pytest_gpumem.units import parse_bytes


def read_count(text: str) -> int:
    """Return a whole number that is not negative.

    Raises:
        argparse.ArgumentTypeError: when it is none.

    """
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number; allowed is 0 or more")
    return int(text)


def read_size(text: str) -> int:
    """Return the bytes of a size.

    Raises:
        argparse.ArgumentTypeError: when it is none.

    """
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None

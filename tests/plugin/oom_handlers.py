"""Tests that handle running out of memory, rightly and wrongly, and what is to be found of each."""

from __future__ import annotations

import random
from typing import NamedTuple

BEGIN = """
import itertools
import pytest, torch

KEPT, CACHE = [], []

def take(kib):
    return torch.zeros(kib * 1024, dtype=torch.uint8, device="cuda")

def guarded(kib):
    return take(kib)
"""


class Handler(NamedTuple):
    """The body of a test; ``_N_`` stands for a size in KiB."""

    body: str
    wanted: tuple[str, ...]
    """The verdicts of its allocations, in their order."""


RIGHT = {
    "halves": """
    n = _N_
    while n:
        try:
            x = guarded(n)
            break
        except torch.OutOfMemoryError:
            n //= 2
    assert n >= _N_ // 2
""",
    "goes to the host": """
    try:
        x = guarded(_N_)
    except torch.OutOfMemoryError:
        x = torch.zeros(_N_)
    assert len(x)
""",
    "expects it": """
    try:
        x = guarded(_N_)
    except RuntimeError as error:
        assert "out of memory" in str(error)
""",
    "cleans up": """
    parts = []
    try:
        parts.append(guarded(_N_))
    except torch.OutOfMemoryError:
        parts.clear()
        torch.cuda.empty_cache()
    finally:
        parts.clear()
""",
    "hands on its own error": """
    class Full(Exception):
        pass
    def work():
        try:
            return guarded(_N_)
        except torch.OutOfMemoryError as error:
            raise Full("come again") from error
    try:
        work()
    except Full:
        pass
""",
    "tries three times and goes without": """
    for _ in range(3):
        try:
            x = guarded(_N_)
            break
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    else:
        x = None
""",
}
FREES = """
    CACHE.append(take(_N_))
    try:
        x = take(_N_)
    except torch.OutOfMemoryError:
        CACHE.clear()
        x = take(_N_)
    CACHE.clear()
"""
"""Its first allocation has no handler, its second gives something back and tries again."""

WRONG = {
    "has none": ("\n    guarded(_N_)\n", "out of memory"),
    "raises it again": (
        """
    try:
        guarded(_N_)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        raise
""",
        "out of memory",
    ),
    "tries once more": (
        """
    try:
        guarded(_N_)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        guarded(_N_)
""",
        "out of memory",
    ),
    "keeps what it had": (
        """
    try:
        guarded(_N_)
    except torch.OutOfMemoryError:
        KEPT.append(take(_N_ // 4 or 1))
""",
        "leaked",
    ),
    "keeps the error": (
        """
    def work():
        small = take(_N_ // 4 or 1)
        return guarded(_N_), small
    try:
        work()
    except torch.OutOfMemoryError as error:
        KEPT.append(error)
""",
        "leaked",
    ),
    "swallows it": (
        """
    def work():
        try:
            return guarded(_N_)
        except torch.OutOfMemoryError:
            return None
    assert work() is not None
""",
        "other error",
    ),
    "returns a wrong result": (
        """
    try:
        total = bool(len(guarded(_N_)))
    except torch.OutOfMemoryError:
        total = 0
    assert total == 1
""",
        "other error",
    ),
    "raises another one": (
        """
    try:
        guarded(_N_)
    except torch.OutOfMemoryError as error:
        raise ValueError("bad input") from error
""",
        "other error",
    ),
    "fails in its clean-up": (
        """
    try:
        x = guarded(_N_)
    except torch.OutOfMemoryError:
        del x
""",
        "other error",
    ),
    "tries for ever": (
        """
    while True:
        try:
            x = guarded(_N_)
            break
        except Exception:
            torch.cuda.empty_cache()
""",
        "endless",
    ),
    "tries for ever, whatever comes": (
        """
    for _ in itertools.count():
        try:
            x = guarded(_N_)
        except:
            continue
        break
""",
        "endless",
    ),
}
TAKES_BEFORE = {"keeps the error": 1}
"""Allocations before the guarded one, which are handled as it is."""


def handlers(numbers: random.Random, of_each: int) -> dict[str, Handler]:
    """Return tests by their names, of each kind so many, of random sizes."""
    found = {}
    for turn in range(of_each):
        for kind, body in RIGHT.items():
            found[f"right_{_name(kind)}_{turn}"] = _sized(numbers, body, ("recovered",))
        for kind, (body, verdict) in WRONG.items():
            before = ("recovered",) * TAKES_BEFORE.get(kind, 0)
            found[f"wrong_{_name(kind)}_{turn}"] = _sized(numbers, body, (*before, verdict))
        wanted = ("out of memory", "recovered")
        found[f"wrong_frees_{turn}"] = _sized(numbers, FREES, wanted)
    return found


def _name(kind: str) -> str:
    return kind.replace(" ", "_").replace("-", "_").replace(",", "")


def _sized(numbers: random.Random, body: str, wanted: tuple[str, ...]) -> Handler:
    return Handler(body.replace("_N_", str(numbers.choice((8, 64, 600, 1500, 4096)))), wanted)


def suite(found: dict[str, Handler]) -> str:
    """Return the source of a module of these tests."""
    return BEGIN + "".join(f"\ndef test_{name}():{each.body}" for name, each in found.items())

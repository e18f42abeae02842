"""How each framework says that memory ran out, as data: one file for each family of them.

A grammar is a message's own words, found wherever they stand, and the figures in it. In its
patterns ``<tried>`` stands for a size with its unit, ``<tried#>`` for a bare number of bytes; the
name is the figure's. Sizes are powers of two whatever their unit's spelling: PyTorch, Paddle,
TensorFlow, XLA and the kernel print them so. ``total`` and ``free`` are the card's; ``allocated``,
``reserved``, ``private``, ``other`` and ``reserved_unallocated`` (reserved but unallocated) the
process's; ``allowed`` is a limit set below the card's size.

A text is the first grammar's that knows it: frameworks come before the driver whose words they
quote, and the host's memory last.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pytest_gpumem.forensics.grammars import (
    arrays,
    cuda,
    graphics,
    host,
    programs,
    pytorch,
    runtimes,
    servers,
    xla,
)
from pytest_gpumem.forensics.grammars.language import Grammar, grammar

if TYPE_CHECKING:
    from collections.abc import Mapping

GRAMMARS = (
    *pytorch.GRAMMARS,
    *xla.GRAMMARS,
    *arrays.GRAMMARS,
    *servers.GRAMMARS,
    *graphics.GRAMMARS,
    *runtimes.GRAMMARS,
    *cuda.GRAMMARS,
    *programs.GRAMMARS,
    *host.GRAMMARS,
)

_learned: list[Grammar] = []
_FIGURES = ("tried", "total", "free", "allocated", "allowed")
_SHORTEST = 6


def learn(messages: Mapping[str, str]) -> None:
    """Add a suite's own messages to the vocabulary, in the place of those that were added before.

    Args:
        messages: from a message, with ``<tried>``, ``<total>`` and the like where it has sizes,
            to whose memory ran out: ``card`` or ``host``.

    Raises:
        ValueError: in one sentence, when one is no message.

    """
    _learned[:] = [_taught(text, memory) for text, memory in messages.items()]
    _index[:] = _indexed()


def _taught(text: str, memory: object) -> Grammar:
    backend = {"card": "unknown", "host": "host"}.get(str(memory))
    if backend is None:
        raise ValueError(f"{memory!r} for {text!r} is neither 'card' nor 'host'")
    parts = re.split(r"<([a-z_]+)>", text)
    wrong = next((name for name in parts[1::2] if name not in _FIGURES), None)
    if wrong is not None:
        allowed = ", ".join(f"<{name}>" for name in _FIGURES)
        raise ValueError(f"<{wrong}> in {text!r} is no figure; allowed are {allowed}")
    needle = max((part.strip() for part in parts[::2]), key=len)
    if len(needle) < _SHORTEST:
        raise ValueError(f"{text!r} is too short to be told from other lines")
    for at in range(0, len(parts), 2):
        parts[at] = re.escape(parts[at])
    for at in range(1, len(parts), 2):
        parts[at] = f"<{parts[at]}>"
    # With its sizes read on their own, a message that was cut is still one.
    return grammar(backend, needle, f"{''.join(parts)}|{re.escape(needle)}", distinct=True)


def vocabulary() -> tuple[Grammar, ...]:
    """Return every grammar, those that a suite added first."""
    return (*_learned, *GRAMMARS)


def speaking(text: str) -> list[Grammar]:
    """Return the grammars of whose messages ``text`` may be one, in the order of their rank."""
    known = vocabulary()
    return [known[at] for at in sorted({at for needle, at in _index if needle in text})]


def _indexed() -> list[tuple[str, int]]:
    return [(needle, at) for at, each in enumerate(vocabulary()) for needle in each.needles]


_index = _indexed()
"""Each needle, and the rank of its grammar."""


def needles() -> tuple[str, ...]:
    """Return texts of which every message has one."""
    found = (needle for each in vocabulary() for needle in each.needles)
    return tuple(dict.fromkeys([*found, "OutOfMemory"]))

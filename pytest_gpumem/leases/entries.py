"""What the ledger's files are called: an entry's name says all of it.

``h-0000000007-4711.9f3c2a51-56789abc=2147483648`` is a lease (``h``: held, ``w``: waiting, ``r``:
kept between tests, ``s``: so too, and some of it can be spared, ``l``: used by programs without
leases, which were waited for in vain) with its number in the queue, its process, and 2 GiB of the
card whose UUID ends so; ``x`` behind the size means exclusive, ``-t`` at the end that it is a
test's, ``-l`` that it was asked for with low priority.
"""

from __future__ import annotations

import functools
import re

from pytest_gpumem.admission import Claim
from pytest_gpumem.tuples import NamedTuple

HELD, WAITING, RESIDENT, SPARE, LASTING = "h", "w", "r", "s", "l"
KEPT = RESIDENT, SPARE
"""What a process keeps without a lease."""
_PROCESS = r"[0-9]{1,10}\.[0-9a-f]{1,16}"
# Limits, so that no name makes the next number too long for a file's name.
_CLAIM = r"[0-9A-Za-z]{1,8}=[0-9]{1,20}x?"
_ENTRY = re.compile(
    rf"([hwrsl])-([0-9]{{10,18}})-({_PROCESS})-((?:{_CLAIM}(?:,{_CLAIM})*)?)(-[tl])?"
)
_IS_PROCESS = re.compile(_PROCESS)


class Entry(NamedTuple):
    """One file of the ledger; ``claims`` are by ``card_key``."""

    name: str
    state: str
    number: int
    process: str
    claims: dict[str, Claim]
    test: bool = False
    """Whether it is a test's: what its process asks for meanwhile comes out of it."""
    low: bool = False
    """Whether it was asked for with low priority: its number is that of somebody who came later."""

    @property
    def pid(self) -> int:
        """Number of its process, which may be another container's."""
        return pid_of(self.process)

    def turned(self, state: str) -> Entry:
        """Return it in another state."""
        return self._replace(state=state, name=state + self.name[1:])


def entry_of(
    state: str,
    number: int,
    process: str,
    claims: dict[str, Claim],
    *,
    test: bool = False,
    low: bool = False,
) -> Entry:
    """Return the entry that says so, with its name."""
    text = ",".join(f"{key}={_claim_text(claim)}" for key, claim in claims.items())
    name = f"{state}-{number:010d}-{process}-{text}{'-t' if test else '-l' if low else ''}"
    return Entry(name, state, number, process, claims, test, low)


@functools.lru_cache(maxsize=4096)
def entry_named(name: str) -> Entry | None:
    """Return what an entry's name says; None if it is no entry's."""
    found = _ENTRY.fullmatch(name)
    if found is None:
        return None
    state, number, process, text, kind = found.groups()
    parts = (part.partition("=") for part in text.split(",") if part)
    claims = {
        key: claim_in(state, int(size.rstrip("x")), size.endswith("x")) for key, _, size in parts
    }
    return Entry(name, state, int(number), process, claims, kind == "-t", kind == "-l")


def is_process(name: str) -> bool:
    """Return whether a process may be called so in the ledger."""
    return _IS_PROCESS.fullmatch(name) is not None


def pid_of(process: str) -> int:
    """Return the number of a process by its name in the ledger."""
    return int(process.partition(".")[0])


@functools.cache
def card_key(uuid: str) -> str:
    """Return the end of a UUID, which leaves room for many cards in one file's name.

    Two cards with the same end would count as one: less would be granted, never more.
    """
    return "".join(each for each in uuid if each.isascii() and each.isalnum())[-8:]


def claim_in(state: str, size: int, exclusive: bool = False) -> Claim:
    """Return what an entry in that state claims."""
    return Claim(size, 0, exclusive) if state in KEPT else Claim(0, size, exclusive)


def _claim_text(claim: Claim) -> str:
    return f"{claim.resident + claim.extra}{'x' if claim.exclusive else ''}"

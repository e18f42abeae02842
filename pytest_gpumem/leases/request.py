"""How a lease is asked for, and what is refused before anything is looked at."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from pytest_gpumem.admission import Claim, never_fits
from pytest_gpumem.devices import host
from pytest_gpumem.errors import RequestRefusedError, TooLarge
from pytest_gpumem.leases.entries import card_key
from pytest_gpumem.tuples import NamedTuple
from pytest_gpumem.units import format_bytes

HOPE = 5.0
"""Seconds that a request waits for processes to spare what they keep; each looks between tests."""
PATIENCE = 10.0
"""Seconds that a request without a timeout waits for foreign programs, which may keep what they
use for good; then it starts with what there is, as it would without leases."""
YIELDS = 1000
"""Later requests that one of low priority lets go first; a run's workers make as many in minutes.
It comes after these for good, so it waits longer but not for ever."""
_MOST_BYTES = 2**63
"""No card has as many."""


class Want(NamedTuple):
    """What is asked for of one card."""

    size: int | None = None
    """Bytes; None is the whole card."""
    exclusive: bool = False
    """Whether nobody else may have a lease of the card meanwhile."""

    def __str__(self) -> str:
        """Return it in words."""
        if self.size is None:
            return "the whole card"
        return format_bytes(self.size) + (" exclusively" if self.exclusive else "")

    @property
    def claim(self) -> Claim:
        """What it takes of the card."""
        return Claim(0, self.size or 0, self.exclusive or self.size is None)

    @classmethod
    def of(cls, claim: Claim) -> Want:
        """Return what ``claim`` was asked for as."""
        return cls(None if claim.exclusive and not claim.extra else claim.extra, claim.exclusive)


class Hope(NamedTuple):
    """What a request still waits for, though no lease that ends brings it."""

    spared: bool = False
    """That processes archive what they keep."""
    freed: bool = False
    """That foreign programs end, if they did when others waited for it."""
    timed: bool = False
    """That foreign programs end before its timeout."""


class Terms(NamedTuple):
    """On which a lease is asked for; see ``LeaseStore.acquire``."""

    label: str
    timeout: float | None
    deadline: float | None
    """Of ``time.monotonic``."""
    on_wait: Callable[[str], None]
    hope: float
    test: bool
    worker: bool
    low: bool

    def hopes(self, waited: float) -> Hope:
        """Return what it still waits for after so many seconds."""
        timed = self.timeout is not None
        spared = waited < self.hope and self.timeout != 0
        return Hope(spared, freed=not timed and waited < PATIENCE, timed=timed)


def claims_of(
    wants: Mapping[str, Want], totals: Mapping[str, int], headroom: int
) -> dict[str, Claim]:
    """Return what is asked for of each card, by ``card_key``; nothing of none is left out.

    Raises:
        RequestRefusedError: when a size is none.
        TooLarge: when a card does not have as much.

    """
    found = {}
    for uuid, want in wants.items():
        if want.size is not None:
            check_size(want.size, f"what is asked for of {called(uuid)}")
        claim, total = want.claim, totals[uuid]
        if never_fits(total, headroom, claim):
            kept = f", of which {format_bytes(headroom)} are kept free" if headroom else ""
            has = f"{called(uuid)}, which has {format_bytes(total)}{kept}"
            raise TooLarge(f"{want} asked for of {has}")
        if claim.extra or claim.exclusive:  # who asks for nothing waits for nobody
            found[card_key(uuid)] = claim
    return found


def called(uuid: str) -> str:
    """Return what a message calls that of which something is asked for: a card, or a pool."""
    if not host.is_pool(uuid):
        return f"card {uuid}"
    return "main memory" if uuid == host.MACHINE else "its control group's main memory"


def check_size(size: int, what: str) -> None:
    """Make sure that ``size`` is a number of bytes.

    Raises:
        RequestRefusedError: when it is not.

    """
    if isinstance(size, bool) or not isinstance(size, int):
        raise RequestRefusedError(f"{what} is {size!r}, which is no whole number of bytes")
    if size < 0:
        raise RequestRefusedError(f"{what} is less than 0 bytes")
    if size >= _MOST_BYTES:
        raise RequestRefusedError(f"{what} is more than any card has")


def check_seconds(seconds: float | None, what: str) -> None:
    """Make sure that ``seconds`` is a time to wait; None is without a limit.

    Raises:
        RequestRefusedError: when it is not.

    """
    if seconds is None:
        return
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise RequestRefusedError(f"{what} is {seconds!r}, which is no number of seconds")
    if not 0 <= seconds <= threading.TIMEOUT_MAX:  # nor nan
        raise RequestRefusedError(
            f"{what} is out of range; allowed are 0 to {threading.TIMEOUT_MAX:.0f} seconds, or "
            "None to wait without a limit"
        )

"""Every error that is raised for users to catch; each message is one sentence."""

from __future__ import annotations


class LeaseError(Exception):
    """Leases are not to be had: their directory cannot be used, or the wait could last for ever."""


class RequestRefusedError(LeaseError, ValueError):
    """A lease cannot be asked for so; says what is wrong, and what is allowed."""


class TooLarge(LeaseError):  # noqa: N818  # the name says what is wrong with the request
    """More is asked for than the card has."""


class LeaseTimeout(LeaseError, TimeoutError):  # noqa: N818  # the same word as TimeoutError's
    """The lease did not become free in time; says who held it."""


class ArchiveError(Exception):
    """Anything an archive cannot do; the state that was given stays as it was."""


class StateRefusedError(ArchiveError):
    """The state holds something that could not be restored bit for bit; says what and where."""


class ArgumentError(ArchiveError, ValueError):
    """What was asked for is of the wrong kind or out of its range; says which and what is."""


class KeyRefusedError(ArchiveError):
    """There is no key, or not one that may be used."""


class DamagedError(ArchiveError):
    """The bytes are not those that were written: damaged, truncated or forged."""


class WrongKeyError(DamagedError):
    """The key does not open it; a damaged header looks the same."""


class UnknownVersionError(DamagedError):
    """Not an archive at all, or one of another version."""


class NotFoundError(ArchiveError):
    """There is nothing of that name in the store."""


class InUseError(ArchiveError):
    """It cannot be had now: a thread computes with it, or a model that sleeps needs it."""


class QuotaError(ArchiveError):
    """There is no room left for it in the store's quota."""


class DiskError(ArchiveError):
    """The system would not read or write; says which file and why."""

"""What can go wrong with an archive: one tree of errors, each message one sentence."""

from __future__ import annotations


class ArchiveError(Exception):
    """Anything an archive cannot do; the state that was given stays as it was."""


class StateRefusedError(ArchiveError):
    """The state holds something that could not be restored bit for bit; says what and where."""


class MismatchError(ArchiveError):
    """The tensors that were to be filled are not shaped like those in the archive."""


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


class QuotaError(ArchiveError):
    """There is no room left for it in the store's quota."""


class DiskError(ArchiveError):
    """The system would not read or write; says which file and why."""

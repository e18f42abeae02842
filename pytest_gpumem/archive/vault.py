"""The secret of a store: sealed under a root key in two files, either of which is enough."""

from __future__ import annotations

import contextlib
import secrets
from typing import TYPE_CHECKING, Final

from pytest_gpumem import files
from pytest_gpumem.archive import disk, keys, sealing
from pytest_gpumem.archive.disk import explained, locked
from pytest_gpumem.errors import DamagedError, DiskError, KeyRefusedError, WrongKeyError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAMES: Final = ("key", "key-copy")
LOCK: Final = "lock"
"""The file whose lock whoever makes or seals a secret has alone."""
_MOST = 4096


class Vault:
    """Opens and seals the secret of the store in ``folder`` with root keys."""

    def __init__(self, folder: Path, roots: keys.Keys) -> None:
        self.folder = folder
        self.keys = roots

    def open(self) -> bytes | None:
        """Return the secret; None where there is none yet.

        Raises:
            WrongKeyError, DamagedError: it is there and does not open.
            OSError: its files cannot be read.

        """
        failure: Exception | None = None
        for name in NAMES:
            try:
                return self._opened(name)
            except FileNotFoundError:
                continue
            except (OSError, DamagedError) as error:
                failure = failure or error
        if isinstance(failure, DamagedError):
            raise type(failure)(
                f"the key of {self.keys.source} does not open the store {str(self.folder)!r}: "
                f"{failure}"
            )
        if failure is not None:
            raise failure
        return None

    def _opened(self, name: str) -> bytes:
        sealed = files.read_own(self.folder / name, _MOST)
        # Somebody may have rotated since our keys were read; theirs is in the file by now.
        secret = _opened_by(self.keys, sealed)
        if secret is None:
            self.keys = keys.again(self.keys)
            secret = _opened_by(self.keys, sealed)
        if secret is None:
            raise WrongKeyError("another key wrote it, or its header is damaged")
        return secret

    def begin(self) -> bytes:
        """Return the secret of a store that has none yet, sealed."""
        secret = secrets.token_bytes(32)
        self._seal(secret)
        return secret

    def rotate(self, secret: bytes, given: keys.Keys | None) -> None:
        """Seal the secret under the first of the ``given`` keys; None: a new one in our key file.

        Raises:
            KeyRefusedError: the keys in use come from no file, and none are given.
            DiskError: the key file cannot be changed.

        """
        if given is not None:
            self.keys = given
            self._seal(secret)
        elif self.keys.file is None:
            raise KeyRefusedError(f"the key comes from {self.keys.source}: a new one must be given")
        else:
            with keys.added(self.keys.file) as now:
                self.keys = now
                self._seal(secret)

    def _seal(self, secret: bytes) -> None:
        """Seal under a key that is in the key file when that is done, also if people edit it.

        Raises:
            KeyRefusedError: it is changed again and again.

        """
        for _ in range(10):
            with explained("seal", self.folder):
                for name in NAMES:
                    sealed = sealing.close_whole(self.keys.keys[0], sealing.KEY, secret)
                    disk.write_small(self.folder / name, sealed)
            used, self.keys = self.keys.keys[0], keys.again(self.keys)
            if used in self.keys.keys:
                return
        raise KeyRefusedError(f"{self.keys.source} is changed by others all the time")

    def problems(self) -> list[tuple[str, str]]:
        """Return the files that do not open, and why."""
        found = list(self._broken())
        if found:
            # Perhaps somebody is just making them.
            with explained("read", self.folder), locked(self.folder / LOCK, alone=False):
                found = list(self._broken())
        return found

    def _broken(self) -> Iterator[tuple[str, str]]:
        for name in NAMES:
            try:
                with explained("read", self.folder / name):
                    self._opened(name)
            except (DamagedError, DiskError, KeyRefusedError) as error:
                yield name, f"the key file does not open: {error}"


def _opened_by(roots: keys.Keys, sealed: bytes) -> bytes | None:
    for root in roots.keys:
        with contextlib.suppress(WrongKeyError):
            return sealing.open_whole(root, sealing.KEY, sealed)
    return None

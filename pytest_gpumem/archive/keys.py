"""Root keys: where they come from and what a file must be like to hold one.

A store's own secret is sealed under a root key. A root key is 32 random bytes, written as
``gpumem-key-`` and 43 letters of URL-safe base64. A key file has one a line, the current one
first; older ones below it still open stores that were not rotated yet. ``#`` begins a comment.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import logging
import os
import secrets
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from pytest_gpumem.archive.disk import explained, sync_directory, write_small
from pytest_gpumem.errors import KeyRefusedError

if TYPE_CHECKING:
    from collections.abc import Callable

KEY_VARIABLE: Final = "GPUMEM_ARCHIVE_KEY"
FILE_VARIABLE: Final = "GPUMEM_ARCHIVE_KEY_FILE"
_PREFIX = "gpumem-key-"
_FORM = f"32 bytes, or {_PREFIX!r} and 43 letters of URL-safe base64"
_log = logging.getLogger("pytest_gpumem")


class Keys(NamedTuple):
    """Root keys, the current one first."""

    keys: tuple[bytes, ...]
    source: str
    """Where they came from, for messages."""
    file: Path | None = None
    """The key file, if they came from one."""

    def __repr__(self) -> str:
        return f"Keys({len(self.keys)} from {self.source})"


def default_file() -> Path:
    """Return the key file: ``$GPUMEM_ARCHIVE_KEY_FILE``, or one in the user's config directory."""
    named = os.environ.get(FILE_VARIABLE)
    if named:
        return Path(named)
    config = os.environ.get("XDG_CONFIG_HOME")
    return (Path(config) if config else Path.home() / ".config") / "gpumem" / "archive.key"


def find(
    key: bytes | str | Path | Callable[[], bytes | str] | None = None, *, make: bool = True
) -> Keys:
    """Return the root keys to use.

    Args:
        key: a key, a function that returns one, or the path of a key file. None: the default
            key file if there is one, then ``$GPUMEM_ARCHIVE_KEY``, else a new key file.
        make: whether a key file may be made.

    Raises:
        KeyRefusedError: there is none, or it is not a key, or not only its owner's.

    """
    if isinstance(key, Path):
        return _read(key)
    if key is not None:
        found = key() if callable(key) else key
        return Keys((_parse(found, "the key that was given"),), "the program")
    file = default_file()
    if file.exists() or file.is_symlink():
        return _read(file)
    from_environment = os.environ.get(KEY_VARIABLE)
    if from_environment:
        place = f"{KEY_VARIABLE} in the environment"
        return Keys((_parse(from_environment, place),), place)
    if not make:
        raise KeyRefusedError(f"there is no key: neither {str(file)!r} nor {KEY_VARIABLE}")
    generate(file)
    _log.warning(
        "made a new key for archives in %s: keep a copy, without it nothing can be restored", file
    )
    return _read(file)


def text_of(key: bytes) -> str:
    """Return how a key is written."""
    return _PREFIX + base64.urlsafe_b64encode(key).decode().rstrip("=")


def generate(file: Path) -> None:
    """Make a key file; one that another process makes at the same moment is left as it is.

    Raises:
        DiskError: it cannot be written.

    """
    with explained("make the key file", file):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside = file.parent / f".{secrets.token_hex(8)}"
        try:
            write_small(aside, (text_of(secrets.token_bytes(32)) + "\n").encode())
            # Unlike a rename, a link does not replace the file of whoever was faster.
            with contextlib.suppress(FileExistsError):
                os.link(aside, file)
        finally:
            aside.unlink(missing_ok=True)
        sync_directory(file.parent)


def add(file: Path) -> Keys:
    """Put a new key before those of a key file and return them all.

    Raises:
        KeyRefusedError: the file may not be used.
        DiskError: it cannot be written.

    """
    _read(file)
    with explained("change the key file", file):
        old = file.read_bytes()
        write_small(file, (text_of(secrets.token_bytes(32)) + "\n").encode() + old)
    return _read(file)


def _read(file: Path) -> Keys:
    """Return the keys of a file that only its owner, this user, can read and write."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    place = f"the key file {str(file)!r}"
    try:
        opened = os.open(file, flags)
    except OSError as error:
        # ELOOP is how O_NOFOLLOW says so, and its text misleads.
        why = "is a symbolic link" if file.is_symlink() else f"cannot be read: {error.strerror}"
        raise KeyRefusedError(f"{place} {why}") from None
    try:
        status = os.fstat(opened)
        if not stat.S_ISREG(status.st_mode):
            raise KeyRefusedError(f"{place} is not a regular file")
        if status.st_uid != os.geteuid():
            raise KeyRefusedError(f"{place} belongs to another user")
        if status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            raise KeyRefusedError(f"{place} is open to others (mode {mode:04o}); chmod 600 it")
        text = os.read(opened, 2**20).decode(errors="replace")
    finally:
        os.close(opened)
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    found = tuple(_parse(line, place) for line in lines if line)
    if not found:
        raise KeyRefusedError(f"{place} holds no key")
    return Keys(found, place, file)


def _parse(key: bytes | str, place: str) -> bytes:
    """Return the 32 bytes of a key; messages never show it."""
    if isinstance(key, str) and key.startswith(_PREFIX) and len(key) == len(_PREFIX) + 43:
        with contextlib.suppress(binascii.Error, ValueError):
            key = base64.b64decode(key[len(_PREFIX) :] + "=", altchars=b"-_", validate=True)
    if not isinstance(key, bytes) or len(key) != 32:
        raise KeyRefusedError(f"{place} is not a key; allowed are {_FORM}")
    return key

"""Root keys: where they come from and what a file must be like to hold one.

A store's own secret is sealed under a root key. A root key is 32 random bytes, written as
``gpumem-key-`` and 43 letters of URL-safe base64. A key file has one a line, the current one
first; older ones below it still open stores that were not rotated yet. ``#`` begins a comment.

Keys are only ever added, by one process at a time. So whoever has read a store's sealed secret
finds the key for it by reading the key file after that, whatever others do meanwhile.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import logging
import os
import secrets
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from pytest_gpumem import files
from pytest_gpumem.archive.disk import explained, locked, write_small
from pytest_gpumem.errors import KeyRefusedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KEY_VARIABLE: Final = "GPUMEM_ARCHIVE_KEY"
FILE_VARIABLE: Final = "GPUMEM_ARCHIVE_KEY_FILE"
_PREFIX = "gpumem-key-"
_FORM = f"32 bytes, or {_PREFIX!r} and 43 letters of URL-safe base64"
_MOST = 2**20
"""Bytes of a key file: 19,000 keys."""
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
    if isinstance(key, Path) or (isinstance(key, str) and _names_file(key)):
        return _read(Path(key))
    if key is not None:
        found = key() if callable(key) else key
        return Keys((_parse(found, "the key that was given"),), "the program")
    file = default_file()
    if os.path.lexists(file):
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


def again(keys: Keys) -> Keys:
    """Return the keys as they are now, which may be more.

    Raises:
        KeyRefusedError: their file may not be used any more.

    """
    return _read(keys.file) if keys.file is not None else keys


def text_of(key: bytes) -> str:
    """Return how a key is written."""
    return _PREFIX + base64.urlsafe_b64encode(key).decode().rstrip("=")


def generate(file: Path) -> None:
    """Make a key file; one that is there is left as it is.

    Raises:
        DiskError: it cannot be written.

    """
    with explained("make the key file", file):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _changing(file):
            if not os.path.lexists(file):
                _write(file, "")


@contextmanager
def added(file: Path) -> Iterator[Keys]:
    """Put a new key before those of a key file and yield them all.

    Nobody else adds one before the block ends.

    Raises:
        KeyRefusedError: the file may not be used, or is full.
        DiskError: it cannot be written.

    """
    with explained("change the key file", file), _changing(file):
        _read(file)
        _write(file, _content(file))
        yield _read(file)


@contextmanager
def _changing(file: Path) -> Iterator[None]:
    # Not the file itself, which is replaced by each change.
    with locked(file.with_name(f".{file.name}.lock"), alone=True):
        yield


def _write(file: Path, old: str) -> None:
    text = f"{text_of(secrets.token_bytes(32))}\n{old}"
    if len(text.encode()) > _MOST:
        raise KeyRefusedError(
            f"the key file {str(file)!r} is full; delete the lines of keys that no store needs"
        )
    # One name for all: what a process left that was killed here goes with the next change.
    aside = file.with_name(f".{file.name}.new")
    aside.unlink(missing_ok=True)
    write_small(file, text.encode(), aside)


def _names_file(key: str) -> bool:
    return not key.startswith(_PREFIX) and (os.sep in key or os.path.lexists(key))


def _content(file: Path) -> str:
    return files.read_own(file, _MOST, closed=files.OPEN).decode(errors="replace")


def _read(file: Path) -> Keys:
    """Return the keys of a file that only its owner, this user, can read and write."""
    place = f"the key file {str(file)!r}"
    try:
        text = _content(file)
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or error
        raise KeyRefusedError(f"{place} cannot be read: {why}") from None
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

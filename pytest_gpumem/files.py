"""Files that are whole or not there, those that do no harm to whoever opens them, and TOML."""

from __future__ import annotations

import errno
import os
import stat
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WRITABLE: Final = 0o022
"""Permissions by which others could change a file."""
OPEN: Final = 0o077
"""Permissions by which others could change or read it."""
_FLAGS = sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY"))
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@contextmanager
def replace(path: Path, *, encoding: str = "utf-8") -> Iterator[TextIO]:
    """Write text to ``path``: all of it is there when the block ends, or what was there before.

    Who may read it and run it stays as it was.

    Raises:
        OSError: of ``path``, when it cannot be written; what stood there is untouched.

    """
    # Beside it, so that the rename stays within one file system; with the process's number, so
    # that two processes which write one file do not write into each other's.
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding=encoding, newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            aside.chmod(stat.S_IMODE(path.stat().st_mode))
        aside.replace(path)
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)  # the name that the user knows
        raise
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def undisturbed(path: Path) -> Iterator[None]:
    """Let nobody else who calls this change ``path`` within: for those who read it and write it.

    By a lock of its directory, so that no file of ours stays there; without effect on Windows.

    Raises:
        OSError: when the directory cannot be opened.

    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    directory = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # of a file system without locks
            fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def read_text(path: Path) -> str:
    """Return the text of a regular file; another one, such as a FIFO, might be waited for.

    Raises:
        OSError: when it is none, or cannot be read.
        ValueError: when it is no UTF-8.

    """
    _refuse_kind(path.stat(), stat.S_IFREG, str(path))
    return path.read_text(encoding="utf-8")


def read_toml(path: Path, tidy: Callable[[str], str] = str) -> dict[str, Any]:
    """Return what a file of TOML says, once ``tidy`` was at its text.

    Raises:
        OSError: when it cannot be read.
        ValueError: in one sentence, when it is no TOML.

    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # pytest needs it there too
    try:
        plain: dict[str, Any] = tomllib.loads(tidy(read_text(path)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not TOML: {error}") from None
    return plain


def open_own(
    path: Path | str,
    flags: int = os.O_RDONLY,
    *,
    most: int | None = None,
    closed: int = WRITABLE,
) -> int:
    """Return the descriptor of a regular file of this user, without waiting for anybody.

    In the place of a file that a program expects there may be a FIFO, which blocks whoever opens
    it, a link that leads elsewhere, a file of somebody else, or a sparse one that fills the memory
    of whoever reads it. Each of them is refused before a byte is read.

    Args:
        path: the file; its last part is not followed as a link.
        flags: as for ``os.open``; a file that is made here has mode 0600.
        most: bytes that it may have.
        closed: permissions that others must not have, ``WRITABLE`` or ``OPEN``.

    Raises:
        OSError: whose ``strerror`` says what is wrong with the file.

    """
    name = str(path)
    try:
        file = os.open(name, flags | _FLAGS, 0o600)
    except OSError as error:
        # Of a link the system says "too many levels", of a FIFO or socket "no such device".
        if error.errno in {errno.ELOOP, errno.ENXIO, errno.EISDIR}:
            _refuse_kind(os.lstat(name), stat.S_IFREG, name)
        raise
    try:
        about = os.fstat(file)
        _refuse_kind(about, stat.S_IFREG, name)
        _refuse_others(about, closed, name)
        _refuse_size(about.st_size, most, name)
    except BaseException:
        os.close(file)
        raise
    return file


def read_own(path: Path | str, most: int, *, closed: int = WRITABLE) -> bytes:
    """Return the content of a file that ``open_own`` opens.

    Raises:
        OSError: see there; also if the file grows beyond ``most`` bytes meanwhile.

    """
    file = open_own(path, most=most, closed=closed)
    try:
        found = bytearray()
        while part := os.read(file, min(2**20, most + 1 - len(found))):
            found += part
            _refuse_size(len(found), most, str(path))
        return bytes(found)
    finally:
        os.close(file)


def own_directory(path: Path, *, follow: bool = False, closed: int = WRITABLE) -> None:
    """Make a directory with mode 0700, or make sure that the one there is this user's.

    Args:
        path: the directory; those above it are made too.
        follow: whether it may be a symbolic link to one.
        closed: permissions that others must not have.

    Raises:
        OSError: whose ``strerror`` says what is wrong with it.

    """
    with suppress(FileExistsError):
        path.mkdir(mode=0o700, parents=True)
    about = path.stat() if follow else path.lstat()
    _refuse_kind(about, stat.S_IFDIR, str(path))
    _refuse_others(about, closed, str(path))


def _refuse_kind(about: os.stat_result, wanted: int, name: str) -> None:
    kind = stat.S_IFMT(about.st_mode)
    if kind != wanted:
        expected = "regular file" if wanted == stat.S_IFREG else "directory"
        found = _KINDS.get(kind, "a file")
        code = errno.ELOOP if kind == stat.S_IFLNK else errno.EINVAL
        raise OSError(code, f"it is {found}, not a {expected}", name)


def _refuse_others(about: os.stat_result, closed: int, name: str) -> None:
    if not hasattr(os, "geteuid"):  # Windows, whose permissions are not in these bits
        return
    if about.st_uid != os.geteuid():
        raise OSError(errno.EPERM, "it belongs to another user", name)
    if about.st_mode & closed:
        mode = stat.S_IMODE(about.st_mode)
        tight = "700" if stat.S_ISDIR(about.st_mode) else "600"
        told = f"it is open to others (mode {mode:04o}); chmod {tight} it"
        raise OSError(errno.EPERM, told, name)


def _refuse_size(size: int, most: int | None, name: str) -> None:
    if most is not None and size > most:
        raise OSError(errno.EFBIG, f"it has {size} bytes; allowed are {most}", name)

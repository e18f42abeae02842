"""Where leases are kept: a directory of the user's own, in memory where that can be."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

from pytest_gpumem.errors import LeaseError
from pytest_gpumem.files import own_directory

_BEING_REMOVED = FileNotFoundError, FileExistsError
"""What the kernel says of files in a directory that somebody removes at the same time."""
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "lustre", "gpfs", "beegfs"}
_NETWORK |= {"fuse.sshfs", "fuse.glusterfs", "glusterfs"}


class Vanished(LeaseError):  # noqa: N818  # nobody sees it who tries again
    """The directory, or an entry, is being removed; a new one can be made right after."""


def run_directory() -> Path:
    """Return this user's directory for leases on this machine; who uses it makes it.

    Raises:
        LeaseError: when GPUMEM_RUN_DIR is not absolute.

    """
    return _place() / f"gpumem-{_user()}"


def _user() -> int | str:
    if hasattr(os, "getuid"):
        return os.getuid()
    import getpass

    return getpass.getuser()


def _place() -> Path:
    """Return where the users' directories lie.

    Processes of one user must agree on it: what a session, a service or ``su`` puts into
    XDG_RUNTIME_DIR and TMPDIR differs, /dev/shm does not, and is in memory.
    """
    if named := os.environ.get("GPUMEM_RUN_DIR"):
        if not Path(named).is_absolute():
            raise LeaseError(f"GPUMEM_RUN_DIR={named} is not an absolute path")
        return Path(named)
    memory = Path("/dev/shm")  # noqa: S108  # the owner of our directory there is looked at
    with suppress(OSError):
        if memory.stat().st_mode & stat.S_ISVTX and os.access(memory, os.W_OK | os.X_OK):
            return memory
    import tempfile

    return Path(tempfile.gettempdir())


def make_own(directory: Path) -> None:
    """Make a directory that only this user may enter, or make sure that it is one.

    Raises:
        OSError: when that cannot be, or it is on a network file system, whose locks others miss.

    """
    _refuse_network(directory)
    # Anybody may make directories in /dev/shm, and links to theirs.
    own_directory(directory)
    directory.chmod(0o700)


def unusable(directory: Path, error: OSError) -> LeaseError:
    """Return the sentence that says so."""
    kind = Vanished if isinstance(error, _BEING_REMOVED) else LeaseError
    named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str) else directory
    within = named != directory and named.is_relative_to(directory)
    why = f"{named.relative_to(directory)}: {error.strerror}" if within else error.strerror
    return kind(
        f"leases cannot be kept in {directory}: {why}; "
        "GPUMEM_RUN_DIR can name another directory on this machine"
    )


def is_plain(path: str) -> bool:
    """Return whether ``path`` is a regular file of this user, and no link to one."""
    try:
        about = os.lstat(path)
    except OSError:
        return False
    own = not hasattr(os, "geteuid") or about.st_uid == os.geteuid()
    return own and stat.S_ISREG(about.st_mode)


def _refuse_network(directory: Path) -> None:
    """Raise where other machines' locks and changes are not seen, or not at once."""
    kind = _filesystem(directory)
    if kind in _NETWORK:
        raise OSError(errno.ENOTSUP, f"{kind} is a network file system")


def _filesystem(directory: Path) -> str:
    """Return the type of the file system that ``directory`` is or will be on, "" if unknown.

    See proc(5), mountinfo.
    """
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found: dict[str, str] = {}
    for line in mounts.splitlines():
        place, _, kind = line.partition(" - ")
        # Blanks in the name of a mount point are written as octal numbers.
        found[place.split()[4].replace("\\040", " ")] = kind.split()[0]
    at = directory.resolve()
    return next((found[str(each)] for each in (at, *at.parents) if str(each) in found), "")

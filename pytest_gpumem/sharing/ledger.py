"""The ledger of leases: a directory of small files whose names say everything.

``h-0000000007-4711.9f3c2a51-56789abc=2147483648`` is a lease (``h``: held, ``w``: waiting, ``r``:
kept between tests, ``s``: so too, and some of it can be spared) with its number in the queue, its
process, and 2 GiB of the card whose UUID ends so; ``x`` behind the size means exclusive. The
content is a label for people. Each process keeps one locked file in another directory; entries of
a process whose lock is gone are void.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
import threading
import weakref
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pytest_gpumem.sharing.admission import Claim
from pytest_gpumem.sharing.locks import FileLock, Watch, is_held

HELD, WAITING, RESIDENT, SPARE = "h", "w", "r", "s"
KEPT = RESIDENT, SPARE
"""What a process keeps without a lease."""
_BEING_REMOVED = FileNotFoundError, FileExistsError, IsADirectoryError
"""What the kernel says of files in a directory that somebody removes at the same time."""
_LABEL = 500
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "lustre", "gpfs", "beegfs"}
_NETWORK |= {"fuse.sshfs", "fuse.glusterfs", "glusterfs"}


class LeaseError(Exception):
    """Why there is no lease, in one sentence."""


class Vanished(LeaseError):  # noqa: N818  # nobody sees it who tries again
    """The directory, or an entry, is being removed; a new one can be made right after."""


class Entry(NamedTuple):
    """One file of the ledger; ``claims`` are by ``card_key``."""

    name: str
    state: str
    number: int
    process: str
    claims: dict[str, Claim]

    @property
    def pid(self) -> int:
        """Number of its process, which may be another container's."""
        return pid_of(self.process)

    def turned(self, state: str) -> Entry:
        """Return it in another state."""
        return self._replace(state=state, name=state + self.name[1:])


class Page:
    """What the ledger said at one moment, in the order of the queue."""

    def __init__(self, names: Collection[str]) -> None:
        known = (name for name in names if name[:2] in ("h-", "w-", "r-", "s-"))
        self.entries = sorted(map(_entry, known), key=lambda entry: entry.number)
        self.last = self.entries[-1].number if self.entries else 0
        self.waiting = [entry for entry in self.entries if entry.state == WAITING]
        self.claims: dict[str, list[Claim]] = defaultdict(list)
        """Held and resident ones, by card."""
        for entry in self.entries:
            if entry.state != WAITING:
                for key, claim in entry.claims.items():
                    self.claims[key].append(claim)

    def ahead(self, key: str, number: int) -> list[Claim]:
        """Return what the requests before ``number`` want of a card."""
        return [
            entry.claims[key]
            for entry in self.waiting
            if entry.number < number and key in entry.claims
        ]


class Standing(NamedTuple):
    """The files by which a process takes part."""

    alive: FileLock
    """Shows that it lives."""
    guard: FileLock
    """Lets it alone change the ledger."""


class Ledger:
    """The ledger in ``directory`` as this process keeps it; any thread may."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._queue = directory / "queue"
        self._alive = directory / "alive"
        self.forget()
        _ledgers.add(self)

    def forget(self) -> None:
        """Have nothing to do with what is in it; a forked child begins so."""
        self._threads = threading.RLock()
        self._standing: Standing | None = None
        self._last = 0
        # Processes of several containers may have the same number.
        self.process = f"{os.getpid()}.{os.urandom(4).hex()}"
        """This process's name in it."""
        self.leases: dict[str, threading.Thread] = {}
        """The thread that took each of this process's leases, by the name of the entry."""
        self.residents: dict[str, Entry] = {}
        """What this process keeps between tests, by card."""

    def drop(self, entry: Entry) -> bool:
        """Strike out a lease of this process; False when it has none such, as a forked child."""
        if entry.name not in self.leases:
            return False
        self.strike(entry)
        return self.leases.pop(entry.name, None) is not None

    @property
    def standing(self) -> Standing:
        """How this process takes part in it; it joins now if it has not yet.

        Raises:
            LeaseError: when the directory cannot be used.

        """
        if self._standing is None:
            with self._threads:
                try:
                    self._standing = self._standing or self._join()
                except OSError as error:
                    raise unusable(self.directory, error) from error
        return self._standing

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep every other thread and process from granting.

        Raises:
            LeaseError: also when anything in the block finds the directory unusable.

        """
        with self._threads:
            guard = self.standing.guard
            try:
                guard.acquire()
                while guard.is_gone:  # as when a user logs out, or somebody cleans up
                    self._leave()
                    guard = self.standing.guard
                    guard.acquire()
                yield
            except OSError as error:
                raise unusable(self.directory, error) from error
            finally:
                guard.release()

    def read(self) -> Page:
        """Return what it says now.

        Raises:
            LeaseError: when the directory cannot be used.

        """
        _ = self.standing  # who has joined has a directory to read
        try:
            try:
                return self.page()
            except FileNotFoundError:
                self.mend()
                _ = self.standing
                return self.page()
        except OSError as error:
            raise unusable(self.directory, error) from error

    def page(self) -> Page:
        """Return what it says now; for where ``alone`` says what is wrong with the directory."""
        return Page(os.listdir(self._queue))  # noqa: PTH208  # iterdir is slower

    def ahead(self, request: Entry) -> int:
        """Return how many wait before ``request``; all who wait ask at once when a process ends."""
        try:
            names = os.listdir(self._queue)  # noqa: PTH208  # as page
        except OSError:
            return 0
        # Names are in the order of the queue.
        return sum(name < request.name and name.startswith(WAITING) for name in names)

    def mend(self) -> None:
        """See to it that the next use makes a directory that is gone, or half gone."""
        with self._threads:
            if not self._queue.is_dir():
                self._leave()

    def next_number(self, page: Page) -> int:
        """Return the number of a request that comes after all in ``page``; needs the lock.

        This process never uses one twice, so that nothing that comes late hits a later entry.
        """
        self._last = max(self._last, page.last) + 1
        return self._last

    def write(self, entry: Entry, label: str) -> None:
        """Add an entry."""
        file = os.open(self._path(entry), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            # The name is what counts: a full disk costs the label, not the lease.
            with suppress(OSError):
                os.write(file, label[:_LABEL].encode(errors="replace"))
        finally:
            os.close(file)

    def turn(self, entry: Entry, state: str) -> None:
        """Put an entry into another state."""
        os.rename(self._path(entry), self._path(entry.turned(state)))  # noqa: PTH104  # as _path

    def strike(self, entry: Entry) -> None:
        """Take an entry out, if it is there; needs no lock, because it can only make room."""
        with suppress(FileNotFoundError):
            os.unlink(self._path(entry))  # noqa: PTH108  # as _path

    def label(self, entry: Entry) -> str:
        """Return what its owner calls itself."""
        try:
            return Path(self._path(entry)).read_text(encoding="utf-8") or "no label"
        except OSError:
            return "gone meanwhile"

    def nudge(self, entry: Entry) -> bool:
        """Wake the owner of a waiting entry; False when it does not wait any more."""
        try:
            os.utime(self._path(entry))
        except FileNotFoundError:
            return False
        if hasattr(os, "sched_yield"):
            # Where both share a core, the woken one would wait until this one sleeps.
            os.sched_yield()
        return True

    def watch(self, entry: Entry) -> Watch:
        """Return what waits for a nudge to ``entry`` or the end of any process."""
        return Watch(Path(self._path(entry)), self._alive)

    def dead(self, suspects: Collection[str] | None) -> list[str]:
        """Return the processes among ``suspects`` (None: all with entries) that seem dead."""
        if suspects is None:
            suspects = {entry.process for entry in self.read().entries}
        return [
            each
            for each in suspects
            if each != self.process and not is_held(f"{self._alive}/{each}")
        ]

    def bury(self, dead: Collection[str]) -> bool:
        """Take out what ``dead`` processes had; return whether there were any.

        Needs the lock. Somebody may start then, and has to be woken.
        """
        # Looked at again: a process that just joins has its file before it has its lock.
        dead = [each for each in dead if not is_held(self._alive / each)]
        for entry in self.page().entries if dead else ():
            if entry.process in dead:
                self.strike(entry)
        for each in dead:
            (self._alive / each).unlink(missing_ok=True)
        return bool(dead)

    def close(self) -> bool:
        """Take everything of this process out; return whether there can have been anything."""
        if self._standing is None:
            return False
        with self.alone():
            for entry in self.page().entries:
                if entry.process == self.process:
                    self.strike(entry)
            self.leases.clear()
            self.residents.clear()
            (self._alive / self.process).unlink(missing_ok=True)
        self._leave()
        return True

    def _path(self, entry: Entry) -> str:
        return f"{self._queue}/{entry.name}"  # a Path takes longer than the system call

    def _join(self) -> Standing:
        """Take part, with all that this process has."""
        make_own(self.directory)
        for each in (self._queue, self._alive):
            each.mkdir(mode=0o700, exist_ok=True)
        files = [FileLock(self.directory / "lock")]
        try:
            files[0].acquire()
            files.append(FileLock(self._alive / self.process))
            files[1].acquire()
            for entry in (*map(_entry, self.leases), *self.residents.values()):
                self.write(entry, "")
            # Whoever waits for what the dead had takes care of them: it would have to be woken.
            listed = {self.process, *(entry.process for entry in self.page().entries)}
            self.bury({each.name for each in self._alive.iterdir()} - listed)
            files[0].release()
        except BaseException:
            for file in files:
                file.close()
            raise
        return Standing(alive=files[1], guard=files[0])

    def _leave(self) -> None:
        own, self._standing = self._standing, None
        for file in own or ():
            file.close()


def pid_of(process: str) -> int:
    """Return the number of a process by its name in the ledger."""
    return int(process.partition(".")[0])


@functools.cache
def card_key(uuid: str) -> str:
    """Return the end of a UUID, which leaves room for many cards in one file's name.

    Two cards with the same end would count as one: less would be granted, never more.
    """
    return "".join(filter(str.isalnum, uuid))[-8:]


def entry_of(state: str, number: int, process: str, claims: dict[str, Claim]) -> Entry:
    """Return the entry that says so, with its name."""
    text = ",".join(f"{key}={_claim_text(claim)}" for key, claim in claims.items())
    return Entry(f"{state}-{number:010d}-{process}-{text}", state, number, process, claims)


@functools.lru_cache(maxsize=4096)
def _entry(name: str) -> Entry:
    state, number, process, text = name.split("-", 3)
    parts = (part.partition("=") for part in text.split(",") if part)
    claims = {key: _claim(state, size) for key, _, size in parts}
    return Entry(name, state, int(number), process, claims)


def _claim_text(claim: Claim) -> str:
    return f"{claim.resident + claim.extra}{'x' if claim.exclusive else ''}"


def _claim(state: str, text: str) -> Claim:
    size = int(text.removesuffix("x"))
    resident, extra = (size, 0) if state in KEPT else (0, size)
    return Claim(resident, extra, text.endswith("x"))


def run_directory() -> Path:
    """Return this user's directory for leases on this machine; who uses it makes it.

    Raises:
        LeaseError: when GPUMEM_RUN_DIR is not absolute.

    """
    import getpass

    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    return _place() / f"gpumem-{user}"


def _place() -> Path:
    """Return where the users' directories lie.

    Processes of one user must agree on it: what a session, a service or ``su`` puts into
    XDG_RUNTIME_DIR and TMPDIR differs, /dev/shm does not, and is in memory.
    """
    if named := os.environ.get("GPUMEM_RUN_DIR"):
        if not Path(named).is_absolute():
            raise LeaseError(f"GPUMEM_RUN_DIR={named} is no absolute path")
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
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Anybody may make directories in /dev/shm, and links to theirs.
    if directory.is_symlink() or not _is_ours(directory):
        raise PermissionError(errno.EPERM, "it belongs to another user")
    directory.chmod(0o700)


def unusable(directory: Path, error: OSError) -> LeaseError:
    """Return the sentence that says so."""
    kind = Vanished if isinstance(error, _BEING_REMOVED) else LeaseError
    return kind(
        f"leases cannot be kept in {directory}: {error.strerror}; "
        "GPUMEM_RUN_DIR can name another directory on this machine"
    )


def _is_ours(path: Path) -> bool:
    return not hasattr(os, "getuid") or path.stat().st_uid == os.getuid()


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


_ledgers: weakref.WeakSet[Ledger] = weakref.WeakSet()


def _forget_in_child() -> None:
    for ledger in _ledgers:
        ledger.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)

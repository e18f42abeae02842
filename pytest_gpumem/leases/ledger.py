"""The ledger of leases: a directory of small files whose names say everything.

``h-0000000007-4711.9f3c2a51-56789abc=2147483648`` is a lease (``h``: held, ``w``: waiting, ``r``:
kept between tests, ``s``: so too, and some of it can be spared) with its number in the queue, its
process, and 2 GiB of the card whose UUID ends so; ``x`` behind the size means exclusive, ``-t`` at
the end that it is a test's. The content is a label for people. Each process keeps one locked file
in another directory, which says from whom the process descends; entries of a process whose lock
is gone are void.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pytest_gpumem.admission import Claim
from pytest_gpumem.devices import family
from pytest_gpumem.errors import LeaseError
from pytest_gpumem.leases import telling
from pytest_gpumem.leases.locks import FileLock, LockBusyError, Watch, is_held

HELD, WAITING, RESIDENT, SPARE = "h", "w", "r", "s"
KEPT = RESIDENT, SPARE
"""What a process keeps without a lease."""
_BEING_REMOVED = FileNotFoundError, FileExistsError, IsADirectoryError
"""What the kernel says of files in a directory that somebody removes at the same time."""
_LABEL = 500
LOCK_PATIENCE = 10.0
"""Seconds that anybody waits for the ledger's lock, which is held for well under a millisecond."""
_LOCK_LEAST = 0.03
"""Seconds that it gets even where the deadline is nearer: its holder may just not be running."""
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "lustre", "gpfs", "beegfs"}
_NETWORK |= {"fuse.sshfs", "fuse.glusterfs", "glusterfs"}


class LedgerBusyError(LeaseError):
    """Somebody keeps the ledger's lock; says who."""


class Vanished(LeaseError):  # noqa: N818  # nobody sees it who tries again
    """The directory, or an entry, is being removed; a new one can be made right after."""


class Entry(NamedTuple):
    """One file of the ledger; ``claims`` are by ``card_key``."""

    name: str
    state: str
    number: int
    process: str
    claims: dict[str, Claim]
    test: bool = False
    """Whether it is a test's: what its process asks for meanwhile comes out of it."""

    @property
    def pid(self) -> int:
        """Number of its process, which may be another container's."""
        return pid_of(self.process)

    def turned(self, state: str) -> Entry:
        """Return it in another state."""
        return self._replace(state=state, name=state + self.name[1:])


class Page:
    """What the ledger said at one moment, in the order of the queue.

    Whoever is asked for by somebody who has a lease works within that lease: the processes that
    its process started, and, if it is a test's, what its own process asks for later. What they
    hold comes out of it, and they never wait for it.
    """

    def __init__(
        self, names: Collection[str], lineage: Callable[[str], tuple[str, ...]] = lambda _: ()
    ) -> None:
        known = (name for name in names if name[:2] in ("h-", "w-", "r-", "s-"))
        self.entries = sorted(map(entry_named, known), key=lambda entry: entry.number)
        self.last = self.entries[-1].number if self.entries else 0
        self.waiting = [entry for entry in self.entries if entry.state == WAITING]
        self.taken = [entry for entry in self.entries if entry.state != WAITING]
        """Held and kept ones."""
        self._ancestors = _ancestors(self.entries, lineage)
        """Processes with entries, by that of any descendant."""

    def descends(self, process: str, other: str) -> bool:
        """Return whether ``other`` started ``process``, directly or not."""
        return other in self._ancestors.get(process, ())

    def covers(self, lease: Entry, other: Entry) -> bool:
        """Return whether ``other`` is, or would be, within a lease that is held."""
        if lease.state != HELD:
            return False
        if lease.process == other.process:
            return lease.test and lease.number < other.number
        return self.descends(other.process, lease.process)

    def against(self, request: Entry, key: str) -> list[Claim]:
        """Return what leaves ``request`` less of a card.

        What its own children have, and for a test what its process has, it keeps rather than waits
        for. So it is with leases whose holders themselves wait, for they would for ever.
        """
        found = []
        for entry in self.taken:
            claim = self.claims[key].get(entry.name)
            if claim is None or self.covers(entry, request):
                continue
            own = request.test and entry.process == request.process
            if own or self.descends(entry.process, request.process) or self.is_stuck(entry):
                claim = Claim(claim.resident + claim.extra, 0, exclusive=False)
            found.append(claim)
        return found

    def ahead(self, request: Entry, key: str) -> list[Claim]:
        """Return what the requests want of a card that start before ``request``.

        Within a lease others are before it only there: the rest waits for the lease's end.
        """
        around = [each for each in self.taken if key in each.claims and self.covers(each, request)]
        return [
            entry.claims[key]
            for entry in self.waiting
            if entry.number < request.number
            and key in entry.claims
            and not self.descends(request.process, entry.process)
            and not self.descends(entry.process, request.process)
            and (not around or any(self.covers(each, entry) for each in around))
        ]

    def left(self, request: Entry, key: str, total: int) -> int:
        """Return what nobody has yet of the lease around ``request``, if there is one."""
        around = (each for each in self.taken if key in each.claims and self.covers(each, request))
        return max(
            (
                (each.claims[key].extra or total) - self._within(each, self.claims[key])
                for each in around
            ),
            default=0,
        )

    def is_covered(self, request: Entry) -> bool:
        """Return whether ``request`` is within somebody's lease."""
        return any(self.covers(each, request) for each in self.taken)

    def is_stuck(self, holder: Entry) -> bool:
        """Return whether a holder itself waits, or for a process of its own that does."""
        return holder.state == HELD and any(
            self.covers(holder, entry) or (entry.test and entry.process == holder.process)
            for entry in self.waiting
        )

    @functools.cached_property
    def claims(self) -> Mapping[str, Mapping[str, Claim]]:
        """Those of ``taken``, by card and name, without what others hold within them."""
        found: defaultdict[str, dict[str, Claim]] = defaultdict(dict)
        for entry in self.taken:
            for key, claim in entry.claims.items():
                found[key][entry.name] = claim
        if len(self.taken) < 2:
            return found
        parents = set().union(*self._ancestors.values())
        around = [entry for entry in self.taken if entry.process in parents or entry.test]
        # Innermost first: what is within them does not count for those around them once more.
        around.sort(key=self._depth, reverse=True)
        outside: dict[tuple[str, str, str], int] = {}
        # What no lease of a process has taken in yet, by process, entry and card.
        for lease in around:
            for key, claim in lease.claims.items():
                left = claim.extra
                for entry in self.taken:
                    if key in entry.claims and self.covers(lease, entry):
                        inner = found[key][entry.name]
                        place = lease.process, entry.name, key
                        size = outside.get(place, inner.resident + inner.extra)
                        outside[place] = max(0, size - left)
                        left = max(0, left - size)
                found[key][lease.name] = claim._replace(extra=left)
        return found

    def _depth(self, entry: Entry) -> tuple[int, int]:
        return len(self._ancestors.get(entry.process, ())), entry.number

    def _within(self, lease: Entry, claims: Mapping[str, Claim]) -> int:
        inside = (entry for entry in self.taken if self.covers(lease, entry))
        found = (claims[entry.name] for entry in inside if entry.name in claims)
        return sum(claim.resident + claim.extra for claim in found)


def _ancestors(
    entries: Collection[Entry], lineage: Callable[[str], tuple[str, ...]]
) -> Mapping[str, Collection[str]]:
    """Return the ancestors among the processes, by process; those that have none are left out."""
    if len(entries) < 2:
        return {}
    processes = {entry.process for entry in entries}
    lines = {process: lineage(process) for process in processes}
    known: defaultdict[str, list[str]] = defaultdict(list)
    for process, line in lines.items():
        known["".join(line[:1])].append(process)
    found = {
        process: {each for one in line[1:] if one in known for each in known[one]}
        for process, line in lines.items()
    }
    return {process: each for process, each in found.items() if each}


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
        self._lineages: dict[str, tuple[str, ...]] = {}
        """Who each process that was asked for descends from, itself first."""

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
            LedgerBusyError: when somebody keeps the lock.

        """
        return self._standing or self.join()

    def join(
        self, deadline: float | None = None, on_wait: Callable[[str], None] = lambda _: None
    ) -> Standing:
        """Take part, if this process does not yet; waits and raises as ``alone`` does."""
        if self._standing is not None:
            return self._standing
        limit = _limit(deadline)
        self._take_turn(limit)
        try:
            if self._standing is None:
                self._standing = self._join(limit, on_wait)
            return self._standing
        except OSError as error:
            raise unusable(self.directory, error) from error
        finally:
            self._threads.release()

    @contextmanager
    def alone(
        self, deadline: float | None = None, on_wait: Callable[[str], None] = lambda _: None
    ) -> Iterator[None]:
        """Keep every other thread and process from granting.

        Waits until ``deadline`` (of ``time.monotonic``), but not longer than anybody should have
        to; ``on_wait`` is told when it takes long, and who has the lock.

        Raises:
            LeaseError: also when anything in the block finds the directory unusable.
            LedgerBusyError: when the lock did not come free.

        """
        limit = _limit(deadline)
        self._take_turn(limit)
        try:
            guard = self.join(limit, on_wait).guard
            try:
                self._lock(guard, limit, on_wait)
                while guard.is_gone:  # as when a user logs out, or somebody cleans up
                    self._leave()
                    guard = self.join(limit, on_wait).guard
                    self._lock(guard, limit, on_wait)
                yield
            finally:
                guard.release()
        except OSError as error:
            raise unusable(self.directory, error) from error
        finally:
            self._threads.release()

    def _take_turn(self, limit: float) -> None:
        """Let this thread be the only one of the process that uses the ledger."""
        if not (
            self._threads.acquire(blocking=False)
            or self._threads.acquire(timeout=max(0.0, limit - time.monotonic()))
        ):
            raise LedgerBusyError(self._busy("another thread of this process"))

    def _lock(self, guard: FileLock, limit: float, on_wait: Callable[[str], None]) -> None:
        try:
            guard.acquire(limit, lambda holder: on_wait(self._busy(holder)))
        except LockBusyError as error:
            raise LedgerBusyError(self._busy(str(error))) from None

    def _busy(self, holder: str) -> str:
        return f"the lock of the leases in {self.directory}, held by {holder}"

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
        return Page(os.listdir(self._queue), self.lineage)  # noqa: PTH208  # iterdir is slower

    def lineage(self, process: str) -> tuple[str, ...]:
        """Return what a process said of itself and its ancestors, closest first; () if nothing."""
        known = self._lineages.get(process)
        if known is None:
            about = self._about(process)
            known = tuple(about[0].split()) if about else ()
            if known:
                self._lineages[process] = known
        return known

    def ancestors(self) -> Mapping[str, int | None]:
        """Return the processes that started this one and take part, outermost first.

        With each comes the number of its file that leads to the terminal, if it has one.
        """
        own = self.lineage(self.process)
        found = {}
        for process in os.listdir(self._alive):  # noqa: PTH208  # as page
            line = self.lineage(process)
            if line and line[0] in own[1:]:
                found[line[0]] = self._about(process)
        return {
            each: int(about[1]) if len(about := found[each]) > 1 and about[1] else None
            for each in reversed(own)
            if each in found
        }

    def is_kin(self, pid: int, roots: Collection[str]) -> bool:
        """Return whether a process started this one, or one of ``roots`` started it."""
        line = family.lineage(pid)
        return bool(line) and (
            line[0] in self.lineage(self.process) or not set(line).isdisjoint(roots)
        )

    def starters(self, pids: Collection[int], taking_part: Collection[str]) -> dict[int, str]:
        """Return which of the processes ``taking_part`` started which of ``pids``.

        Of those that are no kin of this process, which come from ``is_kin``.
        """
        roots, found = self.roots(), {}
        for pid in pids:
            line = family.lineage(pid)
            starter = next((each for each in line[1:] if each in taking_part), None)
            if starter is not None and starter not in roots:
                found[pid] = starter
        return found

    def roots(self) -> Collection[str]:
        """Return this process and those that started it and take part, as ``lineage`` does."""
        return {*self.lineage(self.process)[:1], *self.ancestors()}

    def _about(self, process: str) -> list[str]:
        """Return the lines in which a process told of itself: its lineage, and its terminal."""
        try:
            return Path(f"{self._alive}/{process}").read_text(encoding="utf-8").splitlines()
        except OSError:
            return []

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
        self._take_turn(_limit(None))
        try:
            if not self._queue.is_dir():
                self._leave()
        finally:
            self._threads.release()

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

    def _join(self, limit: float, on_wait: Callable[[str], None]) -> Standing:
        """Take part, with all that this process has."""
        make_own(self.directory)
        for each in (self._queue, self._alive):
            each.mkdir(mode=0o700, exist_ok=True)
        files = [FileLock(self.directory / "lock")]
        try:
            self._lock(files[0], limit, on_wait)
            files.append(FileLock(self._alive / self.process))
            self._lock(files[1], limit, on_wait)
            own, terminal = " ".join(family.lineage(os.getpid())), telling.terminal()
            with suppress(OSError):  # as a label's
                files[1].write(f"{own}\n{'' if terminal is None else terminal}\n")
            for entry in (*map(entry_named, self.leases), *self.residents.values()):
                self.write(entry, "")
            if self.bury({each.name for each in self._alive.iterdir()} - {self.process}):
                for entry in self.page().waiting:  # any of them may be able to start now
                    self.nudge(entry)
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


def _limit(deadline: float | None) -> float:
    """Return until when to wait for the lock."""
    now = time.monotonic()
    patient = now + LOCK_PATIENCE
    return patient if deadline is None else min(patient, max(deadline, now + _LOCK_LEAST))


def entry_of(
    state: str, number: int, process: str, claims: dict[str, Claim], *, test: bool = False
) -> Entry:
    """Return the entry that says so, with its name."""
    text = ",".join(f"{key}={_claim_text(claim)}" for key, claim in claims.items())
    name = f"{state}-{number:010d}-{process}-{text}{'-t' if test else ''}"
    return Entry(name, state, number, process, claims, test)


@functools.lru_cache(maxsize=4096)
def entry_named(name: str) -> Entry:
    """Return what an entry's name says."""
    state, number, process, text, *test = name.split("-", 4)
    parts = (part.partition("=") for part in text.split(",") if part)
    claims = {key: _claim(state, size) for key, _, size in parts}
    return Entry(name, state, int(number), process, claims, test == ["t"])


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

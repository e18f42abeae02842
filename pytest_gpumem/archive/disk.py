"""Files that are whole or not there: written aside, flushed, read back, then renamed."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import secrets
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pytest_gpumem import files
from pytest_gpumem.errors import DiskError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

TEMPORARY: Final = ".new-"
"""How the names of unfinished files begin."""
_SLAB = 4 * 2**20
PIECE: Final = 2 * 2**20
"""Most bytes that ``take`` is asked for at once, beyond which a slab does not go."""
_PAGE = 4096
_DIRECT = getattr(os, "O_DIRECT", 0)
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)


@contextlib.contextmanager
def explained(doing: str, path: Path) -> Generator[None, None, None]:
    """Say what the system would not do.

    Raises:
        DiskError: in place of an ``OSError``.

    """
    try:
        yield
    except OSError as error:
        told = error.strerror or str(error)
        culprit = error.filename
        # An unfinished file's name tells a reader nothing.
        if isinstance(culprit, str) and culprit != str(path) and TEMPORARY not in culprit:
            told = f"{culprit!r}: {told}"
        raise DiskError(f"cannot {doing} {str(path)!r}: {told}") from error


def scratch(length: int) -> mmap.mmap:
    """Return memory of this process alone that begins at a page, as direct reading needs.

    Python's default is memory that forked children share: they would read into one another's.
    """
    return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class NewFile:
    """A file that appears under its name when ``publish`` is called, and never in part.

    Big files bypass the page cache where the file system can: that is faster, leaves the pages
    of others alone, and what is read back comes from the disk.
    """

    def __init__(self, path: Path, aside: Path | None = None) -> None:
        self.path = path
        self.aside = aside or path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
        self.size = 0
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _CLOEXEC | _NOFOLLOW
        self._file = os.open(self.aside, flags, 0o600)
        self._direct = False
        self._slabs = [scratch(_SLAB + PIECE)]
        self._filled = 0
        self._on_disk = 0
        self._writer: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None
        self.on_disk: Callable[[int], None] = lambda _: None
        """Told, in the thread that writes, of how many bytes are on the disk."""

    def take(self, length: int) -> memoryview:
        """Return the place for the next ``length`` bytes, to be filled before the next call."""
        if self._filled >= _SLAB:
            self._write_slab()
        start = self._filled
        self._filled += length
        self.size += length
        return memoryview(self._slabs[0])[start : self._filled]

    def fill(self, data: bytes) -> None:
        """Let ``data`` of any length follow."""
        for at in range(0, len(data), PIECE):
            part = data[at : at + PIECE]
            self.take(len(part))[:] = part

    def _write_slab(self) -> None:
        """Let another thread write the full slab while the next one is filled."""
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1)
            self._slabs.append(scratch(_SLAB + PIECE))
            self._direct = _set_direct(self._file, on=True)
        if self._writing is not None:
            self._writing.result()
        full, empty = self._slabs
        rest = self._filled - _SLAB
        empty[:rest] = full[_SLAB : self._filled]
        at, self._on_disk, self._filled = self._on_disk, self._on_disk + _SLAB, rest
        self._slabs = [empty, full]
        slab = memoryview(full)[:_SLAB]
        try:
            self._writing = self._writer.submit(self._write_ahead, slab, at)
        except RuntimeError:
            # No thread is to be had as the process ends, or at the limit of its threads. None may
            # come later and write what is then in the slab.
            self._writer.shutdown(cancel_futures=True)
            self._writing = None
            self._write_ahead(slab, at)

    def _write_ahead(self, view: memoryview, at: int) -> None:
        self._write(view, at)
        self.on_disk(at + len(view))

    def _write(self, view: memoryview, at: int) -> None:
        while len(view):
            try:
                count = os.pwrite(self._file, view, at)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                # The file system cannot, or after a short write the rest is not aligned.
                self._direct = _set_direct(self._file, on=False)
                continue
            if count == 0:
                raise OSError(errno.EIO, "the system wrote nothing")
            view, at = view[count:], at + count

    def finish(self) -> None:
        """Wait until all is on the disk."""
        if self._writing is not None:
            self._writing.result()
        whole = -(-self._filled // _PAGE) * _PAGE if self._direct else self._filled
        self._write(memoryview(self._slabs[0])[:whole], self._on_disk)
        if whole > self._filled:
            os.ftruncate(self._file, self.size)
        os.fsync(self._file)

    def stop(self) -> None:
        """Let the other thread end, whatever became of its last slab."""
        if self._writer is not None:
            self._writer.shutdown()

    def publish(self) -> None:
        """Give the file its name; it lasts from here on."""
        self.aside.rename(self.path)
        sync_directory(self.path.parent)

    def close(self, *, keep: bool = False) -> None:
        """Close the file, and remove it if it was not published and shall not be kept."""
        self.stop()
        try:
            os.close(self._file)
        finally:
            if not keep:
                with contextlib.suppress(FileNotFoundError):
                    self.aside.unlink()


class OldFile:
    """A file that is read in pieces, by any number of threads.

    ``direct`` reads from the disk itself, where the file system can. Big files always are, as they
    were written: the pages that they would take cost more than what another reading may save.
    """

    def __init__(self, path: Path, *, direct: bool = False) -> None:
        self._file = files.open_own(path)
        self.size = os.fstat(self._file).st_size
        self._direct = (direct or self.size > _SLAB) and _set_direct(self._file, on=True)

    def read(self, at: int, length: int, into: mmap.mmap | None = None) -> memoryview:
        """Return up to ``length`` bytes; fewer only at the end of the file.

        ``into`` is as long as the piece and two pages; the next read may overwrite it.
        """
        start = at // _PAGE * _PAGE if self._direct else at
        wanted = at + length - start
        aligned = -(-wanted // _PAGE) * _PAGE if self._direct else wanted
        view = memoryview(into if into is not None else scratch(aligned or 1))
        done = 0
        while done < wanted:
            # Another thread may end direct reading while this one is refused for it.
            direct = self._direct
            try:
                count = os.preadv(self._file, [view[done:aligned]], start + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise
                self._direct = _set_direct(self._file, on=False)
                continue
            if count == 0:
                break
            done += count
        return view[at - start : min(done, wanted)]

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _set_direct(file: int, *, on: bool) -> bool:
    """Let reads and writes pass the page cache by; return whether they do."""
    import fcntl

    if not _DIRECT:
        return False
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | _DIRECT if on else flags & ~_DIRECT)
    except OSError:
        return False
    return on


def write_small(path: Path, data: bytes, aside: Path | None = None) -> None:
    """Make the file ``path`` hold ``data``; what it held before is there until then."""
    new = NewFile(path, aside)
    try:
        new.fill(data)
        new.finish()
        new.publish()
    finally:
        new.close()


def listed(folder: Path) -> list[os.DirEntry[str]]:
    """Return what is in a directory."""
    with os.scandir(folder) as found:
        return list(found)


def foreign(folder: Path, is_own: Callable[[os.DirEntry[str]], bool]) -> list[str]:
    """Return the names in a directory that are neither its own nor unfinished files'.

    All is judged by one listing: what comes or goes meanwhile is nobody else's for that.
    """
    found = (each for each in listed(folder) if not is_own(each) and not _is_unfinished(each))
    return sorted(each.name for each in found if os.path.lexists(each.path))


def unfinished(folder: Path) -> list[Path]:
    """Return the files that were never published."""
    return [folder / each.name for each in listed(folder) if _is_unfinished(each)]


def _is_unfinished(found: os.DirEntry[str]) -> bool:
    return found.name.startswith(TEMPORARY) and found.is_file(follow_symlinks=False)


def sync_directory(path: Path) -> None:
    """Make renames and removals in a directory last."""
    directory = os.open(path, os.O_RDONLY | _CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextlib.contextmanager
def locked(path: Path, *, alone: bool, wait: bool = True) -> Generator[bool, None, None]:
    """Hold the lock of ``path``, shared or ``alone``; yield whether it was to be had.

    The kernel takes it back when the process ends. Threads exclude one another too.
    """
    import fcntl

    file = files.open_own(path, os.O_RDWR | os.O_CREAT)
    try:
        how = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
        try:
            fcntl.flock(file, how | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            # A forked child may have the file too: closing it here would not be enough.
            fcntl.flock(file, fcntl.LOCK_UN)
    finally:
        os.close(file)

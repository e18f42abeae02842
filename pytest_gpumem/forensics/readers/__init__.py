"""Opens what people have: logs of any kind, JUnit XML, pytest-html, our JSON, torch's snapshots."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import stat
import sys
import tempfile
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple, cast

from pytest_gpumem.forensics import lines
from pytest_gpumem.forensics.readers.junit import read_junit
from pytest_gpumem.forensics.readers.own_runs import read_record
from pytest_gpumem.forensics.readers.page import read_page
from pytest_gpumem.forensics.readers.snapshot import read_snapshot
from pytest_gpumem.forensics.readers.streams import CHUNK, PACKED, Counted, chunks, live, peek
from pytest_gpumem.forensics.sequence import Follower

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pytest_gpumem.forensics.readers.streams import Idle
    from pytest_gpumem.forensics.runs import Run, Seen

    Watch = Callable[[Seen, str | None], None]
    Progress = Callable[[str, int], None]
    """Told a file's name with each part that is read of it, which has so many bytes."""

_SPOOLED = 1 << 26
_NESTED = 3
"""Archives within archives that are opened."""
_PSEUDO = {"/proc", "/sys", "/dev"}
"""Their files are the kernel's: some never end, some wait for a reader's partner."""
_CONTROL = bytes(set(range(32)) - set(b"\t\n\r\f\b\x1b")) + b"\x7f"
_BINARY = 20
"""One control character in so many bytes, and it is no text. Random bytes have one in ten."""


class Reading(NamedTuple):
    """What one file holds, or one entry of an archive."""

    path: str
    kind: str
    size: int
    """Bytes, unpacked."""
    runs: list[Run]
    cut: str = ""
    """Why the input ends before its end, if it does."""


class Inputs(NamedTuple):
    """What was read, and sentences on what could not be."""

    readings: list[Reading]
    notes: list[str]


def gather(
    given: Iterable[str], watch: Watch | None = None, progress: Progress | None = None
) -> Inputs:
    """Return what the files hold; ``-`` is standard input, directories and archives are walked.

    Args:
        given: their paths.
        watch: told of each message of a standard input that has not ended, when it comes.
        progress: told what is read of files.

    Raises:
        OSError: when a file that was named cannot be read.
        ValueError: in one sentence, when it is of no use.

    """
    inputs = Inputs([], [])
    for each in given:
        if each == "-":
            inputs.readings.extend(_stdin(inputs.notes, watch))
        elif Path(each).is_dir():
            _walk(each, inputs, progress)
        else:
            try:
                _read(each, inputs, progress)
            except ValueError as error:
                raise ValueError(f"{each!r} {error}") from None
            except OSError as error:
                # One that breaks while it is read has no name in its error.
                raise OSError(error.errno, error.strerror, error.filename or each) from None
    return inputs


def _stdin(notes: list[str], watch: Watch | None) -> list[Reading]:
    # A process may be started without one.
    file = getattr(sys.stdin, "buffer", None)
    if file is None:
        raise ValueError("'-': standard input is closed")
    try:
        return read_stream(live(file), "-", notes, watch=watch)
    except ValueError as error:
        raise ValueError(f"'-' {error}") from None


def _read(path: str, inputs: Inputs, progress: Progress | None) -> None:
    """Read a file."""
    with Path(path).open("rb") as file:
        told: IO[bytes] = file
        if progress is not None:
            told = cast("IO[bytes]", Counted(file, functools.partial(progress, path)))
        inputs.readings.extend(read_stream(told, path, inputs.notes))


def _walk(root: str, inputs: Inputs, progress: Progress | None) -> None:
    """Read the files of a directory in order of their names; what cannot be read is a note."""

    def unreadable(error: OSError, path: Path | None = None) -> None:
        # A file that breaks while it is read has no name in its error.
        name = error.filename or str(path)
        inputs.notes.append(f"{name!r}: {error.strerror or error}")

    for directory, names, files in os.walk(root, onerror=unreadable):
        names[:] = sorted(
            name
            for name in names
            if not name.startswith(".") and os.path.join(directory, name) not in _PSEUDO  # noqa: PTH118 - as os.walk tells it
        )
        for name in sorted(files):
            path = Path(directory, name)
            try:
                if name.startswith(".") or not stat.S_ISREG(path.stat().st_mode):
                    continue
                _read(str(path), inputs, progress)
            except ValueError as error:
                inputs.notes.append(f"{str(path)!r} {error}")
            except OSError as error:
                unreadable(error, path)


def read_stream(
    file: IO[bytes],
    path: str = "",
    notes: list[str] | None = None,
    depth: int = 0,
    watch: Watch | None = None,
) -> list[Reading]:
    """Return what the open file holds, whatever its kind is: several readings of an archive.

    Args:
        file: the open file.
        path: what to call it.
        notes: where to say which entries of an archive cannot be read.
        depth: how many archives it lies in.
        watch: told of each message that is read before the end is there.

    Raises:
        ValueError: in one sentence, when it is of no use.

    """
    head, stream = peek(file)
    for magic, unpacked in PACKED.items():
        if head.startswith(magic):
            inner = unpacked(stream)
            found = read_stream(inner, path, notes, depth)
            cut = "the archive is cut off" if getattr(inner, "cut", False) else ""
            return [each._replace(cut=each.cut or cut) for each in found]
    if head.startswith(b"PK\x03\x04") or head[257:262] == b"ustar":
        if depth >= _NESTED:
            raise ValueError("lies too deep in archives")
        entries = _zipped if head.startswith(b"PK") else _tarred
        return entries(stream, path, notes if notes is not None else [], depth + 1)
    counted = Counted(stream)
    idle = getattr(file, "idle", None)

    def heard(seen: Seen, test: str | None) -> None:
        if watch is not None and idle is not None and idle.met:
            watch(seen, test)

    kind, runs, cut = _told(head, cast("IO[bytes]", counted), idle, heard)
    return [Reading(path, kind, counted.size, runs, cut)]


def _told(
    head: bytes, stream: IO[bytes], idle: Idle | None, watch: Watch
) -> tuple[str, list[Run], str]:
    """Return a file's kind, its runs, and why it ends early if it does."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start[:1] == b"<" and re.search(rb"(?i)<html|<!doctype html|data-jsonblob", head):
        return "pytest-html", *read_page(stream)
    if re.match(rb"<\?xml|<!DOCTYPE|<testsuites?\b", start):
        return "JUnit XML", *read_junit(head, stream)
    if start[:1] == b"{" and re.search(rb'"schema"\s*:', head):
        return "--gpumem-json", read_record(stream), ""
    if re.match(rb"\x80[\x02-\x05]", head):
        return "torch snapshot", read_snapshot(stream), ""
    _refuse_binary(head)
    runs = Follower(watch).follow(lines.scan(chunks(head, stream, idle)))
    return ("pytest log" if any(run.pytest for run in runs) else "log"), runs, ""


def _refuse_binary(head: bytes) -> None:
    """Raise for bytes that are no text of any encoding: nothing found there would be a finding."""
    nulls = head.count(0)
    # UTF-16 has every other byte 0, whether or not a mark says so.
    wide = nulls and max(head[::2].count(0), head[1::2].count(0)) * 10 >= nulls * 9
    controls = len(head) - len(head.translate(None, _CONTROL)) - (nulls if wide else 0)
    if controls * _BINARY > len(head):
        raise ValueError("is neither text nor a report that is known")


def _zipped(stream: IO[bytes], path: str, notes: list[str], depth: int) -> list[Reading]:
    """Read the entries of a zip archive, such as GitHub serves the logs of a run."""
    import zipfile

    found: list[Reading] = []
    with tempfile.SpooledTemporaryFile(_SPOOLED) as whole:
        for chunk in iter(lambda: stream.read(CHUNK), b""):
            whole.write(chunk)
        try:
            archive = zipfile.ZipFile(whole)
        except (zipfile.BadZipFile, ValueError, OverflowError):
            raise ValueError("is a zip archive that is cut off or damaged") from None
        for entry in sorted(archive.infolist(), key=lambda each: each.filename):
            if entry.is_dir():
                continue
            name = f"{path}/{entry.filename}"
            try:
                with archive.open(entry) as file:
                    found += read_stream(file, name, notes, depth)
            except (zipfile.BadZipFile, zlib.error, EOFError, OSError):
                notes.append(f"{name!r} is damaged")
            except (RuntimeError, NotImplementedError) as error:
                notes.append(f"{name!r}: {error}")
            except ValueError as error:
                notes.append(f"{name!r} {error}")
    return found


def _tarred(stream: IO[bytes], path: str, notes: list[str], depth: int) -> list[Reading]:
    """Read the entries of a tar archive."""
    import tarfile

    found: list[Reading] = []
    with contextlib.suppress(tarfile.ReadError, EOFError):
        archive = tarfile.open(fileobj=stream, mode="r|")  # noqa: SIM115 - it holds nothing
        for entry in archive:
            file = archive.extractfile(entry) if entry.isfile() else None
            if file is None:
                continue
            name = f"{path}/{entry.name}"
            try:
                found += read_stream(file, name, notes, depth)
            except (ValueError, tarfile.ReadError) as error:
                notes.append(f"{name!r} {error}")
        return found
    notes.append(f"{path!r} is an archive that is cut off or damaged")
    return found

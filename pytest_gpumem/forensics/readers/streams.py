"""Files as they come: packed, cut off, in UTF-16, or from a pipe that is written still."""

from __future__ import annotations

import codecs
import io
import os
import select
import zlib
from typing import IO, TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CHUNK = 1 << 20
_HEAD = 4096
_PATIENCE = 0.3
"""Seconds after which a pipe that gives nothing is taken to be written still."""
_TREE_LIMIT = 1 << 28
"""JSON, HTML and pickles are read whole; what is larger is no report of a test run."""


class Idle:
    """Tells whether a pipe has nothing to read for a while, though it has not ended."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.met = False
        """Whether it ever had not."""

    def __call__(self) -> bool:
        """Wait for something to read, a moment at most; tell whether nothing came."""
        ready, _, _ = select.select([self._descriptor], [], [], _PATIENCE)
        self.met = self.met or not ready
        return not ready


class _Live(io.RawIOBase):
    """A pipe that is read as far as it goes."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.idle = Idle(descriptor)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return os.read(self._descriptor, size if size > 0 else CHUNK)


def live(file: IO[bytes]) -> IO[bytes]:
    """Return standard input so that what comes can be told while it comes."""
    try:
        live = _Live(file.fileno())
        live.idle()
    except (OSError, ValueError):  # no pipe, or a system that cannot wait for one
        return file
    live.idle.met = False
    return cast("IO[bytes]", live)


class _Unpacked(io.RawIOBase):
    """A packed file that ends where it is cut off or damaged, with all that stands before."""

    def __init__(self, packed: IO[bytes], make: Callable[[], Any], errors: type[Exception]) -> None:
        self._packed = packed
        self._make = make
        self._errors = errors
        self._unpack = make()
        self._input = b""
        self.cut = False
        """Whether it ended before its end."""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        limit = size if size > 0 else CHUNK
        while not self.cut:
            if self._unpack.eof:
                # Members follow one another when logs were appended.
                self._input = self._unpack.unused_data or self._packed.read(1 << 18)
                if not self._input.strip(b"\0"):
                    return b""
                self._unpack = self._make()
            elif not self._input and getattr(self._unpack, "needs_input", True):
                self._input = self._packed.read(1 << 18)
                self.cut = not self._input
            try:
                told = cast("bytes", self._unpack.decompress(self._input, limit))
            except self._errors:
                self.cut = True
                return b""
            self._input = getattr(self._unpack, "unconsumed_tail", b"")
            if told:
                return told
        return b""


def _gzip(packed: IO[bytes]) -> IO[bytes]:
    unpacked = _Unpacked(packed, lambda: zlib.decompressobj(wbits=31), zlib.error)
    return cast("IO[bytes]", unpacked)


def _bzip2(packed: IO[bytes]) -> IO[bytes]:
    import bz2

    return cast("IO[bytes]", _Unpacked(packed, bz2.BZ2Decompressor, OSError))


def _xz(packed: IO[bytes]) -> IO[bytes]:
    import lzma

    return cast("IO[bytes]", _Unpacked(packed, lzma.LZMADecompressor, lzma.LZMAError))


class _Zstd(io.RawIOBase):
    """The same of zstd, whose own reader bounds what it unpacks at a time."""

    def __init__(self, packed: IO[bytes]) -> None:
        import zstandard

        unpack = zstandard.ZstdDecompressor()
        self._reader = unpack.stream_reader(packed, read_across_frames=True)
        self._errors = zstandard.ZstdError
        self.cut = False

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if self.cut:
            return b""
        try:
            return self._reader.read1(size if size > 0 else CHUNK)
        except self._errors:
            self.cut = True
            return b""


def _zstd(packed: IO[bytes]) -> IO[bytes]:
    return cast("IO[bytes]", _Zstd(packed))


PACKED: dict[bytes, Callable[[IO[bytes]], IO[bytes]]] = {
    b"\x1f\x8b": _gzip,
    b"BZh": _bzip2,
    b"\xfd7zXZ\0": _xz,
    b"\x28\xb5\x2f\xfd": _zstd,
}


class Counted(io.RawIOBase):
    """Counts what is read, and tells somebody of it if asked to."""

    def __init__(self, file: IO[bytes], tell: Callable[[int], None] | None = None) -> None:
        self._file = file
        self._tell = tell
        self.size = 0

    def readable(self) -> bool:
        """Tell that it is one to read from."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Return what the file gives, at most ``size`` bytes."""
        told = self._file.read(size)
        self.size += len(told)
        if self._tell is not None:
            self._tell(len(told))
        return told


def peek(file: IO[bytes]) -> tuple[bytes, IO[bytes]]:
    """Return the first bytes, and the file as from its beginning; pipes cannot seek."""
    head = b""
    idle = getattr(file, "idle", None)
    while len(head) < _HEAD and (more := file.read(_HEAD - len(head))):
        head += more
        if idle is not None and idle():
            break
    return head, cast("IO[bytes]", _Again(head, file))


class _Again(io.RawIOBase):
    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self._head = head
        self._rest = rest

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if not self._head:
            return self._rest.read(size)
        if size < 0:
            taken, self._head = self._head + self._rest.read(), b""
        else:
            taken, self._head = self._head[:size], self._head[size:]
        return taken


def chunks(head: bytes, stream: IO[bytes], idle: Idle | None) -> Iterator[bytes]:
    """Return the log in pieces, as UTF-8 where a byte order mark says that it is UTF-16.

    An empty piece says that more is not there yet.
    """
    encoding = {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}.get(head[:2])
    if b"\0" not in head:
        encoding = None  # two stray bytes, not a mark
    decoder = codecs.getincrementaldecoder(encoding)("replace") if encoding else None
    while chunk := stream.read(CHUNK):
        if text := decoder.decode(chunk).encode() if decoder else chunk:
            yield text
        if idle is not None and idle():
            yield b""


def whole(stream: IO[bytes]) -> bytes:
    """Return all of a report; ``ValueError`` for one that is too large for its kind."""
    pieces = []
    size = 0
    while chunk := stream.read(CHUNK):
        size += len(chunk)
        if size > _TREE_LIMIT:
            raise ValueError(f"is larger than {_TREE_LIMIT >> 20} MiB, too large for its kind")
        pieces.append(chunk)
    return b"".join(pieces)

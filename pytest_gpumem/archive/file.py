"""The file of one state: header, sealed chunks, sealed index; see ``docs/archive-format.md``."""

from __future__ import annotations

import contextlib
import functools
import hmac
import itertools
import json
import struct
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from pytest_gpumem.archive import codec, memory, sealing, taker, tree
from pytest_gpumem.archive.builder import Builder
from pytest_gpumem.archive.desk import lent
from pytest_gpumem.archive.disk import NewFile, OldFile
from pytest_gpumem.archive.nodes import checked
from pytest_gpumem.archive.sealing import CHUNK, HEADER, INDEX, STATE, TAG, Seal
from pytest_gpumem.errors import DamagedError, InUseError, NotFoundError, StateRefusedError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence
    from pathlib import Path

    from pytest_gpumem.archive.desk import Desk
    from pytest_gpumem.archive.memory import Chunk

_TRAILER = struct.Struct("<Q8s")
_END = b"GPUMEM.\n"
_INDEX = struct.Struct("<QI")
LONGEST_INDEX: Final = 64 * 2**20
"""Most bytes of an index, for reading one must not take memory without bound."""
_LONGEST_SEALED: Final = 30 * 2**20
"""Most bytes of it in the file: it has to be read before it can be authenticated."""


class Packed:
    """A state taken apart and ready to be written.

    Raises:
        StateRefusedError: see ``taker.take_apart``.

    """

    def __init__(self, state: Any) -> None:
        self.parts = taker.take_apart(state)
        blocks = self.parts.blocks
        runs = [
            (kind, [block.size for block in group])
            for kind, group in itertools.groupby(blocks, lambda block: block.kind)
        ]
        layout = memory.Layout(runs)
        places = [memory.Place(block.storage, block.offset, block.size) for block in blocks]
        self.memory = memory.Memory(layout, places)
        self._tag: Callable[[codec.Bytes], bytes] | None = None
        self._tags: list[bytes] = []
        """Of each chunk, once there is a fingerprint."""
        described = {"tree": self.parts.tree, "tensors": self.parts.records, "blocks": runs}
        text = json.dumps(described, ensure_ascii=False, separators=(",", ":"))
        # Python's strings may hold lone surrogates.
        self.description = text.encode("utf-8", "surrogatepass")
        if len(self.description) > LONGEST_INDEX:
            raise StateRefusedError(
                f"cannot archive the state: its {len(self.parts.records)} tensors and other values "
                f"take {len(self.description)} bytes to describe; allowed are {LONGEST_INDEX}"
            )

    def fingerprint(self, secret: bytes) -> str:
        """Return 64 hexadecimal digits that only the same state has, for one ``secret``.

        An AES-GCM tag over each chunk (GMAC, a universal hash, 10 times as fast as SHA-256), then
        HMAC-SHA-256 over the tags. Equal nonces are harmless: no tag leaves this function.
        """
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        mac = AESGCM(sealing.derive(secret, b"", b"pytest-gpumem content chunks", 32))
        key = sealing.derive(secret, b"", b"pytest-gpumem content", 32)
        nonce = bytes(12)

        def tag(content: codec.Bytes) -> bytes:
            return mac.encrypt(nonce, b"", memoryview(content))

        def tag_of(chunk: Chunk) -> bytes:
            with lent() as desk:
                return tag(self.memory.gather(chunk, desk))

        whole = hmac.new(key, digestmod="sha256")
        whole.update(struct.pack("<Q", len(self.description)) + self.description)
        self._tag, self._tags = tag, memory.each(tag_of, self.memory.layout.chunks)
        for each in self._tags:
            whole.update(each)
        return whole.hexdigest()

    def taken(self, chunk: Chunk, desk: Desk) -> codec.Bytes:
        """Return the bytes of a chunk, which nobody changes: those of the fingerprint, if it is.

        Else a state that another thread works on would lie under the name of one that it is not,
        and whoever puts that one later would find it there.

        Raises:
            InUseError: they are others now.

        """
        content = self.memory.gather(chunk, desk, copied=True)
        if self._tag is not None and self._tag(content) != self._tags[chunk.number]:
            raise InUseError("cannot archive the state: it was changed while it was archived")
        return content


def write(new: NewFile, secret: bytes, packed: Packed, name: str = "") -> None:
    """Write a state and wait until it is on the disk.

    It can be read under the same ``name`` alone, so that no file passes for another.

    Raises:
        InUseError: it was changed since it was hashed.
        OSError: the system would not.
        StateRefusedError: what is not tensors is too large.

    """
    _Writer(new, secret, packed, name).write()


def write_and_read_back(new: NewFile, secret: bytes, packed: Packed, name: str) -> None:
    """Write a state, read all of it from the disk again, and make sure that it is the same.

    Raises:
        DamagedError: it is not.
        InUseError, OSError, StateRefusedError: see ``write``.

    """
    writer = _Writer(new, secret, packed, name)
    with contextlib.closing(OldFile(new.aside, direct=True)) as old:
        # Not the writer, which has the new file: that cycle would keep its memory.
        seal, places, read = writer.seal, writer.places, 0

        def read_on(size: int) -> None:
            """Read the chunks that are on the disk, while later ones are coded."""
            nonlocal read
            with lent() as desk:
                while read + 1 < len(places) and places[read + 1] <= size:
                    _open_chunk(old, seal, read, places, desk)
                    read += 1

        new.on_disk = read_on
        try:
            writer.write()
        finally:
            new.stop()  # it reads from the file that is closed now
    with contextlib.closing(Reader(new.aside, secret, name, direct=True)) as reader:
        reader.authenticate(first=read)


class _Writer:
    """Writes one state to a new file."""

    def __init__(self, new: NewFile, secret: bytes, packed: Packed, name: str) -> None:
        self.seal = Seal.new(secret, STATE, name)
        self.places = [HEADER]
        """Where each chunk begins that is sealed, and where the next one will."""
        self._new = new
        self._packed = packed
        count = memory.threads(len(packed.memory.layout.chunks)) + memory.AHEAD
        self._spare = [np.empty(codec.CHUNK + codec.SLACK, np.uint8) for _ in range(count)]
        """Memory for coded chunks: as many as may be in work or wait."""

    def write(self) -> None:
        """Write it and wait until it is on the disk."""
        self._new.take(HEADER)[:] = self.seal.header
        memory.in_turn(self._code, self._close, self._packed.memory.layout.chunks)
        self._write_index()
        self._new.finish()

    def _code(self, chunk: Chunk) -> tuple[codec.Bytes, int]:
        out = self._spare.pop()
        with lent() as desk:
            content = self._packed.taken(chunk, desk)
            return out, desk.coder.encode(content, chunk.kind, out)

    def _close(self, chunk: Chunk, coded: tuple[codec.Bytes, int]) -> None:
        out, length = coded
        self.seal.close(CHUNK, chunk.number, out[:length], self._new.take(length + TAG))
        self._spare.append(out)
        self.places.append(self.places[-1] + length + TAG)

    def _write_index(self) -> None:
        import zstandard

        lengths = [end - start for start, end in itertools.pairwise(self.places)]
        index = _INDEX.pack(len(self._packed.description), len(lengths))
        index += struct.pack(f"<{len(lengths)}I", *lengths)
        index += zstandard.ZstdCompressor(level=3).compress(self._packed.description)
        if len(index) > _LONGEST_SEALED - TAG:
            raise StateRefusedError(
                f"cannot archive the state: what it holds beside tensors takes {len(index)} bytes; "
                f"allowed are {_LONGEST_SEALED}"
            )
        sealed = bytearray(len(index) + TAG)
        self.seal.close(INDEX, 0, index, sealed)
        sealed += _TRAILER.pack(len(sealed), _END)
        self._new.fill(bytes(sealed))


class Reader:
    """Reads the file of one state; its tensors one by one, or all of them.

    Raises:
        DamagedError: from every method, when the file is not what was written.
        OSError: the system would not read.

    """

    def __init__(self, path: Path, secret: bytes, name: str = "", *, direct: bool = False) -> None:
        self._file = OldFile(path, direct=direct)
        try:
            self._open(secret, name)
        except BaseException:
            self._file.close()
            raise

    def _open(self, secret: bytes, name: str) -> None:
        self._seal = Seal.of(secret, STATE, bytes(self._file.read(0, HEADER)), name)
        body = self._file.size - _TRAILER.size
        if body < HEADER:
            raise DamagedError("it is too short to be an archive")
        length, end = _TRAILER.unpack(self._file.read(body, _TRAILER.size))
        longest = min(body - HEADER, _LONGEST_SEALED)
        if end != _END or not _INDEX.size + TAG <= length <= longest:
            raise DamagedError("it is truncated, or its end is damaged")
        index = bytearray(length - TAG)
        self._seal.open(INDEX, 0, self._file.read(body - length, length), index)
        described, lengths = _read_index(index)
        self.tree, self.records, runs = described["tree"], described["tensors"], described["blocks"]
        with checked():
            self.layout = memory.Layout([(kind, sizes) for kind, sizes in runs])
        self._places = list(itertools.accumulate(lengths, initial=HEADER))
        if len(lengths) != len(self.layout.chunks) or self._places[-1] != body - length:
            raise DamagedError("its chunks are not all there")
        for sealed, chunk in zip(lengths, self.layout.chunks, strict=True):
            if not TAG < sealed <= chunk.size + codec.SLACK + TAG:
                raise DamagedError("a chunk has an impossible length")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def size(self) -> int:
        """Bytes of the state."""
        return sum(self.layout.sizes)

    def _opened(self, chunk: Chunk, desk: Desk) -> codec.Bytes:
        """Return a chunk, authenticated and still coded, on ``desk``."""
        return _open_chunk(self._file, self._seal, chunk.number, self._places, desk)

    def authenticate(self, first: int = 0) -> None:
        """Read all chunks from the ``first`` on and make sure that they are what was written."""

        def authenticate_one(chunk: Chunk) -> None:
            with lent() as desk:
                self._opened(chunk, desk)

        memory.each(authenticate_one, self.layout.chunks[first:], reading=True)

    def _fill(self, storages: dict[int, Any]) -> None:
        """Read the content of blocks into these storages."""
        sizes = self.layout.sizes
        places: list[memory.Place | None] = [None] * len(sizes)
        for block, storage in storages.items():
            places[block] = memory.Place(storage, 0, sizes[block])
        filled = memory.Memory(self.layout, places)

        def fill_one(chunk: Chunk) -> None:
            with lent() as desk:
                coded = self._opened(chunk, desk)
                decode = functools.partial(desk.coder.decode, coded, chunk.kind)
                filled.scatter(chunk, decode, desk)

        memory.each(fill_one, self.layout.chunks_of(storages), reading=True)

    def get(self, path: Sequence[Hashable] = (), device: str = "cpu") -> Any:
        """Return the state, or what ``path`` leads to in it, in new memory on ``device``.

        Raises:
            KeyError: with the first key that is not there.

        """
        return self._restored(tree.at_path(self.tree, path), device)

    def get_tensors(self, which: Sequence[int], device: str = "cpu") -> list[Any]:
        """Return tensors by their places in ``tree.leaves``, in new memory on ``device``.

        They share memory where they did.

        Raises:
            NotFoundError: there are not so many.

        """
        with checked():
            leaves = list(tree.leaves(self.tree))
        if beyond := [place for place in which if place >= len(leaves)]:
            raise NotFoundError(f"the state has no tensor {beyond[0]}, but {len(leaves)} of them")
        node = ["l", *(leaves[place] for place in which)]
        return self._restored(node, device)  # type: ignore[no-any-return]

    def _restored(self, node: Any, device: str) -> Any:
        with checked():
            blocks = tree.blocks_of(tree.reach(node, self.records), self.records, self.layout.sizes)
        new = {block: memory.fresh(self.layout.sizes[block], device) for block in blocks}
        self._fill(new)
        return self._built(node, new, device)

    def rehearse(self) -> None:
        """Build the state without its content.

        Raises:
            DamagedError: it cannot be built, or only with its content.

        """
        new = {block: memory.fresh(size, "meta") for block, size in enumerate(self.layout.sizes)}
        self._built(self.tree, new, "meta")

    def _built(self, node: Any, storages: dict[int, Any], device: str) -> Any:
        places = {block: (storage, 0) for block, storage in storages.items()}
        return Builder(self.records, self.layout.sizes, places, device=device).build(node)


def _open_chunk(
    old: OldFile, seal: Seal, number: int, places: Sequence[int], desk: Desk
) -> codec.Bytes:
    """Return a chunk, authenticated and still coded, on ``desk``; ``places`` are their starts."""
    start, end = places[number], places[number + 1]
    sealed = old.read(start, end - start, desk.sealed)
    if len(sealed) != end - start:
        raise DamagedError("it is truncated")
    out = desk.coded[: end - start - TAG]
    seal.open(CHUNK, number, sealed, out)
    return out


def _read_index(index: bytearray) -> tuple[dict[str, Any], tuple[int, ...]]:
    import zstandard

    size, count = _INDEX.unpack_from(index)
    frame = memoryview(index)[_INDEX.size + 4 * count :]
    if size > LONGEST_INDEX or _INDEX.size + 4 * count > len(index):
        raise DamagedError("its index has an impossible length")
    lengths = struct.unpack_from(f"<{count}I", index, _INDEX.size)
    try:
        if zstandard.frame_content_size(frame) != size:
            raise DamagedError("its index has the wrong length")
        text = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
        described = json.loads(text.decode("utf-8", "surrogatepass"))
    except (zstandard.ZstdError, ValueError, RecursionError) as error:
        raise DamagedError(f"its index cannot be read: {error}") from None
    if len(text) != size or set(described) != {"tree", "tensors", "blocks"}:
        raise DamagedError("its index is not one")
    return described, lengths

"""Chunks of tensor bytes, made smaller: exponents apart from mantissas, each coded if it pays.

The exponents of trained weights take few values, their mantissas are noise. So a chunk is split
into planes, one for each byte of an element, and only a plane that shrinks is coded. The coder is
zstd with a hash table too small to find false matches: what remains is a fast Huffman coder that
still folds runs. Nearly all exponents of a plane lie within 16 values, so two of them make a byte:
that is half as much to code, at the same size; the few others are listed.
``docs/archive-format.md`` describes the bytes.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import numpy as np

from pytest_gpumem.errors import DamagedError

Bytes = Any
"""A ``uint8`` array. Below Python 3.12 types cannot say that arrays are buffers."""

CHUNK: Final = 2**20
"""Most bytes of a chunk before coding."""
ALIGN: Final = 16
"""Every chunk is a multiple of this long."""
SLACK: Final = 64
"""Most bytes by which a coded chunk may be longer than the chunk."""

KINDS: Final = {"1": 1, "2": 2, "4": 4, "8": 8, "r2": 2, "r4": 4}
"""Bytes of an element. ``r``: bfloat16 and float32, whose exponent begins in the middle of a
byte: the upper 16 bits of each element are rotated left by one, which moves it into the top one.
"""

_STORED, _PLANES = 0, 1
_ZSTD, _PAIRS = 1, 2
_PLANE = struct.Struct("<BI")
_PAIR = struct.Struct("<BI")
_NIBBLES = np.uint64(0x0F0F0F0F0F0F0F0F)
_FOUR = np.uint64(4)
_FEW = 2048
"""Of so many bytes one may lie outside of the 16 values: each takes 5 bytes then."""
_SAMPLE = 2048
_WORTH = 0.97
"""A plane is coded only if a sample of it shrinks to this."""


class Coder:
    """Codes chunks; one at a time."""

    def __init__(self) -> None:
        import zstandard

        self._zstd = zstandard
        parameters = zstandard.ZstdCompressionParameters(
            strategy=zstandard.STRATEGY_FAST,
            hash_log=6,
            chain_log=6,
            search_log=1,
            min_match=7,
            target_length=0,
            window_log=20,
        )
        self._entropy = zstandard.ZstdCompressor(compression_params=parameters)
        self._matches = zstandard.ZstdCompressor(level=1)
        self._decoder = zstandard.ZstdDecompressor()
        self._planes = np.empty(CHUNK, np.uint8)
        self._wide = np.empty(CHUNK // 4, np.uint32)
        self._halves = (np.empty(CHUNK // 2, np.uint16), np.empty(CHUNK // 2, np.uint16))
        self._spare = np.empty(CHUNK // 2, np.uint16)
        self._nibbles = np.empty(CHUNK, np.uint8)
        self._paired = np.empty(CHUNK // 2, np.uint8)

    def encode(self, chunk: Bytes, kind: str, out: Bytes) -> int:
        """Write the coded ``chunk`` to ``out`` and return its length, at most 1 more than it had.

        ``out`` has room for ``SLACK`` bytes more than the chunk.
        """
        width = KINDS[kind]
        size = len(chunk)
        at = 1 + _PLANE.size * width
        # Where they lie if none is coded: most of them need not be moved any more.
        planes = out[at : at + size].reshape(width, -1)
        self._split(chunk, kind, planes)
        out[0] = _PLANES
        for number, plane in enumerate(planes):
            how, part = self._shrink(plane)
            _PLANE.pack_into(out, 1 + _PLANE.size * number, how, len(part))
            if how != _STORED or at != 1 + _PLANE.size * width + len(plane) * number:
                out[at : at + len(part)] = np.frombuffer(part, np.uint8)
            at += len(part)
        if at > size:
            out[0] = _STORED
            out[1 : 1 + size] = chunk
            return 1 + size
        return at

    def _shrink(self, plane: Bytes) -> tuple[int, Bytes]:
        """Return the coded plane and how it is coded: not, where that is not worth it."""
        size = len(plane)
        sample = plane
        if size > 8 * _SAMPLE:
            step = size // 4
            sample = np.concatenate(
                [plane[at : at + _SAMPLE] for at in range(0, size - step + 1, step)]
            )
        entropy = len(self._entropy.compress(sample))
        matches = len(self._matches.compress(sample)) if entropy < len(sample) / 2 else entropy
        if min(entropy, matches) > _WORTH * len(sample):
            return _STORED, plane
        repeats = matches < 0.9 * entropy
        if not repeats and (pairs := self._pairs(plane, sample)) is not None:
            return _PAIRS, pairs
        coded = (self._matches if repeats else self._entropy).compress(plane)
        return (_ZSTD, coded) if len(coded) < size else (_STORED, plane)

    def _pairs(self, plane: Bytes, sample: Bytes) -> bytes | None:
        """Return the plane coded by pairs, None where too much lies outside of 16 values.

        Byte i makes a pair with the one half a plane behind it, for then eight are made at once.
        """
        size = len(plane)
        if size % ALIGN:
            return None
        below = np.concatenate(([0], np.cumsum(np.bincount(sample, minlength=256))))
        within = below[16:] - below[:-16]
        base = int(within.argmax())
        if below[-1] - within[base] > below[-1] // _FEW:
            return None
        nibbles = self._nibbles[:size]
        np.subtract(plane, np.uint8(base), out=nibbles)
        lower, upper = nibbles.view(np.uint64).reshape(2, -1)
        paired: Bytes = self._paired[: size // 2]
        pairs = paired.view(np.uint64)
        # Sixteen at a time, and then within the few words that have one.
        np.bitwise_or(lower, upper, out=pairs)
        np.bitwise_and(pairs, ~_NIBBLES, out=pairs)
        suspects = np.flatnonzero(pairs != 0)
        if len(suspects) > size // _FEW:
            return None
        near = (suspects[:, None] * 8 + np.arange(8)).ravel()
        near = np.concatenate((near, near + size // 2))
        places = near[nibbles[near] > 15]
        if len(places) > size // _FEW:
            return None
        nibbles[places] &= 15
        np.left_shift(upper, _FOUR, out=pairs)
        np.bitwise_or(pairs, lower, out=pairs)
        listed = places.astype("<u4").tobytes() + plane[places].tobytes()
        coded = _PAIR.pack(base, len(places)) + listed + self._entropy.compress(paired)
        return coded if len(coded) < size else None

    def decode(self, coded: Bytes, kind: str, out: Bytes) -> None:
        """Write the chunk that ``coded`` holds to ``out``, which has exactly its length.

        Raises:
            DamagedError: when that is not what it holds. Allocates no more than a chunk before
                it knows.

        """
        width = KINDS[kind]
        size = len(out)
        if len(coded) == 1 + size and coded[0] == _STORED:
            out[:] = coded[1:]
            return
        at = 1 + _PLANE.size * width
        if len(coded) < at or coded[0] != _PLANES:
            raise DamagedError("a chunk is coded in an unknown way")
        planes: list[Bytes] = []
        for number in range(width):
            how, length = _PLANE.unpack_from(coded, 1 + _PLANE.size * number)
            plane = self._planes[number * (size // width) : (number + 1) * (size // width)]
            planes.append(self._plane(coded[at : at + length], how, length, plane))
            at += length
        if at != len(coded):
            raise DamagedError("a chunk is longer than its planes")
        if width == 1:
            out[:] = planes[0]
        else:
            self._merge(planes, kind, out)

    def _plane(self, part: Bytes, how: int, length: int, room: Bytes) -> Bytes:
        """Return a plane as long as ``room``, which may hold it."""
        if len(part) != length or how not in {_STORED, _ZSTD, _PAIRS}:
            raise DamagedError("a chunk is shorter than its planes, or coded in an unknown way")
        if how == _PAIRS:
            return self._unpaired(part, room)
        if how == _ZSTD:
            return self._frame(part, len(room))
        if length != len(room):
            raise DamagedError("a plane has the wrong length")
        return part

    def _unpaired(self, part: Bytes, room: Bytes) -> Bytes:
        if len(part) < _PAIR.size or len(room) % ALIGN:
            raise DamagedError("a plane has the wrong length")
        base, count = _PAIR.unpack_from(part)
        values = _PAIR.size + 4 * count
        if values + count > len(part):
            raise DamagedError("a plane has the wrong length")
        places = np.frombuffer(part[_PAIR.size : values], "<u4")
        pairs = self._frame(part[values + count :], len(room) // 2).view(np.uint64)
        words = room.view(np.uint64)
        half = len(words) // 2
        np.bitwise_and(pairs, _NIBBLES, out=words[:half])
        np.right_shift(pairs, _FOUR, out=words[half:])
        np.bitwise_and(words[half:], _NIBBLES, out=words[half:])
        np.add(room, np.uint8(base), out=room)
        if count and int(places.max()) >= len(room):
            raise DamagedError("a plane has bytes outside of it")
        room[places] = part[values : values + count]
        return room

    def _frame(self, frame: Bytes, size: int) -> Bytes:
        """Return the content of a zstd frame, which must have ``size`` bytes."""
        try:
            # A frame of some bytes may announce gigabytes: the announcement is looked at first.
            if self._zstd.frame_content_size(frame) == size:
                found = self._decoder.decompress(frame, allow_extra_data=False)
                if len(found) == size:
                    return np.frombuffer(found, np.uint8)
        except self._zstd.ZstdError:
            pass
        raise DamagedError("a plane does not decode")

    def _split(self, chunk: Bytes, kind: str, planes: Bytes) -> None:
        if kind in {"1", "8"}:
            planes[:] = chunk.reshape(-1, len(planes)).T
        elif kind in {"2", "r2"}:
            self._split_half(chunk.view(np.uint16), planes, rotate=kind == "r2")
        else:
            words = chunk.view(np.uint32)
            count = len(words)
            low, high = (half[:count] for half in self._halves)
            np.copyto(low, words, casting="unsafe")
            np.right_shift(words, 16, out=self._wide[:count])
            np.copyto(high, self._wide[:count], casting="unsafe")
            self._split_half(low, planes[:2], rotate=False)
            self._split_half(high, planes[2:], rotate=kind == "r4")

    def _split_half(self, words: Any, planes: Bytes, *, rotate: bool) -> None:
        """Split 16-bit words into their lower and upper bytes."""
        low, high = planes
        spare = self._spare[: len(words)]
        np.copyto(low, words, casting="unsafe")
        if rotate:
            # What is rotated out at the top, the sign, comes in below; a comparison is a byte.
            sign = self._nibbles[: len(words)]
            np.less(words.view(np.int16), 0, out=sign.view(np.bool_))
            np.add(low, low, out=low)
            np.bitwise_or(low, sign, out=low)
        np.right_shift(words, 7 if rotate else 8, out=spare)
        np.copyto(high, spare, casting="unsafe")

    def _merge(self, planes: list[Bytes], kind: str, out: Bytes) -> None:
        if kind == "8":
            whole = out.reshape(-1, 8)
            for number, plane in enumerate(planes):
                whole[:, number] = plane
        elif kind in {"2", "r2"}:
            self._merge_half(planes, out.view(np.uint16), rotate=kind == "r2")
        else:
            words = out.view(np.uint32)
            count = len(words)
            half = self._halves[0][:count]
            self._merge_half(planes[2:], half, rotate=kind == "r4")
            np.copyto(words, half)
            np.left_shift(words, 16, out=words)
            self._merge_half(planes[:2], half, rotate=False)
            np.bitwise_or(words, half, out=words)

    def _merge_half(self, planes: list[Bytes], words: Any, *, rotate: bool) -> None:
        spare = self._spare[: len(words)]
        np.copyto(words, planes[1])
        np.left_shift(words, 8, out=words)
        np.bitwise_or(words, planes[0], out=words)
        if rotate:
            np.left_shift(words, 15, out=spare)
            np.right_shift(words, 1, out=words)
            np.bitwise_or(words, spare, out=words)

"""Authenticated encryption of a file's parts, each in its place, under a key for that file alone.

From the secret and a random salt come a key, a nonce base and a commitment, all bound to the whole
header; after Cobblestone (C2SP, chunked-encryption). The commitment names the one secret that
opens the file, which AES-GCM alone does not. A part's nonce is the base with its role and number
folded in, so that no part passes for another one, of this file or any other.
"""

from __future__ import annotations

import functools
import hmac
import os
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.errors import DamagedError, UnknownVersionError, WrongKeyError

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAGIC: Final = b"\x89GPUMEM\n"
VERSION: Final = 1
AES_256_GCM, CHACHA20_POLY1305 = 1, 2
"""Suites."""
STATE, ENTRY, KEY, ANCHORS = 1, 2, 3, 4
"""What a file is."""
CHUNK, INDEX, BODY = 0, 1, 2
"""Roles of a part."""
TAG: Final = 16
"""Bytes by which sealing makes a part longer."""

_FIXED = struct.Struct("<8sBBB5x")
_SALT = 32
_COMMITMENT = 32
HEADER: Final = _FIXED.size + _SALT + _COMMITMENT
"""Bytes of a header."""


@functools.cache
def suite_here() -> int:
    """Return the suite that is fast here: AES where the CPU has instructions for it."""
    if sys.platform == "linux":
        try:
            flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
        except OSError:
            return AES_256_GCM
        if not {"aes"} & set(flags.split()):
            return CHACHA20_POLY1305
    return AES_256_GCM


class Seal:
    """Seals and opens the parts of one file; any thread may."""

    def __init__(self, secret: bytes, header: bytes, name: str) -> None:
        key, self._nonce, self._commitment = _derive(secret, header, name)
        self._aead = _aead(header[9], key)
        self._into = hasattr(self._aead, "encrypt_into")
        self.header = header[: HEADER - _COMMITMENT] + self._commitment

    @classmethod
    def new(cls, secret: bytes, kind: int, name: str = "") -> Seal:
        """Return the seal of a new file of that kind, which opens under that name alone."""
        salt = os.urandom(_SALT)
        fixed = _FIXED.pack(MAGIC, VERSION, suite_here(), kind)
        return cls(secret, fixed + salt, name)

    @classmethod
    def of(cls, secret: bytes, kind: int, header: bytes, name: str = "") -> Seal:
        """Return the seal of the file of that name that begins with ``header``.

        Raises:
            DamagedError: the header is not one of that kind and name, or not of ``secret``.

        """
        if len(header) < HEADER:
            raise DamagedError("it is too short to be an archive")
        magic, version, suite, found = _FIXED.unpack_from(header)
        if magic != MAGIC:
            raise UnknownVersionError("it is not an archive")
        if version != VERSION or suite not in {AES_256_GCM, CHACHA20_POLY1305}:
            raise UnknownVersionError(
                f"it is of version {version}, suite {suite}; this program reads version {VERSION}, "
                "suites 1 and 2"
            )
        if found != kind:
            raise DamagedError("it is another kind of file")
        seal = cls(secret, header[:HEADER], name)
        if not hmac.compare_digest(seal.header, header[:HEADER]):
            raise WrongKeyError(
                "another key wrote it, its header is damaged, or it is another file"
            )
        return seal

    def _place(self, role: int, number: int) -> bytes:
        place = struct.pack("<B3xQ", role, number)
        return bytes(a ^ b for a, b in zip(self._nonce, place, strict=True))

    def close(self, role: int, number: int, part: Buffer, out: Any) -> None:
        """Write the sealed ``part`` to ``out``, which is ``TAG`` longer."""
        nonce = self._place(role, number)
        if self._into:
            self._aead.encrypt_into(nonce, part, None, out)
        else:
            memoryview(out)[:] = self._aead.encrypt(nonce, bytes(part), None)

    def open(self, role: int, number: int, sealed: Buffer, out: Any) -> None:
        """Write the part to ``out``, which is ``TAG`` shorter and must be scratch.

        Raises:
            DamagedError: it is not the part that was sealed there; ``out`` may hold anything then.

        """
        from cryptography.exceptions import InvalidTag

        nonce = self._place(role, number)
        try:
            if self._into:
                self._aead.decrypt_into(nonce, sealed, None, out)
            else:
                memoryview(out)[:] = self._aead.decrypt(nonce, bytes(sealed), None)
        except InvalidTag:
            raise DamagedError("a part of it is not what was written there") from None


def _derive(secret: bytes, header: bytes, name: str) -> tuple[bytes, bytes, bytes]:
    fixed, salt = header[: _FIXED.size], header[_FIXED.size : _FIXED.size + _SALT]
    found = derive(secret, salt, b"pytest-gpumem archive\0" + fixed + name.encode(), 76)
    return found[:32], found[32:44], found[44:]


def derive(secret: bytes, salt: bytes, purpose: bytes, length: int) -> bytes:
    """Return ``length`` bytes of HKDF-SHA-512 (RFC 5869)."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(hashes.SHA512(), length, salt, purpose).derive(secret)


def _aead(suite: int, key: bytes) -> Any:
    from cryptography.hazmat.primitives.ciphers import aead

    return aead.AESGCM(key) if suite == AES_256_GCM else aead.ChaCha20Poly1305(key)


def close_whole(secret: bytes, kind: int, body: bytes) -> bytes:
    """Return a small file of that kind."""
    seal = Seal.new(secret, kind)
    out = bytearray(HEADER + len(body) + TAG)
    out[:HEADER] = seal.header
    seal.close(BODY, 0, body, memoryview(out)[HEADER:])
    return bytes(out)


def open_whole(secret: bytes, kind: int, sealed: bytes) -> bytes:
    """Return the body of a small file.

    Raises:
        DamagedError: it is not what was written.

    """
    seal = Seal.of(secret, kind, sealed[:HEADER])
    if len(sealed) < HEADER + TAG:
        raise DamagedError("it is too short to be an archive")
    out = bytearray(len(sealed) - HEADER - TAG)
    seal.open(BODY, 0, memoryview(sealed)[HEADER:], out)
    return bytes(out)

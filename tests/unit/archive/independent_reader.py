"""A reader of archives that was written from docs/archive-format.md and uses nothing of ours.

Tensors of plain memory come back as ``Plain``; sparse ones and subclasses as their records.
"""

import base64
import hmac
import json
import struct
from collections import OrderedDict
from itertools import product
from typing import NamedTuple

import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

WIDTH = {"1": 1, "2": 2, "4": 4, "8": 8, "r2": 2, "r4": 4}
BITS = {"quint4x2": 4, "quint2x4": 2}


class Plain(NamedTuple):
    dtype: str
    shape: list
    stride: list
    elements: bytes
    more: dict


def hkdf(secret, salt, info, length):
    key, out, last = hmac.digest(salt, secret, "sha512"), b"", b""
    while len(out) < length:
        last = hmac.digest(key, last + info + bytes([len(out) // 64 + 1]), "sha512")
        out += last
    return out[:length]


class File:
    def __init__(self, data, secret, kind, name=""):
        assert data[:8] == b"\x89GPUMEM\n"
        assert (data[8], data[10]) == (1, kind)
        derived = hkdf(
            secret, data[16:48], b"pytest-gpumem archive\0" + data[:16] + name.encode(), 76
        )
        assert hmac.compare_digest(derived[44:], data[48:80])
        self.aead = {1: AESGCM, 2: ChaCha20Poly1305}[data[9]](derived[:32])
        self.base, self.data = derived[32:44], data

    def part(self, role, number, start, end):
        place = struct.pack("<B3xQ", role, number)
        nonce = bytes(a ^ b for a, b in zip(self.base, place, strict=True))
        return self.aead.decrypt(nonce, self.data[start:end], None)


def read_small(data, secret, kind):
    return File(data, secret, kind).part(2, 0, 80, len(data))


def inflate(frame, size):
    assert zstandard.frame_content_size(frame) == size
    return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)


def decode(coded, kind, size):
    if coded[0] == 0:
        assert len(coded) == 1 + size
        return coded[1:]
    width, planes = WIDTH[kind], []
    at = 1 + 5 * width
    for number in range(width):
        how, length = struct.unpack_from("<BI", coded, 1 + 5 * number)
        plane = coded[at : at + length]
        if how == 2:
            planes.append(unpaired(plane, size // width))
        else:
            planes.append(plane if how == 0 else inflate(plane, size // width))
        at += length
    assert at == len(coded)
    out = bytearray(size)
    for number, plane in enumerate(planes):
        out[number::width] = plane
    if kind.startswith("r"):
        for at in range(width - 2, size, width):  # back to the right by one bit
            number = out[at] | out[at + 1] << 8
            number = number >> 1 | (number & 1) << 15
            out[at], out[at + 1] = number & 255, number >> 8
    return bytes(out)


def unpaired(part, size):
    base, count = struct.unpack_from("<BI", part)
    places = struct.unpack_from(f"<{count}I", part, 5)
    values, frame = part[5 + 4 * count :][:count], part[5 + 5 * count :]
    pairs = inflate(frame, size // 2)
    plane = bytearray((pair & 15) + base & 255 for pair in pairs)
    plane += bytes((pair >> 4) + base & 255 for pair in pairs)
    for place, number in zip(places, values, strict=True):
        plane[place] = number
    return bytes(plane)


def read_state(data, secret, name=""):
    opened = File(data, secret, 1, name)
    length, end = struct.unpack("<Q8s", data[-16:])
    assert end == b"GPUMEM.\n"
    index = opened.part(1, 0, len(data) - 16 - length, len(data) - 16)
    size, count = struct.unpack_from("<QI", index)
    lengths = struct.unpack_from(f"<{count}I", index, 12)
    text = json.loads(inflate(index[12 + 4 * count :], size).decode("utf-8", "surrogatepass"))
    assert 80 + sum(lengths) + length + 16 == len(data)
    blocks, number, place = [], 0, 80
    for kind, sizes in text["blocks"]:
        padded = [-(-each // 16) * 16 for each in sizes]
        run = b""
        while len(run) < sum(padded):
            coded = opened.part(0, number, place, place + lengths[number])
            run += decode(coded, kind, min(2**20, sum(padded) - len(run)))
            place, number = place + lengths[number], number + 1
        for each, step in zip(sizes, padded, strict=True):
            blocks.append(run[:each])
            run = run[step:]
    assert number == count
    tensors = [tensor(record, blocks) for record in text["tensors"]]
    return value(text["tree"], tensors), tensors


def tensor(record, blocks):
    dtype, shape, stride, block, offset, more = record
    if dtype in {"sparse", "subclass"}:
        return record
    if stride is None:
        stride, step = [0] * len(shape), 1
        for at in reversed(range(len(shape))):
            stride[at], step = step, step * shape[at]
    if block is None:
        return Plain(dtype, shape, stride, b"", more)
    memory = blocks[block]
    if dtype in BITS:
        return Plain(dtype, shape, stride, memory[offset:], more)
    reach = sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    bits = {"bool": 8, "bfloat16": 16, "complex64": 64, "complex128": 128, "qint8": 8}
    size = bits.get(dtype) or int("".join(filter(str.isdigit, dtype.split("_")[0])))
    size //= 8
    assert offset + (reach + 1) * size <= len(memory)
    places = (
        offset + size * sum(i * step for i, step in zip(index, stride, strict=True))
        for index in product(*map(range, shape))
    )
    return Plain(dtype, shape, stride, b"".join(memory[at : at + size] for at in places), more)


def value(node, tensors):
    if not isinstance(node, list):
        return node
    tag, *rest = node
    if tag == "T":
        return tensors[rest[0]]
    if tag in {"l", "t"}:
        return {"l": list, "t": tuple}[tag](value(each, tensors) for each in rest)
    if tag in {"d", "o"}:
        members = [value(each, tensors) for each in (rest if tag == "d" else rest[1:])]
        kind = dict if tag == "d" else OrderedDict
        return kind(zip(members[::2], members[1::2], strict=True))
    if tag in {"f", "c"}:
        numbers = [struct.unpack("<d", bytes.fromhex(each))[0] for each in rest]
        return numbers[0] if tag == "f" else complex(*numbers)
    if tag == "i":
        return int(rest[0], 16)
    if tag == "b":
        return base64.b64decode(rest[0])
    assert tag in {"size", "dtype", "device"}
    return node

"""Whoever can change the files, but has no key, gets one typed error out of them and no more."""

from __future__ import annotations

import contextlib
import json
import resource
import struct

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_gpumem.archive import codec, disk, file, sealing
from pytest_gpumem.errors import (
    ArchiveError,
    DamagedError,
    UnknownVersionError,
    WrongKeyError,
)

SECRET = b"s" * 32


def archive(folder, state, secret=SECRET):
    new = disk.NewFile(folder / "state")
    try:
        file.write(new, secret, file.Packed(state))
        new.publish()
    finally:
        new.close()
    return (folder / "state").read_bytes()


def read(folder, data, secret=SECRET):
    (folder / "changed").write_bytes(data)
    reader = file.Reader(folder / "changed", secret)
    try:
        return reader.get()
    finally:
        reader.close()


@pytest.fixture
def small(tmp_path):
    return archive(tmp_path, {"w": torch.arange(300.0), "n": [1, "x"]})


@pytest.fixture
def large(tmp_path):
    """An archive of three chunks, with where they begin."""
    data = archive(tmp_path, [torch.randint(0, 256, (3 * 2**20,), dtype=torch.uint8)])
    places = [sealing.HEADER + number * (2**20 + 1 + sealing.TAG) for number in range(4)]
    return data, places


def refused(folder, data):
    with pytest.raises(DamagedError):
        read(folder, data)


@pytest.mark.slow
def test_every_bit_counts(tmp_path, small):
    for at in range(len(small) * 8):
        changed = bytearray(small)
        changed[at // 8] ^= 1 << at % 8
        refused(tmp_path, changed)


def test_every_truncation_and_every_longer_file_is_refused(tmp_path, small):
    for size in range(len(small)):
        refused(tmp_path, small[:size])
    for more in (b"\0", small, small[-16:]):
        refused(tmp_path, small + more)
    for at in range(0, len(small), 7):
        refused(tmp_path, small[:at] + b"\0" + small[at:])


def test_every_chunk_counts(tmp_path, large):
    data, places = large
    for place in places[1:]:
        changed = bytearray(data)
        changed[place - 1] ^= 128
        refused(tmp_path, changed)


def test_chunks_that_are_swapped_dropped_doubled_or_transplanted_are_refused(tmp_path, large):
    data, (a, b, c, end) = large
    first, second, third, rest = data[a:b], data[b:c], data[c:end], data[end:]
    other = archive(tmp_path, [torch.randint(0, 256, (3 * 2**20,), dtype=torch.uint8)])
    for body in (
        second + first + third,
        first + third,
        first + second,
        first + first + second + third,
        first + first + third,
        other[a:b] + second + third,
    ):
        with pytest.raises(DamagedError):
            read(tmp_path, data[:a] + body + rest)
    with pytest.raises(DamagedError):  # another archive's chunks and index under this header
        read(tmp_path, data[:a] + other[a:])
    with pytest.raises(DamagedError):  # another archive's index
        read(tmp_path, data[:end] + other[end:])


def test_another_key_version_suite_or_kind_is_refused_by_name(tmp_path, small):
    with pytest.raises(WrongKeyError, match="another key wrote it"):
        read(tmp_path, small, secret=b"x" * 32)
    for at, sentence in ((8, "it is of version 2"), (9, "suite 3"), (0, "it is not an archive")):
        changed = bytearray(small)
        changed[at] = 2 if at == 8 else 3
        with pytest.raises(UnknownVersionError, match=sentence):
            read(tmp_path, changed)
    entry = sealing.close_whole(SECRET, sealing.ENTRY, b"{}")
    with pytest.raises(DamagedError, match="another kind of file"):
        read(tmp_path, entry + bytes(100))


def test_the_second_suite_reads_and_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(sealing, "suite_here", lambda: sealing.CHACHA20_POLY1305)
    data = archive(tmp_path, {"w": torch.arange(300.0), "n": [1, "x"]})
    assert data[9] == 2
    monkeypatch.undo()

    assert torch.equal(read(tmp_path, data)["w"], torch.arange(300.0))
    for at in range(0, len(data), 3):
        changed = bytearray(data)
        changed[at] ^= 4
        refused(tmp_path, changed)


def test_an_older_binding_writes_the_same_file(tmp_path, small, monkeypatch):
    class Plain:
        def __init__(self, aead):
            self.encrypt, self.decrypt = aead.encrypt, aead.decrypt

    made = sealing._aead
    monkeypatch.setattr(sealing, "_aead", lambda suite, key: Plain(made(suite, key)))

    assert torch.equal(read(tmp_path, small)["w"], torch.arange(300.0))
    data = archive(tmp_path, {"w": torch.arange(300.0), "n": [1, "x"]})
    monkeypatch.undo()
    assert torch.equal(read(tmp_path, data)["w"], torch.arange(300.0))


# From here on whoever forges has the key: only the parser stands between.


def forged(chunks, described, lengths=None, size=None):
    """Return a file with true tags: sealed ``chunks`` (coded) and this index."""
    seal = sealing.Seal.new(SECRET, sealing.STATE)
    body = b""
    for number, coded in enumerate(chunks):
        out = bytearray(len(coded) + sealing.TAG)
        seal.close(sealing.CHUNK, number, coded, out)
        body += out
    text = described if isinstance(described, bytes) else json.dumps(described).encode()
    lengths = [len(coded) + sealing.TAG for coded in chunks] if lengths is None else lengths
    index = struct.pack(
        f"<QI{len(lengths)}I", len(text) if size is None else size, len(lengths), *lengths
    )
    index += zstandard.ZstdCompressor().compress(text)
    out = bytearray(len(index) + sealing.TAG)
    seal.close(sealing.INDEX, 0, index, out)
    return seal.header + body + bytes(out) + struct.pack("<Q8s", len(out), b"GPUMEM.\n")


def index(tree, tensors=(), blocks=()):
    return {"tree": tree, "tensors": list(tensors), "blocks": list(blocks)}


RAW = b"\0" + bytes(16)
ONE = ["float32", [4], None, 0, 0, {}]
BLOCK = ["r4", [16]]


def test_a_true_forgery_is_read(tmp_path):
    data = forged([RAW], index(["T", 0], [ONE], [BLOCK]))
    assert torch.equal(read(tmp_path, data), torch.zeros(4))


@pytest.mark.parametrize(
    "described",
    [
        index(["T", 1], [ONE], [BLOCK]),
        index(["T", -1], [ONE], [BLOCK]),
        index(["T", "0"], [ONE], [BLOCK]),
        index(["T", 0], [["float32", [5], None, 0, 0, {}]], [BLOCK]),
        index(["T", 0], [["float32", [4], None, 0, 4, {}]], [BLOCK]),
        index(["T", 0], [["float32", [4], None, 0, -4, {}]], [BLOCK]),
        index(["T", 0], [["float32", [1], None, 0, 2, {}]], [BLOCK]),
        index(["T", 0], [["float32", [2], [-1], 0, 4, {}]], [BLOCK]),
        index(["T", 0], [["float32", [2, 2], [2**61, 1], 0, 0, {}]], [BLOCK]),
        index(["T", 0], [["float32", [10**9], None, None, 0, {}]], [BLOCK]),
        index(["T", 0], [["float32", [4], None, 1, 0, {}]], [BLOCK]),
        index(["T", 0], [["float32", [2**61, 2**61, 0], None, None, 0, {}]], [BLOCK]),
        index(["T", 0], [["Tensor", [4], None, 0, 0, {}]], [BLOCK]),
        index(["T", 0], [["float32", [4.0], None, 0, 0, {}]], [BLOCK]),
        index(["T", 0], [["quint4x2", [64], None, 0, 0, {"quantizer": ["l"]}]], [BLOCK]),
        index(
            ["T", 0],
            [["float32", [4], None, 0, 0, {"quantizer": ["t", "per_tensor_affine"]}]],
            [BLOCK],
        ),
        index(["T", 0], [["float32", [4], None, 0, 0, {"grad": 0}]], [BLOCK]),
        index(["T", 0], [["float32", [4], None, 0, 0, {"attributes": 5}]], [BLOCK]),
        index(["T", 0], [["int64", [2], None, 0, 0, {"requires_grad": True}]], [BLOCK]),
        index(["T", 0], [["subclass", "os:system", [1], [1], [{}, None], {}]], []),
        index(["T", 0], [["subclass", "torch:load", [1], [1], [{}, None], {}]], []),
        index(["T", 0], [["subclass", "torch.nope:X", [1], [1], [{}, None], {}]], []),
        index(["T", 0], [["sparse", "sparse_coo", [2], [0, 0], 0, {}]], []),
        index(["T", 0], [["sparse", "sparse_csr", [2, 2], [1, 1, 1], 0, {}], ONE], [BLOCK]),
        index(["T", 0], [5], [BLOCK]),
        index(["T", 0], [ONE], [["r4", [17]]]),
        index(["T", 0], [ONE], [["r4", [0]]]),
        index(["T", 0], [ONE], [["r4", [-16]]]),
        index(["T", 0], [ONE], [["r4", [2**60]]]),
        index(["T", 0], [ONE], [["x", [16]]]),
        index(["T", 0], [ONE], [["r4", [16]], ["r4", [16]]]),
        index(["T", 0], [ONE], [5]),
        index({}, [ONE], [BLOCK]),
        index(["x"], [], [BLOCK]),
        index([], [], [BLOCK]),
        index(["f", "00"], [], [BLOCK]),
        index(["b", "=x"], [], [BLOCK]),
        index(["d", 1], [], [BLOCK]),
        index(["d", ["l"], 1], [], [BLOCK]),
        index(["o"], [], [BLOCK]),
        index(["o", 5], [], [BLOCK]),
        index(["dtype", "load"], [], [BLOCK]),
        index(["device", "nowhere"], [], [BLOCK]),
        index(["size", -1], [], [BLOCK]),
        index(1.5, [], [BLOCK]),
        [],
        {"tree": 1},
        b"",
        b"{",
        b"\xff",
        b"[" * 100_000,
        json.dumps(index(eval("[" * 90 + "]" * 90))).encode(),  # noqa: S307  # a constant
    ],
    ids=lambda value: str(value)[:60],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_forged_index_is_refused(tmp_path, described):
    with pytest.raises(DamagedError):
        read(tmp_path, forged([RAW], described))


def bombs():
    zeros = zstandard.ZstdCompressor().compress(bytes(2**30))
    yield (
        "a frame of a gigabyte",
        [b"\1" + struct.pack("<BI", 1, len(zeros)) + zeros],
        ["1", [2**20]],
    )
    claimed = zstandard.ZstdCompressor().compress(bytes(2**20))[:20]
    yield (
        "a frame that ends",
        [b"\1" + struct.pack("<BI", 1, len(claimed)) + claimed],
        ["1", [2**20]],
    )
    small = zstandard.ZstdCompressor().compress(bytes(16))
    tail = small + b"x"
    yield "a tail", [b"\1" + struct.pack("<BI", 1, len(tail)) + tail], ["1", [16]]
    yield "an unknown coding", [b"\2" + bytes(16)], ["1", [16]]
    yield "planes outside", [b"\1" + struct.pack("<BI", 0, 2**32 - 1) + bytes(16)], ["1", [16]]
    yield "nothing", [b"\1"], ["1", [16]]
    eight = zstandard.ZstdCompressor().compress(bytes(8))
    for name, pairs in (
        ("pairs that end", b"\0"),
        ("pairs of nothing", struct.pack("<BI", 0, 0)),
        ("pairs with too many places", struct.pack("<BI", 0, 2**32 - 1) + eight),
        ("pairs with a place outside", struct.pack("<BIIB", 0, 1, 16, 5) + eight),
        ("too few pairs", struct.pack("<BI", 0, 0) + zstandard.ZstdCompressor().compress(b"1234")),
        ("a gigabyte of pairs", struct.pack("<BI", 0, 0) + zeros),
    ):
        yield name, [b"\1" + struct.pack("<BI", 2, len(pairs)) + pairs], ["1", [16]]


@pytest.mark.parametrize("name", [name for name, _, _ in bombs()])
def test_bombs_take_no_memory(tmp_path, name):
    _, chunks, run = next(each for each in bombs() if each[0] == name)
    data = forged(chunks, index(["T", 0], [["uint8", [run[1][0]], None, 0, 0, {}]], [run]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DamagedError):
        read(tmp_path, data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_an_index_bomb_takes_no_memory(tmp_path):
    data = forged([], b" " * 2**28)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DamagedError):
        read(tmp_path, data)
    with pytest.raises(DamagedError):
        read(tmp_path, forged([], b" " * 2**28, size=5))
    with pytest.raises(DamagedError):
        read(tmp_path, forged([], index(None), lengths=[2**32 - 1] * 1000))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 20)
    | st.sampled_from(
        ["T", "d", "l", "o", "f", "float32", "sparse", "subclass", "r4", "dtype", "x"]
    ),
    lambda inside: (
        st.lists(inside, max_size=6)
        | st.dictionaries(
            st.sampled_from(["grad", "conj", "neg", "quantizer", "meta", "attributes"]), inside
        )
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=max(250, settings().max_examples))
@given(
    tree=JSON, records=st.lists(JSON | st.just(ONE), max_size=3), changed=st.integers(0, 5), by=JSON
)
def test_fuzzed_indexes_with_true_tags_are_read_or_refused(
    tmp_path_factory, tree, records, changed, by
):
    folder = tmp_path_factory.getbasetemp()
    near = [*ONE[:changed], by, *ONE[changed + 1 :]]
    for described in (index(tree, records, [BLOCK]), index(["T", 0], [near, ONE], [BLOCK])):
        with contextlib.suppress(DamagedError):
            read(folder, forged([RAW], described))


@settings(deadline=None, max_examples=max(200, settings().max_examples))
@given(
    data=st.binary(max_size=200), kind=st.sampled_from(sorted(codec.KINDS)), size=st.integers(1, 8)
)
def test_fuzzed_chunks_are_decoded_or_refused(data, kind, size):
    out = np.empty(16 * size, np.uint8)
    for coded in (data, b"\1" + data, b"\0" + data):
        with contextlib.suppress(DamagedError):
            codec.Coder().decode(np.frombuffer(coded, np.uint8), kind, out)


@settings(deadline=None, max_examples=max(150, settings().max_examples))
@given(
    pieces=st.lists(
        st.tuples(st.binary(min_size=16, max_size=16), st.integers(1, 3000)), min_size=1, max_size=4
    ),
    kind=st.sampled_from(sorted(codec.KINDS)),
)
def test_every_chunk_comes_back_and_grows_by_no_more_than_a_byte(pieces, kind):
    chunk = np.frombuffer(b"".join(data * times for data, times in pieces), np.uint8)[: codec.CHUNK]
    out, back = np.empty(len(chunk) + codec.SLACK, np.uint8), np.empty(len(chunk), np.uint8)
    size = codec.Coder().encode(chunk, kind, out)
    codec.Coder().decode(out[:size], kind, back)

    assert size <= len(chunk) + 1
    assert (back == chunk).all()


@pytest.mark.parametrize("kind", ["1", "r2"])
@pytest.mark.parametrize("outside", [0, 1, 200, 5000])
@pytest.mark.parametrize("base", [0, 100, 240])
def test_planes_of_pairs_come_back_wherever_their_values_lie(kind, base, outside):
    # More than 16 values in all: what is far off is listed, up to some.
    draw = np.random.default_rng(base + outside)
    weights = 0.5 ** np.arange(16)
    near = draw.choice(16, codec.CHUNK, p=weights / weights.sum())
    far = draw.choice(codec.CHUNK, outside, replace=False)
    near[far] = draw.integers(0, 256, outside)
    chunk = (base + near).astype(np.uint8)
    if kind == "r2":
        chunk[::2] = draw.integers(0, 256, codec.CHUNK // 2)
    out, back = np.empty(len(chunk) + codec.SLACK, np.uint8), np.empty(len(chunk), np.uint8)
    size = codec.Coder().encode(chunk, kind, out)
    codec.Coder().decode(out[:size], kind, back)

    assert (back == chunk).all()
    how = out[1 + 5 * (codec.KINDS[kind] - 1)]
    assert kind != "1" or (how == 2) == (outside < 5000)  # 5,000 of a million are too many


def test_no_error_is_outside_the_tree():
    from pytest_gpumem import errors

    kinds = [each for each in vars(errors).values() if isinstance(each, type)]
    assert all(issubclass(each, (ArchiveError, errors.LeaseError)) for each in kinds)
    assert issubclass(WrongKeyError, DamagedError)
    assert issubclass(UnknownVersionError, DamagedError)

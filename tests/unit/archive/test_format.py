"""Files of version 1 stay readable, and their document tells all that reading them needs."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import independent_reader
import pytest
import torch
from states import raw, raw_storage, same, shared

from pytest_gpumem.archive import disk, file, sealing
from pytest_gpumem.archive.store import ArchiveStore

pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")

GOLDEN = Path(__file__).parent / "golden"
SECRET = bytes(range(32))


def state():
    """Return what the golden states hold: exact numbers only, the same everywhere."""
    weight = torch.nn.Parameter(torch.arange(600.0).reshape(20, 30) / 1024)
    weight.grad = torch.arange(600.0).reshape(20, 30) / 512
    weight.tag = "kept"
    fine = torch.arange(500, dtype=torch.float64) / 3 * 2.0**40
    inner = OrderedDict([("bf16", (torch.arange(700) / 64).bfloat16()), ("tied", weight)])
    inner._metadata = OrderedDict([("", {"version": 2})])
    return {
        "weight": weight,
        "view": weight.detach()[2:9, 3].as_strided((3, 2), (60, 7), 63),
        "zeros": torch.zeros(280_000),
        "inner": inner,
        "tensors": [
            fine,
            (torch.arange(64) / 8).half(),
            torch.arange(-5, 90, dtype=torch.int8),
            torch.arange(40) % 3 == 0,
            torch.arange(33, dtype=torch.int64) * 2**40,
            torch.complex(torch.arange(9.0), torch.arange(9.0) + 1).conj(),
            torch.arange(16, dtype=torch.uint8).view(torch.float8_e4m3fn),
            torch.empty(0, 3),
            torch.empty(2, 2, device="meta"),
            torch.quantize_per_tensor(torch.arange(6.0), 0.5, 1, torch.qint8),
            torch.eye(3).to_sparse(),
        ],
        "values": (1, -(2**70), 2**11_000, 1.5, float("nan"), 3 - 2j, b"\0\xff", "\ud800é", None),
        True: {"size": torch.Size([2, 0]), "dtype": torch.bfloat16, "device": torch.device("cpu")},
    }


def read(path):
    reader = file.Reader(path, SECRET)
    try:
        return reader.get()
    finally:
        reader.close()


def agree(plain, value):
    """Assert that the independent reader's value is that of ours."""
    if isinstance(plain, independent_reader.Plain):
        assert f"torch.{plain.dtype}" == str(value.dtype)
        assert plain.shape == list(value.shape)
        assert plain.stride == list(value.stride())
        assert plain.more.get("requires_grad", False) == value.requires_grad
        assert plain.more.get("conj", False) == value.is_conj()
        if not value.is_meta:
            element = raw(value.detach()).contiguous()
            assert plain.elements == bytes(raw_storage(element.untyped_storage()).tolist())
    elif isinstance(value, torch.Tensor):
        assert plain[:3] == ["sparse", "sparse_coo", list(value.shape)]
    elif isinstance(plain, dict):
        assert type(plain) is type(value)
        assert [*plain] == [*value]
        for key in plain:
            agree(plain[key], value[key])
    elif isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        assert type(plain) is type(value)
        for one, other in zip(plain, value, strict=True):
            agree(one, other)
    elif isinstance(value, (torch.Size, torch.dtype, torch.device)):
        text = [*value] if isinstance(value, torch.Size) else [str(value).removeprefix("torch.")]
        assert plain[1:] == text
    else:
        same(plain, value)


@pytest.mark.parametrize("name", ["state-aes", "state-chacha"])
def test_files_that_were_written_once_are_read_for_ever(name):
    found = read(GOLDEN / name)

    same(state(), found)
    tensors = [found["weight"], found["view"], found["inner"]["tied"]]
    assert tensors[0] is tensors[2]
    assert shared(tensors) == {(1, 0): 252, (2, 0): 0, (2, 1): -252}


@pytest.mark.parametrize("name", ["state-aes", "state-chacha"])
def test_a_reader_written_from_the_document_alone_finds_the_same(name):
    found, tensors = independent_reader.read_state((GOLDEN / name).read_bytes(), SECRET)

    agree(found, state())
    assert found["weight"].more["parameter"]
    assert tensors[found["weight"].more["grad"]].elements != found["weight"].elements
    assert found["weight"].more["attributes"] == ["d", "tag", "kept"]


def test_a_reader_written_from_the_document_alone_reads_a_whole_store(tmp_path):
    store = ArchiveStore(tmp_path, key=SECRET)
    name = store.put(state(), type="model", tags=["t"], metadata={"lr": 0.5})

    secret = independent_reader.read_small((tmp_path / "key-copy").read_bytes(), SECRET, 3)
    sealed = (tmp_path / "entries" / name).read_bytes()
    entry = json.loads(independent_reader.read_small(sealed, secret, 2))
    assert (entry["id"], entry["type"], entry["tags"]) == (name, "model", ["t"])
    assert independent_reader.value(entry["metadata"], []) == {"lr": 0.5}
    data = (tmp_path / "states" / entry["content"]).read_bytes()
    agree(independent_reader.read_state(data, secret, entry["content"])[0], state())


def test_small_files_that_were_written_once_are_read_for_ever():
    for kind, name in ((sealing.ENTRY, "entry"), (sealing.KEY, "key")):
        data = (GOLDEN / name).read_bytes()
        found = sealing.open_whole(SECRET, kind, data)
        assert found == independent_reader.read_small(data, SECRET, kind)
        assert found == (b'{"id": "00"}' if name == "entry" else bytes(32))


def test_what_is_written_today_has_the_layout_of_the_golden_file(tmp_path):
    new = disk.NewFile(tmp_path / "state")
    try:
        file.write(new, SECRET, file.Packed(state()))
        new.publish()
    finally:
        new.close()
    today, then = (file.Reader(path, SECRET) for path in (tmp_path / "state", GOLDEN / "state-aes"))
    assert (today.tree, today.records) == (then.tree, then.records)
    assert today.layout.sizes == then.layout.sizes
    assert [chunk.kind for chunk in today.layout.chunks] == [
        chunk.kind for chunk in then.layout.chunks
    ]
    today.close()
    then.close()


def write_golden():
    """Write the golden files; once, when the version of the format changes."""
    GOLDEN.mkdir(exist_ok=True)
    for name, suite in (("state-aes", 1), ("state-chacha", 2)):
        sealing.suite_here = lambda suite=suite: suite
        new = disk.NewFile(GOLDEN / name)
        file.write(new, SECRET, file.Packed(state()))
        new.publish()
        new.close()
    (GOLDEN / "entry").write_bytes(sealing.close_whole(SECRET, sealing.ENTRY, b'{"id": "00"}'))
    (GOLDEN / "key").write_bytes(sealing.close_whole(SECRET, sealing.KEY, bytes(32)))

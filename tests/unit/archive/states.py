"""States to archive, and the comparison of what came back: bits, types, strides, aliases."""

from __future__ import annotations

import struct
from collections import OrderedDict

import torch
from hypothesis import strategies as st

DTYPES = sorted(
    {value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str
)
SUB_BYTE = {torch.quint4x2, torch.quint2x4}
QUANTIZED = {torch.qint8, torch.quint8, torch.qint32} | SUB_BYTE


def raw(tensor):
    """Return the bytes of a strided tensor, element by element; lazy flags are not resolved."""
    size = tensor.element_size()
    return torch.empty(0, dtype=torch.uint8).set_(
        tensor.untyped_storage(),
        tensor.storage_offset() * size,
        (*tensor.shape, size),
        (*(step * size for step in tensor.stride()), 1),
    )


def raw_storage(storage):
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def parts(tensor):
    if tensor.layout is torch.sparse_coo:
        return [tensor.detach()._indices(), tensor.detach()._values()]
    if tensor.layout in {torch.sparse_csr, torch.sparse_bsr}:
        return [tensor.crow_indices(), tensor.col_indices(), tensor.detach().values()]
    if tensor.layout in {torch.sparse_csc, torch.sparse_bsc}:
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.detach().values()]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def same(one, other):
    """Assert that two values are the same, bit by bit."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        same_tensor(one, other)
    elif isinstance(one, dict):
        assert [*one] == [*other]
        for key in one:
            same(one[key], other[key])
        same(getattr(one, "__dict__", None) or None, getattr(other, "__dict__", None) or None)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            same(mine, theirs)
    elif isinstance(one, float):
        assert struct.pack("d", one) == struct.pack("d", other)
    elif isinstance(one, complex):
        same((one.real, one.imag), (other.real, other.imag))
    else:
        assert one == other


def same_tensor(one, other):
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    assert one.layout == other.layout
    assert one.requires_grad == other.requires_grad
    assert isinstance(one, torch.nn.Parameter) == isinstance(other, torch.nn.Parameter)
    if one.layout is not torch.strided or hasattr(one, "__tensor_flatten__"):
        for mine, theirs in zip(parts(one), parts(other), strict=True):
            same_tensor(mine, theirs)
        return
    assert one.stride() == other.stride()
    assert one.is_meta == other.is_meta
    assert one.is_conj() == other.is_conj()
    assert one.is_neg() == other.is_neg()
    same(dict(one.__dict__), dict(other.__dict__))
    if one.is_quantized:
        assert one.qscheme() == other.qscheme()
    if one.dtype in SUB_BYTE:
        assert torch.equal(raw_storage(one.untyped_storage()), raw_storage(other.untyped_storage()))
    elif not one.is_meta and one.numel():
        assert torch.equal(raw(one), raw(other))


def shared(tensors):
    """Return which elements share memory: for each pair, how far their first bytes are apart."""
    found = {}
    for i, one in enumerate(tensors):
        for j, other in enumerate(tensors[:i]):
            if one.layout is other.layout is torch.strided and one.numel() and other.numel():
                a, b = span(one), span(other)
                if a[0] < b[1] and b[0] < a[1]:
                    found[i, j] = a[0] - b[0]
    return found


def span(tensor):
    start = tensor.untyped_storage().data_ptr() + tensor.storage_offset() * tensor.element_size()
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (reach + 1) * tensor.element_size()


@st.composite
def storages(draw):
    return bytearray(draw(st.binary(min_size=64, max_size=256)))


@st.composite
def strided(draw, pool):
    """A tensor over one of the storages in ``pool``: any dtype, shape, stride and offset."""
    dtype = draw(st.sampled_from([each for each in DTYPES if each not in QUANTIZED]))
    storage = draw(st.sampled_from(pool))
    itemsize = torch.empty(0, dtype=dtype).element_size()
    room = storage.nbytes() // itemsize
    offset = draw(st.integers(0, room - 1))
    left = room - 1 - offset
    shape, stride = [], []
    for _ in range(draw(st.integers(0, 3))):
        size = draw(st.integers(0, 4))
        step = draw(st.integers(0, left // (size - 1) if size > 1 else 3))
        left -= max(size - 1, 0) * step
        shape.append(size)
        stride.append(step)
    tensor = torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)
    flags = ["none", "parameter"] if dtype.is_floating_point or dtype.is_complex else ["none"]
    if dtype in {torch.complex64, torch.complex128, torch.complex32}:
        flags += ["conj", "neg"]
    flag = draw(st.sampled_from(flags))
    if flag == "conj":
        return tensor.conj()
    if flag == "neg":
        return tensor.conj().imag
    if flag == "parameter":
        return torch.nn.Parameter(tensor, requires_grad=draw(st.booleans()))
    return tensor


PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(2**9_999, 2**10_001)
    | st.floats()
    | st.builds(
        lambda bits: struct.unpack("d", struct.pack("Q", bits))[0], st.integers(0, 2**64 - 1)
    )
    | st.complex_numbers()
    | st.text(st.characters())
    | st.text("\ud83d\ude00/.\0")
    | st.binary()
    | st.sampled_from(DTYPES)
    | st.sampled_from([torch.device("cpu"), torch.device("cuda:1"), torch.Size([2, 0])])
)
KEYS = st.text() | st.integers() | st.tuples(st.text(), st.integers()) | st.booleans() | st.none()


class Box:
    """Holds a state for hypothesis to print: torch cannot print all of its own dtypes."""

    def __init__(self, state):
        self.state = state

    def __repr__(self):
        return describe(self.state)


def describe(value):
    if isinstance(value, torch.Tensor):
        return f"<{value.dtype} {list(value.shape)} {value.stride()} +{value.storage_offset()}>"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {describe(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(describe, value)) + "]"
    return repr(value)


@st.composite
def states(draw):
    pool = [
        torch.frombuffer(draw(storages()), dtype=torch.uint8).clone().untyped_storage()
        for _ in range(3)
    ]
    leaves = PLAIN | strided(pool) | st.shared(strided(pool), key="twice")
    state = draw(
        st.recursive(
            leaves,
            lambda inside: (
                st.lists(inside, max_size=4)
                | st.lists(inside, max_size=4).map(tuple)
                | st.dictionaries(KEYS, inside, max_size=4)
                | st.dictionaries(KEYS, inside, max_size=4).map(OrderedDict)
            ),
            max_leaves=12,
        )
    )
    return Box(state)


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in tensors_of(each)]
    return []

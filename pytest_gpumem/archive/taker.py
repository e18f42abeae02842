"""Takes a state apart: text-like nodes, records of its tensors, and the memory behind them."""

from __future__ import annotations

import base64
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpumem.archive import subclasses, torch_private
from pytest_gpumem.archive.builder import Builder
from pytest_gpumem.archive.nodes import (
    BITS,
    DEEPEST,
    DOUBLE,
    UNREADABLE,
    contiguous_stride,
    last_element,
)
from pytest_gpumem.errors import DamagedError, StateRefusedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_CONTAINERS = {dict, list, tuple, OrderedDict}
_BY_OTHERS = {"sparse", "subclass"}
"""Kinds of records whose building runs checks of torch or code of a class."""
_SURE = {"requires_grad", "parameter", "meta", "conj", "neg", "attributes"}
"""What a record may say more, of which nothing can fail."""
_ROTATED = {"bfloat16": "r2", "float32": "r4", "complex64": "r4"}
_HALVED = {"complex32": "2", "complex128": "8"}


class Block(NamedTuple):
    """A stretch of memory, in bytes, that one or more tensors of a state lie in."""

    kind: str
    """How its bytes are coded, see ``codec.KINDS``."""
    storage: Any
    """The ``torch.UntypedStorage`` it is part of, which it keeps alive."""
    offset: int
    size: int


class Parts(NamedTuple):
    """A state taken apart."""

    tree: Any
    records: list[Any]
    tensors: list[Any]
    """The tensor that each record describes."""
    blocks: list[Block]

    @property
    def size(self) -> int:
        """Bytes of all blocks."""
        return sum(block.size for block in self.blocks)


class _Leaf(NamedTuple):
    """A tensor over plain memory, before blocks are known."""

    record: int
    device: str
    start: int
    end: int
    """Addresses of its first byte and after its last one."""
    kind: str
    storage: Any
    base: int
    """Address of the storage."""


def take_apart(state: Any) -> Parts:
    """Return what ``state`` is made of; copies nothing.

    Raises:
        StateRefusedError: names the first part that could not be restored bit for bit.

    """
    taker = _Taker()
    tree = taker.node(state, 0)
    parts = Parts(tree, taker.records, taker.tensors, taker.place())
    _rehearse(parts)
    return parts


def _rehearse(parts: Parts) -> None:
    """Build the state, out of the memory it lies in, if more than our own code has a say in that.

    What is accepted must be restorable: a subclass may hold itself, or not be found again.

    Raises:
        StateRefusedError: it cannot be built.

    """
    if all(record[0] not in _BY_OTHERS and _SURE.issuperset(record[5]) for record in parts.records):
        return
    places = {number: (block.storage, block.offset) for number, block in enumerate(parts.blocks)}
    sizes = [block.size for block in parts.blocks]
    try:
        Builder(parts.records, sizes, places).build(parts.tree)
    except DamagedError as error:
        raise StateRefusedError(
            f"cannot archive the state: it could not be restored: {error}"
        ) from None


class _Taker:
    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._plain = {torch.Tensor, torch.nn.Parameter}
        self.records: list[Any] = []
        self.tensors: list[Any] = []
        self._known: dict[int, int] = {}
        self._leaves: list[_Leaf] = []
        self._path: list[Any] = []
        self._around: set[int] = set()
        """The containers that are being taken apart, by id."""
        self._names: dict[Any, tuple[str, int, str]] = {}

    def _refuse(self, what: str) -> StateRefusedError:
        where = "".join(f"[{key!r}]" for key in self._path)
        return StateRefusedError(f"cannot archive state{where}: {what}")

    def node(self, value: Any, depth: int) -> Any:
        """Return the node of a value."""
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            # Longer ones Python refuses to print and read as decimals.
            return value if value.bit_length() < 10_000 else ["i", f"{value:x}"]
        if kind is float:
            return ["f", DOUBLE.pack(value).hex()]
        if isinstance(value, self._torch.Tensor):
            return ["T", self._tensor(value, depth)]
        if kind in _CONTAINERS:
            return self._container(value, kind, depth)
        if kind is bytes:
            return ["b", base64.b64encode(value).decode()]
        if kind is complex:
            return ["c", DOUBLE.pack(value.real).hex(), DOUBLE.pack(value.imag).hex()]
        if kind is self._torch.Size:
            return ["size", *value]
        if kind is self._torch.dtype:
            return ["dtype", str(value).removeprefix("torch.")]
        if kind is self._torch.device:
            return ["device", str(value)]
        raise self._refuse(
            f"a {kind.__module__}.{kind.__qualname__}; allowed are tensors, None, bool, int, "
            "float, complex, str, bytes, list, tuple, dict, OrderedDict, torch.Size, dtype, device"
        )

    def _container(self, value: Any, kind: type, depth: int) -> list[Any]:
        if id(value) in self._around:
            raise self._refuse(f"a {kind.__name__} inside itself")
        self._refuse_depth(depth)
        self._around.add(id(value))
        if kind is dict:
            found = ["d", *self._items(value, depth)]
        elif kind is OrderedDict:
            # state_dict() keeps the versions of its modules in an attribute.
            more = self.node(vars(value), depth + 1) if vars(value) else None
            found = ["o", more, *self._items(value, depth)]
        else:
            found = ["l" if kind is list else "t", *self._members(value, depth)]
        self._around.discard(id(value))
        return found

    def _refuse_depth(self, depth: int) -> None:
        if depth >= DEEPEST:
            del self._path[8:]
            raise self._refuse(f"more than {DEEPEST} containers or tensors inside one another")

    def _items(self, value: dict[Any, Any], depth: int) -> Iterable[Any]:
        for key, member in value.items():
            self._path.append(key)
            if isinstance(key, self._torch.Tensor):
                raise self._refuse("a tensor as a key")
            yield self.node(key, depth + 1)
            yield self.node(member, depth + 1)
            self._path.pop()

    def _members(self, value: Sequence[Any], depth: int) -> Iterable[Any]:
        for at, member in enumerate(value):
            self._path.append(at)
            yield self.node(member, depth + 1)
            self._path.pop()

    def _tensor(self, tensor: Any, depth: int) -> int:
        """Return the number of the record of ``tensor``; the same tensor has the same one."""
        known = self._known.get(id(tensor))
        if known is not None:
            return known
        self._refuse_depth(depth)
        number = len(self.records)
        self._known[id(tensor)] = number
        self.records.append(None)
        self.tensors.append(tensor)  # also keeps it alive, and so its id
        try:
            self.records[number] = self._record(number, tensor, depth)
        except UNREADABLE as error:
            raise self._refuse(f"a tensor that cannot be taken apart: {error}") from error
        return number

    def _record(self, number: int, tensor: Any, depth: int) -> list[Any]:
        torch = self._torch
        more: dict[str, Any] = {}
        if tensor.requires_grad:
            if not tensor.is_leaf:
                raise self._refuse("a tensor with a graph behind it; detach() it")
            more["requires_grad"] = True
        if tensor.is_leaf and tensor.grad is not None:
            more["grad"] = self._tensor(tensor.grad, depth + 1)
        if tensor._backward_hooks:
            raise self._refuse("a tensor with hooks, which are code")
        if isinstance(tensor, torch.nn.Parameter):
            more["parameter"] = True
        if type(tensor) not in self._plain:
            return self._subclass(tensor, more, depth)
        if tensor.__dict__:
            more["attributes"] = self.node(tensor.__dict__, depth + 1)
        if tensor.layout is not torch.strided:
            return self._sparse(tensor, more, depth)
        if tensor.is_nested:
            raise self._refuse("a nested tensor; give its unbind()")
        if tensor.is_conj():
            more["conj"] = True
        if tensor.is_neg():
            more["neg"] = True
        if tensor.is_quantized:
            try:
                scheme = torch_private.quantizer(tensor)
            except ValueError as error:
                raise self._refuse(f"a tensor {error}") from None
            more["quantizer"] = self.node(scheme, depth + 1)
        if tensor.is_meta:
            more["meta"] = True
        return self._strided(number, tensor, more)

    def _strided(self, number: int, tensor: Any, more: dict[str, Any]) -> list[Any]:
        dtype = tensor.dtype
        if dtype not in self._names:
            name, itemsize = str(dtype).removeprefix("torch."), tensor.element_size()
            self._names[dtype] = name, itemsize, _kind_of(name, itemsize)
        name, itemsize, kind = self._names[dtype]
        shape, stride, count = list(tensor.shape), list(tensor.stride()), tensor.numel()
        if count == 0 or tensor.is_meta:
            return [name, shape, stride, None, 0, more]
        reach = 1 + last_element(shape, stride)
        kept = None if stride == contiguous_stride(shape) else stride
        storage = tensor.untyped_storage()
        base = storage.data_ptr()
        start, end = base, base + storage.nbytes()
        if name not in BITS:
            start = base + tensor.storage_offset() * itemsize
            end = start + reach * itemsize
        if base == 0 or end > base + storage.nbytes():
            raise self._refuse("a tensor whose data is not in memory")
        self._leaves.append(_Leaf(number, str(storage.device), start, end, kind, storage, base))
        return [name, shape, kept, None, start, more]

    def _sparse(self, tensor: Any, more: dict[str, Any], depth: int) -> list[Any]:
        layout = str(tensor.layout).removeprefix("torch.")
        if layout == "sparse_coo":
            parts = [tensor._indices(), tensor._values()]
            more["coalesced"] = tensor.is_coalesced()
        elif layout in {"sparse_csr", "sparse_bsr"}:
            parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
        elif layout in {"sparse_csc", "sparse_bsc"}:
            parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
        else:
            raise self._refuse(f"a tensor of the layout {layout}; give its to_dense()")
        numbers = [self._tensor(part.detach(), depth + 1) for part in parts]
        return ["sparse", layout, list(tensor.shape), numbers, 0, more]

    def _subclass(self, tensor: Any, more: dict[str, Any], depth: int) -> list[Any]:
        kind = type(tensor)
        name = f"{kind.__module__}:{kind.__qualname__}"
        if not hasattr(kind, "__tensor_flatten__"):
            raise self._refuse(f"a tensor of the class {name}, which has no __tensor_flatten__")
        if not subclasses.is_allowed(kind):
            raise self._refuse(f"a tensor of the class {name}; allow_subclass() would allow it")
        names, context = tensor.__tensor_flatten__()
        inner = {each: self._tensor(getattr(tensor, each), depth + 1) for each in names}
        self._path.append(f"context of {name}")
        kept = self.node(context, depth + 1)
        self._path.pop()
        shape, stride = list(tensor.shape), list(tensor.stride())
        if not all(type(size) is int for size in shape + stride):
            raise self._refuse(f"a tensor of the class {name} with a symbolic shape")
        return ["subclass", name, shape, stride, [inner, kept], more]

    def place(self) -> list[Block]:
        """Join the tensors' stretches of memory to blocks and fill in where each tensor lies."""
        self._leaves.sort(key=lambda leaf: (leaf.device, leaf.start, -leaf.end))
        groups: list[list[_Leaf]] = []
        end, last = 0, None
        for leaf in self._leaves:
            together = last is not None and leaf.device == last.device
            # Neighbours in one storage stay together, as those of a flattened parameter do.
            touches = leaf.start == end and last is not None and leaf.base == last.base
            if together and (leaf.start < end or touches):
                groups[-1].append(leaf)
                end = max(end, leaf.end)
            else:
                groups.append([leaf])
                end = leaf.end
            last = leaf
        found = [self._block(group) for group in groups]
        order = sorted(range(len(found)), key=lambda at: (found[at][0].kind, groups[at][0].record))
        blocks: list[Block] = []
        for number, at in enumerate(order):
            block, start = found[at]
            for leaf in groups[at]:
                record = self.records[leaf.record]
                record[3], record[4] = number, leaf.start - start
            blocks.append(block)
        return blocks

    def _block(self, group: list[_Leaf]) -> tuple[Block, int]:
        widest = max(group, key=lambda leaf: leaf.end - leaf.start)
        end = max(leaf.end for leaf in group)
        first = group[0]
        # Offsets from the block's beginning must stay whole elements.
        start = first.base + (first.start - first.base) // 16 * 16
        size = end - start
        for leaf in group:
            if leaf.base <= start and end <= leaf.base + leaf.storage.nbytes():
                return Block(widest.kind, leaf.storage, start - leaf.base, size), start
        raise StateRefusedError(
            "cannot archive the state: two of its storages overlap in memory, and neither "
            "contains the other"
        )


def _kind_of(dtype: str, itemsize: int) -> str:
    """Return how bytes of tensors of ``dtype`` are coded, see ``codec.KINDS``."""
    kind = _ROTATED.get(dtype) or _HALVED.get(dtype) or str(itemsize)
    return kind if kind in {"1", "2", "4", "8", "r2", "r4"} else "1"

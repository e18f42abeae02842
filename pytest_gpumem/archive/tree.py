"""What a state is made of: nested containers and plain values, and tensors over blocks of memory.

``take_apart`` turns a state into text-like nodes, records of its tensors, and the blocks of memory
behind them; ``Builder`` goes back. Nothing that is read names code to run. The nodes and records
are described in ``docs/archive-format.md``.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import struct
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpumem.archive import torch_private
from pytest_gpumem.errors import DamagedError, StateRefusedError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence

    import torch

_DEEPEST = 100
"""Containers inside one another; more is refused, so that recursion stays within Python's own."""
_DOUBLE = struct.Struct("<d")
_UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)
"""What reading nodes and records that are none comes to; checks of torch and classes included."""
_CONTAINERS = {dict, list, tuple, OrderedDict}
_BITS = {"quint4x2": 4, "quint2x4": 2}
"""Bits of an element where that is no whole byte; such tensors have a storage of their own."""
_BY_OTHERS = {"sparse", "subclass"}
"""Kinds of records whose building runs checks of torch or code of a class."""
_SURE = {"requires_grad", "parameter", "meta", "conj", "neg", "attributes"}
"""What a record may say more, of which nothing can fail."""
_SUBCLASS_HOMES = {"torch", "torchao"}
_allowed: set[type] = set()

_ROTATED = {"bfloat16": "r2", "float32": "r4", "complex64": "r4"}
_HALVED = {"complex32": "2", "complex128": "8"}


def allow_subclass(kind: type) -> None:
    """Let archives hold this tensor subclass, which has ``__tensor_flatten__`` and its inverse.

    Those of torch and torchao are allowed already. The process that restores must allow it too.
    """
    _allowed.add(kind)


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


@contextlib.contextmanager
def checked() -> Generator[None, None, None]:
    """Take whatever nodes and records that are none lead to for what it is.

    Raises:
        DamagedError: in place of errors of Python and torch, memory running out excepted.

    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _UNREADABLE as error:
        raise DamagedError(f"a value cannot be read: {error}") from None


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
            return ["f", _DOUBLE.pack(value).hex()]
        if isinstance(value, self._torch.Tensor):
            return ["T", self._tensor(value, depth)]
        if kind in _CONTAINERS:
            return self._container(value, kind, depth)
        if kind is bytes:
            return ["b", base64.b64encode(value).decode()]
        if kind is complex:
            return ["c", _DOUBLE.pack(value.real).hex(), _DOUBLE.pack(value.imag).hex()]
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
        if depth >= _DEEPEST:
            del self._path[8:]
            raise self._refuse(f"more than {_DEEPEST} containers or tensors inside one another")

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
        except _UNREADABLE as error:
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
            self._names[dtype] = name, itemsize, kind_of(name, itemsize)
        name, itemsize, kind = self._names[dtype]
        shape, stride, count = list(tensor.shape), list(tensor.stride()), tensor.numel()
        if count == 0 or tensor.is_meta:
            return [name, shape, stride, None, 0, more]
        reach = 1 + _reach(shape, stride)
        kept = None if stride == contiguous_stride(shape) else stride
        storage = tensor.untyped_storage()
        base = storage.data_ptr()
        start, end = base, base + storage.nbytes()
        if name not in _BITS:
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
        if kind not in _allowed and kind.__module__.partition(".")[0] not in _SUBCLASS_HOMES:
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


def kind_of(dtype: str, itemsize: int) -> str:
    """Return how bytes of tensors of ``dtype`` are coded, see ``codec.KINDS``."""
    kind = _ROTATED.get(dtype) or _HALVED.get(dtype) or str(itemsize)
    return kind if kind in {"1", "2", "4", "8", "r2", "r4"} else "1"


def _reach(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Return how many elements the last one lies behind the first."""
    return sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def contiguous_stride(shape: Sequence[int]) -> list[int]:
    """Return the strides of a contiguous tensor."""
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return stride[::-1]


def at_path(tree: Any, path: Sequence[Hashable]) -> Any:
    """Return the node that the keys and indexes of ``path`` lead to.

    Raises:
        KeyError: with the first key that is not there.

    """
    for key in path:
        tag = tree[0] if isinstance(tree, list) and tree else None
        if tag in {"d", "o"}:
            members = tree[1:] if tag == "d" else tree[2:]
            found = [
                member
                for node, member in zip(members[::2], members[1::2], strict=True)
                if plain(node) == key
            ]
            if not found:
                raise KeyError(key)
            tree = found[0]
        elif tag in {"l", "t"} and type(key) is int and 0 <= key < len(tree) - 1:
            tree = tree[1 + key]
        else:
            raise KeyError(key)
    return tree


def leaves(node: Any) -> Iterator[Any]:
    """Yield the nodes of tensors, in the order of ``listing``."""
    tag = node[0] if isinstance(node, list) and node else None
    if tag == "T":
        yield node
    elif tag in {"l", "t"}:
        for member in node[1:]:
            yield from leaves(member)
    elif tag in {"d", "o"}:
        for member in node[2 if tag == "d" else 3 :: 2]:
            yield from leaves(member)


def listing(node: Any, records: list[Any], path: str = "") -> Iterator[tuple[Any, ...]]:
    """Yield the path, dtype (or kind) and shape of each tensor of ``node``."""
    tag = node[0] if isinstance(node, list) and node else None
    if tag == "T":
        kind, second, third = records[node[1]][:3]
        whole = isinstance(second, list)
        yield path, kind if whole else second, tuple(second if whole else third)
    elif tag in {"l", "t"}:
        for at, member in enumerate(node[1:]):
            yield from listing(member, records, f"{path}[{at}]")
    elif tag in {"d", "o"}:
        members = node[1:] if tag == "d" else node[2:]
        for key, member in zip(members[::2], members[1::2], strict=True):
            yield from listing(member, records, f"{path}[{plain(key)!r}]")


def plain(node: Any) -> Any:
    """Return the value of a node without tensors.

    Raises:
        DamagedError: when there is none.

    """
    return Builder([], [], {}).build(node)


def reach(node: Any, records: list[Any]) -> set[int]:
    """Return the numbers of the records that ``node`` needs, directly or by other records.

    Raises:
        DamagedError: they are not there.

    """
    found: set[int] = set()
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            waiting += each.values()
        elif isinstance(each, list) and len(each) == 2 and each[0] == "T":
            number = each[1]
            if type(number) is not int or not 0 <= number < len(records):
                raise DamagedError("it refers to a tensor that it does not have")
            if number not in found:
                found.add(number)
                waiting += _needs(records[number])
        elif isinstance(each, list):
            waiting += each
    return found


def _needs(record: Any) -> Iterator[Any]:
    """Yield the nodes that a record refers to."""
    if type(record) is not list or len(record) != 6 or type(record[5]) is not dict:
        raise DamagedError("a tensor's record is not one")
    kind, _, _, numbers, inner, more = record
    if kind == "sparse" and type(numbers) is list:
        yield from (["T", number] for number in numbers)
    if kind == "subclass" and type(inner) is list and type(inner[0]) is dict:
        yield from (["T", number] for number in inner[0].values())
        yield inner[1:]
    if "grad" in more:
        yield ["T", more["grad"]]
    yield [more.get("attributes"), more.get("quantizer")]


def blocks_of(numbers: Iterable[int], records: list[Any], sizes: Sequence[int]) -> list[int]:
    """Return the blocks in which these tensors lie.

    Raises:
        DamagedError: they are not there.

    """
    found = set()
    for number in numbers:
        kind, _, _, block, *_ = records[number]
        if block is not None and kind not in {"sparse", "subclass"}:
            if type(block) is not int or not 0 <= block < len(sizes):
                raise DamagedError("a tensor lies in a block that is not there")
            found.add(block)
    return sorted(found)


class Builder:
    """Builds values from nodes and records.

    ``sizes`` are the blocks' lengths in bytes; ``places`` are their storages, filled, and where in
    those they begin. Both records and nodes may be forged by whoever has the key: all that is read
    is checked, so that no tensor reaches outside its block.
    """

    def __init__(
        self,
        records: list[Any],
        sizes: Sequence[int],
        places: Mapping[int, tuple[Any, int]],
        device: str = "cpu",
    ) -> None:
        self._records = records
        self._sizes = sizes
        self._places = places
        self._device = device
        self._built: dict[int, Any] = {}
        self._building: set[int] = set()
        self._unfinished: list[tuple[torch.Tensor, dict[str, Any]]] = []
        """Tensors whose gradients and attributes, which may lead back to them, are missing."""

    def build(self, node: Any) -> Any:
        """Return the value of ``node``.

        Raises:
            DamagedError: that is not a state.

        """
        with checked():
            found = self._value(node)
            while self._unfinished:
                made, more = self._unfinished.pop()
                if "grad" in more:
                    made.grad = self.tensor(more["grad"])
                if "attributes" in more:
                    vars(made).update(self._attributes(more["attributes"]))
            return found

    def _value(self, node: Any, depth: int = 0) -> Any:
        if node is None or type(node) in {bool, int, str}:
            return node
        return self._tagged(node, depth)

    def _tagged(self, node: Any, depth: int) -> Any:
        if depth > _DEEPEST or type(node) is not list:
            raise ValueError("not a node")
        tag, *rest = node
        if tag == "T":
            return self.tensor(*rest)
        if tag == "f":
            return _DOUBLE.unpack(bytes.fromhex(*rest))[0]
        if tag in {"l", "t"}:
            members = [self._value(each, depth + 1) for each in rest]
            return members if tag == "l" else tuple(members)
        if tag == "d":
            return self._items({}, rest, depth)
        if tag == "o":
            found = self._items(OrderedDict(), rest[1:], depth)
            vars(found).update(self._attributes(rest[0], depth))
            return found
        if tag == "b":
            return base64.b64decode(rest[0], validate=True)
        if tag == "c":
            real, imaginary = (_DOUBLE.unpack(bytes.fromhex(each))[0] for each in rest)
            return complex(real, imaginary)
        if tag == "i":
            return int(rest[0], 16)
        import torch

        if tag == "size":
            return torch.Size(_whole_numbers(rest))
        if tag == "dtype":
            return _dtype(*rest)
        if tag == "device":
            return torch.device(*rest)
        raise ValueError(f"of the unknown kind {tag!r}")

    def _items(self, into: Any, rest: list[Any], depth: int) -> Any:
        for key, member in zip(rest[::2], rest[1::2], strict=True):
            into[self._value(key, depth + 1)] = self._value(member, depth + 1)
        return into

    def _attributes(self, node: Any, depth: int = 0) -> dict[str, Any]:
        found = self._value(node, depth + 1) if node is not None else {}
        if type(found) is not dict or not all(type(name) is str for name in found):
            raise ValueError("attributes without names")
        return found

    def tensor(self, number: int) -> torch.Tensor:
        """Return the tensor of a record."""
        if number in self._built:
            return self._built[number]  # type: ignore[no-any-return]
        if type(number) is not int or number < 0 or number in self._building:
            raise ValueError("a tensor inside itself")
        self._building.add(number)
        built = self._built[number] = self._tensor(self._records[number])
        self._building.discard(number)
        return built

    def _tensor(self, record: list[Any]) -> torch.Tensor:
        import torch

        kind, second, third, fourth, fifth, more = record
        made: Any
        if kind == "subclass":
            inner, context = fifth
            home = _subclass(second)
            parts = {name: self.tensor(number) for name, number in inner.items()}
            size, stride = torch.Size(_whole_numbers(third)), tuple(_whole_numbers(fourth))
            made = home.__tensor_unflatten__(parts, self._value(context), size, stride)
        elif kind == "sparse":
            parts_of = [self.tensor(number) for number in fourth]
            made = _sparse(second, _whole_numbers(third), parts_of, more)
        else:
            made = self._strided(record)
        if more.get("conj"):
            made = made.conj()
        if more.get("neg"):
            made = torch_private.negative_view(made)
        if more.get("parameter"):
            made = torch.nn.Parameter(made, requires_grad=False)
        if more.get("requires_grad"):
            made.requires_grad_()
        if "grad" in more or "attributes" in more:
            self._unfinished.append((made, more))
        return made  # type: ignore[no-any-return]

    def _strided(self, record: list[Any]) -> Any:
        import torch

        name, shape, stride, block, offset, more = record
        dtype = _dtype(name)
        shape = _whole_numbers(shape)
        stride = contiguous_stride(shape) if stride is None else _whole_numbers(stride)
        if block is None:
            meta = bool(more.get("meta"))
            if not meta and 0 not in shape:
                raise ValueError("a tensor without a block")
            device = "meta" if meta else self._device
            if "quantizer" not in more:
                return torch.empty_strided(shape, stride, dtype=dtype, device=device)
            storage = torch.empty(0, dtype=torch.uint8, device=device).untyped_storage()
            offset = 0
        else:
            itemsize = dtype.itemsize
            count = 1 + _reach(shape, stride)
            if name in _BITS:
                end = (count * _BITS[name] + 7) // 8
            else:
                end = _whole_number(offset) + count * itemsize
            if offset % itemsize or end > self._sizes[_whole_number(block)] or 0 in shape:
                raise ValueError("a tensor outside its block")
            storage, start = self._places[block]
            offset = (start + offset) // itemsize
        if "quantizer" in more:
            scheme = self._value(more["quantizer"])
            return torch_private.quantized(storage, dtype, (offset, shape, stride), scheme)
        return torch.empty(0, dtype=dtype, device=storage.device).set_(
            storage, offset, shape, stride
        )


def _whole_number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError("not a number of elements")
    return value


def _whole_numbers(values: Any) -> list[int]:
    if type(values) is not list:
        raise ValueError("not a list of numbers")
    return [_whole_number(value) for value in values]


def _dtype(name: str) -> torch.dtype:
    import torch

    found = getattr(torch, name, None) if type(name) is str else None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype of torch {torch.__version__}")
    return found


def _subclass(name: str) -> Any:
    """Return the class of that name if it may be used; imports only from torch and torchao."""
    import torch

    for kind in _allowed:
        if f"{kind.__module__}:{kind.__qualname__}" == name:
            return kind
    module, _, qualified = name.partition(":")
    if module.partition(".")[0] not in _SUBCLASS_HOMES:
        raise ValueError(f"the class {name} is not allowed; allow_subclass() would allow it")
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"the class {name} cannot be imported: {error}") from None
    for part in qualified.split("."):
        found = getattr(found, part)
    if not (isinstance(found, type) and issubclass(found, torch.Tensor)):
        raise ValueError(f"{name} is no tensor class")
    return found


def _sparse(
    layout: str, shape: list[int], parts: list[torch.Tensor], more: dict[str, Any]
) -> torch.Tensor:
    import torch

    if layout == "sparse_coo":
        indices, values = parts
        return torch.sparse_coo_tensor(
            indices,
            values,
            shape,
            check_invariants=True,
            is_coalesced=bool(more.get("coalesced")),
        )
    makers: dict[str, Callable[..., torch.Tensor]] = {
        "sparse_csr": torch.sparse_csr_tensor,
        "sparse_bsr": torch.sparse_bsr_tensor,
        "sparse_csc": torch.sparse_csc_tensor,
        "sparse_bsc": torch.sparse_bsc_tensor,
    }
    return makers[layout](*parts, size=shape, check_invariants=True)

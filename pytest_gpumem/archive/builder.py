"""Builds states from nodes, records and filled memory. Nothing that is read names code to run."""

from __future__ import annotations

import base64
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from pytest_gpumem.archive import subclasses, torch_private
from pytest_gpumem.archive.nodes import (
    BITS,
    DEEPEST,
    DOUBLE,
    checked,
    contiguous_stride,
    last_element,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch


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
        if depth > DEEPEST or type(node) is not list:
            raise ValueError("not a node")
        tag, *rest = node
        if tag == "T":
            return self.tensor(*rest)
        if tag == "f":
            return DOUBLE.unpack(bytes.fromhex(*rest))[0]
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
            real, imaginary = (DOUBLE.unpack(bytes.fromhex(each))[0] for each in rest)
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
            home = subclasses.named(second)
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
            count = 1 + last_element(shape, stride)
            if name in BITS:
                end = (count * BITS[name] + 7) // 8
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

"""Restoring into tensors that exist: which of them takes what, and whether directly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpumem.archive import tree
from pytest_gpumem.errors import MismatchError, StateRefusedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_gpumem.archive.tree import Block


class Pair(NamedTuple):
    """A tensor of an archive, by the number of its record, and the one that takes its content."""

    record: int
    tensor: Any
    where: str


def pairs(records: list[Any], node: Any, target: Any) -> list[Pair]:
    """Return the tensors of ``node`` with those of ``target`` in the same places.

    Raises:
        MismatchError: ``target`` is not built like ``node``.

    """
    found = list(_pairs(node, target, "target"))
    for pair in found:
        kind, second, third = records[pair.record][:3]
        shape = second if isinstance(second, list) else third
        dtype = str(pair.tensor.dtype).removeprefix("torch.")
        if list(pair.tensor.shape) != shape or (kind not in {"sparse", "subclass", dtype}):
            raise MismatchError(
                f"{pair.where} is {dtype} of {list(pair.tensor.shape)}, the archive has "
                f"{kind} of {shape} there"
            )
        if isinstance(second, list):
            stride = tree.contiguous_stride(shape) if third is None else third
            steps = zip(shape, pair.tensor.stride(), stride, strict=True)
            if any(size > 1 and mine == 0 != theirs for size, mine, theirs in steps):
                raise MismatchError(f"{pair.where} has one element for several of the archive's")
    return found


def _pairs(node: Any, target: Any, where: str) -> Iterator[Pair]:
    import torch

    tag = node[0] if isinstance(node, list) else None
    if tag == "T":
        if not isinstance(target, torch.Tensor):
            raise MismatchError(f"{where} is no tensor, the archive has one there")
        yield Pair(node[1], target, where)
    elif tag in {"d", "o", "l", "t"}:
        members = _members(node)
        kind = dict if tag in {"d", "o"} else list if tag == "l" else tuple
        if not isinstance(target, kind) or len(target) != len(members):
            raise MismatchError(
                f"{where} is not a {kind.__name__} of {len(members)}, the archive has one there"
            )
        for key, member in members:
            if kind is dict and key not in target:
                raise MismatchError(f"{where} has no {key!r}, the archive has one")
            yield from _pairs(member, target[key], f"{where}[{key!r}]")


def _members(node: list[Any]) -> list[tuple[Any, Any]]:
    if node[0] in {"l", "t"}:
        return list(enumerate(node[1:]))
    items = node[1:] if node[0] == "d" else node[2:]
    return [(tree.plain(key), value) for key, value in zip(items[::2], items[1::2], strict=True)]


def direct(records: list[Any], sizes: Sequence[int], found: list[Pair]) -> dict[int, Block] | None:
    """Return the memory of the target that takes each block of the archive.

    None where the target's tensors lie otherwise in memory than the archive's, so that they have
    to be copied one by one.

    Raises:
        MismatchError: two tensors of the target share memory, and the archive's do not.

    """
    try:
        parts = tree.take_apart([pair.tensor.detach() for pair in found])
    except StateRefusedError as error:
        raise MismatchError(f"the target's tensors cannot be filled: {error}") from None
    theirs = [parts.records[node[1]] for node in parts.tree[1:]]
    _refuse_false_ties(records, found, theirs)
    blocks: dict[int, Block] = {}
    dense: set[int] = set()
    for pair, record in zip(found, theirs, strict=True):
        wanted = records[pair.record]
        if wanted[0] in {"sparse", "subclass"} or record[0] in {"sparse", "subclass"}:
            return None
        if wanted[3] is None:
            continue
        block = parts.blocks[record[3]] if record[3] is not None else None
        flags = [
            {name: more.get(name) for name in ("conj", "neg", "quantizer")}
            for more in (wanted[5], record[5])
        ]
        if (
            block is None
            or wanted[2] != record[2]
            or wanted[4] != record[4]
            or flags[0] != flags[1]
            or block.size != sizes[wanted[3]]
            or blocks.setdefault(wanted[3], block) is not block
        ):
            return None
        if pair.tensor.numel() * pair.tensor.element_size() == block.size:
            dense.add(wanted[3])
    # A block with gaps between its tensors has bytes of others in them.
    return blocks if dense == set(blocks) else None


def _refuse_false_ties(records: list[Any], found: list[Pair], theirs: list[Any]) -> None:
    """Two tensors over the same memory can take only what overlaps in the archive as well."""
    last: dict[int, tuple[int, Any, Pair]] = {}
    placed = [
        (record[3], record[4], pair)
        for pair, record in zip(found, theirs, strict=True)
        if isinstance(record[3], int) and isinstance(records[pair.record][1], list)
    ]
    for block, offset, pair in sorted(placed, key=lambda each: each[:2]):
        wanted = records[pair.record]
        size = pair.tensor.numel() * pair.tensor.element_size()
        end, origin, other = last.get(block, (0, None, pair))
        here = (wanted[3], wanted[4] - offset)
        if offset < end and here != origin and wanted[3] is not None:
            raise MismatchError(
                f"{pair.where} shares memory with {other.where}, the archive's tensors do not"
            )
        if offset + size > end:
            last[block] = (offset + size, here, pair)


def copy(source: Any, target: Any) -> None:
    """Give ``target`` the content of ``source``: bit by bit, where both are plain memory.

    torch copies some dtypes not at all.
    """
    import torch

    one, other = source.detach(), target.detach()
    plain = {torch.Tensor, torch.nn.Parameter}
    if (
        type(source) not in plain
        or type(target) not in plain
        or one.layout is not torch.strided
        or one.is_quantized
        or (one.is_conj(), one.is_neg()) != (other.is_conj(), other.is_neg())
    ):
        with torch.no_grad():
            target.copy_(source)
    elif one.numel() and not one.is_meta:
        _bytes(other, other).copy_(_bytes(one, other))
        torch.autograd.graph.increment_version(target)


def _bytes(tensor: Any, like: Any) -> Any:
    """Return the bytes of each element, once for those that share a place in ``like``."""
    import torch

    size = tensor.element_size()
    shape = [1 if step == 0 else n for n, step in zip(like.shape, like.stride(), strict=True)]
    stride = [step * size for step in tensor.stride()]
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(
        tensor.untyped_storage(), tensor.storage_offset() * size, (*shape, size), (*stride, 1)
    )

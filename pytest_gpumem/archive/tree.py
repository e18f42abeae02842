"""Ways through the nodes and records of a state, without building it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_gpumem.archive.builder import Builder
from pytest_gpumem.errors import DamagedError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Sequence


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

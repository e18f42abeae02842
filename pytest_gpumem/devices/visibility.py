"""Which cards ``CUDA_VISIBLE_DEVICES`` leaves visible, as pure functions over its text.

The rules are CUDA's as ``torch/cuda/__init__.py`` spells them (``_parse_visible_devices``,
``_transform_uuid_to_ordinals``): indexes are read as ``strtoul`` reads them, UUIDs may be cut
short, the first entry that names no card ends the list, a card named twice empties it. The
rules for MIG are those of NVIDIA's MIG user guide ("Device enumeration"): a process sees one
compute instance only, and beside it no other card.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pytest_gpumem.tuples import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

_LEADING_INTEGER = re.compile(r"[+-]?[0-9]+")


class Slice(NamedTuple):
    """A MIG device: its UUID, and the name ``MIG-GPU-<uuid>/<gi>/<ci>`` of drivers before 470."""

    uuid: str
    path: str = ""


class Board(NamedTuple):
    """A physical GPU as NVML lists it; ``slices`` is None while MIG is off."""

    uuid: str
    model: str
    slices: tuple[Slice, ...] | None = None


def visible_uuids(text: str | None, boards: Sequence[Board]) -> tuple[str, ...]:
    """Return the UUIDs of the cards that ``text`` leaves visible, in CUDA's order.

    ``text`` is the value of ``CUDA_VISIBLE_DEVICES``, None when it is unset. ``boards`` are in
    the order of CUDA's indexes; ``order_is_known`` tells when PCI order is that order.
    """
    allowed = choices(text, boards)
    slices = {each.uuid for each in _slices(boards)}
    # A process sees one slice, and no whole card beside it.
    return tuple(uuid for uuid in allowed if uuid in slices)[:1] or allowed


def choices(text: str | None, boards: Sequence[Board]) -> tuple[str, ...]:
    """Return the UUIDs of the cards of which ``text`` allows any one to be the first.

    Those that it leaves visible, and where MIG is on each slice that it names or leaves: a
    process sees one of them only, but processes beside one another may each see another one.
    """
    if text is not None and text.startswith("MIG-"):
        slices = _slices(boards)
        named = _positions(_entries(text), [(each.uuid, each.path) for each in slices])
        return tuple(slices[position].uuid for position in named)
    if text is not None:
        named = _positions(_entries(text), [(board.uuid,) for board in boards])
        boards = [boards[position] for position in named]
    found: list[str] = []
    for board in boards:
        found += [board.uuid] if board.slices is None else [each.uuid for each in board.slices]
    return tuple(found)


def order_is_known(order: str | None, boards: Sequence[Board]) -> bool:
    """Whether CUDA's indexes follow PCI order, as NVML's do.

    ``order`` is the value of ``CUDA_DEVICE_ORDER``. CUDA's default, ``FASTEST_FIRST``, is only
    known to be PCI order where all boards are alike.
    """
    return order == "PCI_BUS_ID" or len({board.model for board in boards}) <= 1


def names_by_uuid(text: str | None) -> bool:
    """Whether ``CUDA_VISIBLE_DEVICES`` is a list of UUIDs, which no order of indexes changes."""
    return text is not None and text.startswith(("GPU-", "MIG-"))


def _slices(boards: Sequence[Board]) -> list[Slice]:
    return [each for board in boards for each in board.slices or ()]


def _entries(text: str) -> list[str | int]:
    """Return the entries of ``text`` up to the first that is of another form than the first."""
    prefix = text[:4] if names_by_uuid(text) else ""
    entries: list[str | int] = []
    for part in text.split(","):
        entry = part if prefix else _leading_integer(part.strip())
        if entry in entries:
            return []
        if isinstance(entry, int) and entry < 0:
            break
        if isinstance(entry, str) and not entry.startswith(prefix):
            break
        entries.append(entry)
    return entries


def _leading_integer(text: str) -> int:
    """Return the integer that ``text`` starts with (``0x1`` is 0, ``1abc`` is 1), else -1."""
    match = _LEADING_INTEGER.match(text)
    return int(match[0]) if match else -1


def _positions(entries: Sequence[str | int], names: Sequence[tuple[str, ...]]) -> list[int]:
    """Return what the entries name, as positions in ``names``."""
    positions: list[int] = []
    for entry in entries:
        position = entry if isinstance(entry, int) else _position(entry, names)
        if not 0 <= position < len(names):
            break
        if position in positions:
            return []
        positions.append(position)
    return positions


def _position(start: str, names: Sequence[tuple[str, ...]]) -> int:
    """Return the one position whose name is or starts with ``start``, -1 for none or several."""
    for fits in (lambda name: name == start, lambda name: name.startswith(start)):
        found = [at for at, known in enumerate(names) if any(map(fits, known))]
        if found:
            return found[0] if len(found) == 1 else -1
    return -1

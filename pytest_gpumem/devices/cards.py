"""The cards this process may use, and what the driver says of each."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from pytest_gpumem.devices import nvml, torch_private, torch_state
from pytest_gpumem.devices.notebook import note_failure
from pytest_gpumem.devices.nvml import DriverReading, NoDriverError
from pytest_gpumem.devices.visibility import (
    Board,
    choices,
    names_by_uuid,
    order_is_known,
    visible_uuids,
)
from pytest_gpumem.records import Card
from pytest_gpumem.tuples import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

_ORDER_ASSUMED = (
    "the cards differ in model and CUDA_DEVICE_ORDER is not PCI_BUS_ID, so which card CUDA "
    "numbers first is assumed to follow PCI order until torch has initialised CUDA"
)


class CardsFound(NamedTuple):
    """The visible cards in CUDA's order."""

    cards: tuple[Card, ...]
    why_none: str = ""
    """One sentence, when there are no cards."""
    note: str = ""
    """One sentence about what was assumed, when something was."""


def find_cards() -> CardsFound:
    """Return the cards this process may use; no context is created, torch is not imported.

    Before torch has initialised CUDA they are NVML's, as ``CUDA_VISIBLE_DEVICES`` and
    ``CUDA_DEVICE_ORDER`` leave them; afterwards torch's own list is the truth, because CUDA
    read these variables only once. Cards of other backends are known once torch uses them.
    """
    found = _from_driver()
    cuda = torch_state.cuda()
    in_use = _from_torch(cuda, found.cards) if cuda is not None else ()
    if in_use:
        found = CardsFound(in_use)
    others = _from_accelerator(torch_state.accelerator())
    cards = found.cards + others
    return CardsFound(cards, "" if cards else found.why_none, found.note)


def cards_to_choose(visible: str | None) -> tuple[Card, ...]:
    """Return NVML's cards of which a process may have any one as its first.

    ``visible`` is its ``CUDA_VISIBLE_DEVICES``; None where that is unset.
    """
    try:
        return tuple(map(_card, choices(visible, nvml.boards())))
    except NoDriverError:
        return ()


def driver_reading(card: Card) -> DriverReading | None:
    """Return what the driver says of ``card`` as a whole, None where it does not tell.

    Where NVML is silent (unified memory, other makes) torch is asked, once it has initialised
    that card; it does not tell what the driver keeps for itself.
    """
    try:
        reading = nvml.memory(card.uuid) if card.kind == "cuda" else None
    except NoDriverError:
        reading = None
    return reading or _reading_from_torch(card)


def _from_driver() -> CardsFound:
    """Return NVML's cards as CUDA will see them."""
    try:
        boards = nvml.boards()
    except NoDriverError as error:
        return CardsFound((), str(error))
    if not boards:
        return CardsFound((), "the NVIDIA driver answers, but there is no card")
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = visible_uuids(text, boards)
    if not visible:
        return CardsFound((), _why_hidden(text, boards))
    known = names_by_uuid(text) or order_is_known(os.environ.get("CUDA_DEVICE_ORDER"), boards)
    return CardsFound(tuple(map(_card, visible)), note="" if known else _ORDER_ASSUMED)


def _why_hidden(text: str | None, boards: Sequence[Board]) -> str:
    if text is None:
        return "MIG is on, but no MIG device has been made on any card"
    return (
        f"CUDA_VISIBLE_DEVICES={text!r} leaves no card visible; allowed are the indexes 0 to "
        f"{len(boards) - 1} or UUIDs such as {boards[0].uuid}, each card once"
    )


def _card(uuid: str) -> Card:
    """Return the card NVML knows as ``uuid``."""
    reading = nvml.memory(uuid)
    # Without a figure of its own the GPU shares the host's memory (GB10, Jetson).
    # What the driver keeps for itself (0.6 GiB of an H200) is nobody's; torch does not count it.
    total = reading.total - reading.reserved if reading else _host_memory()
    return Card(uuid, nvml.name(uuid), total)


def _host_memory() -> int:
    if not hasattr(os, "sysconf"):
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _from_torch(cuda: Any, visible: Sequence[Card]) -> tuple[Card, ...]:
    """Return the cards of an initialised ``torch.cuda`` by its indexes."""
    try:
        count = cuda.device_count()
        return tuple(
            _torch_card(index, cuda.get_device_properties(index), visible) for index in range(count)
        )
    except Exception as error:
        note_failure("asking torch.cuda for its cards", error)
        return ()


def _torch_card(index: int, properties: Any, visible: Sequence[Card]) -> Card:
    """Return the visible card that torch's ``properties`` describe, one of torch's if none is."""
    told = _bare(str(getattr(properties, "uuid", "")))
    for card in visible:
        if _bare(card.uuid) == told:
            return card
    # CUDA may tell a MIG slice by its GPU's UUID, and some builds of torch tell none.
    if index < len(visible) and (not told or visible[index].uuid.startswith("MIG-")):
        return visible[index]
    return Card(f"GPU-{told or index}", properties.name, properties.total_memory)


def _bare(uuid: str) -> str:
    """Return ``uuid`` without NVML's prefix, which torch leaves off."""
    return uuid.lower().removeprefix("gpu-").removeprefix("mig-")


def _from_accelerator(accelerator: Any | None) -> tuple[Card, ...]:
    """Return the cards of a backend other than CUDA that is in use."""
    if accelerator is None:
        return ()
    kind = torch_state.kind(accelerator)
    try:
        return tuple(_backend_card(kind, index) for index in range(accelerator.device_count()))
    except Exception as error:
        note_failure(f"asking torch.{kind} for its cards", error)
        return ()


def _backend_card(kind: str, index: int) -> Card:
    backend = torch_state.backend(kind)
    if not hasattr(backend, "get_device_properties"):  # MPS: one GPU, sharing the host's memory
        return Card(f"{kind.upper()}-{index}", kind, backend.recommended_max_memory(), kind)
    properties = backend.get_device_properties(index)
    uuid = getattr(properties, "uuid", index)
    uuid = uuid.hex() if isinstance(uuid, bytes) else uuid
    return Card(f"{kind.upper()}-{uuid}", properties.name, properties.total_memory, kind)


def _reading_from_torch(card: Card) -> DriverReading | None:
    """Return torch's reading of the whole card, None before it has initialised it."""
    cuda, accelerator = torch_state.cuda(), torch_state.accelerator()
    if cuda is None and accelerator is None:
        return None
    same_kind = [each.uuid for each in find_cards().cards if each.kind == card.kind]
    if card.uuid not in same_kind:
        return None
    index = same_kind.index(card.uuid)
    try:
        if accelerator is not None and card.kind != "cuda":
            free, total = accelerator.get_memory_info(index)
        # Asking for the memory of a card without a context would create one.
        elif cuda is not None and torch_private.has_context(index):
            free, total = cuda.mem_get_info(index)
        else:
            return None
    except Exception as error:
        note_failure(f"asking torch for the memory of {card.name}", error)
        return None
    return DriverReading(total - free, free, total, 0)

"""What programs use: ``gpu_lease``, and this process's store."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpumem.errors import RequestRefusedError
from pytest_gpumem.leases import notices
from pytest_gpumem.leases.outside import CudaDriver
from pytest_gpumem.leases.request import Want
from pytest_gpumem.leases.store import Lease, LeaseStore
from pytest_gpumem.units import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.records import Card

_stores: list[LeaseStore] = []


@contextmanager
def gpu_lease(
    vram: str | int = "1GiB",
    device: int = 0,
    exclusive: bool = False,
    timeout: float | None = None,
) -> Iterator[Lease]:
    """Wait until ``vram`` of a card may be used, and keep others from it meanwhile.

    ``device`` is CUDA's index of the card. ``exclusive`` keeps everybody else's leases off the
    card. At the end the allocator's unused cache goes back to the driver, so that the next in
    turn finds the bytes. ``timeout`` is in seconds; without one it waits for programs that have
    no lease for 10 seconds at most, and then starts with what there is.

    Raises:
        RequestRefusedError: when ``vram`` is no size, ``timeout`` no time, or there is no such
            card.
        TooLarge: when the card does not have as much.
        LeaseTimeout: when ``timeout`` has passed; says who held the card.
        LeaseError: when leases cannot be kept on this machine, or this thread would wait while it
            holds a lease.

    """
    from pytest_gpumem import devices

    size = _bytes(vram)
    want, card, leases = Want(size, exclusive), _card(device), store()
    for tell in notices.observers:
        tell(card.uuid, card.total if exclusive else size)
    with notices.Waiting(f"gpu_lease of {_label()}", leases.ancestors) as waiting:
        lease = leases.acquire(
            {card.uuid: want}, {card.uuid: card.total}, _label(), timeout, waiting.note
        )
    with lease:
        try:
            yield lease
        finally:
            for allocator in devices.allocators():
                allocator.release_cached()


def _card(device: int) -> Card:
    """Return the card with CUDA's index ``device``."""
    from pytest_gpumem import devices

    found = devices.find_cards()
    if not found.cards:
        # A simulated card answers as soon as pynvml is there, and only then; another thread may
        # just be importing it.
        with suppress(ImportError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("pynvml")
        found = devices.find_cards()
    if not found.cards:
        raise RequestRefusedError(f"there is no card to lease: {found.why_none}")
    if device not in range(len(found.cards)):
        most = len(found.cards) - 1
        raise RequestRefusedError(f"there is no device {device!r}; allowed is 0 to {most}")
    return found.cards[device]


def _bytes(vram: str | int) -> int:
    try:
        return parse_bytes(vram)
    except ValueError as error:
        raise RequestRefusedError(str(error)) from None


def _label() -> str:
    """Return what others see of this process: its test, or else its program."""
    return os.environ.get("PYTEST_CURRENT_TEST") or Path(sys.argv[0]).name or "python"


def store() -> LeaseStore:
    """Return this process's store, which ``gpu_lease`` uses too.

    Raises:
        LeaseError: when GPUMEM_RUN_DIR is not absolute.

    """
    if not _stores:
        _stores.append(LeaseStore(driver=CudaDriver()))
    return _stores[0]  # the same for all, also if two threads came first

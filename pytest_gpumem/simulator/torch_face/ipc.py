"""Storages of a card in other processes, as ``torch.multiprocessing`` sends them.

As with CUDA the receiver gets the sender's memory and is charged nothing for it. What travels is an
open file, in the place of the file in which CUDA's processes count who has received a storage.
"""

from __future__ import annotations

import os
from multiprocessing import reduction
from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.simulator.torch_face.stubs import Device, device_error

if TYPE_CHECKING:
    from pytest_gpumem.simulator.torch_face.memory import CardMemory

__tracebackhide__ = True  # pytest shows the test's line last, none of these

_Sent = tuple[int, bytes | None, int, int, Any, int, bytes, bool]


def send_storages(memory: CardMemory) -> None:
    """Let torch's Python share storages on a card, which it cannot in a build without CUDA."""
    storages: Any = torch.UntypedStorage

    def share(storage: Any, *_others: Any) -> _Sent:
        card = storage.device
        if card.type != "cuda":
            raise RuntimeError(f"_share_cuda_: only available on CUDA, not on {card.type}")
        if not storage.nbytes():
            return card.index, None, 0, 0, None, 0, b"", False
        file, size = memory.share(storage)
        known = os.fstat(file)  # by this a receiver knows what it has already
        handle = f"{known.st_dev} {known.st_ino}".encode()
        return card.index, handle, size, 0, reduction.DupFd(file), 0, b"", False

    def receive(
        cls: Any, card: int, _handle: bytes, size: int, _offset: int, sent: Any, *_others: Any
    ) -> Any:
        device = memory.device(Device("cuda", card))
        memory.card(card).enter()
        file = _opened(sent)
        try:
            made = cls._new_shared_fd_cpu(file, size)
            # By its Python object the account goes, which torch 2.4 keeps for a tensor's alone.
            kept = torch.empty(0, dtype=torch.uint8).set_(made).untyped_storage()
            return memory.receive(kept, device)
        finally:
            os.close(file)

    storages._share_cuda_ = share
    storages._new_shared_cuda = classmethod(receive)
    storages._release_ipc_counter_cuda = classmethod(lambda _cls, sent, *_: os.close(_opened(sent)))


def _opened(sent: Any) -> int:
    """Return a number of this process's own for a file that was sent; once for each that was.

    Raises:
        RuntimeError: as CUDA, where the sender has ended.

    """
    try:
        number: int = sent.detach()
    except (OSError, EOFError):
        raise device_error("invalid resource handle", 400) from None
    return number

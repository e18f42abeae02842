"""Storages of a card in other processes, as ``torch.multiprocessing`` sends them.

As with CUDA the receiver gets the sender's memory and is charged nothing for it, and the sender
must keep it alive until then: what travels is the number of an open file.
"""

from __future__ import annotations

import os
from ast import literal_eval
from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.simulator.torch_face.stubs import Device, device_error

if TYPE_CHECKING:
    from pytest_gpumem.simulator.torch_face.memory import CardMemory

__tracebackhide__ = True  # pytest shows the test's line last, none of these

_Sent = tuple[int, bytes | None, int, int, bytes, int, bytes, bool]
_UNUSED = b"", 0, b"", False
"""What counts the receivers of a storage, and the event that they wait for."""


def send_storages(memory: CardMemory) -> None:
    """Let torch's Python share storages on a card, which it cannot in a build without CUDA."""
    storages: Any = torch.UntypedStorage

    def share(storage: Any, *_others: Any) -> _Sent:
        card = storage.device
        if card.type != "cuda":
            raise RuntimeError(f"_share_cuda_: only available on CUDA, not on {card.type}")
        if not storage.nbytes():
            return card.index, None, 0, 0, *_UNUSED
        file, size = memory.share(storage)
        handle = os.getpid(), file, os.fstat(file).st_ino  # numbers of files are used again
        return card.index, repr(handle).encode(), size, 0, *_UNUSED

    def receive(cls: Any, card: int, handle: bytes, size: int, *_others: Any) -> Any:
        device = memory.device(Device("cuda", card))
        memory.card(card).enter()
        file = _opened(*literal_eval(handle.decode()))
        try:
            return memory.receive(cls._new_shared_fd_cpu(file, size), device)
        finally:
            os.close(file)

    storages._share_cuda_ = share
    storages._new_shared_cuda = classmethod(receive)
    storages._release_ipc_counter_cuda = classmethod(lambda _cls, *_counter: None)


def _opened(sender: int, number: int, inode: int) -> int:
    """Return a number of this process's own for a file that the sender has open.

    Raises:
        RuntimeError: as CUDA, where the sender has let it go or has ended.

    """
    try:
        file = os.open(f"/proc/{sender}/fd/{number}", os.O_RDWR)
    except OSError:
        file = -1
    if file >= 0 and os.fstat(file).st_ino == inode:
        return file
    if file >= 0:
        os.close(file)
    raise device_error("invalid resource handle", 400)

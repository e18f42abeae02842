"""Tensors that torch's own C++ takes for a card's.

``card.cpp`` is compiled for the torch at hand (``compilation``), tried in a process of its own
(``proof``) and then loaded: a tensor of the card is a dense tensor on ``cuda:0`` in every thread
and below Python too, and a tensor of the host costs nothing more than without a card. Here is what
the library asks of Python, which keeps the account.
"""

from __future__ import annotations

import atexit
import ctypes
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.simulator.torch_face import memory
from pytest_gpumem.simulator.torch_face.refusal import OutOfMemoryError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from pytest_gpumem.simulator.blocks import Block
    from pytest_gpumem.simulator.card import SharedCard

__tracebackhide__ = True  # pytest shows the test's line last, none of these

_torch: Any = torch


class _Current(memory.Current):
    """The current card of this thread, which C++ keeps."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._get: Callable[[], int] = library.gpumem_current
        self._set: Callable[[int], None] = library.gpumem_choose

    @property
    def index(self) -> int:
        return self._get()

    @index.setter
    def index(self, index: int) -> None:
        self._set(index)


class CompiledMemory(memory.CardMemory):
    """The account of storages that C++ makes and drops."""

    def __init__(
        self, machine: Sequence[SharedCard], note: Callable[[str], None], path: Path
    ) -> None:
        super().__init__(machine, note)
        _torch.ops.load_library(str(path))
        self._library = ctypes.PyDLL(str(path))
        self._current = _Current(self._library)
        self._told: dict[int, int] = {}

    def install(self) -> None:
        """Put the cards into this process's torch."""
        install = self._library.gpumem_install
        install.argtypes = [ctypes.c_int, *[ctypes.py_object] * 3]
        install(len(self.machine), self._take, self._release, OutOfMemoryError)
        atexit.register(self._close)
        _place_storages()

    def _close(self) -> None:
        """Stop asking Python, which is about to end.

        ``backward()`` returns before autograd's thread of the card has let go of what it worked on,
        of Python's objects too: at the end of the interpreter it would abort the process. A thread
        that has taken up a later backward has done with those before it.
        """
        self._library.gpumem_close()
        if not _torch.cuda.is_initialized():
            return
        for card in self.cards:
            with suppress(RuntimeError):  # a full card; a child by fork, which has no such threads
                leaf = _torch.empty(0, device=card.device, requires_grad=True)
                # Without the context that Tensor.backward() gives the thread to keep.
                _torch.autograd.Variable._execution_engine.run_backward(
                    (leaf.clone(),), (leaf.detach(),), False, False, (), False, accumulate_grad=True
                )

    def _generator(self, index: int) -> Any:
        return _torch.ops.gpumem_card.default_generator(index)

    def _take(self, index: int, size: int, address: int) -> Block | None:
        block = self.take(size, self.card(index).device)
        if block is not None:
            self._told[block.address] = address
            if self.history.recording:
                self.history.placed(block, address)
        return block

    def _release(self, index: int, block: Block | None) -> None:
        # It is asked again where a signal's handler raised in it.
        if block is not None and self._told.pop(block.address, None) is not None:
            self._free(block, self.cards[index])

    def _addresses(self) -> dict[int, int]:
        return self._told


def _place_storages() -> None:
    """Make and resize storages on a card, which the Python of a build without CUDA refuses."""
    storage_class: Any = torch.UntypedStorage
    base: Any = torch._C.StorageBase

    def new(cls: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        if device is None or torch.device(device).type != "cuda":
            place = {} if device is None else {"device": device}
            return base.__new__(cls, *args, **place, **kwargs)
        size = args[0] if args and isinstance(args[0], int) else 0
        return torch.empty(size, dtype=torch.uint8, device=device).untyped_storage()

    def resize(storage: Any, size: int) -> Any:
        if not storage.is_cuda:
            return base.resize_(storage, size)
        _torch.ops.gpumem_card.resize_storage(storage, size)
        return storage

    storage_class.__new__ = new
    storage_class.resize_ = resize

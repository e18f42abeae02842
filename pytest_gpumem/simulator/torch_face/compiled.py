"""Tensors that torch's own C++ takes for a card's.

``card/card.cpp`` is compiled for the torch at hand (``compilation``), tried in a process of its own
(``proof``) and then loaded: a tensor of the card is a dense tensor on ``cuda:0`` in every thread
and below Python too, and a tensor of the host costs nothing more than without a card. Here is what
the library asks of Python, which keeps the account.
"""

from __future__ import annotations

import atexit
import ctypes
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.simulator.torch_face import memory
from pytest_gpumem.simulator.torch_face.legacy import CardType, replace_types
from pytest_gpumem.simulator.torch_face.refusal import TORCH_VERSION, OutOfMemoryError
from pytest_gpumem.simulator.torch_face.stubs import generators

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from pytest_gpumem.simulator.blocks import Block
    from pytest_gpumem.simulator.card import SharedCard

__tracebackhide__ = True  # pytest shows the test's line last, none of these

_torch: Any = torch


class _Current(memory.Current):
    """The current card and streams of this thread, which C++ keeps."""

    def __init__(self, library: Any) -> None:
        library.gpumem_stream.restype = ctypes.c_longlong
        library.gpumem_choose_stream.argtypes = [ctypes.c_int, ctypes.c_longlong]
        self._library = library

    @property
    def index(self) -> int:
        index: int = self._library.gpumem_current()
        return index

    @index.setter
    def index(self, index: int) -> None:
        self._library.gpumem_choose(index)

    def stream(self, index: int) -> int:
        number: int = self._library.gpumem_stream(index)
        return number

    def choose_stream(self, index: int, number: int) -> None:
        self._library.gpumem_choose_stream(index, number)


class Answers:
    """What C++ asks, by names that ``card/account.h`` knows; ``index`` is a card's number."""

    out_of_memory = OutOfMemoryError

    def __init__(self, memory: CompiledMemory) -> None:
        self._memory = memory
        self.blocks: dict[int, tuple[int, Block]] = {}
        """Card and block of each storage, by where its bytes are."""
        self._pinned: dict[int, int] = {}

    def take(self, index: int, size: int, address: int, stream: int) -> Block | None:
        """Return the block of a new storage."""
        memory = self._memory
        block = memory.take(size, memory.card(index).device, stream)
        if block is not None:
            self.blocks[address] = index, block
        return block

    def release(self, index: int, block: Block | None, address: int) -> None:
        """Free the block of a storage that is gone."""
        # It is asked again where a signal's handler raised in it.
        if block is not None and self.blocks.pop(address, None) is not None:
            self._memory.give_back(block, self._memory.cards[index].device)

    def foresee(self, index: int, size: int) -> None:
        """Raise what taking ``size`` bytes would, where it is clear that there is no room."""
        memory = self._memory
        memory.check()
        card = memory.card(index)
        card.enter()
        if size > card.room():
            memory.give_back(memory.take(size, card.device), card.device)

    def use(self, address: int, stream: int) -> None:
        """Say that a stream uses a storage, so that its block is not free as soon as it is."""
        if address in self.blocks:
            index, block = self.blocks[address]
            self._memory.cards[index].allocator.use(block, stream)

    def multiply(self, index: int) -> None:
        """Take cuBLAS's workspace for this thread, if it has none."""
        self._memory.multiply(self._memory.card(index).device, threading.get_ident())

    def lose(self) -> None:
        """Lose the context."""
        self._memory.lose()

    def judge(self, said: str) -> bool:
        """Lose the context if the host's kernel said that an index lies outside; tell whether."""
        outside = memory.lies_outside(said)
        if outside:
            self._memory.lose()
        return outside

    def pin(self, address: int, size: int) -> None:
        """Count memory of the host as page-locked."""
        self._pinned[address] = self._memory.pinned.take(size)

    def unpin(self, address: int) -> None:
        """Count it no longer."""
        self._memory.pinned.give_back(self._pinned.pop(address, 0))

    def pinned(self, address: int) -> bool:
        """Tell whether it is."""
        return address in self._pinned or self._memory.pinned.locked(address)


class CompiledMemory(memory.CardMemory):
    """The account of storages that C++ makes and drops."""

    def __init__(
        self, machine: Sequence[SharedCard], note: Callable[[str], None], path: Path
    ) -> None:
        super().__init__(machine, note)
        _torch.ops.load_library(str(path))
        self._library = ctypes.PyDLL(str(path))
        self._current = _Current(self._library)
        self._answers = Answers(self)

    def install(self) -> None:
        """Put the cards into this process's torch."""
        install = self._library.gpumem_install
        install.argtypes = [ctypes.c_int, ctypes.py_object, ctypes.c_char_p]
        products = " ".join(memory.PRODUCTS) if self.machine[0].workspace else ""
        install(len(self.machine), self._answers, products.encode())
        atexit.register(self._close)
        _place_storages()
        _construct_older_types()
        # A build for CUDA would compile what it fuses in TorchScript for a driver.
        torch._C._jit_override_can_fuse_on_gpu(False)
        if TORCH_VERSION < (2, 7):  # whose constructor asks for a driver, or knows no CUDA at all
            _torch.Generator = generators(_torch.ops.gpumem_card.generator)

    def begin(self, visible: Sequence[int]) -> None:
        """Initialise CUDA with these cards of the machine, in this order."""
        super().begin(visible)
        self._library.gpumem_begin()

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

    def use_on(self, tensor: torch.Tensor, stream: int) -> None:
        """Say that a stream uses ``tensor``, so that its block is not free as soon as it is."""
        if tensor.is_cuda:
            self._answers.use(memory.host_address(tensor.untyped_storage()), stream)

    def share(self, storage: torch.UntypedStorage) -> tuple[int, int]:
        """Return the file that has the bytes of ``storage`` from now on, and their number."""
        host = _torch.ops.gpumem_card.host_bytes(storage).untyped_storage()
        if not host.is_shared():
            before = memory.host_address(storage)
            host = torch.UntypedStorage._new_using_fd_cpu(storage.nbytes())
            _torch.ops.gpumem_card.move_bytes(storage, host)
            blocks = self._answers.blocks
            blocks[memory.host_address(storage)] = blocks.pop(before)
        shared: tuple[int, int] = host._share_fd_cpu_()
        return shared

    def receive(self, host: torch.UntypedStorage, device: torch.device) -> torch.UntypedStorage:
        """Return another process's storage, which is charged there, as one on ``device``."""
        received: torch.UntypedStorage = _torch.ops.gpumem_card.received(
            host, device.index
        ).untyped_storage()
        return received

    def address(self, storage: torch.UntypedStorage, place: int) -> int:
        """Return the card's address for ``place``, where the host has something of ``storage``."""
        blocks, start = self._answers.blocks, memory.host_address(storage)
        if start not in blocks and storage.is_cuda:
            # Where DLPack has handed over a part, another storage begins within the first one.
            for first, (_card, block) in list(blocks.items()):
                if first <= start < first + block.requested:
                    return block.address + place - first
        return blocks[start][1].address + place - start if start in blocks else place


def _place_storages() -> None:
    """Make and resize storages on a card, which the Python of a build without CUDA refuses."""
    storage_class: Any = torch.UntypedStorage
    base: Any = torch._C.StorageBase

    def new(cls: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        if device is None or torch.device(device).type != "cuda":
            place = {} if device is None else {"device": device}
            return base.__new__(cls, *args, **place, **kwargs)
        if not args or isinstance(args[0], int):
            made = torch.empty(*(args or (0,)), dtype=torch.uint8, device=device)
        else:
            made = torch.tensor(args[0], dtype=torch.uint8, device=device)
        return made.untyped_storage()

    def resize(storage: Any, size: int) -> Any:
        if not storage.is_cuda:
            return base.resize_(storage, size)
        _torch.ops.gpumem_card.resize_storage(storage, size)
        return storage

    storage_class.__new__ = new
    storage_class.resize_ = resize


def _construct_older_types() -> None:
    """Let ``torch.cuda.FloatTensor`` and its like make tensors, as a build with CUDA does."""
    replace_types()
    convert = torch.Tensor.type

    def type_or_converted(tensor: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        name = str(dtype) if isinstance(dtype, CardType) else dtype
        return convert(tensor, name, *args, **kwargs)

    _torch.Tensor.type = type_or_converted

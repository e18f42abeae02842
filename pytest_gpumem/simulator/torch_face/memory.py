"""Which storages live on which card, what each costs, and what is said when memory runs out."""

from __future__ import annotations

import functools
import os
import re
import sys
import threading
import weakref
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.simulator.allocator import CachingAllocator
from pytest_gpumem.simulator.pinned import PinnedMemory
from pytest_gpumem.simulator.policy import Policy, read_settings
from pytest_gpumem.simulator.segments import OutOfMemory
from pytest_gpumem.simulator.torch_face.history import History
from pytest_gpumem.simulator.torch_face.inner import made_of
from pytest_gpumem.simulator.torch_face.refusal import (
    OutOfMemoryError,
    beyond_any_card,
    out_of_memory_text,
)
from pytest_gpumem.simulator.torch_face.stubs import CardGenerator, Device, device_error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pytest_gpumem.simulator.blocks import Block
    from pytest_gpumem.simulator.card import SharedCard

__tracebackhide__ = True  # pytest shows the test's line last, none of these

_C: Any = torch._C
_cuda: Any = torch.cuda
PRODUCTS = (
    "mm",
    "addmm",
    "_addmm_activation",
    "bmm",
    "baddbmm",
    "addmv",
    "dot",
    "vdot",
    "_int_mm",
    "_scaled_mm",
)
"""The operations of aten that cuBLAS does, which works in memory of its own."""
INDICES = frozenset({"index", "indices", "target"})
"""What operations call arguments by which they choose, and which a kernel of CUDA asserts."""
_OUTSIDE = re.compile(
    r"(index|Target) -?\d+ is out of bounds|index out of range|tried to access index"
    r"|elements of (input|target) should be between 0 and 1"
)
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_storage_address: Callable[[torch.Tensor], int] = _C._storage_address
host_address: Callable[[Any], int] = _C.StorageBase.data_ptr
"""Where the host has the bytes of a storage."""


def lies_outside(said: str) -> bool:
    """Return whether the host's kernel raised what a kernel of CUDA asserts; say it, as there."""
    outside = _OUTSIDE.search(said) is not None
    if outside:
        print(f"simulated card: {said}", file=sys.stderr)  # noqa: T201  # as a kernel does
    return outside


class _Held(weakref.ref[Any]):
    """A storage on a card and its block; an empty storage has none."""

    __slots__ = ("address", "block", "card", "device", "size")

    address: int
    size: int
    block: Block | None
    card: TorchCard
    device: torch.device
    """The card's, which every operation asks for."""


class TorchCard:
    """A card as this process's torch knows it: ``cuda:index``."""

    def __init__(self, index: int, shared: SharedCard, generator: Any) -> None:
        self.index = index
        self.device = torch.device("cuda", index)
        self.shared = shared
        self.allocator = CachingAllocator(shared.reserve, shared.release, shared.total, index)
        self.generator = generator
        self.workspaces: dict[tuple[int, int], Block | None] = {}
        """What cuBLAS took, by thread and stream."""
        self.entered = False
        """Whether this process has a context on it."""
        self.told = 0
        """The highest peak of which ``shared.grown`` was told."""

    def enter(self) -> None:
        """Take this process's context; once more is harmless.

        Raises:
            RuntimeError: as CUDA, when it does not fit.

        """
        if not self.entered:
            if not self.shared.join():
                raise device_error("out of memory", 2)
            self.entered = True

    def room(self) -> int:
        """Return the bytes that are not handed out, at most what the memory fraction allows."""
        allocator, allocated = self.allocator, self.allocator.allocated
        room = allocator.reserved - allocated + self.shared.free()
        return room if allocator.allowed is None else min(room, allocator.allowed - allocated)


class Current(threading.local):
    """Card and streams of this thread."""

    index = 0
    _streams: Mapping[int, int] = MappingProxyType({})
    """By card, where it is not the default one, 0."""

    def stream(self, index: int) -> int:
        """Return the number of the stream on a card."""
        return self._streams.get(index, 0)

    def choose_stream(self, index: int, number: int) -> None:
        """Make a stream the current one on its card."""
        self._streams = {**self._streams, index: number}


class CardMemory:
    """The cards as this process's torch uses them: one block per storage, freed with it."""

    def __init__(self, machine: Sequence[SharedCard], note: Callable[[str], None]) -> None:
        self.machine = machine
        """The cards of the machine."""
        self.note = note
        """Takes a sentence about what is asked for and not obeyed."""
        self.cards: list[TorchCard] = []
        """Those that this process sees, by torch's numbers; known once CUDA is initialised."""
        self.history = History()
        self.oom_observers: list[Callable[[int, int, int, int], object]] = []
        self.ready = False
        """Whether this very process has initialised CUDA."""
        self.forked = False
        """Whether the parent had: CUDA does not survive a fork."""
        self.pinned = PinnedMemory()
        self.lost = ""
        """Of what error this process lost its context, in CUDA's words."""
        self._current = Current()
        self._policy = Policy()
        self._held: dict[int, _Held] = {}
        os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        self.forked = self.forked or self.ready
        self.ready = False

    def begin(self, visible: Sequence[int]) -> None:
        """Initialise CUDA with these cards of the machine, in this order."""
        self.cards = [
            TorchCard(index, self.machine[place], self._generator(index))
            for index, place in enumerate(visible)
        ]
        for card in self.cards:
            card.allocator.policy = self._policy
            card.allocator.note_segments(functools.partial(self.history.segment, card.index))
        self.ready = True

    def _generator(self, index: int) -> Any:
        """Return the default generator of a card."""
        return CardGenerator(index)

    def obey(self, settings: str, given_by: str) -> None:
        """Let every card's allocator follow torch's settings, and note which change nothing here.

        Raises:
            ValueError: in torch's words, for a value that it refuses.

        """
        try:
            self._policy, ignored = read_settings(settings, self._policy)
        except ValueError as error:
            raise ValueError(f"{given_by}={settings!r}: {error}") from None
        for card in self.cards:
            card.allocator.policy = self._policy
        if ignored:
            self.note(f"the simulated card does not obey {', '.join(ignored)} of {given_by}")

    def stream(self, index: int) -> int:
        """Return the number of this thread's stream on a card; 0 is the default one."""
        return self._current.stream(index)

    def choose_stream(self, index: int, number: int) -> None:
        """Make a stream this thread's current one on its card."""
        self._current.choose_stream(index, number)
        self.choose(index)

    def lose(self) -> None:
        """Lose the context, as by a kernel whose assertion failed: the next call sees it."""
        self.lost = "device-side assert triggered"

    def check(self) -> None:
        """Raise as CUDA, for each call after the one of which the context was lost."""
        if self.lost:
            raise device_error(self.lost, 710)  # cudaErrorAssert

    @property
    def current(self) -> int:
        """The number of this thread's current card."""
        return self._current.index

    def choose(self, index: int, *, enter: bool = True) -> None:
        """Make a card this thread's current one, as CUDA with a context on it.

        Raises:
            RuntimeError: as CUDA, for a card that is not there.

        """
        card = self.card(index)
        if enter and index != self._current.index:
            card.enter()
        self._current.index = index

    def card(self, index: int | None) -> TorchCard:
        """Return the card with this number, the current one for None; initialises CUDA.

        Raises:
            RuntimeError: as CUDA, for a card that is not there.

        """
        if not self.ready:
            _cuda._lazy_init()
        try:
            return self.cards[self._current.index if index is None else index]
        except IndexError:
            raise device_error("invalid device ordinal", 101) from None

    def device(self, value: Any) -> torch.device:
        """Return the device that an argument names, a card's always with its number.

        Raises:
            RuntimeError: as CUDA, for a card that is not there.

        """
        if isinstance(value, int):
            value = Device("cuda", value)
        device: torch.device = value if type(value) is Device else Device(value)
        return self.card(device.index).device if device.type == "cuda" else device

    def where(self, tensor: torch.Tensor) -> torch.device | None:
        """Return the card on which ``tensor`` lives, None for the host."""
        try:
            held = self._held.get(_storage_address(tensor))
        except NotImplementedError:
            inner = made_of(tensor)
        else:
            if held is not None:
                return held.device
            inner = [] if type(tensor) in _PLAIN else made_of(tensor)
        return self.where(inner[-1]) if inner else None

    def where_storage(self, storage: torch.UntypedStorage) -> torch.device | None:
        """Return the card on which ``storage`` lives, None for the host."""
        held = self._held.get(storage._cdata)
        return None if held is None else held.device

    def storages(self) -> list[torch.UntypedStorage]:
        """Return all that live on a card."""
        return [storage for held in list(self._held.values()) if (storage := held()) is not None]

    def use_on(self, tensor: torch.Tensor, stream: int) -> None:
        """Say that a stream uses ``tensor``, so that its block is not free as soon as it is."""
        held = self._held.get(_storage_address(tensor))
        if held is not None and held.block is not None:
            held.card.allocator.use(held.block, stream)

    def charge(self, tensor: torch.Tensor, device: torch.device) -> None:
        """Take a block of ``device`` for the storage of ``tensor``, unless it has one.

        Raises:
            torch.OutOfMemoryError: when it does not fit.
            NotImplementedError: for tensors without storages, such as those of MKL-DNN.

        """
        try:
            known = _storage_address(tensor) in self._held
        except NotImplementedError:
            inner = made_of(tensor)
            if not inner:
                what = f"a {tensor.layout} tensor on the simulated card is not simulated"
                if tensor.is_mkldnn:
                    what = "CUDA has no tensors of MKL-DNN"
                raise NotImplementedError(what) from None
            for each in inner:
                self.charge(each, device)
            return
        if not known:
            storage = tensor.untyped_storage()
            if type(tensor) is not torch.Tensor and storage.device.type == "meta":
                return  # it stands for a tensor that has data
            self.put(storage, self.take(storage.nbytes(), device), device)

    def recharge(self, tensor: torch.Tensor) -> None:
        """Take a new block where an operation changed the size of a storage on a card."""
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:
            for each in made_of(tensor):
                self.recharge(each)
        else:
            self.resize(storage, storage.nbytes())

    def resize(self, storage: torch.UntypedStorage, size: int) -> None:
        """Take a new block of ``size`` bytes, then free the old one, as CUDA's resize does."""
        held = self._held.get(storage._cdata)
        if held is not None and held.size != size:
            old, held.block = held.block, self.take(size, held.card.device)
            held.size = size
            self._free(old, held.card)

    def put(self, storage: torch.UntypedStorage, block: Block | None, device: torch.device) -> None:
        """Say that ``storage`` lives on ``device``, in ``block``."""
        held = _Held(storage, self._died)
        held.address = storage._cdata
        held.size = storage.nbytes()
        held.block = block
        held.card = self.cards[device.index]
        held.device = held.card.device
        self._held[held.address] = held

    def share(self, storage: torch.UntypedStorage) -> tuple[int, int]:
        """Return the file that has the bytes of ``storage`` from now on, and their number."""
        shared: tuple[int, int] = storage._share_fd_cpu_()
        return shared

    def receive(self, host: torch.UntypedStorage, device: torch.device) -> torch.UntypedStorage:
        """Return another process's storage, which is charged there, as one on ``device``."""
        self.put(host, None, device)
        return host

    def address(self, storage: torch.UntypedStorage, place: int) -> int:
        """Return the card's address for ``place``, where the host has something of ``storage``."""
        held = self._held.get(storage._cdata)
        block = None if held is None else held.block
        return place if block is None else block.address + place - host_address(storage)

    def snapshot(self) -> dict[str, Any]:
        """Return the allocators' state in the form of ``torch.cuda.memory._snapshot``."""
        segments = [each for card in self.cards for each in card.allocator.snapshot()]
        return self.history.describe(segments, len(self.cards))

    def take(self, size: int, device: torch.device, stream: int | None = None) -> Block | None:
        """Return a block of ``device`` for ``size`` bytes, None for nothing.

        It is of this thread's current stream unless one is named.

        Raises:
            torch.OutOfMemoryError: when it does not fit.
            RuntimeError: what torch raises when CUDA cannot be initialised.

        """
        self.check()
        if not self.ready:
            _cuda._lazy_init()
        card = self.cards[device.index]
        if not card.entered:
            card.enter()
        if size == 0:
            return None
        if (error := beyond_any_card(size)) is not None:
            raise error
        try:
            block = card.allocator.malloc(
                size, self.stream(card.index) if stream is None else stream
            )
        except OutOfMemory as refused:
            # With its traceback it would be a cycle, which keeps the frames of all callers.
            refusal = refused.with_traceback(None)
        else:
            self.history.allocated(block, card.index)
            if card.shared.grown is not None and card.allocator.peak > card.told:
                card.told = card.allocator.peak
                card.shared.grown()
            return block
        # Outside the handler, so that the error has no context the real one would not have.
        raise self._out_of_memory(refusal, card)

    def multiply(self, device: torch.device, thread: int) -> None:
        """Take cuBLAS's workspace for a thread and its stream, as their first product does.

        ``aten/src/ATen/cuda/CublasHandlePool.cpp``: it comes from the allocator and is kept until
        ``torch._C._cuda_clearCublasWorkspaces``.

        Raises:
            torch.OutOfMemoryError: when it does not fit.

        """
        card = self.cards[device.index]
        key = thread, self.stream(card.index)
        if card.shared.workspace and key not in card.workspaces:
            card.workspaces[key] = self.take(card.shared.workspace, device)

    def clear_workspaces(self) -> None:
        """Give back what cuBLAS took."""
        for card in self.cards:
            while card.workspaces:
                self._free(card.workspaces.popitem()[1], card)

    def give_back(self, block: Block | None, device: torch.device) -> None:
        """Free a block that no storage got."""
        self._free(block, self.cards[device.index])

    def _died(self, held: Any) -> None:
        del self._held[held.address]
        self._free(held.block, held.card)

    def _free(self, block: Block | None, card: TorchCard) -> None:
        if block is not None and not self.forked:
            self.history.freed(block, card.index)
            card.allocator.free(block)

    def _out_of_memory(self, refusal: OutOfMemory, card: TorchCard) -> RuntimeError:
        free = card.shared.free()
        self.history.refused(refusal.requested, free, card.index)
        for observer in self.oom_observers:
            observer(card.index, refusal.requested, card.shared.total, free)
        text = out_of_memory_text(refusal, card.shared, card.index, free)
        error: RuntimeError = OutOfMemoryError(text)
        return error

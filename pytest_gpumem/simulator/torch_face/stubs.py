"""CUDA objects without a driver: generators, streams, events, properties."""

from __future__ import annotations

import itertools
import weakref
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.cuda._utils import _get_device_index

from pytest_gpumem.clock import clock
from pytest_gpumem.simulator import spec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_gpumem.simulator.card import SharedCard
    from pytest_gpumem.simulator.pinned import PinnedMemory

__tracebackhide__ = True  # pytest shows the test's line last, none of these

Device: Any = torch.device
"""torch's own class; ``torch.device`` is ``NumberedDevice`` where numbers are not understood."""
CUDA_DEVICE_TYPE = 1
"""``c10::DeviceType::CUDA``."""


def device_error(what: str, code: int) -> RuntimeError:
    """Return the error torch raises for a failed call of the CUDA runtime.

    The class is ``torch.AcceleratorError`` (since torch 2.8), before that ``RuntimeError``.
    """
    kind: Any = getattr(torch, "AcceleratorError", RuntimeError)
    error: RuntimeError = kind(
        f"CUDA error: {what}\n"
        "CUDA kernel errors might be asynchronously reported at some other API call, so the"
        " stacktrace below might be incorrect.\n"
        "For debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
        "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
    )
    error.error_code = code  # type: ignore[attr-defined]  # torch's C++ sets it
    return error


_HostGenerator: Any = torch._C.Generator
_Kind: Any = type(_HostGenerator)


class _AnyGenerator(_Kind):  # type: ignore[misc]  # ``type`` itself before torch 2.10
    """Lets every generator of torch be an instance of ``Generator``."""

    def __instancecheck__(cls, instance: object) -> bool:  # noqa: N805  # a class of classes
        return isinstance(instance, _HostGenerator)


def generators(on_card: Callable[[int], Any]) -> Any:
    """Return ``torch.Generator`` that asks ``on_card`` for those of a card, by its number."""

    class Generator(_HostGenerator, metaclass=_AnyGenerator):  # type: ignore[misc]  # a C class
        def __new__(cls, device: Any = "cpu") -> Any:
            device = torch.device(device)
            if device.type == "cuda":
                return on_card(_get_device_index(device, optional=True))
            return _HostGenerator(device)

    Generator.__module__, Generator.__qualname__ = "torch", "Generator"  # where pickle finds it
    return Generator


class CardGenerator(_HostGenerator):  # type: ignore[misc]  # a C class
    """A generator of the host's kind that says it is on a card."""

    # Below torch's interface the same generator arrives in another Python object.
    _living: ClassVar = weakref.WeakValueDictionary[int, "CardGenerator"]()

    def __new__(cls, index: int) -> Any:
        """Return a new one for ``cuda:index``, seeded as torch seeds."""
        generator = super().__new__(cls, "cpu")
        generator.index = index
        generator.offset = 0
        cls._living[generator._cdata] = generator
        return generator

    @property
    def device(self) -> torch.device:
        """Its card."""
        device: torch.device = Device("cuda", self.index)
        return device

    def get_offset(self) -> int:
        """Return what ``set_offset`` set; the host's generator counts none."""
        offset: int = self.offset
        return offset

    def set_offset(self, offset: int) -> None:
        """Keep ``offset``: numbers are drawn as without it."""
        self.offset = offset

    def __reduce__(self) -> tuple[Any, ...]:
        return CardGenerator, (self.index,), (self.get_state(), self.offset)

    def __setstate__(self, state: tuple[torch.Tensor, int]) -> None:
        self.set_state(state[0])
        self.offset = state[1]

    @contextmanager
    def instead_of_the_hosts(self, chosen: Any = None) -> Iterator[None]:
        """Let the host's operations draw from this generator, unless one on the card is chosen.

        Raises:
            RuntimeError: what torch raises when a generator of the host is chosen.

        """
        if chosen is not None:
            if chosen._cdata not in self._living:
                raise RuntimeError(
                    f"Expected a 'cuda' device type for generator but found '{chosen.device.type}'"
                )
            yield
            return
        host = torch.default_generator
        state = host.get_state()
        host.set_state(self.get_state())
        try:
            yield
        finally:
            self.set_state(host.get_state())
            host.set_state(state)


class Stream:
    """``torch.cuda.Stream`` in a world with one order of execution."""

    _numbers = itertools.count(1)
    device_type = CUDA_DEVICE_TYPE

    def __init__(
        self,
        device: Any = None,
        priority: int = 0,
        stream_id: int | None = None,
        device_index: int | None = None,
        **_others: Any,
    ) -> None:
        if device_index is None:
            device_index = _get_device_index(device, optional=True)
        self.device_index = device_index
        self.device = Device("cuda", device_index)
        self.stream_id = next(self._numbers) if stream_id is None else stream_id
        self.priority = priority

    @property
    def cuda_stream(self) -> int:
        """The handle; 0 is the default stream, as with CUDA."""
        return self.stream_id

    def wait_event(self, event: Event) -> None:
        """Do nothing."""

    def wait_stream(self, stream: Stream) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""

    def query(self) -> bool:
        """Return True: everything is done."""
        return True

    def is_capturing(self) -> bool:
        """Return False: there are no CUDA graphs."""
        return False

    def record_event(self, event: Event | None = None) -> Event:
        """Record ``event`` or a new one, and return it."""
        event = event or Event()
        event.record(self)
        return event

    def __enter__(self) -> Stream:
        self._contexts = [*getattr(self, "_contexts", []), torch.cuda.stream(self)]  # type: ignore[arg-type]  # it is torch.cuda's now
        self._contexts[-1].__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._contexts.pop().__exit__(*error)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and hash(self) == hash(other)

    def __hash__(self) -> int:
        return hash((self.device, self.stream_id))

    def __repr__(self) -> str:
        return f"<torch.cuda.Stream device={self.device} cuda_stream={self.cuda_stream:#x}>"


class ExternalStream(Stream):
    """``torch.cuda.ExternalStream``: a stream that somebody else made, by its handle."""

    def __init__(self, stream_ptr: int, device: Any = None, **_others: Any) -> None:
        super().__init__(device, stream_id=stream_ptr)


class Event:
    """``torch.cuda.Event``; times are the host's."""

    _numbers = itertools.count(1)

    def __init__(
        self,
        place_or_timing: Any = False,
        _blocking: bool = False,
        interprocess: bool = False,
        *,
        enable_timing: bool = False,
        **_others: Any,
    ) -> None:
        # ``torch.cuda.Event`` begins with the one, ``torch.Event`` with the other.
        self._timed = enable_timing or place_or_timing is True
        self._interprocess = interprocess
        self._recorded: float | None = None
        self.device: torch.device | None = None
        self.event_id = 0
        """A number of its own once it was recorded."""

    @property
    def cuda_event(self) -> int:
        """The handle."""
        return self.event_id

    def __repr__(self) -> str:
        return (
            f"<torch.cuda.Event {self.event_id:#x}>"
            if self.event_id
            else ("<torch.cuda.Event uninitialized>")
        )

    def record(self, stream: Stream | None = None) -> None:
        """Keep the time."""
        self.event_id = self.event_id or next(self._numbers)
        self.device = (stream or torch.cuda.current_stream()).device
        self._recorded = clock.monotonic()

    def wait(self, stream: Stream | None = None) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""

    def query(self) -> bool:
        """Return True: everything is done."""
        return True

    def ipc_handle(self) -> bytes:
        """Return what another process has it by.

        Raises:
            RuntimeError: as CUDA, where it was not made for several processes.

        """
        if not self._interprocess:
            raise device_error("invalid resource handle", 400)
        self.device = self.device or Device("cuda", torch.cuda.current_device())
        return str(self.event_id).encode()

    @classmethod
    def from_ipc_handle(cls, device: torch.device, _handle: bytes) -> Event:
        """Return another process's event: whatever it marks is done."""
        event = cls(interprocess=True)
        event.device = torch.device(device)
        return event

    def elapsed_time(self, end_event: Event) -> float:
        """Return the milliseconds between the two records.

        Raises:
            ValueError: as torch, when one of the two takes no time or was not recorded.

        """
        if not (self._timed and end_event._timed):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self._recorded is None or end_event._recorded is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return (end_event._recorded - self._recorded) * 1e3


class Runtime:
    """What ``torch.cuda.cudart()`` returns."""

    class cudaError:  # noqa: N801  # CUDA's name
        """CUDA's codes; calling it names one."""

        success = 0

    def __init__(self, memory_of: Callable[[int], tuple[int, int]], pinned: PinnedMemory) -> None:
        self.cudaMemGetInfo = memory_of
        """Returns free and total bytes of a card."""
        self.cudaHostRegister = pinned.register
        self.cudaHostUnregister = pinned.unregister

    def __getattr__(self, name: str) -> Any:
        # Profiler marks, synchronisation: they succeed and do nothing.
        if name.startswith("cuda"):
            return lambda *_args: 0
        raise AttributeError(name)


class _CudaDeviceProperties(SimpleNamespace):
    """What torch tells of a card; each is equal to itself alone, as C++'s."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__  # type: ignore[assignment]  # a namespace has none

    def __repr__(self) -> str:
        return (
            f"_CudaDeviceProperties(name='{self.name}', major={self.major}, minor={self.minor},"
            f" total_memory={self.total_memory >> 20}MB,"
            f" multi_processor_count={self.multi_processor_count}, uuid={self.uuid},"
            f" pci_bus_id={self.pci_bus_id}, pci_device_id={self.pci_device_id},"
            f" pci_domain_id={self.pci_domain_id}, L2_cache_size={self.L2_cache_size >> 20}MB)"
        )


def properties(card: SharedCard, place: int) -> _CudaDeviceProperties:
    """Return what ``torch.cuda.get_device_properties`` tells of the machine's card ``place``."""
    return _CudaDeviceProperties(
        name=card.name,
        major=spec.CAPABILITY[0],
        minor=spec.CAPABILITY[1],
        total_memory=card.total,
        multi_processor_count=spec.PROCESSORS,
        uuid=card.uuid.removeprefix("GPU-"),
        is_integrated=0,
        is_multi_gpu_board=0,
        warp_size=spec.WARP,
        max_threads_per_block=spec.THREADS_PER_BLOCK,
        max_threads_per_multi_processor=spec.THREADS_PER_PROCESSOR,
        regs_per_multiprocessor=spec.REGISTERS_PER_PROCESSOR,
        shared_memory_per_block=spec.SHARED_PER_BLOCK,
        shared_memory_per_block_optin=spec.SHARED_PER_BLOCK_OPTIN,
        shared_memory_per_multiprocessor=spec.SHARED_PER_PROCESSOR,
        L2_cache_size=spec.L2_CACHE,
        clock_rate=spec.CLOCK_KHZ,
        memory_clock_rate=spec.MEMORY_CLOCK_KHZ,
        memory_bus_width=spec.MEMORY_BUS_BITS,
        pci_bus_id=spec.pci_bus(place),
        pci_device_id=0,
        pci_domain_id=0,
        gcnArchName=card.name,  # as torch has it where there is no ROCm
    )


class Marks:
    """Profiler ranges that nobody records."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *_args, **_kwargs: 0

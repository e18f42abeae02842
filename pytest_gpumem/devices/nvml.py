"""The driver's figures through NVML: cards, memory, processes; no CUDA context, no torch.

NVML counts driver memory in two ways. Version 2 of its memory call tells what the driver keeps
for itself (``reserved``) apart from ``used``; version 1, all that older drivers have, counts it
as used. Process ids are the host's: inside a container they may name other processes.
"""

from __future__ import annotations

import functools
import sys
import warnings
from typing import TYPE_CHECKING, Any, TypeVar

from pytest_gpumem.devices.notebook import note
from pytest_gpumem.devices.visibility import Board, Slice
from pytest_gpumem.tuples import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_LIBRARY = "libnvidia-ml.so.1"
_UNINITIALIZED = 1  # NVML_ERROR_UNINITIALIZED
_LIBRARY_NOT_FOUND = 12  # NVML_ERROR_LIBRARY_NOT_FOUND
_MIG_ENABLED = 1  # NVML_DEVICE_MIG_ENABLE
_NOT_TOLD = 2**63
"""From here on a figure is the driver's "not available": WSL, WDDM and MIG answer 2**64 - 1."""

# Drivers before 510 have no third version; the plain name is all that old bindings have.
_PROCESS_CALLS = (
    "nvmlDeviceGetComputeRunningProcesses_v3",
    "nvmlDeviceGetComputeRunningProcesses_v2",
    "nvmlDeviceGetComputeRunningProcesses",
)


class NoDriverError(Exception):
    """Why NVML tells nothing here, in one sentence."""


class _ShutDownError(Exception):
    """Somebody shut NVML down since it was started: handles are void."""


class DriverReading(NamedTuple):
    """What the driver says of a whole card, in bytes, every process counted."""

    used: int
    free: int
    total: int
    reserved: int
    """Kept by the driver itself; 0 where the driver counts it as ``used``."""


def boards() -> tuple[Board, ...]:
    """Return the machine's GPUs in PCI order.

    Raises:
        NoDriverError: in one sentence, when there is no working driver.

    """
    return _asking(Driver.boards)


def name(uuid: str) -> str:
    """Return the model name of the GPU or MIG slice ``uuid``, empty when the driver is silent."""
    return _asking(lambda driver: driver.name(uuid))


def memory(uuid: str) -> DriverReading | None:
    """Return the memory of the GPU or MIG slice ``uuid``, None where the driver does not tell.

    Unified memory (GB10, Jetson) is such a place: the call is not supported or says zero.

    Raises:
        NoDriverError: in one sentence, when there is no working driver.

    """
    return _asking(lambda driver: driver.memory(uuid))


def processes(uuid: str) -> dict[int, int | None]:
    """Return the bytes of each process that computes on ``uuid``; None where they are not told.

    Raises:
        NoDriverError: in one sentence, when there is no working driver.

    """
    return _asking(lambda driver: driver.processes(uuid))


class Driver:
    """NVML, started. Every call it cannot answer is None, whatever the reason."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._handles: dict[str, Any] = {}

    def boards(self) -> tuple[Board, ...]:
        """Return the machine's GPUs in PCI order, and learn their and their slices' handles."""
        try:
            count = self._nvml.nvmlDeviceGetCount()
        except Exception as error:
            if _code(error) == _UNINITIALIZED:
                raise _ShutDownError from error
            raise NoDriverError(f"the NVIDIA driver cannot count its cards: {error}") from error
        found = []
        for index in range(count):
            handle = self._ask("nvmlDeviceGetHandleByIndex", index)
            uuid = _text(self._ask("nvmlDeviceGetUUID", handle))
            if not uuid:
                note(f"the NVIDIA driver does not answer for card {index} of {count}")
                continue
            self._handles[uuid] = handle
            board = Board(uuid, self.name(uuid), self._slices(uuid))
            found.append((self._pci_place(handle), board))
        return tuple(board for _, board in sorted(found, key=lambda each: each[0]))

    def name(self, uuid: str) -> str:
        """Return the model name of ``uuid``."""
        return _text(self._ask("nvmlDeviceGetName", self._handle(uuid)))

    def memory(self, uuid: str) -> DriverReading | None:
        """Return the driver's reading of ``uuid``, of version 2 where the driver has it."""
        handle = self._handle(uuid)
        for version in (getattr(self._nvml, "nvmlMemory_v2", None), None):
            told = self._ask("nvmlDeviceGetMemoryInfo", handle, version)
            if told is not None and 0 < told.total < _NOT_TOLD:
                reserved = getattr(told, "reserved", 0)
                return DriverReading(told.used, told.free, told.total, reserved)
        return None

    def processes(self, uuid: str) -> dict[int, int | None]:
        """Return pid -> bytes from the newest process call that driver and binding share."""
        handle = self._handle(uuid)
        for call in _PROCESS_CALLS:
            told = self._ask(call, handle)
            if told is not None:
                return {each.pid: _figure(each.usedGpuMemory) for each in told}
        return {}

    def _slices(self, uuid: str) -> tuple[Slice, ...] | None:
        """Return the MIG devices of a board, None while MIG is off or unknown to it."""
        board = self._handles[uuid]
        mode = self._ask("nvmlDeviceGetMigMode", board)
        if mode is None or mode[0] != _MIG_ENABLED:
            return None
        count = self._ask("nvmlDeviceGetMaxMigDeviceCount", board) or 0
        handles = [
            self._ask("nvmlDeviceGetMigDeviceHandleByIndex", board, index) for index in range(count)
        ]
        # There are holes where no slice was made.
        return tuple(self._slice(uuid, handle) for handle in handles if handle is not None)

    def _slice(self, board: str, handle: Any) -> Slice:
        uuid = _text(self._ask("nvmlDeviceGetUUID", handle))
        self._handles[uuid] = handle
        gpu_instance = self._ask("nvmlDeviceGetGpuInstanceId", handle)
        compute_instance = self._ask("nvmlDeviceGetComputeInstanceId", handle)
        return Slice(uuid, f"MIG-{board}/{gpu_instance}/{compute_instance}")

    def _pci_place(self, handle: Any) -> tuple[int, ...]:
        """Return what PCI order sorts by; NVML promises no order of its own between reboots."""
        place = self._ask("nvmlDeviceGetPciInfo", handle)
        return () if place is None else (place.domain, place.bus, place.device)

    def _handle(self, uuid: str) -> Any:
        if uuid not in self._handles:
            self.boards()
        return self._handles.get(uuid)

    def _ask(self, call: str, subject: Any, *arguments: Any) -> Any:
        """Return NVML's answer about ``subject``, a handle or the index of one.

        None when there is no such subject, or the driver or the binding has no answer.
        """
        if subject is None:
            return None
        try:
            return getattr(self._nvml, call)(subject, *arguments)
        except Exception as error:
            if _code(error) == _UNINITIALIZED:
                raise _ShutDownError from error
            return None


def _asking(question: Callable[[Driver], T]) -> T:
    """Return the driver's answer; a suite that shut NVML down gets it started again, once."""
    try:
        return question(_start(_pynvml()))
    except _ShutDownError:
        _start.cache_clear()
    try:
        return question(_start(_pynvml()))
    except _ShutDownError as error:
        raise NoDriverError("NVML was shut down and does not start again") from error


@functools.lru_cache(maxsize=1)
def _start(nvml: Any) -> Driver:
    """Return NVML started; NVML counts its starts, so the suite's own do not disturb ours."""
    try:
        nvml.nvmlInit()
    except Exception as error:
        if _code(error) == _LIBRARY_NOT_FOUND:
            raise NoDriverError(_no_library()) from error
        raise NoDriverError(f"the NVIDIA driver does not answer: {error}") from error
    return Driver(nvml)


def _pynvml() -> Any:
    """Return the NVML binding; it is not even imported where there is no driver library.

    A binding that somebody else imported is used as it is.
    """
    if "pynvml" in sys.modules:
        return sys.modules["pynvml"]
    if sys.platform == "linux":
        if problem := _library_problem(_LIBRARY):
            raise NoDriverError(problem)
    with warnings.catch_warnings():
        # The inactive distribution called "pynvml" warns; -W error would make that fatal.
        warnings.simplefilter("ignore")
        try:
            import pynvml
        except ImportError as error:
            raise NoDriverError(f"the NVML binding nvidia-ml-py is missing: {error}") from error
    return pynvml


@functools.cache
def _library_problem(library: str) -> str:
    """Return why the driver's library cannot be loaded, "" if it can.

    A dlopen that fails takes 30 microseconds, which each lease would pay; importing the binding
    takes 30 ms.
    """
    import ctypes

    try:
        ctypes.CDLL(library)
    except OSError as error:
        if "cannot open shared object file" in str(error):
            return _no_library()
        return f"the NVIDIA driver library cannot be loaded: {error}"
    return ""


def _no_library() -> str:
    return f"there is no NVIDIA driver library ({_LIBRARY}) on this machine"


def _code(error: Exception) -> int | None:
    """Return the NVML return code that ``error`` carries."""
    return getattr(error, "value", None)


def _text(told: str | bytes | None) -> str:
    """Return ``told`` as text; old bindings answer in bytes."""
    return told.decode() if isinstance(told, bytes) else told or ""


def _figure(told: int | None) -> int | None:
    """Return a number of bytes, None where the driver says "not available"."""
    return None if told is None or told >= _NOT_TOLD else told

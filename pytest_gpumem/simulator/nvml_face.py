"""NVML's answers for the simulated cards, given through the real ``pynvml`` module.

``pynvml`` looks its C functions up in the library it has loaded. Here that library is a Python
object, so that everything imported from pynvml, before or after, asks it. Only this process sees
it: ``nvidia-smi`` and programs that load NVML themselves do not.

Whatever is not answered is "Not Supported", as by a card that cannot. The driver keeps nothing
for itself (``reserved`` is 0), so that both versions of NVML's memory call and
``torch.cuda.mem_get_info`` agree.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
from typing import TYPE_CHECKING, Any

from pytest_gpumem.simulator import spec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_gpumem.simulator.card import SharedCard

# Return codes: nvmlReturn_t in nvml.h.
_SUCCESS = 0
_UNINITIALIZED = 1
_INVALID_ARGUMENT = 2
_NOT_SUPPORTED = 3
_NOT_FOUND = 6
_INSUFFICIENT_SIZE = 7
_ARGUMENT_VERSION_MISMATCH = 25

_PCI_DEVICE = 0x10DE  # NVIDIA's vendor number, and no device number
_NO_MIG_INSTANCE = 0xFFFFFFFF

_PRIVATE_NAMES = ("nvmlLib", "_nvmlLib_refcount", "_nvmlGetFunctionPointer_cache")


def install(cards: Sequence[SharedCard]) -> None:
    """Let pynvml's functions answer for ``cards``, and for no others, in this process.

    Raises:
        RuntimeError: when the installed nvidia-ml-py lacks the private names this relies on.

    """
    import pynvml

    missing = [name for name in _PRIVATE_NAMES if not hasattr(pynvml, name)]
    if missing:
        version = importlib.metadata.version("nvidia-ml-py")
        raise RuntimeError(
            f"the simulated card cannot answer NVML through nvidia-ml-py {version}, which has no"
            f" {' and no '.join(missing)}; versions 12.535 to 13.615 have them"
        )
    pynvml.nvmlLib = _Library(cards, pynvml, started=pynvml._nvmlLib_refcount)
    pynvml._nvmlGetFunctionPointer_cache.clear()


class _Library:
    """Stands where pynvml keeps ``CDLL("libnvidia-ml.so.1")``; its attributes are C functions.

    An out parameter arrives as ``ctypes.byref(...)``, whose ``_obj`` is the object to fill.
    """

    def __init__(self, cards: Sequence[SharedCard], pynvml: Any, started: int) -> None:
        self._started = started
        self._handles = [pynvml.struct_c_nvmlDevice_t() for _ in cards]
        self._system: dict[str, Callable[..., int]] = {
            "nvmlShutdown": self._shut_down,
            "nvmlSystemGetDriverVersion": _text(spec.DRIVER),
            "nvmlSystemGetNVMLVersion": _text(spec.NVML),
            "nvmlSystemGetCudaDriverVersion": _number(spec.cuda_number(spec.CUDA)),
            "nvmlSystemGetCudaDriverVersion_v2": _number(spec.cuda_number(spec.CUDA)),
            "nvmlDeviceGetCount_v2": _number(len(cards)),
            "nvmlDeviceGetHandleByIndex_v2": self._find(range(len(cards)), _INVALID_ARGUMENT),
            "nvmlDeviceGetHandleByUUID": self._find(
                [card.uuid.encode() for card in cards], _NOT_FOUND
            ),
            "nvmlDeviceGetHandleByPciBusId_v2": self._find(
                [_bus_id(index) for index in range(len(cards))], _NOT_FOUND
            ),
        }
        self._devices = {
            ctypes.addressof(handle): _Device(card, index, pynvml.nvmlMemory_v2)
            for index, (card, handle) in enumerate(zip(cards, self._handles, strict=True))
        }

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Return the C function ``name``; each can take attributes: pynvml sets a ``restype``."""
        if not name.startswith("nvml"):
            raise AttributeError(name)
        if name == "nvmlErrorString":
            return lambda code: f"NVML error {code}".encode()
        return functools.partial(self._call, name)

    def _call(self, name: str, *arguments: Any) -> int:
        if name == "nvmlInitWithFlags":
            self._started += 1
            return _SUCCESS
        if not self._started:
            return _UNINITIALIZED
        if name in self._system:
            return self._system[name](*arguments)
        handle, *rest = arguments
        device = self._devices.get(ctypes.addressof(handle.contents)) if handle else None
        if device is None:
            return _INVALID_ARGUMENT
        answer = device.functions.get(name)
        return _NOT_SUPPORTED if answer is None else answer(*rest)

    def _shut_down(self) -> int:
        self._started -= 1
        return _SUCCESS

    def _find(self, keys: Sequence[object], otherwise: int) -> Callable[..., int]:
        def answer(wanted: Any, device: Any) -> int:
            if wanted.value not in keys:
                return otherwise
            device._obj.contents = self._handles[keys.index(wanted.value)]
            return _SUCCESS

        return answer


class _Device:
    """One card: the functions that take its handle."""

    def __init__(self, card: SharedCard, index: int, memory_version: Any) -> None:
        self._card = card
        self._index = index
        self._memory_version = memory_version
        self.functions: dict[str, Callable[..., int]] = {
            "nvmlDeviceGetName": _text(card.name),
            "nvmlDeviceGetUUID": _text(card.uuid),
            "nvmlDeviceGetIndex": _number(index),
            "nvmlDeviceGetMinorNumber": _number(index),
            "nvmlDeviceGetCudaComputeCapability": _number(*spec.CAPABILITY),
            "nvmlDeviceGetPciInfo_v3": self._pci_info,
            "nvmlDeviceGetUtilizationRates": _idle,
            "nvmlDeviceGetMemoryInfo": self._memory,
            "nvmlDeviceGetMemoryInfo_v2": self._memory_v2,
            "nvmlDeviceGetComputeRunningProcesses_v2": self._compute_processes,
            "nvmlDeviceGetComputeRunningProcesses_v3": self._compute_processes,
            "nvmlDeviceGetGraphicsRunningProcesses_v2": _number(0),
            "nvmlDeviceGetGraphicsRunningProcesses_v3": _number(0),
        }

    def _memory(self, memory: Any) -> int:
        total, free = self._card.total, self._card.free()
        memory._obj.total, memory._obj.free, memory._obj.used = total, free, total - free
        return _SUCCESS

    def _memory_v2(self, memory: Any) -> int:
        if memory._obj.version != self._memory_version:
            return _ARGUMENT_VERSION_MISMATCH
        memory._obj.reserved = 0
        return self._memory(memory)

    def _pci_info(self, info: Any) -> int:
        bus_id = _bus_id(self._index)
        info._obj.domain, info._obj.bus, info._obj.device = 0, spec.pci_bus(self._index), 0
        info._obj.pciDeviceId = _PCI_DEVICE
        info._obj.busId = bus_id
        info._obj.busIdLegacy = bus_id[4:]
        return _SUCCESS

    def _compute_processes(self, count: Any, entries: Any) -> int:
        used = self._card.processes()
        room, count._obj.value = count._obj.value, len(used)
        if room < len(used):
            return _INSUFFICIENT_SIZE
        for entry, (pid, size) in zip(entries or (), used.items(), strict=False):
            entry.pid, entry.usedGpuMemory = pid, size
            entry.gpuInstanceId = entry.computeInstanceId = _NO_MIG_INSTANCE
        return _SUCCESS


def _text(text: str) -> Callable[..., int]:
    def answer(buffer: Any, _length: Any) -> int:
        buffer.value = text.encode()
        return _SUCCESS

    return answer


def _number(*numbers: int) -> Callable[..., int]:
    def answer(*places: Any) -> int:
        for place, number in zip(places, numbers, strict=False):
            place._obj.value = number
        return _SUCCESS

    return answer


def _idle(utilization: Any) -> int:
    utilization._obj.gpu = utilization._obj.memory = 0
    return _SUCCESS


def _bus_id(index: int) -> bytes:
    return f"00000000:{spec.pci_bus(index):02X}:00.0".encode()

"""NVML's answers for a simulated card, given through the real ``pynvml`` module.

``pynvml`` looks its C functions up in the library it has loaded. Here that library is a Python
object, so that everything imported from pynvml, before or after, asks it. Only this process sees
it: ``nvidia-smi`` and programs that load NVML themselves do not.

Whatever is not answered is "Not Supported", as by a card that cannot. The driver keeps nothing
for itself (``reserved`` is 0), so that both versions of NVML's memory call and
``torch.cuda.mem_get_info`` agree.
"""

from __future__ import annotations

import functools
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.simulator.card import SharedCard

# Return codes: nvmlReturn_t in nvml.h.
_SUCCESS = 0
_UNINITIALIZED = 1
_INVALID_ARGUMENT = 2
_NOT_SUPPORTED = 3
_NOT_FOUND = 6
_INSUFFICIENT_SIZE = 7
_ARGUMENT_VERSION_MISMATCH = 25

_DRIVER_VERSION = b"580.0"
_NVML_VERSION = b"13.580.0"
_CUDA_VERSION = 13000
_PCI_BUS = 1
_PCI_BUS_ID = b"00000000:01:00.0"
_PCI_DEVICE = 0x10DE  # NVIDIA's vendor number, and no device number
_NO_MIG_INSTANCE = 0xFFFFFFFF

_PRIVATE_NAMES = ("nvmlLib", "_nvmlLib_refcount", "_nvmlGetFunctionPointer_cache")


def install(card: SharedCard) -> None:
    """Let pynvml's functions answer for ``card``, and for no other, in this process.

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
    pynvml.nvmlLib = _Library(card, pynvml, started=pynvml._nvmlLib_refcount)
    pynvml._nvmlGetFunctionPointer_cache.clear()


class _Library:
    """Stands where pynvml keeps ``CDLL("libnvidia-ml.so.1")``; its attributes are C functions.

    An out parameter arrives as ``ctypes.byref(...)``, whose ``_obj`` is the object to fill.
    """

    def __init__(self, card: SharedCard, pynvml: Any, started: int) -> None:
        self._card = card
        self._started = started
        self._memory_version = pynvml.nvmlMemory_v2
        self._device = pynvml.struct_c_nvmlDevice_t()
        self._system: dict[str, Callable[..., int]] = {
            "nvmlShutdown": self._shut_down,
            "nvmlSystemGetDriverVersion": _text(_DRIVER_VERSION),
            "nvmlSystemGetNVMLVersion": _text(_NVML_VERSION),
            "nvmlSystemGetCudaDriverVersion": _number(_CUDA_VERSION),
            "nvmlSystemGetCudaDriverVersion_v2": _number(_CUDA_VERSION),
            "nvmlDeviceGetCount_v2": _number(1),
            "nvmlDeviceGetHandleByIndex_v2": self._find(0, _INVALID_ARGUMENT),
            "nvmlDeviceGetHandleByUUID": self._find(card.uuid.encode(), _NOT_FOUND),
            "nvmlDeviceGetHandleByPciBusId_v2": self._find(_PCI_BUS_ID, _NOT_FOUND),
        }
        self._of_device: dict[str, Callable[..., int]] = {
            "nvmlDeviceGetName": _text(card.name.encode()),
            "nvmlDeviceGetUUID": _text(card.uuid.encode()),
            "nvmlDeviceGetIndex": _number(0),
            "nvmlDeviceGetMinorNumber": _number(0),
            "nvmlDeviceGetCudaComputeCapability": _number(*card.compute_capability),
            "nvmlDeviceGetPciInfo_v3": _pci_info,
            "nvmlDeviceGetUtilizationRates": _idle,
            "nvmlDeviceGetMemoryInfo": self._memory,
            "nvmlDeviceGetMemoryInfo_v2": self._memory_v2,
            "nvmlDeviceGetComputeRunningProcesses_v2": self._compute_processes,
            "nvmlDeviceGetComputeRunningProcesses_v3": self._compute_processes,
            "nvmlDeviceGetGraphicsRunningProcesses_v2": _number(0),
            "nvmlDeviceGetGraphicsRunningProcesses_v3": _number(0),
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
        if name not in self._of_device:
            return _NOT_SUPPORTED
        from ctypes import addressof

        handle, *rest = arguments
        if not handle or addressof(handle.contents) != addressof(self._device):
            return _INVALID_ARGUMENT
        return self._of_device[name](*rest)

    def _shut_down(self) -> int:
        self._started -= 1
        return _SUCCESS

    def _find(self, key: object, otherwise: int) -> Callable[..., int]:
        def answer(wanted: Any, device: Any) -> int:
            if wanted.value != key:
                return otherwise
            device._obj.contents = self._device
            return _SUCCESS

        return answer

    def _memory(self, memory: Any) -> int:
        total, free = self._card.total, self._card.free()
        memory._obj.total, memory._obj.free, memory._obj.used = total, free, total - free
        return _SUCCESS

    def _memory_v2(self, memory: Any) -> int:
        if memory._obj.version != self._memory_version:
            return _ARGUMENT_VERSION_MISMATCH
        memory._obj.reserved = 0
        return self._memory(memory)

    def _compute_processes(self, count: Any, entries: Any) -> int:
        used = self._card.processes()
        room, count._obj.value = count._obj.value, len(used)
        if room < len(used):
            return _INSUFFICIENT_SIZE
        for entry, (pid, size) in zip(entries or (), used.items(), strict=False):
            entry.pid, entry.usedGpuMemory = pid, size
            entry.gpuInstanceId = entry.computeInstanceId = _NO_MIG_INSTANCE
        return _SUCCESS


def _text(text: bytes) -> Callable[..., int]:
    def answer(buffer: Any, _length: Any) -> int:
        buffer.value = text
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


def _pci_info(info: Any) -> int:
    info._obj.domain, info._obj.bus, info._obj.device = 0, _PCI_BUS, 0
    info._obj.pciDeviceId = _PCI_DEVICE
    info._obj.busId = _PCI_BUS_ID
    info._obj.busIdLegacy = _PCI_BUS_ID[4:]
    return _SUCCESS

# ruff: noqa: N802, N815  # the driver's functions carry NVML's names
"""A fake driver behind the real NVML binding, and a fake torch.cuda.

The driver's functions are put where the binding looks them up first, so that its structures,
versions, sentinels and error classes are the real ones.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pynvml

if TYPE_CHECKING:
    import pytest

GIB = 2**30
SUCCESS, UNINITIALIZED, NOT_SUPPORTED, NOT_FOUND = 0, 1, 3, 6
INSUFFICIENT_SIZE = 7


def uuid(letter: str) -> str:
    """A UUID of NVML's form that is all one hexadecimal letter."""
    return "GPU-" + "-".join(letter * length for length in (8, 4, 4, 4, 12))


@dataclass
class FakeSlice:
    uuid: str
    gpu_instance: int
    total: int = 5 * GIB


@dataclass
class FakeBoard:
    uuid: str
    name: str = "NVIDIA Fake 100"
    bus: int = 0
    total: int = 16 * GIB
    used: int = GIB
    reserved: int = GIB // 2
    memory_code: int = SUCCESS
    slices: list[FakeSlice | None] | None = None
    processes: dict[int, int] = field(default_factory=dict)


class FakeDriver:
    """As many of NVML's C functions as the devices room calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.boards: list[FakeBoard] = []
        self.init_code = SUCCESS
        self.running = False
        self.missing: set[str] = set()
        functions = {
            name.removeprefix("_c_"): getattr(self, name)
            for name in dir(self)
            if name.startswith("_c_")
        }
        # The binding asks this object for every function that is not in its cache.
        monkeypatch.setattr(pynvml, "nvmlLib", self)
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
        self._functions = functions

    def __getattr__(self, name: str) -> Any:
        functions = self.__dict__.get("_functions", {})
        if name not in functions or name in self.missing:
            raise AttributeError(name)
        return functions[name]

    def _found(self, handle: Any) -> Any:
        everything = [*self.boards, *(s for b in self.boards for s in b.slices or () if s)]
        return everything[_number(handle) - 1]

    def _set_handle(self, box: Any, thing: Any) -> int:
        everything = [*self.boards, *(s for b in self.boards for s in b.slices or () if s)]
        number = next(at for at, each in enumerate(everything, 1) if each is thing)
        ctypes.cast(box, ctypes.POINTER(ctypes.c_void_p))[0] = number
        return SUCCESS

    def _c_nvmlInitWithFlags(self, _flags: Any) -> int:
        self.running = self.init_code == SUCCESS
        return self.init_code

    def _c_nvmlDeviceGetCount_v2(self, box: Any) -> int:
        if not self.running:
            return UNINITIALIZED
        box._obj.value = len(self.boards)
        return SUCCESS

    def _c_nvmlDeviceGetHandleByIndex_v2(self, index: Any, box: Any) -> int:
        return self._set_handle(box, self.boards[index.value])

    def _c_nvmlDeviceGetUUID(self, handle: Any, text: Any, _size: Any) -> int:
        text.value = self._found(handle).uuid.encode()
        return SUCCESS

    def _c_nvmlDeviceGetName(self, handle: Any, text: Any, _size: Any) -> int:
        found = self._found(handle)
        text.value = (found.name if isinstance(found, FakeBoard) else "a MIG slice").encode()
        return SUCCESS

    def _c_nvmlDeviceGetPciInfo_v3(self, handle: Any, box: Any) -> int:
        box._obj.bus = self._found(handle).bus
        return SUCCESS

    def _c_nvmlDeviceGetMemoryInfo_v2(self, handle: Any, box: Any) -> int:
        if not self.running:
            return UNINITIALIZED
        found, told = self._found(handle), box._obj
        if isinstance(found, FakeSlice):
            told.total = told.free = found.total
            return SUCCESS
        told.total, told.used, told.reserved = found.total, found.used, found.reserved
        told.free = found.total - found.used - found.reserved
        return found.memory_code

    def _c_nvmlDeviceGetMemoryInfo(self, handle: Any, box: Any) -> int:
        found, told = self._found(handle), box._obj
        told.total, told.used = found.total, found.used + found.reserved
        told.free = found.total - told.used
        return found.memory_code

    def _c_nvmlDeviceGetMigMode(self, handle: Any, current: Any, _pending: Any) -> int:
        slices = self._found(handle).slices
        current._obj.value = slices is not None
        return SUCCESS

    def _c_nvmlDeviceGetMaxMigDeviceCount(self, handle: Any, box: Any) -> int:
        box._obj.value = len(self._found(handle).slices)
        return SUCCESS

    def _c_nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, index: Any, box: Any) -> int:
        made = self._found(handle).slices[index.value]
        return NOT_FOUND if made is None else self._set_handle(box, made)

    def _c_nvmlDeviceGetGpuInstanceId(self, handle: Any, box: Any) -> int:
        box._obj.value = self._found(handle).gpu_instance
        return SUCCESS

    def _c_nvmlDeviceGetComputeInstanceId(self, _handle: Any, box: Any) -> int:
        box._obj.value = 0
        return SUCCESS

    def _c_nvmlDeviceGetComputeRunningProcesses_v3(
        self, handle: Any, count: Any, table: Any
    ) -> int:
        processes = self._found(handle).processes
        if processes and table is None:
            count._obj.value = len(processes)
            return INSUFFICIENT_SIZE
        for row, (pid, size) in zip(table or (), processes.items(), strict=False):
            row.pid, row.usedGpuMemory = pid, size
        count._obj.value = len(processes)
        return SUCCESS

    _c_nvmlDeviceGetComputeRunningProcesses_v2 = _c_nvmlDeviceGetComputeRunningProcesses_v3


def _number(handle: Any) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


class FakeCuda(SimpleNamespace):
    """An initialised torch.cuda whose allocator is a list of nested statistics."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(
            stats=[],
            uuids=[],
            calls=[],
            contexts=set(),
            segments=[],
            initialised=True,
            broken="",
        )
        self.__dict__.update(fields)

    def is_initialized(self) -> bool:
        return self.initialised

    def device_count(self) -> int:
        return len(self.stats)

    def memory_stats_as_nested_dict(self, index: int) -> dict[str, Any]:
        self._may_fail()
        return dict(sys.modules["torch"]._C._cuda_memoryStats(index))

    def get_device_properties(self, index: int) -> Any:
        self._may_fail()
        return SimpleNamespace(name=f"Fake {index}", total_memory=15 * GIB, uuid=self.uuids[index])

    def mem_get_info(self, index: int) -> tuple[int, int]:
        self.calls.append(("mem_get_info", index))
        return 6 * GIB, 8 * GIB

    def forget_peak(self, index: int) -> None:
        self.calls.append(("reset_peak", index))
        for stat in ("allocated_bytes", "reserved_bytes"):
            figures = self.stats[index][stat]["all"]
            figures["peak"] = figures["current"]

    def reset_peak_memory_stats(self, index: int) -> None:
        sys.modules["torch"]._C._cuda_resetPeakMemoryStats(index)

    def empty_cache(self) -> None:
        self._may_fail()
        self.calls.append(("empty_cache",))

    def synchronize(self, index: int) -> None:
        self._may_fail()
        self.calls.append(("synchronize", index))

    def memory_snapshot(self) -> list[dict[str, Any]]:
        return self.segments

    def _may_fail(self) -> None:
        if self.broken:
            raise RuntimeError(self.broken)


def stats(allocated: int = 0, reserved: int = 0, peak: int = 0) -> dict[str, Any]:
    """One device's statistics, nested as torch nests them."""
    return {
        "allocated_bytes": {"all": {"current": allocated, "peak": max(peak, allocated)}},
        "reserved_bytes": {"all": {"current": reserved, "peak": reserved}},
        "num_alloc_retries": 1,
        "num_ooms": 2,
    }

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest
from device_fakes import FakeCuda, FakeDriver

from pytest_gpumem.devices import allocator, notebook, nvml


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts without a driver, without notes, with every card visible."""
    monkeypatch.setattr(notebook, "_notes", {})
    monkeypatch.setattr(
        allocator,
        "_registered",
        [
            allocator.TorchAllocator(each.name, each._face, each._figures)
            for each in allocator._registered
            if isinstance(each, allocator.TorchAllocator)
        ],
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    nvml._start.cache_clear()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """A working driver with no card yet; tests add boards."""
    return FakeDriver(monkeypatch)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A torch that has initialised CUDA; tests add devices."""
    fake = FakeCuda()
    core = SimpleNamespace(
        _cuda_resetPeakMemoryStats=fake.forget_peak,
        _cuda_memoryStats=lambda index: copy.deepcopy(fake.stats[index]),
        _cuda_clearCublasWorkspaces=lambda: fake.calls.append(("clear_workspaces",)),
        _cuda_hasPrimaryContext=lambda index: index in fake.contexts,
    )
    torch = SimpleNamespace(cuda=fake, _C=core, __version__="2.13.0", __file__="/lib/torch/x.py")
    monkeypatch.setitem(sys.modules, "torch", torch)
    return fake


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)

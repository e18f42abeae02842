from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING

from device_fakes import GIB, FakeBoard, FakeCuda, FakeDriver, stats, uuid

from pytest_gpumem.devices import (
    Allocator,
    AllocatorReading,
    allocators,
    notes,
    register,
    watch_peaks,
)

if TYPE_CHECKING:
    import pytest

A, B = uuid("a"), uuid("b")


def torch_cuda() -> Allocator:
    (allocator,) = allocators()
    return allocator


def test_there_is_no_allocator_before_torch_is_loaded(no_torch: None) -> None:
    assert allocators() == ()


def test_there_is_no_allocator_before_cuda_is_initialised(cuda: FakeCuda) -> None:
    cuda.initialised = False
    assert allocators() == ()


def test_there_is_no_allocator_while_torch_is_still_being_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace()))
    assert allocators() == ()


def test_every_device_is_read(cuda: FakeCuda) -> None:
    cuda.stats = [stats(allocated=5, reserved=8, peak=7), stats()]
    assert torch_cuda().name == "torch.cuda"
    assert torch_cuda().read() == (
        AllocatorReading(5, 7, 8, 8, retries=1, ooms=2),
        AllocatorReading(0, 0, 0, 0, retries=1, ooms=2),
    )


def test_cards_are_found_by_uuid_not_by_index(driver: FakeDriver, cuda: FakeCuda) -> None:
    driver.boards = [FakeBoard(A), FakeBoard(B)]
    cuda.stats, cuda.uuids = [stats(), stats()], [B[4:], A[4:]]
    assert [torch_cuda().card(index).uuid for index in (0, 1)] == [B, A]


def test_a_card_nothing_tells_of_still_has_an_identity(driver: FakeDriver, cuda: FakeCuda) -> None:
    assert torch_cuda().card(3).uuid == "torch.cuda:3"


def test_broken_statistics_keep_the_last_reading_and_are_noted_once(cuda: FakeCuda) -> None:
    cuda.stats = [stats(allocated=5)]
    allocator = torch_cuda()
    before = allocator.read()
    cuda.broken = "CUDA error: an illegal memory access was encountered\nCompile with ..."
    assert allocator.read() == before
    assert allocator.read() == before
    assert notes() == (
        (
            "reading the memory statistics of torch.cuda failed: "
            "CUDA error: an illegal memory access was encountered"
        ),
    )


def test_a_broken_context_raises_from_nothing(cuda: FakeCuda) -> None:
    cuda.stats = [stats(reserved=2)]
    allocator = torch_cuda()
    allocator.read()
    cuda.broken = "CUDA error: device-side assert triggered"
    allocator.release_cached()
    allocator.settle()
    allocator.card(0)
    assert any(sentence.startswith("torch.cuda.empty_cache failed") for sentence in notes())


def test_cuda_lost_to_a_fork_reads_nothing(cuda: FakeCuda) -> None:
    cuda.stats = [stats(allocated=5)]
    allocator = torch_cuda()
    cuda.initialised = False
    assert allocator.read() == ()
    assert not allocator.active()
    allocator.reset_peak(0)
    allocator.release_cached()
    allocator.settle()
    assert cuda.calls == []


def test_release_cached_empties_torchs_cache(cuda: FakeCuda) -> None:
    torch_cuda().release_cached()
    assert cuda.calls == [("empty_cache",)]


def test_settle_waits_only_for_devices_that_hold_memory(cuda: FakeCuda) -> None:
    cuda.stats = [stats(), stats(allocated=1, reserved=GIB)]
    torch_cuda().settle()
    assert cuda.calls == [("synchronize", 1), ("clear_workspaces",)]


def test_settle_leaves_workspaces_alone_while_a_captured_graph_may_use_them(
    cuda: FakeCuda,
) -> None:
    cuda.segments = [{"segment_pool_id": (0, 0)}, {"segment_pool_id": (0, 1)}]
    torch_cuda().settle()
    assert cuda.calls == []


def test_its_own_peak_reset_is_not_told(cuda: FakeCuda) -> None:
    cuda.stats = [stats()]
    told: list[str] = []
    undo = watch_peaks(lambda: told.append("reset"))
    torch_cuda().reset_peak(0)
    undo()
    assert cuda.calls == [("reset_peak", 0)]
    assert told == []


def test_a_registered_framework_is_measured_while_it_is_active() -> None:
    class Other:
        name = "other"

        def __init__(self) -> None:
            self.on = False

        def active(self) -> bool:
            return self.on

        def read(self) -> tuple[AllocatorReading, ...]:
            return (AllocatorReading(1, 1, 1, 1, 0, 0),)

    other = Other()
    register(other)  # type: ignore[arg-type]  # as much of an allocator as this test needs
    assert other not in allocators()
    other.on = True
    assert other in allocators()


def test_an_accelerator_is_read_by_its_flat_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = {
        "allocated_bytes.all.current": 5,
        "allocated_bytes.all.peak": 7,
        "reserved_bytes.all.current": 8,
        "reserved_bytes.all.peak": 9,
        "num_ooms": 1,
    }
    accelerator = SimpleNamespace(
        current_accelerator=lambda: SimpleNamespace(type="xpu"),
        device_count=lambda: 1,
        memory_stats=lambda _index: flat,
    )
    xpu = SimpleNamespace(is_initialized=lambda: True)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(accelerator=accelerator, xpu=xpu))
    (allocator,) = allocators()
    assert allocator.name == "torch.accelerator"
    assert allocator.read() == (AllocatorReading(5, 7, 8, 9, retries=0, ooms=1),)
    xpu.is_initialized = lambda: False
    assert allocators() == ()


def test_cuda_behind_torch_accelerator_is_read_once_only(cuda: FakeCuda) -> None:
    sys.modules["torch"].accelerator = SimpleNamespace(
        current_accelerator=lambda: SimpleNamespace(type="cuda"), memory_stats=lambda _index: {}
    )
    assert [each.name for each in allocators()] == ["torch.cuda"]

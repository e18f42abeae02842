"""A typed suite that uses every public name; type checkers read it, nothing runs it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import pytest_gpumem
from pytest_gpumem import (
    ArchiveError,
    ArchiveStore,
    ArgumentError,
    Consolidation,
    DamagedError,
    DiskError,
    GpuConsolidator,
    GpuMemory,
    HybridResourceManager,
    InUseError,
    KeyRefusedError,
    Lease,
    LeaseError,
    LeaseTimeout,
    ModelPool,
    NotFoundError,
    QuotaError,
    RequestRefusedError,
    RunRecord,
    StateRefusedError,
    TooLarge,
    UnknownVersionError,
    WrongKeyError,
    allow_subclass,
    analyze_oom_sequence,
    get_gpu_consolidator,
    get_resource_manager,
    get_sentence_transformer_device,
    gpu_lease,
    load_run,
    load_sentence_transformer,
)

VERSION: str = pytest_gpumem.__version__
LEASE_ERRORS: tuple[type[LeaseError], ...] = (LeaseTimeout, RequestRefusedError, TooLarge)
TIME_IS_UP: type[TimeoutError] = LeaseTimeout
ARCHIVE_ERRORS: tuple[type[ArchiveError], ...] = (
    ArgumentError,
    DamagedError,
    DiskError,
    InUseError,
    KeyRefusedError,
    NotFoundError,
    QuotaError,
    StateRefusedError,
    UnknownVersionError,
    WrongKeyError,
)


@pytest.fixture
def card() -> Iterator[Lease]:
    with gpu_lease("1GiB", device=0, exclusive=False, timeout=5.0) as lease:
        yield lease


@pytest.mark.gpu(vram="1GiB")
def test_memory(gpumem: GpuMemory, gpu_device: str, model_pool: ModelPool, card: Lease) -> None:
    peak: int = gpumem.peak
    allocated: int = gpumem.allocated
    per_card: list[int] = [usage.leaked for usage in gpumem.usage()]
    size: int | None = card.size
    assert peak + allocated >= sum(per_card)
    assert size is not None
    assert gpu_device
    assert model_pool


def test_routing() -> None:
    manager: HybridResourceManager = get_resource_manager()
    device: str = manager.allocate_task("tensor", 12.5)
    device = get_sentence_transformer_device()
    load_sentence_transformer("all-MiniLM-L6-v2")
    assert device


def test_archive(tmp_path: Path) -> None:
    allow_subclass(object)
    store = ArchiveStore(tmp_path, key=b"k" * 32, quota=2**30)
    state: str = store.put({"a": 1}, type="state", tags=("x",), metadata={"n": 1})
    store.get(state)
    consolidator: GpuConsolidator = get_gpu_consolidator()
    done: Consolidation = consolidator.consolidate_gpu_memory(process_context="a test")
    freed: int = done.freed_allocator
    assert freed


def test_records(tmp_path: Path) -> None:
    run: RunRecord = load_run(tmp_path / "run.json")
    peaks: list[int] = [usage.peak for test in run.tests for usage in test.cards]
    analyze_oom_sequence(tmp_path / "log")
    assert peaks

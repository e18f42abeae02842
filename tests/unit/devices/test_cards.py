from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from device_fakes import GIB, NOT_SUPPORTED, FakeBoard, FakeCuda, FakeDriver, FakeSlice, stats, uuid

from pytest_gpumem.devices import (
    Usage,
    cards_to_choose,
    driver_reading,
    find_cards,
    nvml,
    own_bytes,
    process_bytes,
    torch_state,
    usage,
    used_bytes,
    users,
)
from pytest_gpumem.devices.nvml import DriverReading
from pytest_gpumem.records import Card

A, B = uuid("a"), uuid("b")

pytestmark = pytest.mark.usefixtures("no_torch")


def uuids() -> list[str]:
    return [card.uuid for card in find_cards().cards]


def test_one_card_is_found_by_uuid_name_and_what_programs_may_use(driver: FakeDriver) -> None:
    driver.boards = [FakeBoard(A, name="NVIDIA Fake 100", total=16 * GIB, reserved=GIB // 2)]
    found = find_cards()
    assert found.cards == (Card(A, "NVIDIA Fake 100", 15 * GIB + GIB // 2, "cuda"),)
    assert (found.why_none, found.note) == ("", "")


def test_no_driver_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pynvml")
    monkeypatch.setattr(nvml, "_LIBRARY", "libno-such-driver.so.1")
    found = find_cards()
    assert found.cards == ()
    assert found.why_none == (
        "there is no NVIDIA driver library (libno-such-driver.so.1) on this machine"
    )


def test_a_broken_driver_is_one_sentence_in_the_drivers_words(driver: FakeDriver) -> None:
    driver.init_code = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    assert find_cards().why_none == "the NVIDIA driver does not answer: Driver Not Loaded"


def test_a_driver_without_a_card_is_one_sentence(driver: FakeDriver) -> None:
    assert find_cards().why_none == "the NVIDIA driver answers, but there is no card"


@pytest.mark.parametrize("text", ["", "-1", "7", "0,0", "GPU-f"])
def test_hidden_cards_are_one_sentence_that_says_what_is_allowed(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    driver.boards = [FakeBoard(A), FakeBoard(B)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    found = find_cards()
    assert found.cards == ()
    assert found.why_none == (
        f"CUDA_VISIBLE_DEVICES={text!r} leaves no card visible; allowed are the indexes 0 to 1 "
        f"or UUIDs such as {A}, each card once"
    )


def test_visible_cards_come_in_the_order_they_are_named(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.boards = [FakeBoard(A), FakeBoard(B)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert uuids() == [B, A]


def test_unlike_cards_are_taken_in_pci_order_with_a_note(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.boards = [FakeBoard(A, name="Fake 4090", bus=9), FakeBoard(B, name="Fake 100", bus=3)]
    found = find_cards()
    assert [card.uuid for card in found.cards] == [B, A]
    assert "CUDA_DEVICE_ORDER is not PCI_BUS_ID" in found.note
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert find_cards().note == ""


def test_unlike_cards_named_by_uuid_need_no_note(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.boards = [FakeBoard(A, name="Fake 4090"), FakeBoard(B, name="Fake 100")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"{B},{A}")
    assert uuids() == [B, A]
    assert find_cards().note == ""


def test_once_torch_has_initialised_cuda_its_order_is_the_truth(
    driver: FakeDriver, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.boards = [FakeBoard(A, name="Fake 4090"), FakeBoard(B, name="Fake 100")]
    cuda.stats, cuda.uuids = [stats(), stats()], [B[4:], A[4:]]
    found = find_cards()
    assert [card.uuid for card in found.cards] == [B, A]
    assert found.note == ""


def test_torch_that_has_not_initialised_cuda_is_not_asked(
    driver: FakeDriver, cuda: FakeCuda
) -> None:
    driver.boards = [FakeBoard(A)]
    cuda.initialised, cuda.broken = False, "asked too early"
    assert uuids() == [A]


def test_the_variable_changed_after_cuda_was_initialised_changes_nothing(
    driver: FakeDriver, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.boards = [FakeBoard(A), FakeBoard(B)]
    cuda.stats, cuda.uuids = [stats()], [A[4:]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert uuids() == [A]


def test_a_cuda_that_no_longer_answers_leaves_the_drivers_cards(
    driver: FakeDriver, cuda: FakeCuda
) -> None:
    driver.boards = [FakeBoard(A)]
    cuda.stats, cuda.uuids, cuda.broken = [stats()], [A[4:]], "CUDA error: unspecified"
    assert uuids() == [A]


def test_rocm_cards_are_torchs_cards(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    cuda.stats, cuda.uuids, cuda.contexts = [stats()], [A[4:]], {0}
    (card,) = find_cards().cards
    assert card == Card(A, "Fake 0", 15 * GIB, "cuda")
    assert driver_reading(card) == DriverReading(2 * GIB, 6 * GIB, 8 * GIB, 0)
    assert process_bytes(card) == {}


def test_mig_shows_the_slice_and_its_memory(driver: FakeDriver) -> None:
    driver.boards = [FakeBoard(A, slices=[FakeSlice("MIG-1", 7), FakeSlice("MIG-2", 8)])]
    (card,) = find_cards().cards
    assert card == Card("MIG-1", "a MIG slice", 5 * GIB)
    assert driver_reading(card) == DriverReading(0, 5 * GIB, 5 * GIB, 0)


def test_a_mig_slice_that_torch_tells_by_its_gpu_is_the_visible_slice(
    driver: FakeDriver, cuda: FakeCuda
) -> None:
    driver.boards = [FakeBoard(A, slices=[FakeSlice("MIG-1", 7)])]
    cuda.stats, cuda.uuids = [stats()], [A[4:]]
    assert uuids() == ["MIG-1"]


def test_a_process_could_have_each_slice_as_its_card(driver: FakeDriver) -> None:
    slices = [FakeSlice("MIG-1", 1), None, FakeSlice("MIG-2", 2, total=9 * GIB)]
    driver.boards = [FakeBoard(A, slices=slices)]
    assert [(card.uuid, card.total) for card in cards_to_choose(None)] == [
        ("MIG-1", 5 * GIB),
        ("MIG-2", 9 * GIB),
    ]


ME, NOBODY = os.getpid(), 4_000_000_000


@pytest.mark.parametrize(
    ("told", "here", "reserved", "own"),
    [
        ({ME: 5}, True, 5, 5),
        ({ME: 5}, True, 0, 5),
        ({ME: 5}, True, 6, None),  # less than is reserved: somebody else's number
        ({ME: 5, NOBODY: 1}, True, 0, 5),  # a process that has just ended
        ({ME: 5}, False, 0, 5),
        ({ME: 5, NOBODY: 1}, False, 0, None),  # numbers of another pid namespace
        ({NOBODY: 1}, True, 0, None),
        ({ME: None}, True, 0, None),  # WSL, MIG
        ({}, True, 0, None),
    ],
)
def test_a_process_knows_its_own_figure(
    told: dict[int, int | None],
    here: bool,
    reserved: int,
    own: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    namespace = str(Path("/proc/self/ns/pid").readlink())
    monkeypatch.setattr(users, "_FIRST_NAMESPACE", namespace if here else "another")
    monkeypatch.setattr(users, "process_bytes", lambda _: told)
    card = Card(A, "", 0)

    assert own_bytes(card, reserved) == own
    if not reserved:
        known = {pid: size for pid, size in told.items() if pid != ME or own}
        unknown = not here and NOBODY in told
        assert usage(card) == Usage({} if unknown else known, own or 0)


def test_what_anybody_uses_is_the_drivers_figure_or_else_that_of_the_processes(
    driver: FakeDriver,
) -> None:
    board = FakeBoard(A, used=3 * GIB, processes={1: GIB, 2: GIB})
    driver.boards = [board]
    assert used_bytes(Card(A, "", 0)) == 3 * GIB
    board.memory_code = NOT_SUPPORTED  # unified memory
    assert used_bytes(Card(A, "", 0)) == 2 * GIB


def test_mig_without_slices_is_one_sentence(driver: FakeDriver) -> None:
    driver.boards = [FakeBoard(A, slices=[])]
    assert find_cards().why_none == "MIG is on, but no MIG device has been made on any card"


def test_unified_memory_has_the_hosts_total_and_no_driver_figure(driver: FakeDriver) -> None:
    driver.boards = [FakeBoard(A, memory_code=NOT_SUPPORTED)]
    (card,) = find_cards().cards
    assert card.total > GIB
    assert driver_reading(card) is None


def test_unified_memory_is_read_through_torch_once_it_holds_a_context(
    driver: FakeDriver, cuda: FakeCuda
) -> None:
    driver.boards = [FakeBoard(A, memory_code=NOT_SUPPORTED)]
    cuda.stats, cuda.uuids = [stats()], [A[4:]]
    (card,) = find_cards().cards
    assert driver_reading(card) is None
    assert cuda.calls == []
    cuda.contexts = {0}
    assert driver_reading(card) == DriverReading(2 * GIB, 6 * GIB, 8 * GIB, 0)


def test_a_reading_after_the_driver_has_gone_is_none(driver: FakeDriver) -> None:
    driver.boards = [FakeBoard(A)]
    (card,) = find_cards().cards
    driver.running, driver.init_code = False, pynvml.NVML_ERROR_UNKNOWN
    assert driver_reading(card) is None
    assert process_bytes(card) == {}


def fake_accelerator(kind: str, **functions: Any) -> SimpleNamespace:
    return SimpleNamespace(
        current_accelerator=lambda: SimpleNamespace(type=kind),
        device_count=lambda: 1,
        memory_stats=lambda _index: {"allocated_bytes.all.current": 5},
        get_memory_info=lambda _index: (3 * GIB, 4 * GIB),
        **functions,
    )


def test_an_xpu_in_use_is_a_card(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="Fake Arc", total_memory=4 * GIB, uuid=b"\x01\x02")
    xpu = SimpleNamespace(is_initialized=lambda: True, get_device_properties=lambda _: properties)
    torch = SimpleNamespace(accelerator=fake_accelerator("xpu"), xpu=xpu)
    monkeypatch.setitem(sys.modules, "torch", torch)
    (card,) = find_cards().cards
    assert card == Card("XPU-0102", "Fake Arc", 4 * GIB, "xpu")
    assert driver_reading(card) == DriverReading(GIB, 3 * GIB, 4 * GIB, 0)
    xpu.is_initialized = lambda: False
    assert find_cards().cards == ()


def test_mps_in_use_is_a_card(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    mps = SimpleNamespace(recommended_max_memory=lambda: 8 * GIB)
    torch = SimpleNamespace(accelerator=fake_accelerator("mps"), mps=mps)
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert find_cards().cards == (Card("MPS-0", "mps", 8 * GIB, "mps"),)


def test_an_accelerator_without_statistics_has_no_cards(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_index: int) -> None:
        raise RuntimeError("Allocator for mps is not a DeviceAllocator.")

    accelerator = fake_accelerator("mps")
    accelerator.memory_stats = fails
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(accelerator=accelerator))
    assert find_cards().cards == ()


def python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_finding_and_reading_does_not_import_torch() -> None:
    code = (
        "import sys; from pytest_gpumem.devices import *; found = find_cards(); allocators();"
        "[driver_reading(card) for card in found.cards]; watch_peaks(print)(); record_stacks();"
        "allocation_stacks(); print('torch' in sys.modules)"
    )
    assert python(code) == "False"


def test_importing_the_room_loads_no_binding() -> None:
    code = (
        "import sys; import pytest_gpumem.devices;"
        "print({'torch', 'pynvml', 'ctypes'} & set(sys.modules))"
    )
    assert python(code) == "set()"


def test_a_torch_without_cuda_has_no_allocator_and_is_not_initialised() -> None:
    code = (
        "import torch; from pytest_gpumem.devices import allocators, find_cards, allocation_stacks;"
        "find_cards(); print(allocators(), allocation_stacks(), torch.cuda.is_initialized())"
    )
    assert python(code) == "() {} False"


def fake(kind: str) -> SimpleNamespace:
    device = SimpleNamespace(type=kind) if kind else None
    return SimpleNamespace(current_accelerator=lambda: device)


@pytest.mark.parametrize(
    ("torch", "maker"),
    [
        (None, ""),
        (SimpleNamespace(), ""),
        (SimpleNamespace(version=SimpleNamespace(hip="6.4"), accelerator=fake("cuda")), "rocm"),
        (SimpleNamespace(version=SimpleNamespace(hip=None), accelerator=fake("cuda")), ""),
        (SimpleNamespace(accelerator=fake("xpu")), "xpu"),
        (SimpleNamespace(accelerator=fake("mps")), "mps"),
        (SimpleNamespace(accelerator=fake("")), ""),
    ],
)
def test_other_makers_are_told_by_the_build_of_torch(
    monkeypatch: pytest.MonkeyPatch, torch: Any, maker: str
) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert torch_state.other_maker() == maker

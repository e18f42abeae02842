from __future__ import annotations

import ctypes
import sys

import pynvml
import pytest
from device_fakes import GIB, NOT_SUPPORTED, FakeBoard, FakeDriver, FakeSlice, uuid

from pytest_gpumem.devices import notes, nvml
from pytest_gpumem.devices.nvml import DriverReading, NoDriverError

A, B = uuid("a"), uuid("b")
NOT_AVAILABLE = 2**64 - 1


def test_without_a_driver_library_the_binding_is_not_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "pynvml")
    monkeypatch.setattr(nvml, "_LIBRARY", "libno-such-driver.so.1")
    with pytest.raises(NoDriverError, match=r"no NVIDIA driver library \(libno-such-driver"):
        nvml.boards()
    assert "pynvml" not in sys.modules


def test_a_library_that_is_not_one_is_named_with_the_loaders_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.delitem(sys.modules, "pynvml")
    monkeypatch.setattr(nvml, "_LIBRARY", __file__)
    with pytest.raises(NoDriverError, match=r"library cannot be loaded: .*test_nvml"):
        nvml.boards()


def test_a_binding_somebody_imported_says_that_there_is_no_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    with pytest.raises(NoDriverError, match="there is no NVIDIA driver library"):
        nvml.boards()


def test_a_broken_driver_is_told_in_its_own_words(driver: FakeDriver) -> None:
    driver.init_code = pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
    with pytest.raises(NoDriverError, match="does not answer: RM has detected an NVML/RM version"):
        nvml.boards()


def test_a_driver_that_comes_back_is_asked_again(driver: FakeDriver) -> None:
    driver.init_code = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    with pytest.raises(NoDriverError, match="Driver Not Loaded"):
        nvml.boards()
    driver.init_code = 0
    driver.boards = [FakeBoard(A)]
    assert [board.uuid for board in nvml.boards()] == [A]


def test_boards_come_in_pci_order_whatever_order_nvml_has(driver: FakeDriver) -> None:
    driver.boards = [FakeBoard(A, bus=9), FakeBoard(B, bus=3)]
    assert [board.uuid for board in nvml.boards()] == [B, A]


def test_boards_keep_nvmls_order_where_pci_places_are_not_told(driver: FakeDriver) -> None:
    driver.boards = [FakeBoard(A, bus=9), FakeBoard(B, bus=3)]
    driver.missing = {"nvmlDeviceGetPciInfo_v3"}
    assert [board.uuid for board in nvml.boards()] == [A, B]


def test_a_lost_card_is_left_out_and_noted(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.boards = [FakeBoard(A), FakeBoard(B)]
    handle_of = pynvml.nvmlDeviceGetHandleByIndex

    def lost_first(index: int) -> object:
        if index == 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return handle_of(index)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lost_first)
    assert [board.uuid for board in nvml.boards()] == [B]
    assert notes() == ("the NVIDIA driver does not answer for card 0 of 2",)


def test_memory_tells_what_the_driver_reserves_apart_from_what_is_used(
    driver: FakeDriver,
) -> None:
    driver.boards = [FakeBoard(A, total=16 * GIB, used=3 * GIB, reserved=GIB)]
    assert nvml.memory(A) == DriverReading(
        used=3 * GIB, free=12 * GIB, total=16 * GIB, reserved=GIB
    )


def test_an_older_driver_counts_what_it_reserves_as_used(driver: FakeDriver) -> None:
    driver.boards = [FakeBoard(A, total=16 * GIB, used=3 * GIB, reserved=GIB)]
    driver.missing = {"nvmlDeviceGetMemoryInfo_v2"}
    assert nvml.memory(A) == DriverReading(used=4 * GIB, free=12 * GIB, total=16 * GIB, reserved=0)


@pytest.mark.parametrize(
    "board",
    [
        pytest.param(FakeBoard(A, memory_code=NOT_SUPPORTED), id="not-supported"),
        pytest.param(FakeBoard(A, total=0, used=0, reserved=0), id="zero"),
    ],
)
def test_unified_memory_has_no_driver_figure(driver: FakeDriver, board: FakeBoard) -> None:
    driver.boards = [board]
    assert nvml.memory(A) is None


def test_an_unknown_card_has_no_figures(driver: FakeDriver) -> None:
    driver.boards = [FakeBoard(A)]
    assert nvml.memory(B) is None
    assert nvml.processes(B) == {}
    assert nvml.name(B) == ""


def test_processes_are_told_by_pid_and_untold_figures_are_none(driver: FakeDriver) -> None:
    driver.boards = [FakeBoard(A, processes={7: GIB, 8: NOT_AVAILABLE})]
    assert nvml.processes(A) == {7: GIB, 8: None}


def test_a_figure_the_binding_lets_through_as_17179869184_gib_is_not_told(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pynvml, "NVML_VALUE_NOT_AVAILABLE_ulonglong", ctypes.c_ulonglong(1))
    driver.boards = [FakeBoard(A, processes={8: NOT_AVAILABLE})]
    assert nvml.processes(A) == {8: None}


@pytest.mark.newest
def test_an_older_driver_is_asked_by_its_older_process_call(driver: FakeDriver) -> None:
    driver.boards = [FakeBoard(A, processes={7: GIB, 8: NOT_AVAILABLE})]
    driver.missing = {"nvmlDeviceGetComputeRunningProcesses_v3"}
    assert nvml.processes(A) == {7: GIB, 8: None}


def test_a_driver_without_any_known_process_call_tells_no_process(driver: FakeDriver) -> None:
    driver.boards = [FakeBoard(A, processes={7: GIB})]
    driver.missing = {f"nvmlDeviceGetComputeRunningProcesses_v{version}" for version in (2, 3)}
    assert nvml.processes(A) == {}


def test_mig_slices_are_cards_of_their_own(driver: FakeDriver) -> None:
    made = [FakeSlice("MIG-1", 7), None, FakeSlice("MIG-2", 9, total=10 * GIB)]
    driver.boards = [FakeBoard(A, slices=made)]
    (board,) = nvml.boards()
    assert board.slices is not None
    assert [(each.uuid, each.path) for each in board.slices] == [
        ("MIG-1", f"MIG-{A}/7/0"),
        ("MIG-2", f"MIG-{A}/9/0"),
    ]
    reading = nvml.memory("MIG-2")
    assert reading is not None
    assert reading.total == 10 * GIB


def test_a_driver_without_mig_calls_has_plain_boards(driver: FakeDriver) -> None:
    driver.boards = [FakeBoard(A)]
    driver.missing = {"nvmlDeviceGetMigMode"}
    assert nvml.boards()[0].slices is None


def test_nvml_is_started_again_when_the_suite_has_shut_it_down(driver: FakeDriver) -> None:
    driver.boards = [FakeBoard(A)]
    assert nvml.memory(A) is not None
    driver.running = False
    assert nvml.memory(A) is not None


def test_nvml_that_stays_down_is_one_sentence(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.boards = [FakeBoard(A)]
    nvml.boards()
    driver.running = False
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    with pytest.raises(NoDriverError, match="does not start again"):
        nvml.boards()

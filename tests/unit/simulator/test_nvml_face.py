from __future__ import annotations

import importlib.metadata
import os
import re
from typing import TYPE_CHECKING, Any

import pynvml
import pytest
from pynvml import nvmlDeviceGetCount, nvmlInit

from pytest_gpumem.simulator import nvml_face, spec
from pytest_gpumem.simulator.card import SharedCard

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 2**20
TOTAL, CONTEXT = 1000 * MIB, 100 * MIB
NO_INSTANCE = 0xFFFFFFFF


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SharedCard]:
    """A card that NVML answers for; nothing of it is left in pynvml afterwards."""
    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "_nvmlLib_refcount", 0)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    card = SharedCard.create(tmp_path / "card", total=TOTAL, context=CONTEXT)
    nvml_face.install([card])
    yield card
    card.close()


@pytest.fixture
def handle(card: SharedCard) -> Any:
    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByIndex(0)


def test_the_private_names_of_this_version_of_pynvml_are_known() -> None:
    version = importlib.metadata.version("nvidia-ml-py")
    assert version.startswith("13.615."), "look through pynvml's loading code, then name it here"


def test_a_pynvml_without_those_names_is_refused_in_one_sentence(
    card: SharedCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(pynvml, "nvmlLib")
    with pytest.raises(RuntimeError, match=r"nvidia-ml-py 13\.615\.\d+, which has no nvmlLib;"):
        nvml_face.install([card])


def test_names_imported_before_answer_for_the_card(card: SharedCard) -> None:
    nvmlInit()
    assert nvmlDeviceGetCount() == 1


def test_the_card_is_found_by_index_uuid_and_bus(card: SharedCard, handle: Any) -> None:
    found = [
        handle,
        pynvml.nvmlDeviceGetHandleByUUID(card.uuid),
        pynvml.nvmlDeviceGetHandleByPciBusId(pynvml.nvmlDeviceGetPciInfo(handle).busId),
    ]
    assert [pynvml.nvmlDeviceGetUUID(each) for each in found] == [card.uuid] * 3


def test_other_cards_are_not_found(handle: Any) -> None:
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlDeviceGetHandleByIndex(1)
    with pytest.raises(pynvml.NVMLError_NotFound):
        pynvml.nvmlDeviceGetHandleByUUID("GPU-00000000-0000-0000-0000-000000000000")
    with pytest.raises(pynvml.NVMLError_NotFound):
        pynvml.nvmlDeviceGetHandleByPciBusId("00000000:02:00.0")


@pytest.mark.parametrize("wrong", [None, pynvml.c_nvmlDevice_t()], ids=["None", "null"])
def test_a_handle_of_no_card_is_an_invalid_argument(handle: Any, wrong: Any) -> None:
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlDeviceGetName(wrong)


def test_the_card_describes_itself(card: SharedCard, handle: Any) -> None:
    assert pynvml.nvmlDeviceGetName(handle) == card.name
    assert pynvml.nvmlDeviceGetIndex(handle) == 0
    assert pynvml.nvmlDeviceGetMinorNumber(handle) == 0
    assert pynvml.nvmlDeviceGetCudaComputeCapability(handle) == spec.CAPABILITY
    place = pynvml.nvmlDeviceGetPciInfo(handle)
    assert (place.domain, place.bus, place.device) == (0, 1, 0)
    use = pynvml.nvmlDeviceGetUtilizationRates(handle)
    assert (use.gpu, use.memory) == (0, 0)


def test_versions_are_numbers_that_tools_can_parse(handle: Any) -> None:
    numbers = re.compile(r"\d+(\.\d+)+")
    assert numbers.fullmatch(pynvml.nvmlSystemGetDriverVersion())
    assert numbers.fullmatch(pynvml.nvmlSystemGetNVMLVersion())
    assert pynvml.nvmlSystemGetCudaDriverVersion() // 1000 >= 12
    assert pynvml.nvmlSystemGetCudaDriverVersion_v2() // 1000 >= 12


def test_both_versions_of_the_memory_call_agree_with_the_card(
    card: SharedCard, handle: Any
) -> None:
    card.join()
    card.reserve(50 * MIB)
    first = pynvml.nvmlDeviceGetMemoryInfo(handle)
    second = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    figures = (TOTAL, card.free(), CONTEXT + 50 * MIB)
    assert (first.total, first.free, first.used) == figures
    assert (second.total, second.free, second.used, second.reserved) == (*figures, 0)


def test_an_unknown_version_of_the_memory_call_is_refused(handle: Any) -> None:
    with pytest.raises(pynvml.NVMLError_ArgumentVersionMismatch):
        pynvml.nvmlDeviceGetMemoryInfo(handle, version=7)


@pytest.mark.parametrize(
    "ask",
    [
        getattr(pynvml, name)
        for version in ("", "_v2", "_v3")
        # Older bindings have one of the numbered ones.
        if hasattr(pynvml, name := f"nvmlDeviceGetComputeRunningProcesses{version}")
    ],
)
def test_the_processes_that_joined_are_told_with_their_bytes(
    card: SharedCard, handle: Any, ask: Any
) -> None:
    assert ask(handle) == []
    card.join()
    card.reserve(50 * MIB)
    (told,) = ask(handle)
    assert (told.pid, told.usedGpuMemory) == (os.getpid(), CONTEXT + 50 * MIB)
    assert (told.gpuInstanceId, told.computeInstanceId) == (NO_INSTANCE, NO_INSTANCE)


def test_a_list_of_processes_that_is_too_short_is_refused(card: SharedCard, handle: Any) -> None:
    card.join()
    function = pynvml._nvmlGetFunctionPointer("nvmlDeviceGetComputeRunningProcesses_v3")
    count = pynvml.c_uint(0)
    refusal = function(handle, pynvml.byref(count), None)
    assert (refusal, count.value) == (pynvml.NVML_ERROR_INSUFFICIENT_SIZE, 1)


def test_no_process_draws_on_the_card(card: SharedCard, handle: Any) -> None:
    card.join()
    assert pynvml.nvmlDeviceGetGraphicsRunningProcesses(handle) == []


@pytest.mark.parametrize(
    "ask",
    [
        pynvml.nvmlDeviceGetMigMode,
        pynvml.nvmlDeviceGetPowerUsage,
        pynvml.nvmlDeviceGetEccMode,
        pynvml.nvmlDeviceGetBAR1MemoryInfo,
    ],
)
def test_what_the_card_cannot_tell_is_not_supported(handle: Any, ask: Any) -> None:
    with pytest.raises(pynvml.NVMLError_NotSupported):
        ask(handle)


def test_nothing_answers_before_the_start_nor_after_the_last_shutdown(card: SharedCard) -> None:
    with pytest.raises(pynvml.NVMLError_Uninitialized):
        pynvml.nvmlDeviceGetCount()
    pynvml.nvmlInit()
    pynvml.nvmlInit()
    pynvml.nvmlShutdown()
    assert pynvml.nvmlDeviceGetCount() == 1
    pynvml.nvmlShutdown()
    with pytest.raises(pynvml.NVMLError_Uninitialized):
        pynvml.nvmlDeviceGetCount()
    with pytest.raises(pynvml.NVMLError_Uninitialized):
        pynvml.nvmlShutdown()


def test_an_error_without_a_known_name_is_told_by_its_number(card: SharedCard) -> None:
    assert pynvml.nvmlErrorString(987) == "NVML error 987"


def test_a_new_card_takes_the_place_of_the_old_one_for_those_who_had_started(
    handle: Any, tmp_path: Path
) -> None:
    newer = SharedCard.create(tmp_path / "newer", total=5, context=0)
    nvml_face.install([newer])
    found = pynvml.nvmlDeviceGetHandleByIndex(0)
    assert pynvml.nvmlDeviceGetUUID(found) == newer.uuid
    assert pynvml.nvmlDeviceGetMemoryInfo(found).total == 5
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlDeviceGetMemoryInfo(handle)
    newer.close()

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from device_fakes import stats

from pytest_gpumem.devices import (
    Recording,
    allocation_stacks,
    notes,
    record_stacks,
    torch_private,
    watch_peaks,
)

if TYPE_CHECKING:
    from device_fakes import FakeCuda


@pytest.mark.newest
def test_every_private_name_is_in_the_torch_of_the_named_version_and_in_newer_ones() -> None:
    import torch

    named, here = (
        version.split(".")[:2] for version in (torch_private.FOUND_IN, torch.__version__)
    )
    assert [*map(int, here)] >= [*map(int, named)]
    folder = Path(torch.__file__).parent
    # A CPU build has not got the CUDA functions, but its stubs and dynamo's list name them.
    declared = (folder / "_C/__init__.pyi").read_text() + (
        folder / "_dynamo/trace_rules.py"
    ).read_text()
    names = (
        *torch_private.PEAKS,
        *torch_private.PEAKS.values(),
        torch_private.CLEAR_WORKSPACES,
        torch_private.HAS_CONTEXT,
        torch_private.IS_RECORDING,
        torch_private.RECORD,
        torch_private.RECORD_AS_BEFORE,
    )
    assert [name for name in names if name not in declared] == []
    assert callable(torch.cuda._lazy_call)
    assert callable(torch.cuda.memory._record_memory_history)
    assert callable(torch.cuda.memory._snapshot)


def test_the_callback_comes_before_the_reset(cuda: FakeCuda) -> None:
    cuda.stats = [stats(), stats()]
    undo = watch_peaks(lambda: cuda.calls.append(("told",)))
    cuda.reset_peak_memory_stats(1)
    assert cuda.calls == [("told",), ("reset_peak", 1)]
    undo()
    cuda.reset_peak_memory_stats(1)
    assert cuda.calls[2:] == [("reset_peak", 1)]


@pytest.mark.newest
def test_every_public_name_of_the_reset_is_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from torch.accelerator import reset_peak_memory_stats as bound_early

    def swallow(index: int) -> None:
        del index

    def yes() -> bool:
        return True

    for name in (*torch_private.PEAKS, *torch_private.PEAKS.values()):
        monkeypatch.setattr(torch._C, name, swallow, raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_isAllocatorInitialized", yes)
    monkeypatch.setattr(torch.accelerator.memory, "_get_device_index", lambda *_, **__: 0)
    told: list[int] = []
    undo = watch_peaks(lambda: told.append(1))
    try:
        torch.cuda.reset_peak_memory_stats(0)
        with pytest.warns(FutureWarning):
            torch.cuda.reset_max_memory_allocated(0)
        with pytest.warns(FutureWarning):
            torch.cuda.reset_max_memory_cached(0)
        torch.accelerator.reset_peak_memory_stats()
        bound_early()
        torch.xpu.reset_peak_memory_stats(0)
    finally:
        undo()
    assert len(told) == 6
    torch.cuda.reset_peak_memory_stats(0)
    assert len(told) == 6
    assert torch._C._cuda_resetPeakMemoryStats is swallow


def test_hooks_may_be_undone_in_any_order(cuda: FakeCuda) -> None:
    cuda.stats = [stats()]
    told: list[str] = []
    undo_first = watch_peaks(lambda: told.append("first"))
    undo_second = watch_peaks(lambda: told.append("second"))
    undo_first()
    cuda.reset_peak_memory_stats(0)
    undo_second()
    cuda.reset_peak_memory_stats(0)
    assert told == ["second"]


def peak(cuda: FakeCuda) -> int:
    return int(cuda.memory_stats_as_nested_dict(0)["allocated_bytes"]["all"]["peak"])


def test_the_suite_reads_its_own_peak_whatever_we_reset(cuda: FakeCuda) -> None:
    cuda.stats = [stats(allocated=10, peak=70)]
    undo = watch_peaks(lambda: None)
    with torch_private.unnoticed():
        cuda.reset_peak_memory_stats(0)
        assert peak(cuda) == 10
    assert peak(cuda) == 70
    cuda.reset_peak_memory_stats(0)
    assert peak(cuda) == 10
    undo()


def test_a_higher_peak_since_is_the_suites_peak(cuda: FakeCuda) -> None:
    cuda.stats = [stats(allocated=10, peak=70)]
    undo = watch_peaks(lambda: None)
    with torch_private.unnoticed():
        cuda.reset_peak_memory_stats(0)
    cuda.stats = [stats(allocated=10, peak=90)]
    assert peak(cuda) == 90
    undo()


def test_resets_of_our_own_are_told_to_nobody(cuda: FakeCuda) -> None:
    cuda.stats = [stats()]
    told: list[str] = []
    undo = watch_peaks(lambda: told.append("told"))
    with torch_private.unnoticed():
        cuda.reset_peak_memory_stats(0)
    undo()
    assert told == []


def test_without_torch_there_is_nothing_to_hook_and_nothing_to_record(no_torch: None) -> None:
    watch_peaks(pytest.fail)()
    assert record_stacks() == "allocation stacks are not recorded: torch is not loaded"
    assert allocation_stacks() == {}


def test_a_torch_that_cannot_record_says_so(cuda: FakeCuda) -> None:
    assert record_stacks() == "allocation stacks are not recorded: torch 2.13.0 cannot"


class Recorder:
    """torch's allocation history: what it was asked, and a snapshot to give."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.asked: list[dict[str, Any]] = []
        self.waiting: list[Any] = []
        self.on = False
        self.blocks: list[dict[str, Any]] = []
        core = sys.modules["torch"]._C
        core._cuda_record_memory_history = None
        core._cuda_isHistoryEnabled = lambda: self.on
        cuda._lazy_call = self.waiting.append
        cuda.memory = SimpleNamespace(
            _record_memory_history=self.record,
            _snapshot=lambda: {"segments": [{"blocks": self.blocks}]},
        )

    def record(self, **options: Any) -> None:
        self.asked.append(options)
        self.on = options.get("enabled") is not None

    def suite_records(self) -> None:
        """Let the suite start a recording of its own, as torch does it."""
        sys.modules["torch"]._C._cuda_record_memory_history("all")


@pytest.fixture
def recorder(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder(cuda)
    sys.modules["torch"]._C._cuda_record_memory_history = lambda enabled: made.record(
        enabled=enabled
    )
    monkeypatch.setattr(torch_private, "_ours", threading.Event())
    return made


def test_recording_waits_for_cuda_and_keeps_live_allocations_only(recorder: Recorder) -> None:
    assert record_stacks() == ""
    assert recorder.asked == []
    (start,) = recorder.waiting
    start()
    assert recorder.asked == [{"enabled": "state", "context": "state", "stacks": "python"}]


def test_a_recording_of_the_suites_own_is_left_as_it_is(recorder: Recorder) -> None:
    recorder.on = True
    record_stacks()
    recorder.waiting[0]()
    assert recorder.asked == []


def test_a_recording_that_fails_does_not_fail_cudas_initialisation(
    recorder: Recorder, cuda: FakeCuda
) -> None:
    def fails(**_options: Any) -> None:
        raise RuntimeError("no stacks on this platform")

    cuda.memory._record_memory_history = fails
    record_stacks()
    recorder.waiting[0]()
    assert notes() == ("recording allocation stacks failed: no stacks on this platform",)


def frame(path: str, line: int, name: str) -> dict[str, Any]:
    return {"filename": path, "line": line, "name": name}


def test_stacks_are_told_by_address_without_the_frames_of_torch(recorder: Recorder) -> None:
    recorder.on = True
    ours = str(Path(torch_private.__file__).parent / "x.py")
    frames = [
        frame("/lib/torch/nn/modules/linear.py", 9, "forward"),
        frame("/home/me/test_x.py", 7, "make"),
        frame(ours, 1, "wrapper"),
        frame("/home/me/conftest.py", 3, "model"),
        frame("/lib/torchvision/models.py", 2, "load"),
        frame(str(Path(pytest.__file__).parents[1] / "_pytest" / "fixtures.py"), 5, "call"),
        frame("/usr/bin/pytest", 1, "<module>"),
    ]
    recorder.blocks = [
        {"address": 512, "state": "active_allocated", "frames": frames},
        {"address": 1024, "state": "inactive", "frames": frames},
        {"address": 2048, "state": "active_allocated", "frames": []},
        {"address": 4096, "state": "active_allocated"},
        {"address": 8192, "state": "active_allocated", "frames": frames[:1]},
    ]
    assert allocation_stacks() == {
        512: (
            "/home/me/test_x.py:7 make",
            "/home/me/conftest.py:3 model",
            "/lib/torchvision/models.py:2 load",
        )
    }


def test_no_snapshot_is_taken_while_nothing_is_recorded(recorder: Recorder) -> None:
    recorder.blocks = [{"address": 1, "state": "active_allocated", "frames": [frame("a", 1, "f")]}]
    assert allocation_stacks() == {}


def test_a_snapshot_that_fails_is_noted(recorder: Recorder, cuda: FakeCuda) -> None:
    def fails() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    recorder.on = True
    cuda.memory._snapshot = fails
    assert allocation_stacks() == {}
    assert notes() == ("reading allocation stacks failed: CUDA error: unspecified launch failure",)


ALL = {"enabled": "all", "context": "alloc", "stacks": "python", "max_entries": 7}
OFF = {"enabled": None}
STATE = {"enabled": "state", "context": "state", "stacks": "python"}


def test_a_recording_begins_with_cuda_and_ends_with_the_test(recorder: Recorder) -> None:
    recording = Recording(7)
    assert recording.read() is None
    recorder.waiting[0]()
    assert recorder.asked == [OFF, ALL]
    assert recording.read() == {"segments": [{"blocks": []}]}
    recording.end()
    assert recorder.asked == [OFF, ALL, OFF]
    assert not recorder.on


def test_stacks_of_living_allocations_go_on_behind_a_recording(recorder: Recorder) -> None:
    record_stacks()
    recording = Recording(7)
    for start in recorder.waiting:
        start()
    recording.end()
    assert recorder.asked == [STATE, OFF, ALL, OFF, STATE]


def test_a_recording_that_was_over_before_cuda_began_records_nothing(recorder: Recorder) -> None:
    Recording(7).end()
    recorder.waiting[0]()
    assert recorder.asked == []


@pytest.mark.parametrize("before", [True, False])
def test_a_recording_gives_way_to_one_of_the_suite(recorder: Recorder, before: bool) -> None:
    recorder.on = before
    recording = Recording(7)
    recorder.waiting[0]()
    if not before:
        recorder.suite_records()
    asked = list(recorder.asked)
    assert recording.read() is None
    recording.end()
    assert recorder.asked == asked
    assert recorder.on
    who = "suite" if before else "test"
    assert recording.why_not == f"the {who} records torch's memory history itself"


def test_a_torch_that_cannot_record_events_says_so(cuda: FakeCuda) -> None:
    assert Recording(7).why_not == "torch 2.13.0 cannot record allocations"


def test_without_torch_no_events_are_recorded(no_torch: None) -> None:
    recording = Recording(7)
    assert recording.why_not == "torch was not loaded when the test began"
    assert recording.read() is None
    recording.end()


def test_what_torch_does_not_tell_is_a_note_and_no_error(
    recorder: Recorder, cuda: FakeCuda
) -> None:
    def fails(**_options: Any) -> None:
        raise RuntimeError("cudaMallocAsync does not yet support recordHistory")

    cuda.memory._record_memory_history = fails
    recording = Recording(7)
    recorder.waiting[0]()
    assert recording.read() is None
    assert "does not yet support recordHistory" in recording.why_not
    assert "recording allocations failed: cudaMallocAsync" in notes()[0]

"""The private names of torch that measuring needs: this module is their only home.

Every name is looked up when it is used. Where a torch has not got it, the function does nothing
and says why; ``FOUND_IN`` is the version in which all of them were found.
"""

from __future__ import annotations

import functools
import itertools
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gpumem.devices import torch_state
from pytest_gpumem.devices.notebook import note_failure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FOUND_IN = "2.13"

# Every public way to reset peaks ends in one of these, names bound by `from ... import` too,
# and every public way to read them in its twin.
PEAKS = {
    "_cuda_resetPeakMemoryStats": "_cuda_memoryStats",
    "_xpu_resetPeakMemoryStats": "_xpu_memoryStats",
    "_accelerator_resetPeakStats": "_accelerator_getDeviceStats",
}
ALLOCATOR_SETTINGS = "_accelerator_getAllocatorSettings"
CLEAR_WORKSPACES = "_cuda_clearCublasWorkspaces"
HAS_CONTEXT = "_cuda_hasPrimaryContext"
IS_RECORDING = "_cuda_isHistoryEnabled"
RECORD = "_cuda_record_memory_history"
RECORD_AS_BEFORE = "_cuda_record_memory_history_legacy"

_DEFAULT_POOL = (0, 0)

_unnoticed = threading.local()


def _private(name: str) -> Any | None:
    """Return ``torch._C.<name>``, None where this torch or this build has not got it."""
    return getattr(getattr(sys.modules.get("torch"), "_C", None), name, None)


def has_context(index: int) -> bool:
    """Whether this process holds a CUDA context on device ``index``; False when it is unknown."""
    ask = _private(HAS_CONTEXT)
    return ask is not None and bool(ask(index))


class unnoticed:  # noqa: N801  # reads as a statement: with unnoticed(): ...
    """Read and reset peaks within, on this thread, as if ``watch_peaks`` were not there."""

    def __enter__(self) -> None:
        _unnoticed.depth = getattr(_unnoticed, "depth", 0) + 1

    def __exit__(self, *_error: object) -> None:
        _unnoticed.depth -= 1


def watch_peaks(callback: Callable[[], object]) -> Callable[[], None]:
    """Share the peak statistics with the suite, so that neither spoils the other's; return undo.

    ``callback`` is called right before anybody else resets them, so that a peak can be noted
    before it is lost. Resets made within ``unnoticed`` call nobody, and the suite goes on
    reading the peak since its own last reset, as if they had not been made. Covers
    ``torch.cuda``, ``torch.xpu`` and ``torch.accelerator`` under all their names. torch must be
    loaded: before that there is nothing to watch, and the call does nothing.
    """
    kept: dict[int, _Peaks] = {}
    undos = []
    for reset, read in PEAKS.items():
        if _private(reset) is not None and _private(read) is not None:
            undos.append(_watch_reset(reset, _private(read), callback, kept))
            undos.append(_watch_read(read, kept))

    def undo() -> None:
        for each in reversed(undos):
            each()

    return undo


_Peaks = dict[tuple[str, str], int]
"""Highest value by statistic and pool: ("allocated_bytes", "all") and so on."""


def _watch_reset(
    name: str, read: Any, callback: Callable[[], object], kept: dict[int, _Peaks]
) -> Callable[[], None]:
    def before(index: int) -> None:
        if getattr(_unnoticed, "depth", 0):
            kept[index] = _higher(read(index), kept.get(index, {}))
        else:
            callback()
            kept.pop(index, None)

    def reset(original: Any, index: int) -> Any:
        before(index)
        return original(index)

    return _wrap(name, reset)


def _watch_read(name: str, kept: dict[int, _Peaks]) -> Callable[[], None]:
    def read(original: Any, index: int) -> Any:
        stats = original(index)
        if kept and not getattr(_unnoticed, "depth", 0):
            for (stat, pool), peak in _higher(stats, kept.get(index, {})).items():
                stats[stat][pool]["peak"] = peak
        return stats

    return _wrap(name, read)


def _higher(stats: dict[str, Any], kept: _Peaks) -> _Peaks:
    """Return the peaks of torch's nested statistics, or what was kept where that is higher."""
    return {
        (stat, pool): max(figures["peak"], kept.get((stat, pool), 0))
        for stat, pools in stats.items()
        if isinstance(pools, dict)
        for pool, figures in pools.items()
        if isinstance(figures, dict) and "peak" in figures
    }


def _wrap(name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Have ``torch._C.<name>`` call ``around(original, ...)``; return what takes it off again."""
    core = sys.modules["torch"]._C
    original = getattr(core, name)
    on = True

    @functools.wraps(original)
    def wrapper(*arguments: Any) -> Any:
        return around(original, *arguments) if on else original(*arguments)

    def undo() -> None:
        nonlocal on
        on = False  # somebody may have wrapped us, or kept the wrapper
        if getattr(core, name) is wrapper:
            setattr(core, name, original)

    setattr(core, name, wrapper)
    return undo


def default_device() -> str:
    """Return the device that ``torch.set_default_device`` set, ``cpu`` where it set none.

    The public question makes a tensor there, and with it a context, to tell the device's index.
    """
    default = getattr(sys.modules.get("torch"), "_GLOBAL_DEVICE_CONTEXT", None)
    context = getattr(default, "device_context", None)
    return "cpu" if context is None else str(context.device)


def allocator_settings() -> str:
    """Return what was set by a call, "" for nothing and where torch does not tell."""
    ask = _private(ALLOCATOR_SETTINGS)
    return "" if ask is None else str(ask())


def clear_workspaces() -> None:
    """Free the workspaces that cuBLAS keeps from its first call on, as PyTorch's leak check does.

    Not while a private pool lives: a captured CUDA graph writes into the workspace it was
    captured with, which would then be somebody else's memory.
    """
    clear, cuda = _private(CLEAR_WORKSPACES), torch_state.cuda()
    if clear is None or cuda is None:
        return
    pools = {tuple(each.get("segment_pool_id", _DEFAULT_POOL)) for each in cuda.memory_snapshot()}
    if pools <= {_DEFAULT_POOL}:
        clear()


def living_blocks() -> frozenset[tuple[int, int]]:
    """Return address and bytes of all allocations of torch's CUDA allocator; some 3 us for each."""
    cuda = torch_state.cuda()
    try:
        segments = () if cuda is None else cuda.memory_snapshot()
    except Exception as error:
        note_failure("reading the allocator's blocks", error)
        return frozenset()
    return frozenset(
        (block["address"], block.get("requested_size", block["size"]))
        for segment in segments
        for block in segment["blocks"]
        if block["state"] == "active_allocated" and "address" in block
    )


def record_stacks() -> str:
    """Record where each allocation is made, from now or from CUDA's initialisation on.

    Only live allocations are kept, so memory does not grow with the run (about 2 us and a few KB
    per allocation). A recording that the suite started itself is left as it is. Returns why
    nothing is recorded, empty when it is.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return "allocation stacks are not recorded: torch is not loaded"
    # Recording initialises CUDA: it has to wait until the suite does.
    if _private(RECORD) is None or not when_initialised(_start_recording):
        return f"allocation stacks are not recorded: torch {torch.__version__} cannot"
    return ""


def when_initialised(act: Callable[[], None]) -> bool:
    """Call ``act`` once torch has initialised CUDA, now if it has; False if it never will be."""
    later = getattr(getattr(sys.modules.get("torch"), "cuda", None), "_lazy_call", None)
    if later is None:
        return False
    later(act)
    return True


_ours = threading.Event()
"""Set while stacks of living allocations are recorded because we asked for them."""


def _start_recording() -> None:
    try:
        if not _is_recording():
            _record(enabled="state", context="state", stacks="python")
            _ours.set()
    except Exception as error:  # within torch's own initialisation, which must not fail of it
        note_failure("recording allocation stacks", error)


def _is_recording() -> bool:
    ask = _private(IS_RECORDING)
    return ask is not None and bool(ask())


def _record(**how: Any) -> None:
    sys.modules["torch"].cuda.memory._record_memory_history(**how)


class Recording:
    """Records each allocation and free of torch's CUDA allocator with its Python stack.

    From now or from CUDA's initialisation on, until ``end``; some 2 us and a few KB for each. A
    recording of the suite's own is left as it is, whether it is there or comes: then there is
    none of ours.

    Args:
        most: events that are kept of each device, the last ones.

    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.why_not = ""
        """Why nothing is recorded, in a sentence without an end; "" while it is."""
        self._wanted = True
        self._started = False
        self._undos: list[Callable[[], None]] = []
        torch = sys.modules.get("torch")
        if torch is None:
            self.why_not = "torch was not loaded when the test began"
        elif _private(RECORD) is None or not when_initialised(self._start):
            self.why_not = f"torch {torch.__version__} cannot record allocations"

    def _start(self) -> None:
        if not self._wanted:
            return  # it was over before CUDA was initialised
        try:
            if _is_recording() and not _ours.is_set():
                self.why_not = "the suite records torch's memory history itself"
                return
            _record(enabled=None)  # what an earlier one left
            _record(enabled="all", context="alloc", stacks="python", max_entries=self.most)
            self._started = True
            for name in (RECORD, RECORD_AS_BEFORE):
                if _private(name) is not None:
                    self._undos.append(_wrap(name, self._give_way))
        except Exception as error:  # within torch's own initialisation, which must not fail of it
            note_failure("recording allocations", error)
            self.why_not = f"torch does not record allocations here: {error}"

    def _give_way(self, original: Any, *arguments: Any) -> Any:
        self.why_not = "the test records torch's memory history itself"
        _ours.clear()
        return original(*arguments)

    def read(self) -> dict[str, Any] | None:
        """Return what ``torch.cuda.memory._snapshot`` does, None where there is nothing of ours."""
        if self.why_not or not self._started:
            return None
        try:
            found: dict[str, Any] = sys.modules["torch"].cuda.memory._snapshot()
        except Exception as error:
            note_failure("reading recorded allocations", error)
            self.why_not = f"torch does not tell what it recorded: {error}"
            return None
        return found

    def end(self) -> None:
        """Stop, and go on with stacks of living allocations where these are asked for."""
        self._wanted = False
        for undo in reversed(self._undos):
            undo()
        self._undos.clear()
        if self._started and not self.why_not:
            try:
                _record(enabled=None)
                if _ours.is_set():
                    _record(enabled="state", context="state", stacks="python")
            except Exception as error:
                note_failure("ending the record of allocations", error)


def allocation_stacks() -> dict[int, tuple[str, ...]]:
    """Return the address of each live allocation -> its stack, innermost user frame first.

    A frame is ``path:line function``. Frames of torch and of this package are left out, and those
    of pytest and of what called it; an allocation of which nothing else is left, or made before
    recording began, is not in it.
    """
    cuda = torch_state.cuda()
    if cuda is None or (_private(IS_RECORDING) is not None and not _is_recording()):
        return {}
    try:
        segments = cuda.memory._snapshot()["segments"]
    except Exception as error:
        note_failure("reading allocation stacks", error)
        return {}
    blocks = (block for segment in segments for block in segment["blocks"])
    stacks = {
        block["address"]: _user_frames(block.get("frames", ()))
        for block in blocks
        if block["state"] == "active_allocated"
    }
    return {address: stack for address, stack in stacks.items() if stack}


def _user_frames(frames: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    ours = (_folder(sys.modules["torch"].__file__), _folder(__file__, above=1))
    runner = sys.modules.get("_pytest")
    outside = "\0" if runner is None else _folder(runner.__file__)
    inside = itertools.takewhile(lambda frame: not frame["filename"].startswith(outside), frames)
    return tuple(
        f"{frame['filename']}:{frame['line']} {frame['name']}"
        for frame in inside
        if not frame["filename"].startswith(ours)
    )


@functools.cache
def _folder(path: str, above: int = 0) -> str:
    """Return the folder of ``path``, or ``above`` more levels up, with a closing separator."""
    import os

    return str(Path(path).parents[above]) + os.sep

"""Whether somebody else computes with tensors: a thread, from where it stands, or a CUDA graph.

A call of torch that works on memory has let the GIL go, and ``weight.add_(1)`` counts as a user of
``weight`` nowhere. So whoever wants to give memory up first sees to it that new calls are stopped,
and then that each other thread has moved on from where it stood, or stands where it has nothing of
these tensors in hand.
"""

from __future__ import annotations

import contextlib
import dis
import gc
import os
import sys
import threading
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from pytest_gpumem.clock import clock
from pytest_gpumem.errors import InUseError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from types import FrameType

_PATIENCE = 0.02
"""Seconds in which a thread that runs Python is sure to have moved on."""
_THREADS = (f"{os.sep}threading.py", str(Path("concurrent", "futures", "thread.py")))
"""Ends of the files whose functions ``run`` call what a thread was started for."""
_STEPS, _MOST = 6, 10_000
"""How far, and to how many objects, is followed what such a thread was started with."""


def refuse(parts: Collection[int], but: Collection[int]) -> bool:
    """Wait until calls that other threads had begun are over.

    Args:
        parts: ids of the tensors, and of what computes with them.
        but: the idents of the threads that ask.

    Returns:
        Whether a backward pass is not over that another thread had begun. It may have any tensor in
        hand to which a graph brings gradients: of what torch's engine is about, nothing tells.

    Raises:
        InUseError: a thread computes with one of these objects, or a CUDA graph may.

    """
    if _there_are_cuda_graphs():
        raise InUseError("a CUDA graph reads weights from where they were when it was captured")
    others = _others(but)
    stuck = {key: _place(frame) for key, frame in others.items()}
    passes = _backward_passes(others.values())
    until = clock.monotonic() + _PATIENCE
    while (stuck or passes) and clock.monotonic() < until:
        clock.sleep(_PATIENCE / 40)
        others = _others(but)
        now = {key: _place(frame) for key, frame in others.items()}
        stuck = {key: place for key, place in stuck.items() if now.get(key) == place}
        passes &= _backward_passes(others.values())
    torch = str(Path(sys.modules["torch"].__file__ or "").parent), str(Path(__file__).parent)
    for key, frame in _others(but).items():
        if _has_in_hand(frame, parts, torch, stuck=key in stuck):
            names = {each.ident: each.name for each in threading.enumerate()}
            raise InUseError(f"the thread {names.get(key, key)!r} computes with it")
    return bool(passes)


def _there_are_cuda_graphs() -> bool:
    """Return whether a CUDA graph is left; which memory one computes with, nothing tells."""
    cuda = sys.modules["torch"].cuda
    if cuda.graph.default_capture_stream is None:  # none was ever captured
        return False
    return any(issubclass(type(each), cuda.CUDAGraph) for each in gc.get_objects())


def _others(but: Collection[int]) -> dict[int, FrameType]:
    return {key: frame for key, frame in sys._current_frames().items() if key not in but}


def _place(frame: FrameType) -> tuple[int, int]:
    return id(frame), frame.f_lasti


def _backward_passes(innermost: Iterable[FrameType]) -> set[int]:
    """Return the ids of the frames in which threads wait for torch's engine, whoever runs it."""
    home = sys.modules["torch"].autograd.__file__  # of ``backward`` and ``grad``
    found = set()
    for each in innermost:
        frame: FrameType | None = each
        while frame is not None:
            if frame.f_code.co_filename == home:
                found.add(id(frame))
            frame = frame.f_back
    return found


def _has_in_hand(
    innermost: FrameType, parts: Collection[int], torch: tuple[str, ...], *, stuck: bool
) -> bool:
    """Look at torch's frames and those of waking, and at where a thread stands that did not move.

    A thread may stand still with a model because it waits; that it does, nothing tells.
    """
    frame: FrameType | None = innermost
    while frame is not None:
        if frame.f_code.co_filename.startswith(torch):
            reached = _in_reach(frame)
        else:
            reached = _at_hand(frame) if stuck and frame is innermost else iter(())
        if any(id(each) in parts for each in reached):
            return True
        frame = frame.f_back
    return False


def _at_hand(frame: FrameType) -> Iterator[Any]:
    """Yield what a function names; and what that refers to, the nearest first, if it runs a thread.

    ``self._target(*self._args)`` may be a call into C, and then no variable is the tensor. In other
    functions what their variables refer to tells nothing, but for what the call names in which they
    stand: ``time.sleep`` beside ``self.model``, and ``self.model.weight.add_``.
    """
    found = [*frame.f_locals.values(), *map(frame.f_globals.get, frame.f_code.co_names)]
    yield from _named(frame)
    runs = frame.f_code.co_name == "run" and frame.f_code.co_filename.endswith(_THREADS)
    seen: set[int] = set()
    for _ in range(1 + _STEPS * runs):
        following: list[Any] = []
        for each in found:
            if id(each) in seen or issubclass(type(each), (type, ModuleType)):
                continue
            if len(seen) == _MOST:
                return
            seen.add(id(each))
            yield each
            if type(each) is FunctionType:  # not through its globals
                following += (each.__closure__, each.__defaults__)
            else:
                following += gc.get_referents(each)
        found = following


def _named(frame: FrameType) -> Iterator[Any]:
    """Yield what the call names in which a function stands, and what lies in containers on the way.

    Attributes are looked up where objects keep them, so that nobody's code runs: no property is
    found.
    """
    variables, attributes = _names(frame)
    found = [
        scope[name] for scope in (frame.f_locals, frame.f_globals) for name in variables & {*scope}
    ]
    for _ in range(1 + len(attributes)):
        following: list[Any] = []
        for each in found:
            if type(each) in (dict, list, tuple):
                following += list(each.values()) if type(each) is dict else each
                continue
            with contextlib.suppress(AttributeError):  # it has none: ``__slots__``, or is of C
                kept = object.__getattribute__(each, "__dict__")
                for table in (kept, *map(kept.get, ("_parameters", "_buffers", "_modules"))):
                    following += [table[name] for name in attributes if name in (table or ())]
        found = following[:_MOST]
        yield from found


def _names(frame: FrameType) -> tuple[set[str], set[str]]:
    """Return the variables and the attributes that were read for the call that a function makes."""
    variables: set[str] = set()
    attributes: set[str] = set()
    for each in dis.get_instructions(frame.f_code):
        if each.offset >= frame.f_lasti:
            break
        if each.opname.startswith(("STORE_", "POP_", "RETURN_", "JUMP_")):  # a statement's end
            variables, attributes = set(), set()
        elif each.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            attributes.add(each.argval)
        elif each.opname.startswith("LOAD_") and each.opname != "LOAD_CONST":
            # From Python 3.13 on one instruction may read two.
            variables |= {*each.argval} if isinstance(each.argval, tuple) else {each.argval}
    return variables, attributes


def _in_reach(frame: FrameType) -> Iterator[Any]:
    for value in list(frame.f_locals.values()):
        yield value
        if isinstance(value, (list, tuple)):
            yield from list(value)
        elif type(value) is dict:
            yield from list(value.values())

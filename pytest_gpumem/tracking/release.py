"""Giving back what a finished test still pins: locals of failed frames, the last error, cycles."""

from __future__ import annotations

import gc
import inspect
import subprocess
import sys
import types
from typing import TYPE_CHECKING

from pytest_gpumem import devices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pytest_gpumem.forensics.vocabulary import Said

_NEARLY_FULL = 256 * 2**20
"""Bytes free below which a library that cannot start probably found no room: cuBLAS and cuDNN take
a handle, their kernels and a workspace of up to 32 MiB (``CUBLAS_WORKSPACE_CONFIG`` in PyTorch's
notes on CUDA)."""
_OUTPUT = 1 << 16
"""Bytes of a command's output that are looked at: its last words tell why it failed."""
SUSPENDABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
GENERATORS = (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)


def give_back(errors: Sequence[BaseException], stayed: Callable[[], bool]) -> None:
    """Drop what only tracebacks and young reference cycles keep alive, by the cheapest means.

    ``stayed`` says whether memory is still held.
    """
    for error in errors:
        clear_frames(error)
    forget_last_error()
    collect(stayed, young=True)
    if errors and stayed():
        clear_living_errors()
        drop_tracebacks(errors)
        collect(stayed, young=True)


def clear_frames(error: BaseException) -> None:
    """Drop the local variables of every finished frame that ``error`` keeps alive.

    Covers the tracebacks of the whole graph of ``__cause__``, ``__context__`` and exception group
    members. Tracebacks themselves stay, so reports made later still show their lines. Frames that
    still run and frames of suspended generators and coroutines are left as they are.
    """
    frames = {id(frame): frame for each in chain(error) for frame in _frames(each.__traceback__)}
    _clear(list(frames.values()))


def drop_tracebacks(errors: Sequence[BaseException]) -> None:
    """Take the tracebacks off ``errors`` and all they refer to, and off ``sys.last_traceback``.

    For what clearing the frames does not reach: from Python 3.11 on a frame keeps its function,
    and by its closure the variables of the test around it. Emptying the closure instead would
    take the variables from whoever may still call the function.
    """
    for error in errors:
        for each in chain(error):
            each.__traceback__ = None
    if hasattr(sys, "last_traceback"):
        sys.last_traceback = None


def clear_living_errors() -> None:
    """Drop the locals of the finished frames that any living exception keeps; one pass.

    For a failed test whose exceptions are not all known: hypothesis keeps one for each example
    that failed.
    """
    errors = [each for each in gc.get_objects() if BaseException in type(each).__mro__]
    frames = {id(frame): frame for each in errors for frame in _frames(each.__traceback__)}
    _clear(list(frames.values()))


def forget_last_error() -> None:
    """Drop the local variables that ``sys.last_value`` and its companions keep alive.

    pytest sets them at every failure and keeps them through the next test's set-up. The values
    stay, so ``pdb.pm()`` still shows where the error was.
    """
    for name in ("last_exc", "last_value"):
        error = getattr(sys, name, None)
        if isinstance(error, BaseException):
            clear_frames(error)
    frames = {id(frame): frame for frame in _frames(getattr(sys, "last_traceback", None))}
    _clear(list(frames.values()))


def collect(above: Callable[[], bool], *, young: bool = False) -> None:
    """Collect cyclic garbage, youngest generation first, for as long as ``above()`` is true.

    The full collection takes about 0.1 s with torch loaded, and is left out where only ``young``
    garbage is wanted: fresh cycles of a test are mostly found in the younger generations.
    """
    for generation in range(2 if young else 3):
        if not above():
            return
        gc.collect(generation)


def oom_sentence(error: BaseException) -> str:
    """Return the first sentences of a card's out-of-memory error in the chain, "" without one.

    With the limit that was hit, where somebody had set one below the card's size.
    """
    said = _out_of_memory(error)
    if said is None:
        return ""
    sentence = ". ".join(said.text.split(". ")[:2])
    limit = f" ({said.allowed} allowed)"
    return f"{sentence}{limit}" if said.allowed and said.allowed not in sentence else sentence


def says_oom(error: BaseException) -> bool:
    """Return whether this very error says that a card is out of memory, and not one behind it."""
    said = _said(error)
    return said is not None and not said.host and not said.weak


def oom_text(error: BaseException) -> str:
    """Return all that such an error says of the card, "" without one in the chain."""
    said = _out_of_memory(error)
    return "" if said is None else said.text


def fits_nowhere(sentence: str, most: int) -> bool:
    """Return whether one allocation that failed was above ``most`` bytes or the process's limit.

    False where ``sentence`` does not tell. Whoever else is on the card has no part in that.
    """
    from pytest_gpumem.forensics import vocabulary

    said = vocabulary.classify(sentence)
    if said is None:
        return False
    return said.tried > (most if said.limit is None else min(most, said.limit))


def _out_of_memory(error: BaseException) -> Said | None:
    """Return what the chain of ``error`` says of a card whose memory ran out, None if nothing."""
    told = [said for each in chain(error) if (said := _said(each)) is not None and not said.host]
    sure = next((said for said in told if not said.weak), None)
    return sure or next((said for said in told if _nearly_full()), None)


def _said(error: BaseException) -> Said | None:
    """Return what one exception says; an assertion, or pytest's own, quotes what it compared."""
    from pytest_gpumem.forensics.vocabulary import Said, classify

    if isinstance(error, AssertionError) or _of_pytest(error):
        return None
    try:
        text = _words(error)
        said = _of_process(error) or classify(text)
    except Exception:  # whatever the suite's class does
        return None
    if said is None and type(error).__name__ == "OutOfMemoryError":
        known = type(error).__module__.partition(".")[0] in ("torch", "cupy")
        return Said(text.partition("\n")[0] or "out of memory") if known else None
    return said


def _words(error: BaseException) -> str:
    """Return an exception's text and the notes that were added to it.

    A command that failed is named by its arguments, which are nobody's error.
    """
    text = "" if isinstance(error, subprocess.SubprocessError) else str(error)
    return "\n".join([text, *map(str, getattr(error, "__notes__", ()))])


def _of_process(error: BaseException) -> Said | None:
    """Return what a command that failed said at its end, where its output was kept."""
    from pytest_gpumem.forensics.vocabulary import classify

    if not isinstance(error, subprocess.CalledProcessError):
        return None
    output = error.stderr or error.output or ""
    if isinstance(output, bytes):
        output = output[-_OUTPUT:].decode(errors="replace")
    return classify(output[-_OUTPUT:], logged=True)


def _of_pytest(error: BaseException) -> bool:
    # pytest.fail's own class says that it is a builtin; its base does not.
    return any(kind.__module__.startswith("_pytest.") for kind in type(error).__mro__)


def _nearly_full() -> bool:
    """Tell whether a card has less room than a library needs to start; False when not known."""
    readings = map(devices.driver_reading, devices.find_cards().cards)
    return any(each is not None and each.free < _NEARLY_FULL for each in readings)


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield ``error`` and every exception it refers to (cause, context, group), each once."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        # Read by name, because on Python 3.10 exception groups come from a package.
        members = getattr(each, "exceptions", ())
        related = [each.__cause__, each.__context__]
        related += members if isinstance(members, (tuple, list)) else ()
        waiting += [other for other in related if isinstance(other, BaseException)]


def _frames(traceback: types.TracebackType | None) -> Iterator[types.FrameType]:
    """Yield the frames of ``traceback``, outermost first, each before those that called it.

    Callers are not all in the traceback, but a frame that outlives its call keeps them as well:
    unittest's ``TestCase.__call__`` holds the test case so.
    """
    while traceback is not None:
        frame: types.FrameType | None = traceback.tb_frame
        while frame is not None:
            yield frame
            frame = frame.f_back
        traceback = traceback.tb_next


def _clear(frames: list[types.FrameType]) -> None:
    """Drop the locals of the finished ones among ``frames``."""
    suspended = _suspended(frames)
    for frame in frames:
        if id(frame) in suspended:
            continue
        try:
            frame.clear()
        except RuntimeError:  # it still runs (Python 3.13: or is suspended)
            continue
        # Up to Python 3.12 whoever read f_locals, as pytest does for every frame it reports,
        # left a snapshot in the frame that clear() forgets; reading again brings it up to date.
        frame.f_locals  # noqa: B018  # read for its effect


def _suspended(frames: list[types.FrameType]) -> set[int]:
    """Return the ids of those ``frames`` whose generator or coroutine may still go on.

    Before Python 3.13 ``frame.clear()`` would end them: their ``finally`` blocks would run early.
    """
    candidates = [frame for frame in frames if frame.f_code.co_flags & SUSPENDABLE]
    if sys.version_info >= (3, 13) or not candidates:
        return set()
    elif sys.version_info >= (3, 11):  # noqa: RET505  # mypy knows branches by version, not returns
        # The collector sees the contents of a frame, its code among them, only once the frame
        # has outlived its generator. That holds for generators in a frozen heap as well.
        return {id(frame) for frame in candidates if not _refers(frame, frame.f_code)}
    else:
        if gc.get_freeze_count():  # a frozen generator cannot be found, so none is risked
            return {id(frame) for frame in candidates}
        owners = gc.get_referrers(*candidates)
        return {
            id(frame)
            for frame in candidates
            if any(type(owner) in GENERATORS and _refers(owner, frame) for owner in owners)
        }


def _refers(holder: object, held: object) -> bool:
    """Tell whether the collector sees a reference from ``holder`` to ``held``."""
    return any(each is held for each in gc.get_referents(holder))

from __future__ import annotations

import asyncio
import builtins
import gc
import subprocess
import sys
import traceback
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpumem import devices
from pytest_gpumem.records import Card
from pytest_gpumem.tracking import release

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator


class Tensor:
    """Stands for a tensor: something that is freed with its last reference."""


Witness = weakref.ref[Tensor]


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """What is freed here is freed by its last reference, not by luck."""
    gc.disable()
    yield
    gc.enable()


def failure(witnesses: list[Witness], error: BaseException | None = None) -> BaseException:
    """Return an error whose traceback pins one tensor in a finished frame."""

    def fail() -> None:
        tensor = Tensor()
        witnesses.append(weakref.ref(tensor))
        raise error or ValueError("boom")

    try:
        fail()
    except BaseException as caught:
        return caught
    raise AssertionError


def freed(witnesses: list[Witness]) -> bool:
    assert witnesses
    return all(witness() is None for witness in witnesses)


def test_locals_of_failed_frames_are_freed() -> None:
    witnesses: list[Witness] = []
    error = failure(witnesses)
    assert not freed(witnesses)
    release.clear_frames(error)
    assert freed(witnesses)


def test_the_traceback_stays_for_reports_made_later() -> None:
    error = failure([])
    release.clear_frames(error)
    frames = traceback.walk_tb(error.__traceback__)
    assert [frame.f_code.co_name for frame, _ in frames] == ["failure", "fail"]


def test_a_snapshot_of_the_locals_taken_by_a_report_is_freed_too() -> None:
    witnesses: list[Witness] = []
    error = failure(witnesses)
    assert [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
    release.clear_frames(error)
    assert freed(witnesses)


def test_locals_of_finished_callers_are_freed() -> None:
    def caller() -> BaseException:
        tensor = Tensor()
        witnesses.append(weakref.ref(tensor))
        return failure(witnesses)

    witnesses: list[Witness] = []
    error = caller()
    assert witnesses[0]() is not None
    release.clear_frames(error)
    assert freed(witnesses)


@pytest.mark.parametrize("link", ["__cause__", "__context__"])
def test_chained_errors_are_followed(link: str) -> None:
    witnesses: list[Witness] = []
    error = failure(witnesses)
    setattr(error, link, failure(witnesses))
    setattr(getattr(error, link), link, failure(witnesses))
    release.clear_frames(error)
    assert len(witnesses) == 3
    assert freed(witnesses)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups came with Python 3.11")
def test_members_of_nested_groups_are_followed() -> None:
    witnesses: list[Witness] = []
    group: Any = getattr(builtins, "ExceptionGroup", None)
    inner = group("inner", [failure(witnesses), failure(witnesses)])
    error = failure(witnesses, group("outer", [inner, failure(witnesses)]))
    release.clear_frames(error)
    assert len(witnesses) == 4
    assert freed(witnesses)


def test_a_circle_of_contexts_comes_to_an_end() -> None:
    witnesses: list[Witness] = []
    first, second = failure(witnesses), failure(witnesses)
    first.__cause__, second.__cause__ = second, first
    release.clear_frames(first)
    assert freed(witnesses)


def test_an_attribute_called_exceptions_that_is_no_group_is_ignored() -> None:
    witnesses: list[Witness] = []
    error = failure(witnesses)
    error.exceptions = ["no exception"]  # type: ignore[attr-defined]
    release.clear_frames(error)
    assert freed(witnesses)


def test_running_frames_keep_their_locals() -> None:
    tensor = Tensor()
    try:
        int("no number")
    except ValueError as error:
        release.clear_frames(error)
    assert isinstance(tensor, Tensor)


def test_a_suspended_generator_goes_on_where_it_was() -> None:
    def fixture() -> Iterator[object]:
        tensor = Tensor()
        try:
            int("no number")
        except ValueError as error:
            caught.append(error)
        try:
            yield tensor
            yield tensor
        finally:
            ended.append(True)

    caught: list[ValueError] = []
    ended: list[bool] = []
    generator = fixture()
    first = next(generator)
    release.clear_frames(caught[0])
    assert not ended
    assert next(generator) is first


def test_a_suspended_generator_in_a_frozen_heap_goes_on() -> None:
    def fixture() -> Iterator[object]:
        try:
            int("no number")
        except ValueError as error:
            caught.append(error)
        yield 1
        yield 2

    caught: list[ValueError] = []
    generator = fixture()
    next(generator)
    gc.freeze()
    try:
        release.clear_frames(caught[0])
    finally:
        gc.unfreeze()
    assert next(generator) == 2


def test_a_suspended_coroutine_goes_on_where_it_was() -> None:
    async def job() -> int:
        try:
            int("no number")
        except ValueError as error:
            caught.append(error)
        await asyncio.sleep(0)
        return 7

    async def main() -> int:
        task = asyncio.ensure_future(job())
        await asyncio.sleep(0)
        release.clear_frames(caught[0])
        return await task

    caught: list[ValueError] = []
    assert asyncio.run(main()) == 7


def finished_generator(witnesses: list[Witness]) -> BaseException:
    def fail() -> Iterator[int]:
        tensor = Tensor()
        witnesses.append(weakref.ref(tensor))
        yield 1
        raise ValueError("boom")

    try:
        list(fail())
    except ValueError as error:
        return error
    raise AssertionError


def finished_coroutine(witnesses: list[Witness]) -> BaseException:
    async def stream() -> AsyncIterator[int]:
        tensor = Tensor()
        witnesses.append(weakref.ref(tensor))
        yield 1
        raise ValueError("boom")

    async def fail() -> None:
        tensor = Tensor()
        witnesses.append(weakref.ref(tensor))
        async for _ in stream():
            await asyncio.sleep(0)

    try:
        asyncio.run(fail())
    except ValueError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize("make", [finished_generator, finished_coroutine])
def test_locals_of_failed_generators_and_coroutines_are_freed(
    make: Callable[[list[Witness]], BaseException],
) -> None:
    witnesses: list[Witness] = []
    error = make(witnesses)
    assert not freed(witnesses)
    release.clear_frames(error)
    assert freed(witnesses)


@pytest.mark.parametrize("name", ["last_exc", "last_value"])
def test_the_last_error_is_kept_without_its_locals(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    witnesses: list[Witness] = []
    error = failure(witnesses)
    monkeypatch.setattr(sys, name, error, raising=False)
    release.forget_last_error()
    assert getattr(sys, name) is error
    assert freed(witnesses)


def test_the_last_traceback_alone_is_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    witnesses: list[Witness] = []
    monkeypatch.setattr(sys, "last_traceback", failure(witnesses).__traceback__, raising=False)
    release.forget_last_error()
    assert freed(witnesses)


def test_without_a_last_error_there_is_nothing_to_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("last_exc", "last_value", "last_traceback"):
        monkeypatch.delattr(sys, name, raising=False)
    release.forget_last_error()
    assert not hasattr(sys, "last_value")


def cycle(witnesses: list[Witness]) -> None:
    tensor = Tensor()
    tensor.self = tensor  # type: ignore[attr-defined]
    witnesses.append(weakref.ref(tensor))


def test_collect_frees_cycles_until_nothing_is_above() -> None:
    witnesses: list[Witness] = []
    cycle(witnesses)
    release.collect(lambda: not freed(witnesses))
    assert freed(witnesses)


def test_collect_does_nothing_when_nothing_is_above() -> None:
    witnesses: list[Witness] = []
    cycle(witnesses)
    release.collect(lambda: False)
    assert not freed(witnesses)


def test_collect_reaches_the_oldest_generation() -> None:
    witnesses: list[Witness] = []
    cycle(witnesses)
    held = witnesses[0]()
    gc.collect(0)
    gc.collect(1)
    del held
    release.collect(lambda: not freed(witnesses))
    assert freed(witnesses)


def test_collect_stops_at_the_generation_that_was_enough() -> None:
    old: list[Witness] = []
    cycle(old)
    held = old[0]()
    gc.collect(0)
    gc.collect(1)
    young: list[Witness] = []
    cycle(young)
    del held
    release.collect(lambda: not freed(young))
    assert freed(young)
    assert not freed(old)


def test_a_function_that_a_running_one_can_still_call_keeps_its_variables() -> None:
    def outer(number: int) -> Callable[[int], int]:
        return lambda divisor: number // divisor

    divide = outer(5)
    try:
        divide(0)
    except ZeroDivisionError as error:
        release.clear_living_errors()
        release.drop_tracebacks([error])
    assert divide(1) == 5


def test_what_a_failed_closure_pins_goes_with_the_traceback() -> None:
    witnesses: list[Witness] = []

    def test() -> None:
        tensor = Tensor()
        witnesses.append(weakref.ref(tensor))

        def loss() -> None:
            raise ValueError(tensor.__class__)

        loss()

    try:
        test()
    except ValueError as error:
        caught = error
    release.clear_frames(caught)
    release.drop_tracebacks([caught])
    assert freed(witnesses)


@pytest.mark.parametrize(
    ("sentence", "nowhere"),
    [
        ("CUDA out of memory. Tried to allocate 46.00 MiB", False),
        ("CUDA out of memory. Tried to allocate 4.00 GiB", False),
        ("CUDA out of memory. Tried to allocate 5.25 GiB", True),
        ("CUDA out of memory. Tried to allocate 3.00 GiB. 3.20 GiB allowed; Of the", False),
        ("CUDA out of memory. Tried to allocate 3.00 GiB. 2.00 GiB allowed; Of the", True),
        ("CUDA out of memory", False),
        ("CUDA error: out of memory", False),
        ("something else", False),
    ],
)
def test_what_asks_for_more_than_any_card_or_its_process_may_have(
    sentence: str, nowhere: bool
) -> None:
    assert release.fits_nowhere(sentence, 2**32) is nowhere


class OutOfMemoryError(Exception):
    """As Ray's, and many a database's."""


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    error.__cause__ = cause
    return error


class UnspeakableError(RuntimeError):
    def __str__(self) -> str:
        raise ValueError


CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB"


def noted(error: BaseException, note: str) -> BaseException:
    error.__notes__ = [note]  # type: ignore[attr-defined]  # as add_note does, from Python 3.11
    return error


def child(stderr: str | bytes | None = None, output: str | None = None) -> BaseException:
    command = ["python", "-c", f"raise RuntimeError('{CUDA}')"]
    return subprocess.CalledProcessError(1, command, output, stderr)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError(f"Worker failed: {CUDA}. GPU 0 has"), CUDA),
        (ValueError(f"Worker 1\n\x1b[1;31m{CUDA}. GPU 0 has\x1b[0m"), CUDA),
        (MemoryError("std::bad_alloc: out_of_memory: CUDA error"), None),
        (raised(KeyError("x"), RuntimeError(CUDA)), CUDA),
        (raised(AssertionError("x"), RuntimeError(CUDA)), CUDA),
        (type("OutOfMemoryError", (RuntimeError,), {"__module__": "torch"})("so full"), "so full"),
        (
            RuntimeError(f"{CUDA}. GPU 0 has a capacity of 1 B. 20.00 MiB allowed; Of the"),
            f"{CUDA} (20.00 MiB allowed)",
        ),
        (OutOfMemoryError("the page pool is used up"), ""),
        (OutOfMemoryError("Task was killed due to the node running low on memory"), ""),
        (OutOfMemoryError(CUDA), CUDA),
        (MemoryError(), ""),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:7] . DefaultCPUAllocator: not enough"), ""),
        (AssertionError(CUDA), ""),
        (pytest.fail.Exception(CUDA), ""),
        (UnspeakableError(), ""),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling"), ""),
        (noted(KeyError("x"), f"while loading: {CUDA}"), CUDA),
        (noted(KeyError("x"), "on the second card"), ""),
        (child(f"Traceback (most recent call last):\nRuntimeError: {CUDA}\n"), CUDA),
        (child(f"Traceback (most recent call last):\nRuntimeError: {CUDA}\n".encode()), CUDA),
        (child(None, f"RuntimeError: {CUDA}\n"), CUDA),
        (noted(child(), f"its log ends with: {CUDA}"), CUDA),
        (child(), ""),
        (child(f"WARNING {CUDA}, retrying with 8\nKeyError: 'x'\n"), ""),
        (child("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), ""),
        (subprocess.TimeoutExpired(["python", f"'{CUDA}'"], 5, stderr="slow"), ""),
    ],
    ids=repr,
)
def test_what_ran_out_of_a_cards_memory(error: BaseException, sentence: str | None) -> None:
    assert release.oom_sentence(error) == (str(error) if sentence is None else sentence)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.11 brought exception groups")
def test_a_member_of_a_group_counts() -> None:
    group = ExceptionGroup("two", [ValueError("x"), RuntimeError(CUDA)])  # noqa: F821  # from 3.11
    assert release.oom_sentence(group) == CUDA


@pytest.mark.parametrize(("free", "counts"), [(2**20, True), (2**30, False), (None, False)])
def test_weak_evidence_counts_on_a_card_that_was_nearly_full(
    monkeypatch: pytest.MonkeyPatch, free: int | None, counts: bool
) -> None:
    card = Card("GPU-1", "A card", 2**34)
    reading = None if free is None else devices.DriverReading(2**34 - free, free, 2**34, 0)
    monkeypatch.setattr(devices, "find_cards", lambda: devices.CardsFound((card,)))
    monkeypatch.setattr(devices, "driver_reading", lambda _card: reading)
    error = RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling")
    assert bool(release.oom_sentence(error)) is counts

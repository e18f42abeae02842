"""Says why memory ran out, with its evidence, and what to do about it."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pytest_gpumem.records.findings import OomEvent

_CONTEXT = 3 * 2**29
"""More than a process's CUDA context takes (0.3 to 0.9 GiB were seen) must be somebody else's."""
_SANE = 2**50
"""Sizes above are not sizes: NVML's "not available" prints as 17179869184.00 GiB."""

HOST = {"cpu", "host"}
"""Backends whose memory is the host's."""
_SHOWN = 5
_TORCH = {"cuda", "hip", "xpu", "npu", "musa"}


class Leftover(NamedTuple):
    """What an earlier test left behind in the same worker, in bytes."""

    nodeid: str
    size: int


class Past(NamedTuple):
    """What is known of a worker's earlier tests."""

    leftovers: Sequence[Leftover] = ()
    """What records say that they left, the largest first."""
    grew: bool = False
    """Whether each of its failures found more allocated than the one before."""


class Finding(NamedTuple):
    """A cause and what speaks for it."""

    cause: str
    evidence: tuple[str, ...]
    inferred: bool = False
    """Whether something else may explain the evidence, too."""


def assess(event: OomEvent, *, limit: bool = False, past: Past = Past()) -> OomEvent:  # noqa: B008 - it is a tuple
    """Return ``event`` with its cause, evidence and advice.

    Args:
        event: with its figures.
        limit: whether the message itself says that a limit was hit.
        past: what is known of the tests that ran before it in the same worker.

    """
    finding = _finding(event, limit, past)
    event = event._replace(
        cause=finding.cause, evidence=finding.evidence, inferred=finding.inferred
    )
    return event._replace(advice=tuple(_ADVICE[finding.cause](event)))


def _finding(event: OomEvent, limit: bool, past: Past) -> Finding:
    if event.backend in HOST:
        return _host(event)
    tried, total, free, allowed = (
        _sane(size)
        for size in (
            event.tried_bytes,
            event.total_bytes,
            event.free_bytes,
            event.allowed_bytes,
        )
    )
    if event.backend == "vllm" and tried is not None and free is not None and free < tried:
        return _startup(tried, free, limit)
    if tried is not None and total is not None and tried > total:
        return Finding(
            "larger_than_card", (f"one request for {_b(tried)} on a card of {_b(total)}",)
        )
    if event.backend == "mps" and allowed is not None:
        return _mps(event, tried, allowed, past)
    if limit or (allowed is not None and (total is None or allowed < total)):
        found = _limited(event, tried, free, allowed)
        if limit or found is not None:
            return found or Finding("memory_fraction", ("the message names a limit",))
    if tried is None or free is None:
        return _without_free(event, past)
    return _on_card(event, tried, free, total, past)


def _startup(tried: int, free: int, limit: bool) -> Finding:
    """Tell what vLLM did not find: room on the card, or in what it may use of it."""
    if limit:
        return Finding("memory_fraction", (f"{_b(tried)} was needed, {_b(free)} was set aside",))
    return Finding("other_processes", (f"{_b(free)} was free at startup, {_b(tried)} was wanted",))


def _host(event: OomEvent) -> Finding:
    tried = event.tried_bytes
    size = f", {_b(tried)} in it" if tried else ""
    said = "the host said so" if event.confirmed else "a process was killed"
    return Finding("host_ram", (f"{said}{size}",), inferred=not event.confirmed)


def _limited(
    event: OomEvent, tried: int | None, free: int | None, allowed: int | None
) -> Finding | None:
    """Blame the limit if the card itself had room, or what was asked for exceeds the limit."""
    own = (event.allocated_bytes or 0) + (tried or 0)
    exceeded = allowed is not None and own > allowed
    if allowed is None or not (exceeded or free is None or (tried or 0) <= free):
        return None
    room = f", while {_b(free)} of the card was free" if free is not None else ""
    return Finding("memory_fraction", (f"a limit of {_b(allowed)} was set{room}",))


def _mps(event: OomEvent, tried: int | None, allowed: int, past: Past) -> Finding:
    if tried is not None and tried > allowed:
        return Finding(
            "larger_than_card", (f"one request for {_b(tried)}, {_b(allowed)} is allowed",)
        )
    others = sum(each.bytes for each in event.processes if not each.own)
    if others > (event.allocated_bytes or 0):
        return Finding("other_processes", (f"other allocations hold {_b(others)}",))
    return _own(event, past)


def _without_free(event: OomEvent, past: Past) -> Finding:
    need = (event.allocated_bytes or 0) + (_sane(event.tried_bytes) or 0)
    if not past.leftovers:
        total = _sane(event.total_bytes) if event.allocated_bytes and event.tried_bytes else None
        known = total and f"{_b(need)} was needed on a card of {_b(total)}"
        return Finding("unknown", (known or "the message has no figures of the card",))
    left = sum(each.size for each in past.leftovers)
    if event.total_bytes and need - left > event.total_bytes:
        needed = f"{_b(need)} was needed on a card of {_b(event.total_bytes)}"
        return Finding("unknown", (f"{needed}, {_b(left)} of it left by others",))
    return _own(event, past)


def _on_card(event: OomEvent, tried: int, free: int, total: int | None, past: Past) -> Finding:
    pieces = _sane(event.reserved_unallocated_bytes) or 0
    others, said = _others(event, free, total)
    if free >= tried and pieces < tried:
        return Finding("driver", (f"{_b(free)} was free, {_b(tried)} was asked for",))
    grown = event.growth_bytes if past.grew else 0
    left = sum(each.size for each in past.leftovers) or grown or 0
    candidates = [
        (
            others if others >= _share(total, event) else 0,
            Finding("other_processes", said, inferred=not event.processes),
        ),
        (
            pieces if pieces >= tried else 0,
            Finding(
                "fragmentation",
                (
                    f"{_b(pieces)} was reserved but in pieces, {_b(tried)} was asked for",
                    f"{_b(free)} was free",
                ),
            ),
        ),
        (left, _own(event, past)),
    ]
    # Blamed is who holds most among those without whom the request would have been met.
    size, finding = max(candidates, key=lambda candidate: candidate[0])
    return finding if size and size + free >= tried else _own(event, past)


def _share(total: int | None, event: OomEvent) -> int:
    """Return from how many bytes on others count: not a desktop's few, beside a large own use."""
    own = event.allocated_bytes or 0
    return min(own, (total or 0) // 10)


def _others(event: OomEvent, free: int, total: int | None) -> tuple[int, tuple[str, ...]]:
    """Return what others hold of the card, and how that is known."""
    listed = [each for each in event.processes if not each.own and each.bytes < _SANE]
    if listed:
        held = sum(each.bytes for each in listed)
        count = f"{len(listed)} other process{'es' if len(listed) > 1 else ''}"
        largest = sorted(listed, key=lambda each: -each.bytes)[:_SHOWN]
        named = ", ".join(
            f"{_b(each.bytes)} by {'pid ' if each.pid else 'others'}{each.pid or ''}"
            for each in largest
        )
        return held, (f"{count} held {_b(held)}: {named}",)
    if event.processes or total is None or event.allocated_bytes is None:
        return 0, ()
    own = event.allocated_bytes + (event.reserved_unallocated_bytes or 0)
    rest = total - free - own
    if rest <= max(_CONTEXT, total // 10):
        return 0, ()
    return rest, (f"{_b(rest)} of the card was neither free nor this process's",)


def _own(event: OomEvent, past: Past) -> Finding:
    """Tell what earlier tests left from what the test may need itself."""
    if past.leftovers:
        named = (f"{each.nodeid} left {_b(each.size)}" for each in past.leftovers[:_SHOWN])
        return Finding("accumulation", tuple(named))
    if past.grew and event.growth_bytes:
        said = f"{_b(event.growth_bytes)} more was allocated than at the worker's first failure"
        return Finding("accumulation", (said, "and more at each of them"), inferred=True)
    if not event.allocated_bytes:
        return Finding("unknown", ())
    before = event.position - 1 if event.position else 0
    who = f", after {before} other tests" if before else ""
    return Finding(
        "unknown",
        (f"this process alone filled the card: it held {_b(event.allocated_bytes)}{who}",),
    )


def _sane(size: int | None) -> int | None:
    return size if size is not None and size < _SANE else None


def _b(size: int) -> str:
    return format_bytes(size)


def _need(event: OomEvent) -> str | None:
    """Return the size for the test's mark: what it held and asked for, with a tenth to spare."""
    held, tried = _sane(event.allocated_bytes), _sane(event.tried_bytes)
    if tried is None:
        return None
    mib = ((held or 0) + tried) * 11 // 10 // 2**20 + 1
    return f"{mib}MiB"


def _mark(event: OomEvent) -> Iterator[str]:
    need = _need(event)
    if need and event.nodeid:
        yield f'@pytest.mark.gpu(vram="{need}")  # on {event.nodeid}'


def _several(event: OomEvent) -> Iterator[str]:
    held = max((each.bytes for each in event.processes if each.bytes < _SANE), default=0)
    own = (event.allocated_bytes or 0) + (event.reserved_unallocated_bytes or 0)
    share = max(held, own + (_sane(event.tried_bytes) or 0))
    if event.total_bytes and share and event.nodeid:
        count = max(1, min(64, event.total_bytes * 9 // 10 // share))
        yield f"pytest -p gpumem -n {count}  # as many workers as the card has room for"
    yield from _mark(event)
    yield "nvidia-smi --query-compute-apps=pid,process_name,used_memory --format=csv"


def _pieces(event: OomEvent) -> Iterator[str]:
    text = event.message
    if "expandable_segments" not in text and "max_split_size_mb" in text:
        yield "export PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:128"
        return
    names = ("PYTORCH_HIP_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    name = next((each for each in names if each in text), "PYTORCH_CUDA_ALLOC_CONF")
    yield f"export {name}=expandable_segments:True"


def _accumulated(event: OomEvent) -> Iterator[str]:
    tests = shlex.join([*event.before, event.nodeid] if event.nodeid else [])
    yield f"pytest -p gpumem --gpumem-stacks {tests}".rstrip() + "  # names who holds what"
    yield '@pytest.mark.vram_leak_limit("0B")  # on the tests that ran before'
    yield "gc.collect(); torch.cuda.empty_cache()  # after deleting the models, in the fixture"


def _too_large(event: OomEvent) -> Iterator[str]:
    yield from _mark(event)
    yield "pytest -p gpumem --gpumem-too-large=skip  # no setting makes the card larger"


def _fraction(event: OomEvent) -> Iterator[str]:
    if event.backend in _TORCH:
        yield (
            "torch.cuda.set_per_process_memory_fraction(1.0)  # in the teardown of whoever set it"
        )
        yield "grep -rn set_per_process_memory_fraction tests/"
    elif event.backend == "cupy":
        yield "export CUPY_GPU_MEMORY_LIMIT=100%"
    elif event.backend == "vllm":
        yield "gpu_memory_utilization=0.95  # or a smaller max_model_len"
    else:
        yield "raise the limit that the message names"


def _driver(event: OomEvent) -> Iterator[str]:
    if event.nodeid:
        yield f"pytest -p gpumem {shlex.quote(event.nodeid)}  # alone: does it still fail?"
    yield "nvidia-smi  # what others hold, and whether the driver is healthy"


def _ram(event: OomEvent) -> Iterator[str]:
    yield "pytest -p gpumem -n 1  # fewer workers need less main memory"
    if not event.confirmed:
        yield "dmesg -T | grep -i 'killed process'  # then read it with gpumem forensics too"


def _unknown(event: OomEvent) -> Iterator[str]:
    test = f" {shlex.quote(event.nodeid)}" if event.nodeid else ""
    yield f"pytest -p gpumem --gpumem-json run.json{test}  # measures who holds what"


_ADVICE: dict[str, Callable[[OomEvent], Iterator[str]]] = {
    "other_processes": _several,
    "fragmentation": _pieces,
    "accumulation": _accumulated,
    "larger_than_card": _too_large,
    "memory_fraction": _fraction,
    "driver": _driver,
    "host_ram": _ram,
    "unknown": _unknown,
}

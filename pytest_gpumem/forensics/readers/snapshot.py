"""Snapshots of torch's allocator: pickles, of which nothing that would run code is read."""

from __future__ import annotations

import io
import pickle
from typing import IO, Any, NoReturn

from pytest_gpumem.forensics import messages
from pytest_gpumem.forensics.readers.streams import whole
from pytest_gpumem.forensics.runs import Failure, Run, Seen


class _Inert(pickle.Unpickler):
    """Reads numbers, texts, lists and dicts; whatever would run code is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"holds {module}.{name}, which is not read")


def read_snapshot(stream: IO[bytes]) -> list[Run]:
    """Read what ``torch.cuda.memory._dump_snapshot`` wrote."""
    try:
        state = _Inert(io.BytesIO(whole(stream))).load()
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"is no memory snapshot: {error}") from None
    run = Run()
    try:
        for device, trace in enumerate(state["device_traces"]):
            mine = [each for each in state["segments"] if each.get("device", 0) == device]
            for number, entry in enumerate(trace, 1):
                if entry.get("action") == "oom":
                    run.failures.append(_snapshot_oom(device, mine, number, entry))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"is no memory snapshot of torch: {error!r}") from None
    return [run]


def _snapshot_oom(
    device: int, segments: list[dict[str, Any]], number: int, entry: dict[str, Any]
) -> Failure:
    allocated = sum(int(each.get("allocated_size", 0)) for each in segments)
    reserved = sum(int(each.get("total_size", 0)) for each in segments)
    sizes = {
        "tried": int(entry["size"]),
        "free": int(entry.get("device_free", entry.get("addr", 0))),
        "allocated": allocated,
        "reserved_unallocated": max(0, reserved - allocated),
    }
    test = next(
        (
            f"{frame['filename']}::{frame['name']}"
            for frame in entry.get("frames", ())
            if str(frame.get("name", "")).startswith("test")
        ),
        "",
    )
    failure = Failure(number, test, "FAILED", "call" if test else "")
    failure.nodeid = test or None
    text = f"CUDA out of memory. Tried to allocate {sizes['tried']} bytes"
    found = messages.parse(text, raised=True)
    if found is None:
        raise ValueError("the table of messages lacks PyTorch's")
    failure.seen = Seen(number, found._replace(sizes=sizes, printed={}, device=device))
    return failure

"""What cards tell one another: copies, as ``torch.cuda.comm`` asks for them, and messages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pytest_gpumem.simulator.torch_face.memory import CardMemory

__tracebackhide__ = True  # pytest shows the test's line last, none of these

Devices = Sequence[int]


def functions() -> dict[str, Callable[..., Any]]:
    """Return every function by its name in ``torch._C``; a build without CUDA has none."""
    return {
        "_broadcast": broadcast,
        "_broadcast_out": broadcast_out,
        "_broadcast_coalesced": broadcast_coalesced,
        "_scatter": scatter,
        "_scatter_out": scatter_out,
        "_gather": gather,
        "_gather_out": gather_out,
    }


def _place(index: int) -> torch.device:
    return torch.device("cpu") if index == -1 else torch.device("cuda", index)


def broadcast(tensor: torch.Tensor, devices: Devices) -> tuple[torch.Tensor, ...]:
    """Return ``tensor`` on each device; where it is already, itself."""
    return tuple(tensor.to(_place(index)) for index in devices)


def broadcast_out(tensor: torch.Tensor, out: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Copy ``tensor`` into each of ``out``."""
    for each in out:
        each.copy_(tensor)
    return out


def broadcast_coalesced(
    tensors: Sequence[torch.Tensor], devices: Devices, _buffer_size: int
) -> list[list[torch.Tensor]]:
    """Return the tensors on each device."""
    return [[tensor.to(_place(index)) for tensor in tensors] for index in devices]


def scatter(
    tensor: torch.Tensor,
    devices: Devices,
    chunk_sizes: Devices | None = None,
    dim: int = 0,
    _streams: object = None,
) -> tuple[torch.Tensor, ...]:
    """Return a part of ``tensor`` on each device."""
    if chunk_sizes is None:
        parts = tensor.chunk(len(devices), dim)
    else:
        parts = torch.split_with_sizes(tensor, list(chunk_sizes), dim)
    return tuple(part.to(_place(index)) for part, index in zip(parts, devices, strict=False))


def scatter_out(
    tensor: torch.Tensor, out: Sequence[torch.Tensor], dim: int = 0, _streams: object = None
) -> tuple[torch.Tensor, ...]:
    """Copy a part of ``tensor`` into each of ``out``."""
    parts = torch.split_with_sizes(tensor, [each.size(dim) for each in out], dim)
    return tuple(each.copy_(part) for each, part in zip(out, parts, strict=True))


def gather(
    tensors: Sequence[torch.Tensor], dim: int = 0, destination: int | None = None
) -> torch.Tensor:
    """Return the tensors one behind the other, on a device."""
    place = _place(torch.cuda.current_device() if destination is None else destination)
    return torch.cat([tensor.to(place) for tensor in tensors], dim)


def gather_out(tensors: Sequence[torch.Tensor], out: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Copy the tensors one behind the other into ``out``."""
    return out.copy_(gather(tensors, dim, out.get_device()))


def talk_by_gloo(memory: CardMemory) -> None:
    """Let gloo stand for NCCL, which needs a driver.

    Suites choose NCCL wherever CUDA is available; they would fail where they pass on the CPU.
    """
    backend: Any = sys.modules["torch.distributed.distributed_c10d"].Backend
    new = backend.__new__

    def new_without_nccl(cls: Any, name: Any) -> Any:
        if isinstance(name, str) and "nccl" in name.lower():
            memory.note("the simulated card talks by gloo where NCCL is asked for")
            name = name.lower().replace("nccl", "gloo")
        return new(cls, name)

    backend.__new__ = new_without_nccl

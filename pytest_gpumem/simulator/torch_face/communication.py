"""Copies among several cards as ``torch.cuda.comm`` and ``nn.DataParallel`` ask for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

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

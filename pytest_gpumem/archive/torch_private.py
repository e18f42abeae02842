"""The private parts of torch that an exact restore needs, each tried against torch 2.13."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def negative_view(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` with its lazy negation set: no public call makes one."""
    import torch

    return torch._neg_view(tensor)


def quantizer(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what ``quantized`` needs: the scheme, and numbers or tensors of its scales."""
    import torch

    scheme = tensor.qscheme()
    if scheme == torch.per_tensor_affine:
        return ("per_tensor_affine", tensor.q_scale(), tensor.q_zero_point())
    if scheme in {torch.per_channel_affine, torch.per_channel_affine_float_qparams}:
        scales, zeros = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
        return (str(scheme).removeprefix("torch."), scales, zeros, tensor.q_per_channel_axis())
    raise ValueError(f"quantised as {scheme}")


def quantized(
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    place: tuple[int, list[int], list[int]],
    parameters: tuple[Any, ...],
) -> torch.Tensor:
    """Return a quantised tensor over ``storage``, as torch's own loading does.

    ``place`` is its offset in elements, its shape and its strides; ``parameters`` are those of
    ``quantizer``.
    """
    import torch

    scheme, *numbers = parameters
    offset, shape, stride = place
    options: Any = {"dtype": dtype, "device": storage.device}
    if scheme == "per_tensor_affine":
        scale, zero = numbers
        empty = torch._empty_affine_quantized([0], scale=scale, zero_point=zero, **options)
    elif scheme in {"per_channel_affine", "per_channel_affine_float_qparams"}:
        scales, zeros, axis = numbers
        empty = torch._empty_per_channel_affine_quantized(
            shape, scales=scales, zero_points=zeros, axis=axis, **options
        )
    else:
        raise ValueError(f"quantised as {scheme!r}")
    return empty.set_(storage, offset, shape, stride)

"""The private parts of torch that archives and sleep need, each tried against torch 2.13."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

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


def holders(tensor: torch.Tensor) -> int:
    """Return how many in C++ hold a tensor beside its Python object, such as a graph or a call.

    The node at which its gradients gather is none of them: it never looks at the content.
    """
    from torch.autograd.graph import get_gradient_edge

    use_count: Callable[[], int] = tensor._use_count  # type: ignore[attr-defined]  # private
    count = use_count()
    if count == 2 and tensor.requires_grad:  # the object's own, and perhaps its node's
        node = get_gradient_edge(tensor).node  # makes one, if there is none
        count -= use_count() == count
        del node
    return count - 1


def storage_holders(storage: torch.UntypedStorage) -> int:
    """Return how many tensors lie in a storage."""
    import torch

    return torch._C._storage_Use_Count(storage._cdata) - 1


def plainly() -> AbstractContextManager[Any]:
    """Return the context in which tensors are what they are below their classes."""
    import torch

    return torch._C.DisableTorchFunctionSubclass()


_WAYS_TO_C = (
    ("torch._functorch.eager_transforms", "_wrap_tensor_for_grad"),
    ("torch._functorch.eager_transforms", "_wrap_functional_tensor"),
    ("torch._functorch.utils", "unwrap_if_dead"),
)
"""What ``torch.func`` and ``autograd.Function.apply`` do first with each tensor they are given."""


def before_c(wake: Callable[[Any], None]) -> None:
    """Have ``wake`` called with each tensor on the ways of torch into C++ that ask no class."""
    for module, name in _WAYS_TO_C:
        home = importlib.import_module(module)
        way = getattr(home, name, None)
        if way is not None and not hasattr(way, "__wrapped__"):
            setattr(home, name, _after(wake, way))


def _after(wake: Callable[[Any], None], wrap: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(wrap)
    def wrapped(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        wake(tensor)
        return wrap(tensor, *args, **kwargs)

    return wrapped

"""The private parts of torch that archives and sleep need, each tried against torch 2.13."""

from __future__ import annotations

import functools
import pkgutil
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
    count: int = tensor._use_count()  # type: ignore[attr-defined]  # private
    return count - 1 - (count == 2 and gathers(tensor))


def gathers(tensor: torch.Tensor) -> bool:
    """Return whether a graph is there that will bring gradients to a tensor, a leaf."""
    from torch.autograd.graph import get_gradient_edge

    if not tensor.requires_grad:
        return False
    use_count: Callable[[], int] = tensor._use_count  # type: ignore[attr-defined]  # private
    count = use_count()
    node = get_gradient_edge(tensor).node  # makes one, which holds the tensor, if there is none
    there = use_count() == count
    del node
    return there


def shell(kind: type, tensor: torch.Tensor) -> Any:
    """Return a tensor of class ``kind`` with the shape of another, and without memory.

    It says that it is a meta tensor: so it cannot be what others have for content. Who asks for its
    address in C++ gets an error.
    """
    import torch

    made: torch.Tensor = torch.Tensor._make_wrapper_subclass(
        kind,
        tensor.shape,
        strides=tensor.stride(),
        dtype=tensor.dtype,
        device=torch.device("meta"),
        requires_grad=tensor.requires_grad,
        storage_size=0,
    )
    torch._C._set_throw_on_mutable_data_ptr(made)
    return made


def is_shell(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's insides are those of a shell."""
    import torch

    return torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python)


def swap(one: torch.Tensor, other: torch.Tensor) -> None:
    """Give two tensors each other's insides; their objects, classes and attributes stay.

    Raises:
        RuntimeError: code in C++ has a weak reference to one.

    """
    import torch

    torch._C._swap_tensor_impl(one, other)


def main_memory(storage: torch.UntypedStorage) -> int | None:
    """Return the address of a storage that is main memory for torch's own code, else None.

    That of a card simulated in Python is, whatever it and its address are called there, and can be
    written where it is.
    """
    import torch

    base: Any = torch._C.StorageBase
    if base.device.__get__(storage).type != "cpu":
        return None
    address: int = base.data_ptr(storage)
    return address


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
    # Transformer layers ask it for the faster of two ways, which differ in the last bits.
    ("torch.overrides", "has_torch_function"),
    ("torch.utils", "swap_tensors"),
    ("torch.utils.dlpack", "to_dlpack"),
    ("torch.jit._recursive", "create_script_module"),
    ("torch._C:ScriptFunction", "__call__"),
    ("torch._C:ScriptMethod", "__call__"),
)
"""What torch calls first with tensors on its ways into C++ that ask no class, or too late.

The first three are those of ``torch.func`` and ``autograd.Function.apply``.
"""


def before_c(wake: Callable[..., None]) -> None:
    """Have ``wake`` called with what is given to functions of torch before they look at it."""
    for module, name in _WAYS_TO_C:
        home = pkgutil.resolve_name(module)
        way = getattr(home, name, None)
        if way is not None and not hasattr(way, "__wrapped__"):
            setattr(home, name, _after(wake, way))


def _after(wake: Callable[..., None], way: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(way)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        wake(args, kwargs)
        return way(*args, **kwargs)

    return wrapped

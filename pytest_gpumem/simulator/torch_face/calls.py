"""What the face does with single functions of torch.

Each handler takes the face, the function and its arguments, and runs with the face off: what it
calls of torch shows the host.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._device import DeviceContext, _device_constructors

from pytest_gpumem.simulator.torch_face.inner import made_of
from pytest_gpumem.simulator.torch_face.kernels import KERNELS, bind
from pytest_gpumem.simulator.torch_face.legacy import CardType
from pytest_gpumem.simulator.torch_face.modes import dispatches_itself, dtensor, face_again
from pytest_gpumem.simulator.torch_face.stubs import Device

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_gpumem.simulator.blocks import Block
    from pytest_gpumem.simulator.torch_face.modes import Face, Function, Handler
    from pytest_gpumem.simulator.torch_face.stubs import CardGenerator

__tracebackhide__ = True  # pytest shows the test's line last, none of these

_C: Any = torch._C
Tensor: Any = torch.Tensor
HOST: torch.device = Device("cpu")
# Elements from which a factory's result is asked for its size before it is made.
_WORTH_ASKING = 2**18
_UNASKED = frozenset(("device", "generator", "pin_memory"))
_NO_CONTEXT = nullcontext()
_to_copy: Any = torch.ops.aten._to_copy.default
_FAKE: Any = _C._TorchDispatchModeKey.FAKE
_RANDOM = frozenset(
    getattr(torch, name)
    for name in (
        "rand",
        "randn",
        "randint",
        "randperm",
        "normal",
        "rand_like",
        "randn_like",
        "randint_like",
    )
)

# Where a tensor is.


def _device(face: Face, func: Function, args: Any, kwargs: Any) -> torch.device:
    return face.memory.where(args[0]) or func(*args, **kwargs)


def _device_of(face: Face, tensor: Any) -> torch.device:
    return _device(face, Tensor.device.__get__, (tensor,), {})


def _is_cuda(face: Face, func: Function, args: Any, kwargs: Any) -> bool:
    return bool(face.memory.where(args[0]) or func(*args, **kwargs))


def _is_cpu(face: Face, func: Function, args: Any, kwargs: Any) -> bool:
    return not face.memory.where(args[0]) and bool(func(*args, **kwargs))


def _get_device(face: Face, func: Function, args: Any, kwargs: Any) -> int:
    card = face.memory.where(args[0])
    return card.index if card else func(*args, **kwargs)


# New tensors.


def create(face: Face, func: Function, args: Any, kwargs: Any) -> Any:
    """Run a function that makes a tensor on ``device=``, or else where its tensor is."""
    device = kwargs.get("device")
    device = _device_of(face, args[0]) if device is None else face.memory.device(device)
    return _create_at(face, device, func, args, kwargs)


def _create_at_default(face: Face, func: Function, args: Any, kwargs: Any) -> Any:
    """Run a factory, which takes the default device where none is named."""
    device = _first(kwargs.get("device"), _default_device(), HOST)
    return _create_at(face, face.memory.device(device), func, args, kwargs)


def _create_at(face: Face, device: torch.device, func: Function, args: Any, kwargs: Any) -> Any:
    if kwargs.get("out") is not None:
        return func(*args, **kwargs)
    if device.type == "cuda" and _C._get_dispatch_mode(_FAKE) is None:
        return _create_on_card(face, device, func, args, {**kwargs, "device": HOST})
    if device.type == "cuda":  # of tensors without data, which see the host
        return face.charges.run_aside(func, *args, **{**kwargs, "device": HOST})
    if kwargs.get("pin_memory"):
        return _pin(face, face.charges.run_aside(func, *args, **{**kwargs, "pin_memory": False}))
    return face.charges.run_aside(func, *args, **kwargs)


def _create_on_card(face: Face, card: torch.device, func: Function, args: Any, kwargs: Any) -> Any:
    block = _take_ahead(face, card, func, args, kwargs)
    try:
        with _drawing(face, card, func, kwargs):
            result = face.charges.run_aside(func, *args, **kwargs)
    except BaseException:
        face.memory.give_back(block, card)
        raise
    if block is None:
        face.charges.charge_all(result, card)
    else:
        face.memory.put(result.untyped_storage(), block, card)
    return result


def _take_ahead(
    face: Face, card: torch.device, func: Function, args: Any, kwargs: Any
) -> Block | None:
    """Take the block of a large result before the host has to hold it, where that is told.

    None where the result is small, or where only the result will tell.
    """
    if _product((*args, kwargs.get("size", 1))) < _WORTH_ASKING:
        return None
    told = {key: value for key, value in kwargs.items() if key not in _UNASKED}
    try:
        meta = face.charges.run_aside(func, *args, **told, device="meta")
        size = meta.untyped_storage().nbytes()
    except (RuntimeError, TypeError, AttributeError):
        return None
    return face.memory.take(size, card)


def _drawing(
    face: Face, card: torch.device, func: Function, kwargs: Any
) -> AbstractContextManager[None]:
    """Return the context in which random numbers come from the card's generator."""
    if func not in _RANDOM:
        return _NO_CONTEXT
    generator: CardGenerator = face.memory.cards[card.index].generator
    return generator.instead_of_the_hosts(kwargs.get("generator"))


def _convert(face: Face, func: Function, args: Any, kwargs: Any) -> Any:
    """Run ``torch.tensor``, ``as_tensor`` or ``asarray``."""
    data = args[0] if args else kwargs.get("data", kwargs.get("obj"))
    is_tensor = isinstance(data, Tensor)
    if not is_tensor and hasattr(data, "__cuda_array_interface__"):
        raise NotImplementedError(
            "the simulated card makes no tensor of an address (__cuda_array_interface__)"
        )
    own = _device_of(face, data) if is_tensor else HOST
    device = face.memory.device(_first(kwargs.get("device"), _default_device(), own))
    on_card = device.type == "cuda"
    if is_tensor and func is not torch.tensor and device != own and (on_card or own.type == "cuda"):
        # Sharing memory, as these functions like to, is not possible across devices.
        return _send(face, data, device, kwargs.get("dtype"))
    if not on_card:
        return face.charges.run_aside(func, *args, **{**kwargs, "device": device})
    result = face.charges.run_aside(func, *args, **{**kwargs, "device": HOST})
    if not is_tensor and func is not torch.tensor:
        result = result.clone()  # of an array, which stays on the host
    face.memory.charge(result, device)
    return result


def _along(face: Face, func: Function, args: Any, kwargs: Any) -> Any:
    """Run a method whose result lives where its tensor does, which dispatch does not see."""
    if kwargs.get("device") is not None:
        return create(face, func, args, kwargs)
    result = face.charges.run_aside(func, *args, **kwargs)
    card = face.memory.where(args[0])
    if card:
        face.memory.charge(result, card)
    return result


def _set_item(face: Face, func: Function, args: Any, kwargs: Any) -> Any:
    """Send a mask to its tensor's device, where torch may fill by it without asking."""
    tensor, index, value = args
    card = face.memory.where(tensor)
    if card and isinstance(index, Tensor) and not face.memory.where(index):
        index = _send(face, index, card)
    return func(tensor, index, value, **kwargs)


def _set_grad(face: Face, func: Function, args: Any, kwargs: Any) -> Any:
    """Refuse a gradient from another device, which the host takes for the same one."""
    tensor, gradient = args
    if isinstance(gradient, Tensor):
        places = [_device_of(face, each) for each in (gradient, tensor)]
        what = "device type" if places[0].type != places[1].type else "device"
        if places[0] != places[1]:
            names = [place.type if what == "device type" else str(place) for place in places]
            raise RuntimeError(
                f"attempting to assign a gradient with {what} '{names[0]}' to a tensor with"
                f" {what} '{names[1]}'. Please ensure that the gradient and the tensor are on the"
                " same device"
            )
    return func(*args, **kwargs)


# Copies between host and card.


def _to(face: Face, func: Function, args: Any, kwargs: Any) -> Any:
    tensor, place, dtype, rest = _parse_to(args, kwargs)
    if place is None:
        return func(*args, **kwargs)
    if isinstance(place, Tensor):
        dtype = place.dtype
        place = _device_of(face, place)
    device = face.memory.device(place)
    if _device_of(face, tensor) == device:
        return tensor.to(tensor.dtype if dtype is None else dtype, **rest)
    return _send(face, tensor, device, dtype, rest.get("memory_format"))


def _type_as(face: Face, func: Function, args: Any, kwargs: Any) -> Any:
    """Send the tensor to where the other one is, which the host takes for the same place."""
    tensor, other = bind(("self", "other"), args, kwargs)
    device = _device_of(face, other)
    if _device_of(face, tensor) == device:
        return func(*args, **kwargs)
    return _send(face, tensor, device, other.dtype)


def _cuda(face: Face, _func: Function, args: Any, kwargs: Any) -> Any:
    tensor, device, _, memory_format = bind(
        ("self", "device", "non_blocking", "memory_format"), args, kwargs
    )
    device = face.memory.device("cuda" if device is None else device)
    if _device_of(face, tensor) == device:
        return tensor
    return _send(face, tensor, device, None, memory_format)


def _cpu(face: Face, func: Function, args: Any, kwargs: Any) -> Any:
    if face.memory.where(args[0]):
        return _send(face, args[0], HOST, None, kwargs.get("memory_format"))
    return func(*args, **kwargs)


def _send(
    face: Face, tensor: Any, device: torch.device, dtype: Any = None, memory_format: Any = None
) -> Any:
    """Copy ``tensor`` to another device; its gradient comes back the same way."""
    memory_format = memory_format or torch.preserve_format
    kind: Any = type(tensor)
    if kind is dtensor():  # which C++ takes apart, and not by the devices that the face shows
        tensor = tensor if dtype is None else tensor.to(dtype)
        local = _send(face, tensor._local_tensor, device, None, memory_format)
        return kind(local, tensor._spec, requires_grad=tensor.requires_grad)
    if dispatches_itself(kind):  # it knows how what it is made of is sent
        return _to_copy(tensor, device=device, dtype=dtype, memory_format=memory_format)
    if tensor.requires_grad and torch.is_grad_enabled() and not tensor.is_meta:
        return ToCopy.apply(tensor, face, device, dtype, memory_format)  # type: ignore[no-untyped-call]  # torch's
    return _send_data(face, tensor, device, dtype, memory_format)


def _send_data(
    face: Face, tensor: Any, device: torch.device, dtype: Any, memory_format: Any
) -> Any:
    """Copy ``tensor`` to another device, without a gradient."""
    on_card = device.type == "cuda"
    target = HOST if on_card else device
    dtype = tensor.dtype if dtype is None else dtype
    copy = face.charges.run_aside(tensor.to, target, dtype, copy=True, memory_format=memory_format)
    if on_card:
        face.memory.charge(copy, device)
    return copy


def _type(face: Face, func: Function, args: Any, kwargs: Any) -> Any:
    tensor, dtype, *_ = bind(("self", "dtype", "non_blocking"), args, kwargs)
    card = face.memory.where(tensor)
    if isinstance(dtype, CardType):
        dtype = str(dtype)
    if dtype is None:
        name: str = func(tensor)
        return name.replace("torch.", "torch.cuda.", 1) if card else name
    if not isinstance(dtype, str):
        return func(tensor, dtype)
    moved = _send(face, tensor, HOST) if card else tensor
    if dtype.startswith("torch.cuda."):
        converted = func(moved, dtype.replace("torch.cuda.", "torch.", 1))
        return _send(face, converted, card or face.memory.device("cuda"))
    return func(moved, dtype)


# The host's own.


def _numpy(face: Face, func: Function, args: Any, kwargs: Any) -> Any:
    card = face.memory.where(args[0])
    if not card:
        return func(*args, **kwargs)
    if kwargs.get("force"):
        return func(_send_data(face, args[0], HOST, None, torch.preserve_format), force=True)
    raise TypeError(
        f"can't convert {card} device type tensor to numpy."
        " Use Tensor.cpu() to copy the tensor to host memory first."
    )


def _pin_memory(face: Face, func: Function, args: Any, kwargs: Any) -> Any:
    tensor = args[0]
    if face.memory.where(tensor):
        raise RuntimeError(
            f"cannot pin '{_type(face, Tensor.type, args, {})}'"
            " only dense CPU tensors can be pinned"
        )
    return tensor if _is_pinned(face, func, args, kwargs) else _pin(face, tensor.clone())


def _is_pinned(face: Face, _func: Function, args: Any, _kwargs: Any) -> bool:
    return all(
        face.memory.pinned.covers(each, each.untyped_storage())
        for each in made_of(args[0]) or (args[0],)
    )


class ToCopy(torch.autograd.Function):
    """A copy between devices, named as autograd names the real one."""

    @staticmethod
    def forward(  # noqa: PLR0917  # autograd passes them by position
        ctx: Any, tensor: Any, face: Face, device: torch.device, dtype: Any, memory_format: Any
    ) -> Any:
        """Copy ``tensor``."""
        ctx.device = face.memory.where(tensor) or HOST
        ctx.dtype = tensor.dtype
        return _send_data(face, tensor, device, dtype, memory_format)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        """Copy ``gradient`` back."""
        with face_again():
            return gradient.to(ctx.device, ctx.dtype), None, None, None, None


def _default_device() -> torch.device | None:
    """Return what ``torch.set_default_device`` or ``with torch.device(...)`` set in this thread."""
    # It waits at the bottom of this thread's stack of modes.
    if _C._len_torch_function_stack():
        mode = _C._get_function_stack_at(0)
        if isinstance(mode, DeviceContext):
            return mode.device
    return None


def _first(*values: Any) -> Any:
    """Return the first value that is not None (a device may be number 0)."""
    return next(value for value in values if value is not None)


def _parse_to(args: Any, kwargs: Any) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Return tensor, device (or a tensor that is there), dtype and the rest of ``Tensor.to``."""
    tensor, *rest = args
    named = dict(kwargs)
    names = ["device", "dtype", "non_blocking", "copy"]
    if rest and isinstance(rest[0], torch.dtype):
        names.remove("device")
    elif rest and isinstance(rest[0], Tensor):
        names[:2] = ["other"]
    named.update(zip(names, rest, strict=False))
    device = named.pop("device", None)
    other = named.pop("other", None)
    return tensor, other if device is None else device, named.pop("dtype", None), named


def _product(values: Iterable[Any]) -> int:
    """Return the product of all whole numbers in ``values`` but 0."""
    product = 1
    for value in values:
        if isinstance(value, int):
            product *= abs(value) or 1
        elif isinstance(value, (list, tuple)):
            product *= _product(value)
    return product


def _pin(face: Face, tensor: Any) -> Any:
    for each in made_of(tensor) or (tensor,):
        face.memory.pinned.pin(each.untyped_storage())
    return tensor


def _handlers() -> dict[Any, Handler]:
    converting = (torch.tensor, torch.as_tensor, torch.asarray)
    table: dict[Any, Handler] = dict.fromkeys(_device_constructors(), _create_at_default)
    table.pop(torch.fill, None)  # which torch 2.4 counts among them
    table |= dict.fromkeys(converting, _convert)
    for name in ("empty", "zeros", "ones", "full", "empty_strided"):
        table[getattr(Tensor, f"new_{name}")] = create
    return table | {
        Tensor.device.__get__: _device,
        Tensor.is_cuda.__get__: _is_cuda,
        Tensor.is_cpu.__get__: _is_cpu,
        Tensor.get_device: _get_device,
        torch.get_device: _get_device,
        Tensor.new_tensor: _along,
        Tensor.new: _along,
        Tensor.__setitem__: _set_item,
        Tensor.grad.__set__: _set_grad,
        Tensor.to: _to,
        Tensor.type_as: _type_as,
        Tensor.cuda: _cuda,
        Tensor.cpu: _cpu,
        Tensor.type: _type,
        Tensor.numpy: _numpy,
        Tensor.pin_memory: _pin_memory,
        Tensor.is_pinned: _is_pinned,
        **KERNELS,
    }


HANDLERS = _handlers()

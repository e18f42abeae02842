"""``torch.device(0)``, which a build of torch without CUDA refuses.

torch takes a number for the accelerator that it was built for, asking below Python. So the name
``torch.device`` gets a class that knows the numbers of cards, and whose instances are those of
torch's own class: that one cannot be derived from.
"""

from __future__ import annotations

import copyreg
from typing import Any

import torch

from pytest_gpumem.simulator.torch_face.stubs import Device

__tracebackhide__ = True  # pytest shows the test's line last, none of these

_C: Any = torch._C
_torch: Any = torch


class _Numbered(type):
    """Makes and knows torch's devices in the place of their own class."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], int):
            return Device("cuda", args[0])
        return Device(*args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Device)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, Device) or type.__subclasscheck__(cls, kind)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is Device

    def __hash__(cls) -> int:
        return hash(Device)

    def __getattr__(cls, name: str) -> Any:
        return getattr(Device, name)


class device(metaclass=_Numbered):  # noqa: N801  # torch's name
    """``torch.device``, with numbers of cards."""


device.__module__ = "torch"


def understand_numbers() -> None:
    """Let torch take the numbers of cards for devices, where it does not."""
    try:
        Device(0)
    except RuntimeError:
        pass
    else:
        return
    _torch.device = device
    # Pickling looks for the class of a device by its name.
    copyreg.pickle(Device, _reduce)


def read_devices_of_to() -> None:
    """Let ``Module.to`` read its arguments as they are.

    Its reader names no tensor: with a device by keyword it would pass for a function that makes
    one there, and be told the host.
    """
    parse = _C._nn._parse_to

    def parse_to(*args: Any, **kwargs: Any) -> Any:
        if not args and kwargs.get("device") is not None:
            args = (kwargs.pop("device"),)
        if args and isinstance(args[0], int):
            args = Device("cuda", args[0]), *args[1:]
        elif args and isinstance(args[0], torch.Tensor):
            args = args[0].device, args[0].dtype, *args[1:]
        return parse(*args, **kwargs)

    _C._nn._parse_to = parse_to


def _reduce(value: torch.device) -> tuple[Any, tuple[Any, ...]]:
    return device, (value.type,) if value.index is None else (value.type, value.index)

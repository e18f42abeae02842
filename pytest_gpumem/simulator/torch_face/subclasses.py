"""Kinds of tensors that programs, and torch itself, derive from torch's own."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.simulator.torch_face import stubs
from pytest_gpumem.simulator.torch_face.calls import HOST
from pytest_gpumem.simulator.torch_face.refusal import TORCH_VERSION

if TYPE_CHECKING:
    from pytest_gpumem.simulator.torch_face.memory import CardMemory

__tracebackhide__ = True  # pytest shows the test's line last, none of these

_C: Any = torch._C
_torch: Any = torch


def construct_subclasses() -> None:
    """Let ``Subclass(tensor)`` work, which torch's own constructor refuses under its modes.

    What a mode returns has a Python object already, and cannot be given another class.
    """
    base: Any = _C.TensorBase

    # torch's compiler puts a function of its own in its place, and compares their parameters
    # unless these are all that there may be.
    def new(*args: Any, **kwargs: Any) -> Any:
        cls, *rest = args
        made = base.__new__(_torch.Tensor, *rest, **kwargs)
        return made if cls is _torch.Tensor else made.as_subclass(cls)

    _torch.Tensor.__new__ = new
    if TORCH_VERSION < (2, 5):  # where it is an alias, which a mode of dispatch has made an object
        as_subclass = _C.TensorBase.as_subclass

        def as_subclass_below_modes(tensor: Any, cls: Any) -> Any:
            with _C._DisableTorchDispatch():
                return as_subclass(tensor, cls)

        _torch.Tensor.as_subclass = as_subclass_below_modes


def put_wrappers_on_the_card(memory: CardMemory) -> None:
    """Make tensors that wrap others on the host, and say that they are where they should be.

    C++ would ask a driver about tensors on a card, which ends the process without one.
    """
    make = _C.TensorBase._make_wrapper_subclass

    @functools.wraps(make)
    def make_on_host(*args: Any, **kwargs: Any) -> Any:
        named = next((each for each in (*args, *kwargs.values()) if _names_a_card(each)), None)
        if named is None:
            return make(*args, **kwargs)
        host = [HOST if _names_a_card(each) else each for each in args]
        made = make(
            *host, **{key: HOST if _names_a_card(each) else each for key, each in kwargs.items()}
        )
        memory.put(made.untyped_storage(), None, memory.device(named))
        return made

    _torch.Tensor._make_wrapper_subclass = staticmethod(make_on_host)


def _names_a_card(value: Any) -> bool:
    return isinstance(value, (stubs.Device, str)) and str(value).startswith("cuda")


def refuse_nested_tensors() -> None:
    """Refuse nested tensors of strided layout on a card, for which C++ would ask a driver."""
    make = _C._nested.nested_tensor

    @functools.wraps(make)
    def make_on_host(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        if _names_a_card(device):
            raise NotImplementedError(
                "the simulated card in Python has no nested tensors of strided layout:"
                " take layout=torch.jagged, or the compiled card"
            )
        return make(data, *args, device=device, **kwargs)

    _C._nested.nested_tensor = make_on_host


def let_fake_tensors_see_the_host() -> None:
    """Make tensors without data on the host, as those with data are made.

    Those on a card would ask torch's C++ for CUDA, which ends the process without it.
    """
    fake: Any = sys.modules["torch._subclasses.fake_tensor"]
    new = fake.FakeTensor.__new__

    def on_host(value: Any) -> Any:
        return HOST if _names_a_card(value) else value

    def new_on_host(cls: Any, *args: Any, **kwargs: Any) -> Any:
        named = {name: on_host(value) for name, value in kwargs.items()}
        return new(cls, *map(on_host, args), **named)

    fake.FakeTensor.__new__ = staticmethod(new_on_host)

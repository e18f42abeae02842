"""What a tensor is while it sleeps: any use of it wakes it first.

It is the object that it was, with another class: torch asks the class before each call that is
given the tensor (``__torch_function__``), and what it does then is to wake it. What is written in
C++ may ask no class. So the object has other insides, too, while it sleeps: a *shell*, which has
the tensor's shape and no memory, and about which torch asks at the latest when it would compute
(``__torch_dispatch__``). Its own insides are in its *stand-in* meanwhile, and the shell is
afterwards: who in C++ has kept that is led to the tensor.
"""

from __future__ import annotations

import copy
import sys
import weakref
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.archive import torch_private
from pytest_gpumem.errors import InUseError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_NAP: Final = "_gpumem_nap"
"""The attribute in which a sleeping tensor has its nap."""
_STANDS_FOR: Final = "_gpumem_stands_for"
"""The attribute in which a stand-in has a reference to its tensor."""


class _Asleep:
    awake: type
    """What the tensor's class is when it does not sleep."""

    def __init_subclass__(cls) -> None:
        """Have a sleeper's class called in errors as an awake one's."""
        cls.__name__, cls.__qualname__ = cls.awake.__name__, cls.awake.__qualname__
        cls.__module__ = cls.awake.__module__

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Return what ``type(parameter)(...)`` means: an awake one."""
        return cls.awake(*args, **kwargs)

    @classmethod
    def __torch_function__(
        cls, func: Any, _types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = _awake(args), _awake(kwargs or {})
        if func is torch.Tensor.detach and _in_new_parameter():
            return _as_itself(args[0])
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, _types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Wake for C++; below autograd, where a graph leads to the shell and not to the tensor."""
        kwargs = kwargs or {}
        with torch_private.plainly():
            trained = any(each.requires_grad for each in _sleepers([args, kwargs]))
        args, kwargs = _awake(args), _awake(kwargs)
        aten = torch.ops.aten
        lost = ""
        if trained and torch.is_grad_enabled() and func is not aten.detach.default:
            lost = "would not get its gradient"
        elif func is aten._to_copy.default:  # as_tensor(weight, device=...): it lay elsewhere
            lost = "would get a copy where it may want the tensor itself"
        if lost:
            raise InUseError(
                f"a tensor that slept was given to {func} by code in C++, which {lost}; "
                "it is awake now: do that again"
            )
        return func(*args, **kwargs)

    # torch's own of these look into the tensor before they ask its class, or not at all.

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(_awake(self), name, value)

    def as_subclass(self, kind: type) -> Any:
        return _awake(self).as_subclass(kind)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(_awake(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _awake(self).__reduce_ex__(protocol)


class AsleepTensor(_Asleep, torch.Tensor):  # type: ignore[misc]  # torch types it as a function
    """A tensor that sleeps."""

    awake = torch.Tensor


class AsleepParameter(_Asleep, torch.nn.Parameter):  # type: ignore[misc]  # as above
    """A parameter that sleeps."""

    awake = torch.nn.Parameter


KINDS: Final[dict[type, Any]] = {kind.awake: kind for kind in (AsleepTensor, AsleepParameter)}
"""The classes of tensors that may sleep, each with what it is then."""


def nap_of(tensor: Any) -> Any:
    """Return the ``sleep.Nap`` of a tensor, None if it is awake."""
    return vars(tensor).get(_NAP) if isinstance(tensor, _Asleep) else None


def wake(*values: Any) -> None:
    """Wake the tensors in ``values``, and those that fell asleep with them.

    Raises:
        ArchiveError: a content cannot be had; they sleep on. The archive is named.

    """
    for each in _sleepers(values):
        tensor = _stood_for(each) if _STANDS_FOR in vars(each) else each
        nap = nap_of(tensor)
        if nap is not None:
            nap.wake()


def mark(tensor: Any, nap: Any) -> None:
    """Have ``nap`` woken by any use of a tensor from here on."""
    vars(tensor)[_NAP] = nap
    tensor.__class__ = KINDS[type(tensor)]


def unmark(tensor: Any, nap: Any) -> None:
    """Let a tensor be used again without further ado, if it was ``nap`` that it woke."""
    # The class first: without the attribute a sleeping tensor could not be woken.
    if nap_of(tensor) is nap:
        object.__setattr__(tensor, "__class__", tensor.awake)
        del vars(tensor)[_NAP]


def exchange(tensors: Sequence[Any]) -> list[Any]:
    """Give tensors shells for insides; return the stand-ins that have their own.

    Raises:
        InUseError: code in C++ has a weak reference to one. All are as they were.

    """
    stand_ins: list[Any] = []
    try:
        for each in tensors:
            stand_in = torch_private.shell(type(each), each)
            vars(stand_in)[_STANDS_FOR] = weakref.ref(each)
            torch_private.swap(each, stand_in)
            stand_ins.append(stand_in)
    except RuntimeError as error:
        for each, stand_in in zip(tensors, stand_ins, strict=False):
            torch_private.swap(each, stand_in)
        raise InUseError(f"its memory is in use: {error}") from None
    return stand_ins


def empty(stand_in: Any) -> None:
    """Free the memory of the tensor that a stand-in stands for."""
    nothing = torch.empty((0,) * stand_in.dim(), dtype=stand_in.dtype, device=stand_in.device)
    torch.Tensor.data.__set__(stand_in, nothing)  # type: ignore[attr-defined]  # a descriptor


def fill(tensor: Any, stand_in: Any, content: Any) -> None:
    """Give a tensor its own insides again, with ``content``; once more is harmless."""
    if torch_private.is_shell(tensor):
        torch_private.swap(tensor, stand_in)
    torch.Tensor.data.__set__(tensor, content)  # type: ignore[attr-defined]  # a descriptor


def _awake(values: Any) -> Any:
    """Return ``values``, awake; tensors in the place of what stands for them."""
    wake(values)
    asleep = next(_sleepers([values]), None) is not None
    return _themselves(values) if asleep else values


def _themselves(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_themselves(each) for each in value]
    if isinstance(value, dict):
        return {key: _themselves(each) for key, each in value.items()}
    if not isinstance(value, _Asleep):
        return value
    if _STANDS_FOR in vars(value):
        value = _stood_for(value)
        if value is None:
            raise InUseError("this stands for a tensor that slept, and that is gone")
    elif nap_of(value) is None and isinstance(value, _Asleep):
        raise InUseError("this is no tensor that sleeps, and has the class of one")
    return _awake(value)  # another thread may have begun to consolidate it


def _stood_for(sleeper: Any) -> Any:
    reference = vars(sleeper).get(_STANDS_FOR)
    return reference() if reference is not None else None


def _sleepers(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, _Asleep):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _sleepers(value)
        elif isinstance(value, dict):
            yield from _sleepers(value.values())
        elif isinstance(value, torch.nn.Module):
            yield from _sleepers([*value.parameters(), *value.buffers()])


def _in_new_parameter() -> bool:
    """Return whether ``nn.Parameter(tensor)`` asks; a simulated card's frames may lie between."""
    frame = sys._getframe(2)
    for _ in range(4):
        if frame.f_code is torch.nn.Parameter.__new__.__code__:
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def _as_itself(tensor: Any) -> Any:
    """Return what ``nn.Parameter`` wants of a tensor whose class it does not know: one like it."""
    if type(tensor) is torch.nn.Parameter:
        return torch.nn.Parameter(tensor.data, requires_grad=tensor.requires_grad)
    return tensor.detach()


def _reduce_awake(tensor: Any) -> Any:
    from torch.multiprocessing import reductions

    return reductions.reduce_tensor(_awake(tensor))  # type: ignore[no-untyped-call]  # torch's


for _kind in KINDS.values():
    ForkingPickler.register(_kind, _reduce_awake)  # which goes by the exact class

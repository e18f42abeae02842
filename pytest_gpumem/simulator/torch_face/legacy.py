"""``torch.cuda.FloatTensor`` and its like, which older programs call, compare with and set.

They are classes of torch's own, made below Python for the build's devices; those of the card are
replaced by classes that know its tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

__tracebackhide__ = True  # pytest shows the test's line last, none of these

_torch: Any = torch
_cuda: Any = torch.cuda
_KINDS = ["Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool"]


class CardType(type):
    """Makes and knows the card's tensors of one dtype."""

    host: Any
    """The class of the host's."""

    def __instancecheck__(cls, instance: object) -> bool:
        return (
            isinstance(instance, torch.Tensor)
            and instance.is_cuda
            and instance.dtype is cls.host.dtype
            and instance.layout is torch.strided
        )

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Return a tensor on the card of what the host's class makes."""
        return cls.host(*args, **kwargs).cuda()

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.host, name)

    def __repr__(cls) -> str:
        return f"<class '{cls}'>"

    def __str__(cls) -> str:
        return f"torch.cuda.{cls.__name__}"


def replace_types() -> None:
    """Give ``torch.cuda`` the classes of the card's tensors."""
    for name in (f"{kind}Tensor" for kind in _KINDS):
        members = {"host": getattr(_torch, name), "__module__": "torch.cuda", "is_cuda": True}
        setattr(_cuda, name, CardType(name, (), members))
    _torch._C._set_default_tensor_type = _setting(_torch._C._set_default_tensor_type)


def _setting(set_type: Callable[[Any], None]) -> Callable[[Any], None]:
    """Let a card's type be the default one, of which C++ knows the dtype alone."""
    on_card = False

    def set_default(kind: Any) -> None:
        nonlocal on_card
        wanted = isinstance(kind, CardType)
        set_type(kind.host if wanted else kind)
        before, on_card = on_card, wanted
        if on_card or before:  # what set_default_device itself was asked for stays
            torch.set_default_device("cuda" if on_card else None)

    return set_default

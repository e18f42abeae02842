"""``torch.cuda.FloatTensor`` and its like, which older programs call and compare with.

They are classes of torch's own, made below Python for the build's devices; those of the card are
replaced by classes that know its tensors.
"""

from __future__ import annotations

from typing import Any

import torch

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

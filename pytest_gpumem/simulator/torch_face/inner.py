"""The tensors that a tensor without data of its own is made of."""

from __future__ import annotations

from typing import Any

import torch

__tracebackhide__ = True  # pytest shows the test's line last, none of these

_C: Any = torch._C
_aten: Any = torch.ops.aten
_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


def made_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return what is in a tensor that ``torch.func`` wrapped, a DTensor or a sparse one.

    The last says where the whole is. Nothing for any other tensor.
    """
    functorch = _C._functorch
    if functorch.is_functorch_wrapped_tensor(tensor):
        return [functorch.get_unwrapped(tensor)]
    local = getattr(tensor, "_local_tensor", None)
    if isinstance(local, torch.Tensor):
        return [local]
    names = _PARTS.get(tensor.layout)
    if names is None:
        return []
    # Below the modes, which would ask where the tensor is, and below autograd.
    with _C._DisableTorchDispatch(), _C._AutoDispatchBelowAutograd():
        return [getattr(_aten, name).default(tensor) for name in names]

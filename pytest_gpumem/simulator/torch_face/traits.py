"""What ``modes.Charges`` must know of each operation of torch, found once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from pytest_gpumem.simulator.torch_face.memory import INDICES, PRODUCTS

__tracebackhide__ = True  # pytest shows the test's line last, none of these

_C: Any = torch._C
_library: Any = torch.library
_OpOverload: Any = torch._ops.OpOverload
NUMBERS = frozenset((bool, int, float, complex))
# Operations that take tensors from several devices; the first tensor says where the result is.
INDEXING = frozenset(
    f"aten::{name}"
    for name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
)
_MIXING = INDEXING | {
    f"aten::{name}"
    for name in (
        "copy_",
        "fill_",
        "fill",
        "_foreach_copy_",
        "_copy_from",
        "set_",
        "is_same_size",
        "tensor_split",
        "ctc_loss",
        "_ctc_loss",
        "_ctc_loss_backward",
        "_pack_padded_sequence",
        "_pack_padded_sequence_backward",
    )
}
# torch's tensors of symbolic zeros crash the interpreter when they pass a dispatch mode.
_INSTEAD = {torch.ops.aten._efficientzerotensor.default: torch.ops.aten.zeros.default}
_OF_A_CARD = ("CUDA", "CompositeExplicitAutograd")
"""Where ``torch.library`` registers kernels that a card runs."""
_TORCHS = frozenset(("aten", "prims", "_native"))
_PRODUCTS = frozenset(f"aten::{name}" for name in PRODUCTS)


class Traits(NamedTuple):
    """What must be known of one operation."""

    name: str
    run: Any
    """What is run for it."""
    mixes: bool
    """Takes tensors from several devices."""
    random: bool
    resizes: bool
    """May change the size of a storage it is given."""
    composite: bool
    """Is made of other operations."""
    multiplies: bool = False
    """Multiplies matrices, with cuBLAS."""
    chooses: bool = False
    """By indices, which may lie outside."""
    no_numbers: int = 0
    """How many tensors it takes first, where it takes no number for one."""
    in_python: bool = False
    """Somebody's Python is what a card runs for it."""


def traits_of(func: Any) -> Traits:
    """Return what must be known of ``func``."""
    if not isinstance(func, _OpOverload):  # a higher-order operator
        return Traits("", func, mixes=True, random=False, resizes=False, composite=False)
    name = func._schema.name
    return Traits(
        name,
        _INSTEAD.get(func, func),
        mixes=name in _MIXING,
        random=torch.Tag.nondeterministic_seeded in func.tags,
        resizes=name.startswith("aten::resize")
        or any(argument.is_out for argument in func._schema.arguments),
        composite=_C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        ),
        multiplies=name in _PRODUCTS,
        chooses=any(argument.name in INDICES for argument in func._schema.arguments),
        no_numbers=_no_numbers(func._schema),
        in_python=any(_kernel_in_python(func.name(), key) for key in _OF_A_CARD),
    )


def _kernel_in_python(name: str, key: str) -> bool:
    # torch's own for a card are of Triton, where the host has others.
    namespace, _, rest = name.partition("::")
    return namespace not in _TORCHS and f"{namespace}/{rest}/{key}" in _library._impls


def _no_numbers(schema: Any) -> int:
    if _C._should_allow_numbers_as_tensors(schema.name.partition("::")[2]):
        return 0
    kinds = [isinstance(argument.type, _C.TensorType) for argument in schema.arguments]
    return [*kinds, False].index(False)


def with_tensors(traits: Traits, args: Any) -> Any:
    """Return the arguments of an operation without numbers in the place of tensors.

    Constants of traced programs are such tensors, which torch hands to a mode as numbers.
    """
    tensors = args[: traits.no_numbers]
    return *map(torch.as_tensor, tensors), *args[traits.no_numbers :]

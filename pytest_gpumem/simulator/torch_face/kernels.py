"""What the face does with functions of torch that are other kernels on a card than on the host.

They are called as those of ``calls`` are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pytest_gpumem.simulator.torch_face.modes import Face, Function, Handler

__tracebackhide__ = True  # pytest shows the test's line last, none of these

_C: Any = torch._C
Tensor: Any = torch.Tensor


def bind(names: tuple[str, ...], args: Any, kwargs: Any) -> list[Any]:
    """Return the values of these parameters, None for those that were not given."""
    named = dict(zip(names, args, strict=False)) | kwargs
    return [named.get(name) for name in names]


def _pad_packed(face: Face, func: Function, args: Any, kwargs: Any) -> Any:
    """Put the padded sequences where the packed ones are; their lengths stay on the host."""
    padded, lengths = face.charges.run_aside(func, *args, **kwargs)
    card = face.memory.where(args[0])
    if card:
        face.memory.charge(padded, card)
    return padded, lengths


def _assert_async(face: Face, func: Function, args: Any, kwargs: Any) -> Any:
    """Lose the context where the assertion fails, as by the kernel that tries it on the card.

    Which is seen by the next call, as there: a way to try what a suite does after such an error.
    """
    if face.memory.where(args[0]):
        if not args[0]:
            face.memory.lose()
        return None
    return func(*args, **kwargs)


def _ctc_loss(face: Face, func: Function, args: Any, kwargs: Any) -> Any:
    """Give it the lengths as numbers: as host tensors it would send them to the host's device."""
    if face.memory.where(args[0]):
        args = [
            arg.flatten().tolist() if position in (2, 3) and isinstance(arg, Tensor) else arg
            for position, arg in enumerate(args)
        ]
    return func(*args, **kwargs)


def _histc(face: Face, func: Function, args: Any, kwargs: Any) -> Any:
    """Count whole numbers, as mixtures of experts do: the host's kernel refuses them."""
    tensor, *rest = args or (kwargs.pop("input"),)
    card = face.memory.where(tensor)
    if not card or tensor.is_floating_point() or "out" in kwargs:
        return func(tensor, *rest, **kwargs)
    counts = face.charges.run_aside(lambda: func(tensor.double(), *rest, **kwargs).to(tensor.dtype))
    face.memory.charge(counts, card)
    return counts


def _dropout(face: Face, func: Function, args: Any, kwargs: Any) -> Any:
    """Run dropout as CUDA does, with a mask of bytes."""
    tensor, probability, train = bind(("input", "p", "train"), args, kwargs)
    if train and 0 < probability < 1 and face.memory.where(tensor):
        return torch.native_dropout(tensor, probability, True)[0]
    return func(*args, **kwargs)


def _attention(face: Face, func: Function, args: Any, kwargs: Any) -> Any:
    """Let the host's kernels stand for those of CUDA that a program has chosen.

    The host has no memory-efficient one, and none of cuDNN; its flash one takes their place.
    """
    chosen = _C._get_flash_sdp_enabled(), _C._get_math_sdp_enabled()
    others = _C._get_mem_efficient_sdp_enabled() or _C._get_cudnn_sdp_enabled()
    if not others or any(chosen) or not face.memory.where(args[0]):
        return func(*args, **kwargs)
    try:
        _C._set_sdp_use_flash(True)
        _C._set_sdp_use_math(True)  # for what the flash one refuses: a dropout
        return func(*args, **kwargs)
    finally:
        _C._set_sdp_use_flash(chosen[0])
        _C._set_sdp_use_math(chosen[1])


KERNELS: dict[Any, Handler] = {
    torch.ctc_loss: _ctc_loss,
    torch._assert_async: _assert_async,
    torch.dropout: _dropout,
    torch.histc: _histc,
    Tensor.histc: _histc,
    torch.nn.functional.scaled_dot_product_attention: _attention,
    torch._VF._pad_packed_sequence: _pad_packed,
}

"""DLPack's capsules of tensors on a card, which C++ makes of the host's bytes.

A capsule says where its bytes are, and its taker goes by that: NumPy refuses a card's. So it is
told the card, and what is made of it here is a tensor of the storage that it is about.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.simulator.torch_face.memory import host_address
from pytest_gpumem.simulator.torch_face.stubs import Device

if TYPE_CHECKING:
    from pytest_gpumem.simulator.torch_face.memory import CardMemory

__tracebackhide__ = True  # pytest shows the test's line last, none of these

_C: Any = torch._C
_torch: Any = torch
_Place = ctypes.c_int32 * 2
"""DLPack's ``DLDevice``: a kind and a number."""
_HOST, _CUDA = 1, 2
# By the capsule's name: behind the pointer to the bytes, in the second form behind a version, two
# pointers and flags as well.
_OFFSETS = {b"dltensor": 8, b"dltensor_versioned": 40}
# Of this module's own: what pythonapi's attributes are told of their types, all who use them get.
_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(
    ("PyCapsule_GetName", ctypes.pythonapi)
)
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def label_capsules(memory: CardMemory) -> None:
    """Let ``torch._C`` tell the card in a capsule, and understand one that does."""
    receive = _C._from_dlpack

    def received(capsule: Any) -> Any:
        place = _place(capsule)
        if place is None or place[0] != _CUDA:
            return receive(capsule)
        card = memory.device(Device("cuda", place[1]))
        place[:] = _HOST, 0
        with _C.DisableTorchFunction():
            return _on_card(memory, receive(capsule), card)

    def labelling(give: Any) -> Any:
        def given(tensor: Any, *args: Any, dl_device: Any = None, **options: Any) -> Any:
            if dl_device is not None:
                kind, index = dl_device
                tensor = tensor.to(Device("cuda", index) if kind == _CUDA else Device("cpu"))
            capsule = give(tensor, *args, **options)
            card = memory.where(tensor)
            place = _place(capsule)
            if card and place is not None:
                place[:] = _CUDA, card.index
            return capsule

        return given

    _C._from_dlpack = received
    for name in ("_to_dlpack", "_to_dlpack_versioned"):
        if hasattr(_C, name):  # older versions have only the first
            setattr(_C, name, labelling(getattr(_C, name)))
    # Imported by name when torch was.
    _torch.to_dlpack = _torch.utils.dlpack.to_dlpack = _C._to_dlpack
    _torch.utils.dlpack._from_dlpack = received  # so in torch 2.4


def _place(capsule: Any) -> Any:
    """Return a capsule's ``DLDevice``, to be changed there; None for one that was taken."""
    name = _name(capsule)
    return (
        _Place.from_address(_pointer(capsule, name) + _OFFSETS[name]) if name in _OFFSETS else None
    )


def _on_card(memory: CardMemory, shown: Any, card: torch.device) -> Any:
    """Return ``shown``, of bytes that some storage on the card has, as a tensor of that storage."""
    place = host_address(shown.untyped_storage())
    for storage in memory.storages():
        offset = place - host_address(storage)
        if 0 <= offset < storage.nbytes():
            empty = torch.empty(0, dtype=shown.dtype)
            return empty.set_(storage, offset // shown.itemsize, shown.shape, shown.stride())
    memory.charge(shown, card)  # of nothing, or of a copy that C++ made
    return shown

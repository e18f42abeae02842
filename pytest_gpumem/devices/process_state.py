"""What a process has set that outlives a test and changes what later ones meet; read, never made.

Nothing here creates a CUDA context or imports torch: what torch has not got yet has its default.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

from pytest_gpumem.devices import torch_private, torch_state
from pytest_gpumem.devices.notebook import note_failure

VARIABLES = ("CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Of the environment: which cards there are, and how torch takes their memory."""
_VISIBLE, _ALLOCATOR, _OLD_ALLOCATOR = map(os.fsencode, VARIABLES)
FRACTION = "memory fraction of cuda:"
_DEFAULTS = {
    "default device": "cpu",
    "default dtype": "torch.float32",
    "deterministic algorithms": False,
    "gradients": True,
    "float32 matmul precision": "highest",
    "allocator settings": "",
    "current device": "cuda:0",
}
"""Of torch. The settings of its allocator are those that were made by a call."""

Settings = dict[str, object]
"""By what is set; texts of the environment are as the system keeps them, encoded."""
Values = tuple[tuple[object, ...], ...]
"""What is set: of the environment, of torch, of its CUDA. Named where two differ: twice a test they
are read, and most tests change none."""


def read(variables: tuple[object, ...], *, fractions: bool = True) -> Values:
    """Return what is set now, of the environment what ``variables`` says; some 2 us with torch."""
    torch = sys.modules.get("torch")
    if isinstance(torch, ModuleType):  # a mock of it has everything
        try:
            return variables, _of_torch(torch), _of_cuda(fractions)
        except AttributeError:  # another thread is still importing it
            pass
        except Exception as error:
            note_failure("reading torch's settings", error)
    return variables, (), ()


def named(values: Values) -> Settings:
    """Return by its name what is set."""
    variables, of_torch, of_cuda = values
    found: Settings = dict(zip(VARIABLES, variables, strict=True))
    found.update(zip(_OF_TORCH, of_torch, strict=False))
    if of_torch:
        found["default dtype"] = str(found["default dtype"])
    if of_cuda:
        current, *fractions = of_cuda
        found["current device"] = f"cuda:{current}"
        found.update((f"{FRACTION}{index}", each) for index, each in enumerate(fractions))
    return found


def variables() -> tuple[object, ...]:
    """Return the environment's; twice a test, so a look through ``os.environ`` would show.

    It raises and catches an error for each that is not set, which what it wraps (in CPython, on
    POSIX) does not. A look at all variables takes 40 us.
    """
    wrapped = getattr(os.environ, "_data", None)
    if os.name == "posix" and isinstance(wrapped, dict):
        get = wrapped.get
        return get(_VISIBLE), get(_ALLOCATOR), get(_OLD_ALLOCATOR)
    return tuple(map(os.environ.get, VARIABLES))


_OF_TORCH = tuple(_DEFAULTS)[:-1]


def _of_torch(torch: Any) -> tuple[object, ...]:
    return (
        torch_private.default_device(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(),
        torch_private.allocator_settings(),
    )


def _of_cuda(fractions: bool) -> tuple[object, ...]:
    cuda = torch_state.cuda()
    if cuda is None:
        return ()
    # Older versions of torch can set it, but not tell it.
    if not (fractions and hasattr(cuda.module, "get_per_process_memory_fraction")):
        return (cuda.current_device(),)
    tell = cuda.get_per_process_memory_fraction
    return (cuda.current_device(), *[tell(index) for index in range(cuda.device_count())])


def changes(before: Values, after: Values) -> dict[str, tuple[object, object]]:
    """Return what differs by its name, with its value before and after."""
    was = named(before)
    told = ((what, _value(was, what), value) for what, value in named(after).items())
    return {what: (old, new) for what, old, new in told if old != new}


def _value(settings: Settings, what: str) -> object:
    return settings.get(what, 1.0 if what.startswith(FRACTION) else _DEFAULTS.get(what))


def put_back(what: str, value: object) -> bool:
    """Set ``what`` to ``value`` again where that is safe; return whether it was.

    Only a limit that fails innocent tests is: a memory fraction that was lowered. Raised, it fails
    none, and lowering it again might. What decides how tests compute may be meant to last.
    """
    cuda = torch_state.cuda()
    if cuda is None or not what.startswith(FRACTION):
        return False
    index = int(what.removeprefix(FRACTION))
    try:
        if cuda.get_per_process_memory_fraction(index) > value:
            return False
        cuda.set_per_process_memory_fraction(value, index)
    except Exception as error:
        note_failure(f"setting the {what} again", error)
        return False
    return True

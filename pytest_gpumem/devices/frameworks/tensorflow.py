"""TensorFlow: what its allocator tells of each GPU.

By TensorFlow 2.21: ``tf.config.experimental.get_memory_info("GPU:0")`` tells current and peak
bytes of a logical device, ``reset_memory_stats`` sets the peak back. Both initialise the devices,
so they are asked only once the eager context is initialised, which its private ``_context`` tells.
What the allocator reserved, nearly all of the card unless it may grow, is not told.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from pytest_gpumem.devices.frameworks.base import Array, Framework, Level
from pytest_gpumem.devices.heap import instances

if TYPE_CHECKING:
    from collections.abc import Iterable

FOUND_IN = "2.21.0"
"""Version in which the private names were found."""
_KINDS = (
    ("tensorflow.python.framework.ops", "EagerTensor"),
    ("tensorflow.python.ops.resource_variable_ops", "BaseResourceVariable"),
)
_HANDLES = ("resource", "variant")
"""Types of what refers to memory of others: a variable's handle, a data set."""


class TensorFlow(Framework):
    """TensorFlow's logical GPUs."""

    name = "TensorFlow"
    exact_peaks = True

    def __init__(self) -> None:
        super().__init__()
        self._gpus: int | None = None
        """How many there are: once initialised they do not change."""

    def active(self) -> bool:
        """Whether the eager context is initialised, and has a GPU."""
        context = getattr(sys.modules.get("tensorflow.python.eager.context"), "_context", None)
        if context is None or getattr(context, "_initialized", False) is not True:
            self._gpus = None
            return False
        if self._gpus is None:
            config = getattr(sys.modules.get("tensorflow"), "config", None)
            if config is None:
                return False
            self._gpus = len(config.list_logical_devices("GPU"))
        return self._gpus > 0

    def levels(self) -> dict[int, Level]:
        """Return what each GPU tells."""
        ask = _config().experimental.get_memory_info
        told = {index: ask(f"GPU:{index}") for index in range(self._gpus or 0)}
        return {
            index: Level(int(each["current"]), int(each["current"]), int(each["peak"]))
            for index, each in told.items()
        }

    def ordinal(self, index: int) -> int:
        """Return the number of the physical device: some may be hidden, some be several."""
        logical = [
            int(physical.name.rpartition(":")[2])
            for physical in _config().get_visible_devices("GPU")
            for _ in _config().get_logical_device_configuration(physical) or (None,)
        ]
        return logical[index]

    def set_back(self, index: int) -> None:
        """Set the peak back."""
        _config().experimental.reset_memory_stats(f"GPU:{index}")

    def things(self) -> Iterable[Any]:
        """Return the living eager tensors and variables."""
        found = (getattr(sys.modules.get(module), name, None) for module, name in _KINDS)
        return instances(*(kind for kind in found if isinstance(kind, type)))

    def array(self, thing: Any) -> Array | None:
        """Return the memory of a tensor or variable on a GPU."""
        _, on_gpu, index = str(thing.device).rpartition("device:GPU:")
        if not on_gpu or thing.dtype.name in _HANDLES:
            return None
        shape = tuple(thing.shape.as_list())
        size = int(thing.shape.num_elements()) * thing.dtype.size
        return Array(thing, -id(thing), size, f"{self.name}:{index}", shape, thing.dtype.name)


def _config() -> Any:
    return sys.modules["tensorflow"].config


ALLOCATOR = TensorFlow()

"""torch as the suite left it: looked up, never imported, never initialised."""

from __future__ import annotations

import sys
from typing import Any


class _Face:
    """A module of torch with its functions as they were when it was first looked at.

    Suites replace ``torch.cuda.device_count`` and its like to test their own code; what we
    measure must not depend on it.
    """

    EARLY = ("device_count", "is_initialized", "memory_stats_as_nested_dict")
    """Asked for before the first test; the others when they are needed."""

    def __init__(self, module: Any) -> None:
        self.module = module
        for name in self.EARLY:
            setattr(self, name, getattr(module, name, None))

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)
        setattr(self, name, value)
        return value


_cuda = _Face(None)


def cuda() -> Any:
    """Return ``torch.cuda`` once this process has initialised it (CUDA or ROCm), else None.

    A forked child of a process that had is not initialised.
    """
    global _cuda  # noqa: PLW0603  # one face of one module
    module = getattr(sys.modules.get("torch"), "cuda", None)
    if module is None or module is not _cuda.module:
        # Missing while another thread is still importing torch.
        if not hasattr(module, "is_initialized"):
            return None
        _cuda = _Face(module)
    # A mock's answer is true, but is not True.
    return _cuda if _cuda.is_initialized() is True else None


def cuda_answers() -> bool:
    """Return whether CUDA still works in this process; True where it was not initialised."""
    module = cuda()
    if module is None:
        return True
    try:
        module.synchronize()
    except Exception:  # whatever it is: the next call will fail likewise
        return False
    return True


def accelerator() -> Any:
    """Return ``torch.accelerator`` once it is in use, on another device than CUDA, else None.

    None too before torch 2.9, whose accelerators tell no memory statistics in common.
    """
    module: Any = getattr(sys.modules.get("torch"), "accelerator", None)
    # torch has one kind of accelerator at a time, and asking which takes longer.
    if not hasattr(module, "memory_stats") or cuda() is not None:
        return None
    if kind(module) in ("", "cuda"):
        return None
    its = backend(kind(module))
    if hasattr(its, "is_initialized"):
        return module if its.is_initialized() else None
    try:
        # Empty until the allocator exists, which asking does not bring about (MPS).
        return module if module.memory_stats(0) else None
    except Exception:  # the backend has an allocator without statistics
        return None


def other_maker() -> str:
    """Return what the loaded torch was built for where NVML does not answer for it.

    ``rocm``, ``xpu``, ``mps`` and so on; empty without torch, without an accelerator and with
    CUDA. Asks what the build is, initialises nothing.
    """
    torch = sys.modules.get("torch")
    # A mock of torch has everything, but no text.
    if isinstance(getattr(getattr(torch, "version", None), "hip", None), str):
        return "rocm"
    module = getattr(torch, "accelerator", None)
    built_for = kind(module) if hasattr(module, "current_accelerator") else ""
    return "" if built_for == "cuda" else built_for


def kind(module: Any) -> str:
    """Return the device type of ``torch.accelerator``: ``xpu``, ``mps``; empty for none."""
    found = getattr(module.current_accelerator(), "type", "")
    return found if isinstance(found, str) else ""


def backend(kind: str) -> Any:
    """Return torch's module for a device type: ``torch.xpu``, ``torch.mps``."""
    return getattr(sys.modules.get("torch"), kind, None)

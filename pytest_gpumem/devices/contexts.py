"""On which devices this process has a CUDA context, asked of a driver that is loaded anyway."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_SUCCESS = 0


class _Driver:
    """CUDA's driver, once somebody in this process has loaded it."""

    library: Any = None


def held() -> tuple[int, ...]:
    """Return the devices with a primary context of this process, by CUDA's indexes; about 1 us.

    Neither loads nor initialises the driver, which a process may be about to fork: the driver
    answers ``CUDA_ERROR_NOT_INITIALIZED`` until somebody has initialised it, and in a child that
    was forked from who had (CUDA driver API, ``cuDeviceGetCount``, ``cuDevicePrimaryCtxGetState``).
    """
    driver = _Driver.library or _loaded()
    count = ctypes.c_int(0)
    if driver is None or driver.cuDeviceGetCount(ctypes.byref(count)) != _SUCCESS:
        return ()
    return tuple(index for index in range(count.value) if _has_context(driver, index))


def _loaded() -> Any:
    """Return the driver's library if this process has loaded it."""
    mode = getattr(os, "RTLD_NOLOAD", None)
    if mode is None:
        return None
    try:
        _Driver.library = ctypes.CDLL(_LIBRARY, mode=mode | os.RTLD_LAZY)
    except OSError:
        return None
    return _Driver.library


def _has_context(driver: Any, index: int) -> bool:
    device, flags, active = ctypes.c_int(0), ctypes.c_uint(0), ctypes.c_int(0)
    if driver.cuDeviceGet(ctypes.byref(device), index) != _SUCCESS:
        return False
    asked = driver.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active))
    return asked == _SUCCESS and bool(active.value)

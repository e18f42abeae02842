"""Stand-ins for frameworks beside torch, as far as they are asked, by the sources that were read.

No figure of them was taken on a GPU. CuPy by ``cupy/cuda/memory.pyx`` of 15.0.0a1, RMM by
``rmm/pylibrmm/memory_resource/_memory_resource.pyx`` of 26.08, JAX by ``jaxlib`` 0.10.2, Numba by
``numba/cuda/cudadrv/driver.py`` of numba-cuda 0.30.4, TensorFlow by 2.21.0.
"""

from __future__ import annotations

import contextlib
import sys
import types
from types import SimpleNamespace

CURRENT = [0]
"""CUDA's current device."""


class OutOfMemoryError(MemoryError):
    """As ``cupy.cuda.memory.OutOfMemoryError`` puts it."""

    def __init__(self, size, total, limit=0):
        super().__init__(
            f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes, "
            f"limit set to: {limit:,} bytes)."
        )


OutOfMemoryError.__module__ = "cupy.cuda.memory"


class Pool:
    """``MemoryPool``: blocks of 512 bytes, kept when they are freed, by the current device."""

    def __init__(self, limit=2**60):
        self.limit = limit
        self.used, self.total = {}, {}

    def malloc(self, size):
        rounded, device = -(-size // 512) * 512, CURRENT[0]
        used, total = self.used.get(device, 0), self.total.get(device, 0)
        if used + rounded > total:
            if used + rounded > self.limit:
                raise OutOfMemoryError(rounded, total, self.limit)
            self.total[device] = used + rounded
        self.used[device] = used + rounded
        return Memory(self, device, rounded)

    def used_bytes(self):
        return self.used.get(CURRENT[0], 0)

    def total_bytes(self):
        return self.total.get(CURRENT[0], 0)

    def free_all_blocks(self, stream=None):
        self.total[CURRENT[0]] = self.used.get(CURRENT[0], 0)


class Memory:
    """``PooledMemory``: gives its block back when it dies."""

    def __init__(self, pool, device, size):
        self.pool, self.device, self.size, self.ptr = pool, device, size, id(self)

    def __del__(self):
        self.pool.used[self.device] -= self.size


class ndarray:  # as CuPy calls it
    """An array of bytes."""

    def __init__(self, size):
        memory = sys.modules["cupy"].cuda.get_allocator()(size)
        self.data = SimpleNamespace(mem=memory, device_id=memory.device)
        self.shape, self.dtype = (size,), "uint8"


def cupy(limit=2**60, uuids=()):
    """Return a stand-in for the module ``cupy``."""
    module, pool = types.ModuleType("cupy"), Pool(limit)
    pinned = SimpleNamespace(freed=0)
    pinned.free_all_blocks = lambda: setattr(pinned, "freed", pinned.freed + 1)
    allocator = [pool.malloc]

    @contextlib.contextmanager
    def device(index):
        before, CURRENT[0] = CURRENT[0], index
        yield
        CURRENT[0] = before

    def properties(index):
        return {"uuid": uuids[index]} if uuids else {}

    module.ndarray = ndarray
    module.get_default_memory_pool = lambda: pool
    module.get_default_pinned_memory_pool = lambda: pinned
    module.cuda = SimpleNamespace(
        Device=device,
        runtime=SimpleNamespace(getDeviceProperties=properties),
        get_allocator=lambda: allocator[0],
        set_allocator=lambda new=None: allocator.__setitem__(0, new or Memory),
    )
    return module


def rmm(*stacks):
    """Return a stand-in for ``rmm`` with a resource for each device."""
    module = types.ModuleType("rmm")
    module.mr = SimpleNamespace(get_per_device_resource=lambda index: stacks[index])
    return module


def jax(*devices, arrays=(), platform="cuda"):
    """Return a stand-in for ``jax._src.xla_bridge`` with one initialised backend."""
    module = types.ModuleType("jax._src.xla_bridge")
    client = SimpleNamespace(local_devices=lambda: list(devices), live_arrays=lambda: list(arrays))
    module._backends = {platform: client}
    return module


class JaxDevice:
    """One of JAX's devices, which are told apart by their hash."""

    def __init__(self, stats, local_hardware_id=0, platform="gpu"):
        self.stats, self.platform = stats, platform
        self.local_hardware_id = local_hardware_id

    def memory_stats(self):
        return self.stats

"""The frameworks that run on a CPU, for real, each in a process that has it; none has a GPU here.

CuPy and RMM have no build for a CPU, but can be imported; RMM can allocate by functions of ours.
Skipped where they are not installed: ``pip install --target DIR 'jax[cpu]'`` and DIR in PYTHONPATH.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

PROGRAMS = {
    "jax": """
import jax
from pytest_gpumem import devices
assert devices.allocators() == ()
module = sys.modules["jax._src.xla_bridge"]
assert not module.backends_are_initialized(), "asking it has initialised JAX"
array = jax.numpy.ones(1000)
assert devices.allocators() == () and list(devices.living_arrays()) == []
assert module._backends and array.devices().pop().memory_stats() is None

from pytest_gpumem.devices.frameworks import jax as ours
# Its arrays and devices are asked as a GPU's are; only figures it has none.
ours.GPUS, ours.ALLOCATOR._known = ("cpu",), ()
(allocator,) = devices.allocators()
assert allocator.read() == () and allocator.ordinal(0) == 0
(found,) = devices.living_arrays()
assert found.thing is array and (found.size, found.shape, found.dtype) == (4000, (1000,), "float32")
del found
import weakref
weakref.ref(array)
array.delete()
assert list(devices.living_arrays()) == []
""",
    "tensorflow": """
import tensorflow as tf
from pytest_gpumem import devices
assert devices.allocators() == ()
context = sys.modules["tensorflow.python.eager.context"]
assert context._context is None, "asking it has initialised TensorFlow"
tensor = tf.ones(100)
assert context._context._initialized is True
assert devices.allocators() == () and list(devices.living_arrays()) == []

# As a GPU is: its CPU answers the same calls.
from pytest_gpumem.devices.frameworks import tensorflow as ours
info = tf.config.experimental.get_memory_info("CPU:0")
assert set(info) == {"current", "peak"}
from pytest_gpumem.devices.heap import instances
kinds = [getattr(sys.modules[module], name) for module, name in ours._KINDS]
variable = tf.Variable(tf.ones(10))
found = {id(each) for each in instances(*kinds)}
assert {id(tensor), id(variable)} <= found
for each in (tensor, variable):
    assert each.dtype.size == 4 and each.dtype.name not in ours._HANDLES
    assert each.shape.num_elements()
    assert "device:CPU:0" in each.device
    import weakref
    weakref.ref(each)
assert variable.handle.dtype.name in ours._HANDLES
(physical,) = tf.config.get_visible_devices("CPU")
assert physical.name.rpartition(":")[2] == "0"
assert not tf.config.get_logical_device_configuration(physical)
""",
    "numba": """
import types, weakref
from numba import cuda
from pytest_gpumem import devices
driver = sys.modules["numba.cuda.cudadrv.driver"]
assert devices.allocators() == () and driver.driver.devices == {}

class Context:
    pass

context = Context()
# Numba's own bookkeeping; the driver's calls alone are stand-ins.
real, driver._logger = driver.driver, __import__("logging").getLogger("numba")
def allocate(*arguments):  # numba's writes to a box, numba-cuda's returns
    if len(arguments) > 1:
        arguments[0]._obj.value = 4096 + arguments[-1]
    return 4096 + arguments[-1]
real.cuMemAlloc = allocate
real.cuMemFree = lambda pointer: None
context.memory_manager = manager = driver.NumbaCUDAMemoryManager(context=context)
manager.deallocations.memory_capacity = 10**9
real.devices[0] = types.SimpleNamespace(primary_context=context, uuid="GPU-1")
one, other = manager.memalloc(1000), manager.memalloc(500)
(allocator,) = devices.allocators()
assert [each[0] for each in allocator.read()] == [1500], allocator.read()
del other
(reading,) = allocator.read()
assert (reading.allocated, reading.reserved) == (1000, 1500), reading
allocator.settle()
assert allocator.read()[0].reserved == 1000
""",
    "numba's simulator": """
import os
os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
from numba import cuda
from pytest_gpumem import devices
array = cuda.to_device([1, 2, 3])
assert devices.allocators() == () and list(devices.living_arrays()) == []
""",
}
PROGRAMS["cupy"] = """
import cupy
from pytest_gpumem import devices
from pytest_gpumem.devices import contexts
from pytest_gpumem.devices.frameworks import cupy as ours
from pytest_gpumem.devices.heap import instances
from pytest_gpumem.tracking import release
assert devices.allocators() == () and contexts.held() == ()
default = cupy.get_default_memory_pool()
assert ours._pools() == [default] and list(instances(cupy.ndarray)) == []
another = cupy.cuda.MemoryPool()
cupy.cuda.set_allocator(another.malloc)
assert ours._pools() == [default, another]
cupy.cuda.set_allocator(None)
assert ours._pools() == [default]
cupy.get_default_pinned_memory_pool().free_all_blocks()
try:
    raise cupy.cuda.memory.OutOfMemoryError(8 << 30, 1 << 20, 0)
except MemoryError as error:
    assert "Out of memory allocating 8,589,934,592 bytes" in release.oom_text(error)
"""
PROGRAMS["rmm"] = """
import ctypes, rmm
from pytest_gpumem.devices import contexts
from pytest_gpumem.devices.frameworks import rmm as ours
from pytest_gpumem.tracking import release
assert not ours.ALLOCATOR.active()
contexts.held = lambda: (0,)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
system = rmm.mr.CallbackMemoryResource(
    lambda size, stream: libc.malloc(size), lambda address, size, stream: libc.free(address)
)

def figures(resource):
    rmm.mr.set_per_device_resource(0, resource)
    first, second = resource.allocate(4096), resource.allocate(8192)
    resource.deallocate(second, 8192)
    told = ours.ALLOCATOR.read()[0]
    resource.deallocate(first, 4096)
    return told.allocated, told.reserved, ours.ALLOCATOR.levels()[0].peak

assert figures(rmm.mr.StatisticsResourceAdaptor(system)) == (4096, 4096, 12288)
assert figures(rmm.mr.TrackingResourceAdaptor(system)) == (4096, 4096, None)
limited = rmm.mr.LimitingResourceAdaptor(system, 1 << 20)
assert figures(rmm.mr.StatisticsResourceAdaptor(limited)) == (4096, 4096, 12288)
pool = rmm.mr.PoolMemoryResource(system, initial_pool_size=1 << 20)
assert figures(rmm.mr.StatisticsResourceAdaptor(pool)) == (4096, 1 << 20, 12288)
try:
    limited.allocate(2 << 20)
except MemoryError as error:
    assert "Exceeded memory limit 1048576" in release.oom_text(error)
else:
    raise AssertionError
"""
PROGRAMS["numba_cuda"] = "import _numba_cuda_redirector\n" + PROGRAMS["numba"]
"""NVIDIA's package, which takes the place of the one in numba."""


@pytest.mark.parametrize("name", PROGRAMS)
def test_on_a_cpu(name):
    package = name.partition("'")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    program = "import sys\n" + PROGRAMS[name]
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]

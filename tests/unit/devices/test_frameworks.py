"""Frameworks beside torch, by stand-ins that follow their sources; none was run on a GPU."""

from __future__ import annotations

import ctypes
import sys
import types
from types import SimpleNamespace

import framework_fakes as fakes
import pytest
from device_fakes import GIB, FakeBoard, FakeDriver, uuid

from pytest_gpumem import devices
from pytest_gpumem.devices import allocator as looked
from pytest_gpumem.devices import contexts, frameworks

A, B = uuid("a"), uuid("b")


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(frameworks, "_met", {})
    monkeypatch.setattr(looked, "_alone", -1)
    for module in ("torch", *frameworks.MODULES):
        monkeypatch.delitem(sys.modules, module, raising=False)
    for name in frameworks.MODULES.values():
        monkeypatch.delitem(sys.modules, f"pytest_gpumem.devices.frameworks.{name}", raising=False)
    monkeypatch.setattr(contexts, "held", lambda: (0,))
    fakes.CURRENT[0] = 0


@pytest.fixture
def load(monkeypatch):
    def _load(module, name=""):
        monkeypatch.setitem(sys.modules, name or module.__name__, module)
        found = devices.allocators()
        return found[0] if found else None

    return _load


def test_a_machine_on_which_none_is_loaded_imports_none():
    assert devices.allocators() == ()
    assert list(devices.living_arrays()) == []
    names = {*frameworks.MODULES, "torch"}
    assert not names & set(sys.modules)
    assert not any(
        f"pytest_gpumem.devices.frameworks.{name}" in sys.modules
        for name in frameworks.MODULES.values()
    )


@pytest.mark.parametrize("name", frameworks.MODULES)
def test_half_a_framework_is_none(load, name):
    """Missing parts are those of a module that another thread is importing, or of a mock."""
    assert load(types.ModuleType(name)) is None
    assert list(devices.living_arrays()) == []


def test_without_a_context_cupy_is_not_asked(load, monkeypatch):
    monkeypatch.setattr(contexts, "held", tuple)
    assert load(fakes.cupy()) is None


def test_cupy_by_its_pools(load):
    cupy = fakes.cupy()
    allocator = load(cupy)
    kept, other = cupy.ndarray(1000), cupy.ndarray(3000)
    del other
    (reading,) = allocator.read()
    assert (reading.allocated, reading.reserved) == (1024, 1024 + 3072)
    assert (reading.allocated_peak, allocator.exact_peaks) == (1024, False)
    (array,) = devices.living_arrays()
    assert (array.thing, array.size, array.device) == (kept, 1024, "CuPy:0")
    assert (array.shape, array.dtype) == ((1000,), "uint8")
    half = cupy.ndarray.__new__(cupy.ndarray)  # as one whose making failed: it hides no other
    assert len(list(devices.living_arrays())) == 1
    del half
    allocator.release_cached()
    assert allocator.read()[0].reserved == 1024
    assert cupy.get_default_pinned_memory_pool().freed == 1


def test_a_pool_in_the_place_of_cupys_is_counted_too_and_no_allocator_that_is_none(load):
    cupy = fakes.cupy()
    allocator = load(cupy)
    first = cupy.ndarray(512)
    cupy.cuda.set_allocator(fakes.Pool().malloc)
    second = cupy.ndarray(1024)
    assert allocator.read()[0].allocated == 1536
    cupy.cuda.set_allocator(lambda size: fakes.Memory(fakes.Pool(), 0, size))  # RMM's is no pool
    assert allocator.read()[0].allocated == 512
    del first, second


def test_each_device_with_a_context_is_entered_and_left(load, monkeypatch):
    monkeypatch.setattr(contexts, "held", lambda: (0, 2))
    cupy = fakes.cupy()
    allocator = load(cupy)
    fakes.CURRENT[0] = 2
    there = cupy.ndarray(512)
    assert [each.allocated for each in allocator.read()] == [0, 0, 512]
    assert fakes.CURRENT == [2]
    del there


def test_cupys_cards_by_the_uuid_that_the_runtime_tells(load, driver: FakeDriver):
    driver.boards = [FakeBoard(A), FakeBoard(B)]
    bare = [bytes.fromhex(each.removeprefix("GPU-").replace("-", "")) for each in (B, A)]
    allocator = load(fakes.cupy(uuids=bare))
    assert [allocator.card(index).uuid for index in (0, 1)] == [B, A]


STATISTICS = SimpleNamespace(current_bytes=5, peak_bytes=9, total_bytes=70)


def resource(**what):
    return SimpleNamespace(**{"upstream_mr": None, **what})


@pytest.mark.parametrize(
    ("stack", "allocated", "reserved", "peak"),
    [
        pytest.param(resource(), 0, 0, 0, id="nothing is told"),
        pytest.param(resource(allocation_counts=STATISTICS), 5, 9, 9, id="statistics"),
        pytest.param(
            resource(allocation_counts=vars(STATISTICS)), 5, 9, 9, id="a dict, as once they were"
        ),
        pytest.param(
            resource(allocation_counts=STATISTICS, upstream_mr=resource(pool_size=lambda: 4 * GIB)),
            *(5, 4 * GIB, 9),
            id="statistics of a pool",
        ),
        pytest.param(resource(pool_size=lambda: 64), 0, 64, 0, id="a pool alone"),
        pytest.param(resource(get_allocated_bytes=lambda: 7), 7, 7, 7, id="what limits or tracks"),
        pytest.param(
            resource(
                allocation_counts=SimpleNamespace(current_bytes=-3, peak_bytes=0),
                upstream_mr=resource(get_allocated_bytes=lambda: 7),
            ),
            *(7, 7, 7),
            id="counters that the suite pushed",
        ),
    ],
)
def test_rmm_by_what_its_resources_count(load, stack, allocated, reserved, peak):
    (reading,) = load(fakes.rmm(stack)).read()
    assert (reading.allocated, reading.reserved_peak) == (allocated, max(reserved, peak))
    assert reading.allocated_peak == peak


def test_of_a_pool_that_counts_nothing_a_note_says_so(load):
    load(fakes.rmm(resource(pool_size=lambda: 64))).read()
    assert any("enable_statistics" in note for note in devices.notes())


def jax_stats(used, peak, pool=0, limit=0):
    return {
        "bytes_in_use": used,
        "peak_bytes_in_use": peak,
        "pool_bytes": pool,
        "bytes_limit": limit,
    }


def test_jaxs_peak_is_the_processs_and_counts_where_it_rose(load):
    device = fakes.JaxDevice(jax_stats(5, 9, 16))
    allocator = load(fakes.jax(device))
    seen = []
    for used, ever in ((5, 9), (6, 9), (6, 30), (2, 30)):
        device.stats = jax_stats(used, ever, 32)
        seen.append(allocator.read()[0].allocated_peak)
        allocator.reset_peak(0)
    assert seen == [9, 6, 30, 2]


@pytest.mark.parametrize(
    "module",
    [
        fakes.jax(fakes.JaxDevice(None, platform="cpu"), platform="cpu"),
        fakes.jax(),
        SimpleNamespace(_backends={}),
        SimpleNamespace(_backends=None),
        SimpleNamespace(),
    ],
    ids=["a CPU", "no device", "not initialised", "not a dict", "a version without it"],
)
def test_jax_without_a_gpu_is_not_measured(load, module):
    assert load(module, "jax._src.xla_bridge") is None


def test_a_gpu_of_jax_that_tells_nothing_reads_nothing(load):
    assert load(fakes.jax(fakes.JaxDevice(None))).read() == ()


def test_jaxs_cards_by_the_number_that_cuda_gives_them(load, driver: FakeDriver):
    driver.boards = [FakeBoard(A), FakeBoard(B)]
    allocator = load(fakes.jax(fakes.JaxDevice({}, local_hardware_id=1)))
    assert allocator.card(0).uuid == B


@pytest.mark.parametrize(
    ("set_to", "pool", "told"),
    [("", 90, True), ("true", 90, True), ("false", 90, False), ("0", 90, False), ("", 10, False)],
)
def test_what_jax_reserves_ahead_is_told_in_a_note(load, monkeypatch, set_to, pool, told):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", set_to)
    load(fakes.jax(fakes.JaxDevice(jax_stats(5, 5, pool, 90)))).read()
    assert any("JAX reserved" in note for note in devices.notes()) is told


class JaxArray:
    shape, dtype = (4, 2), SimpleNamespace(itemsize=4)

    def __init__(self, *devices, part=(4, 2), deleted=False):
        self._devices, self._deleted = devices, deleted
        self.sharding = SimpleNamespace(shard_shape=lambda _: part)

    def devices(self):
        return set(self._devices)

    def is_deleted(self):
        return self._deleted


def test_jaxs_arrays_are_those_that_its_gpus_have(load):
    gpu, cpu = fakes.JaxDevice({}), fakes.JaxDevice(None, platform="cpu")
    whole, spread = JaxArray(gpu), JaxArray(gpu, cpu, part=(2, 2))
    load(fakes.jax(gpu, arrays=[whole, spread, JaxArray(cpu), JaxArray(gpu, deleted=True)]))
    found = [(each.thing, each.size, each.device) for each in devices.living_arrays()]
    assert found == [(whole, 32, "JAX:0"), (spread, 16, "JAX:0")]


def test_arrays_that_cannot_be_asked_hide_no_others(load):
    gpu = fakes.JaxDevice({})
    good, empty, bad = JaxArray(gpu), JaxArray(gpu, part=(0, 2)), JaxArray(gpu)
    bad.devices = lambda: 1 // 0
    tuple_like = type("Tuple", (tuple,), {"__slots__": ()})()  # has no weak references
    load(fakes.jax(gpu, arrays=[tuple_like, bad, empty, None, object(), good]))
    assert [each.thing for each in devices.living_arrays()] == [good]


@pytest.mark.parametrize(
    "break_it",
    [
        lambda stats: stats.clear(),
        lambda stats: stats.update(bytes_in_use=None),
        lambda stats: stats.update(bytes_in_use="many"),
        lambda stats: stats.update(bytes_in_use=-5, peak_bytes_in_use=-5),
        lambda stats: stats.update(bytes_in_use=2**70, peak_bytes_in_use=0),
        lambda stats: stats.update(pool_bytes=0, bytes_in_use=7),
    ],
    ids=["empty", "none", "words", "below zero", "beyond any card", "more than reserved"],
)
def test_odd_figures_raise_nothing(load, break_it):
    stats = jax_stats(5, 9, 16)
    allocator = load(fakes.jax(fakes.JaxDevice(stats)))
    allocator.read()
    break_it(stats)
    for reading in allocator.read():
        assert reading.allocated_peak >= reading.allocated >= 0
        assert reading.reserved_peak >= reading.reserved >= reading.allocated


class NumbaCUDAMemoryManager:
    def __init__(self, living=(), pending=()):
        self.allocations = dict(enumerate(living))
        self.deallocations = SimpleNamespace(_cons=list(pending))
        self.deallocations.clear = self.deallocations._cons.clear


class MappedMemory:
    size = 1 << 20


class Pointer:
    def __init__(self, size):
        self.size = size


def numba(manager, told=A):
    context = None if manager is None else SimpleNamespace(memory_manager=manager)
    device = SimpleNamespace(primary_context=context, uuid=told)
    return SimpleNamespace(driver=SimpleNamespace(devices={1: device}))


def test_numba_by_its_lists(load, driver: FakeDriver):
    driver.boards = [FakeBoard(A), FakeBoard(B)]
    manager = NumbaCUDAMemoryManager(
        [Pointer(64), Pointer(32), MappedMemory()], [(None, None, 16), (None, None, 0)]
    )
    allocator = load(numba(manager), "numba.cuda.cudadrv.driver")
    _, reading = allocator.read()
    assert (reading.allocated, reading.reserved) == (96, 112)
    assert allocator.card(1).uuid == A
    allocator.settle()
    assert allocator.read()[1].reserved == 96


class RmmNumbaManager(Pointer):
    pass


@pytest.mark.parametrize("manager", [None, RmmNumbaManager(1)], ids=["no context", "RMM's"])
def test_numba_is_not_asked_for_what_is_not_its_own(load, manager):
    assert load(numba(manager), "numba.cuda.cudadrv.driver") is None


class TensorFlowConfig:
    def __init__(self, logical, visible, parts=1):
        self._logical, self._visible, self._parts = logical, visible, parts
        self.told = {"current": 5, "peak": 9}
        self.experimental = SimpleNamespace(
            get_memory_info=lambda _: dict(self.told),
            reset_memory_stats=lambda _: self.told.update(peak=self.told["current"]),
        )

    def list_logical_devices(self, _kind):
        return [None] * self._logical

    def get_visible_devices(self, _kind):
        return [SimpleNamespace(name=f"/physical_device:GPU:{at}") for at in self._visible]

    def get_logical_device_configuration(self, _physical):
        return [None] * self._parts if self._parts > 1 else None


@pytest.fixture
def tensorflow(load, monkeypatch):
    def _tensorflow(config, initialised=True):
        monkeypatch.setitem(sys.modules, "tensorflow", SimpleNamespace(config=config))
        eager = SimpleNamespace(_context=SimpleNamespace(_initialized=initialised))
        return load(eager, "tensorflow.python.eager.context")

    return _tensorflow


def test_tensorflow_tells_its_peak_and_sets_it_back(tensorflow):
    allocator = tensorflow(TensorFlowConfig(1, [0]))
    assert allocator.exact_peaks
    assert allocator.read()[0][:2] == (5, 9)
    allocator.reset_peak(0)
    assert allocator.read()[0][:2] == (5, 5)


@pytest.mark.parametrize(("gpus", "initialised"), [(0, True), (1, False)])
def test_tensorflow_is_not_initialised_and_needs_a_gpu(tensorflow, gpus, initialised):
    assert tensorflow(TensorFlowConfig(gpus, [0]), initialised) is None


@pytest.mark.parametrize(
    ("visible", "parts", "wanted"), [([1], 1, [B]), ([1, 0], 1, [B, A]), ([1], 2, [B, B])]
)
def test_tensorflows_cards_may_be_hidden_and_divided(
    tensorflow, driver: FakeDriver, visible, parts, wanted
):
    driver.boards = [FakeBoard(A), FakeBoard(B)]
    allocator = tensorflow(TensorFlowConfig(len(wanted), visible, parts))
    assert [allocator.card(index).uuid for index in range(len(wanted))] == wanted


def test_cuda_visible_devices_is_honoured(load, driver: FakeDriver, monkeypatch):
    driver.boards = [FakeBoard(A), FakeBoard(B)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert load(fakes.rmm(resource())).card(0).uuid == B


def test_what_fails_is_noted_once_and_keeps_the_last_reading(load):
    device = fakes.JaxDevice(jax_stats(5, 9))
    allocator = load(fakes.jax(device))
    before = allocator.read()
    device.memory_stats = lambda: 1 // 0
    assert (allocator.read(), allocator.read()) == (before, before)
    allocator.release_cached()
    assert allocator.card(7).uuid == "JAX:7"
    notes = [note for note in devices.notes() if "JAX" in note]
    assert notes[0] == "reading the memory statistics of JAX failed: division by zero" or (
        "integer division" in notes[0]
    )
    assert len(notes) == 2


# The driver


class Library:
    """CUDA's driver: ``active`` are the devices with a primary context; None: not initialised."""

    def __init__(self, active, count=2):
        self.active, self.count = active, count

    def cuDeviceGetCount(self, box):  # noqa: N802  # the driver's name
        box._obj.value = self.count
        return 3 if self.active is None else 0

    def cuDeviceGet(self, box, index):  # noqa: N802  # the driver's name
        box._obj.value = index
        return 0

    def cuDevicePrimaryCtxGetState(self, device, _flags, box):  # noqa: N802  # the driver's name
        box._obj.value = device.value in self.active
        return 0


@pytest.mark.parametrize(
    ("active", "wanted"), [(None, ()), ((), ()), ((1,), (1,)), ((0, 1), (0, 1))]
)
def test_contexts_are_asked_of_the_driver(monkeypatch, active, wanted):
    monkeypatch.undo()
    monkeypatch.setattr(contexts._Driver, "library", Library(active))
    assert contexts.held() == wanted


def test_a_driver_that_nobody_loaded_is_not_loaded(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(contexts._Driver, "library", None)

    def refuse(name, mode):
        assert mode & contexts.os.RTLD_NOLOAD
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert contexts.held() == ()

"""Places in torch's own Python, and in ``threading``, that must not see through the face."""

from __future__ import annotations

import atexit
import contextlib
import functools
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._device import DeviceContext

from pytest_gpumem.on_import import when_imported
from pytest_gpumem.simulator import spec
from pytest_gpumem.simulator.torch_face import communication, stubs
from pytest_gpumem.simulator.torch_face.cuda_functions import memory_of
from pytest_gpumem.simulator.torch_face.device_numbers import read_devices_of_to, understand_numbers
from pytest_gpumem.simulator.torch_face.dlpack import label_capsules
from pytest_gpumem.simulator.torch_face.ipc import send_storages
from pytest_gpumem.simulator.torch_face.legacy import replace_types
from pytest_gpumem.simulator.torch_face.modes import (
    Face,
    backward_on_the_card,
    charges_again,
    face_again,
    making_tensors_beside,
)
from pytest_gpumem.simulator.torch_face.refusal import TORCH_VERSION
from pytest_gpumem.simulator.torch_face.subclasses import (
    construct_subclasses,
    let_fake_tensors_see_the_host,
    put_wrappers_on_the_card,
    refuse_nested_tensors,
)

if TYPE_CHECKING:
    from pytest_gpumem.simulator.torch_face.cuda_functions import Functions
    from pytest_gpumem.simulator.torch_face.memory import CardMemory

__tracebackhide__ = True  # pytest shows the test's line last, none of these

_C: Any = torch._C
_torch: Any = torch
_cuda: Any = torch.cuda
_Enter = Callable[[], contextlib.AbstractContextManager[None]]
_until_exit = contextlib.ExitStack()


def prepare(memory: CardMemory, functions: Functions) -> None:
    """Let the Python of torch find a CUDA build with these cards."""
    for name, function in functions.items():
        setattr(_C, name, function)
    _C._has_cuda = True
    _torch.version.cuda = _torch.version.cuda or spec.CUDA
    _C.__getattr__ = _say_what_is_missing
    _give_cuda_its_objects(memory)
    _tell_addresses_on_the_card(memory)
    send_storages(memory)
    _refuse_graphs_and_pools()
    when_imported(
        "torch.distributed.distributed_c10d", functools.partial(communication.talk_by_gloo, memory)
    )
    when_imported("torch._dynamo.config", _run_compiled_functions_eagerly)
    when_imported("torch._dynamo.eval_frame", _expect_no_compiled_frames)


def prepare_for_modes(memory: CardMemory) -> None:
    """Change what would see that the tensors on these cards are the host's."""
    understand_numbers()
    read_devices_of_to()
    _torch.Generator = stubs.generators(stubs.CardGenerator)
    replace_types()
    _look_through_face()
    _place_storages(memory)
    construct_subclasses()
    put_wrappers_on_the_card(memory)
    label_capsules(memory)
    refuse_nested_tensors()
    _let_autocast_reach_the_host()
    _group_by_seen_device(memory)
    _charge_for_showing()
    run = backward_on_the_card(_torch.autograd.graph._engine_run_backward)
    _torch.autograd._engine_run_backward = _torch.autograd.graph._engine_run_backward = run
    when_imported("torch._subclasses.fake_tensor", let_fake_tensors_see_the_host)
    _let_programs_make_tensors_beside_theirs()
    when_imported("torch.jit._serialization", _load_programs_on_the_host)
    when_imported("torch.nn.parallel.distributed", _let_buckets_lie_on_the_card)


def _give_cuda_its_objects(memory: CardMemory) -> None:
    _cuda._cudart = stubs.Runtime(memory_of(memory), memory.pinned)
    # Bound when torch.cuda was imported:
    _cuda._is_in_bad_fork = _C._cuda_isInBadFork
    _cuda._exchange_device = _C._cuda_exchangeDevice
    _cuda._maybe_exchange_device = _C._cuda_maybeExchangeDevice
    _cuda.graphs._cuda_isCurrentStreamCapturing = _C._cuda_isCurrentStreamCapturing
    # torch asks the library of NVML behind pynvml's back, for CUDA_VISIBLE_DEVICES.
    _cuda._raw_device_count_nvml = lambda: len(memory.machine)
    _cuda._raw_device_uuid_nvml = lambda: [card.uuid for card in memory.machine]
    _cuda._cached_device_count = None
    for module in (_cuda, _cuda.streams, _torch):
        module.Stream, module.Event = stubs.Stream, stubs.Event
    _cuda.ExternalStream = _cuda.streams.ExternalStream = stubs.ExternalStream
    if TORCH_VERSION < (2, 5):  # where the compiler asks for these bases
        _torch._streambase._StreamBase.register(stubs.Stream)
        _torch._streambase._EventBase.register(stubs.Event)
    _cuda.nccl.is_available = lambda _tensors: False  # which would warn that it is not built
    _cuda.nvtx._nvtx = stubs.Marks()
    _torch.Tensor.record_stream = lambda tensor, stream: memory.use_on(tensor, stream.stream_id)
    cudnn = _torch.backends.cudnn
    # On the host there is no cuDNN, and asking for it would warn.
    cudnn.is_acceptable = lambda _tensor: False
    if not _C._has_cudnn:
        _C._has_cudnn = True
        cudnn._init = lambda: True
        cudnn.version = lambda: spec.CUDNN
        # Held for whoever asks what was set; there is nothing that it would change.
        limit = [10]
        _C._cuda_get_cudnn_benchmark_limit = lambda: limit[0]
        _C._cuda_set_cudnn_benchmark_limit = lambda value: limit.__setitem__(0, value)
    # Without its library the profiler would print a stack for each operation.
    _after(_torch.autograd.profiler.profile, "__init__", _profile_the_host)


def _tell_addresses_on_the_card(memory: CardMemory) -> None:
    """Let tensors and storages tell where they are on their card, not where the host has them.

    Programs look for them in snapshots, and whether an address was handed out again.
    """

    def of_tensors(read: Any) -> Any:
        @functools.wraps(read)
        def tensor_address(tensor: Any) -> int:
            with _C.DisableTorchFunction():  # which would come back here: it goes by names
                place: int = read(tensor)
                return memory.address(tensor.untyped_storage(), place) if place else place

        return tensor_address

    of_storage = _C.StorageBase.data_ptr

    @functools.wraps(of_storage)
    def storage_address(storage: Any) -> int:
        place: int = of_storage(storage)
        return memory.address(storage, place) if place else place

    for name in ("data_ptr", "const_data_ptr"):
        if hasattr(_C.TensorBase, name):  # older versions have only the first
            setattr(_torch.Tensor, name, of_tensors(getattr(_C.TensorBase, name)))
    _torch.UntypedStorage.data_ptr = storage_address


def _after(kind: Any, name: str, act: Callable[[Any], None]) -> None:
    """Call ``act`` with the object after each call of its method ``name``."""
    method = getattr(kind, name)

    @functools.wraps(method)
    def with_act(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        act(self)
        return result

    setattr(kind, name, with_act)


def _profile_the_host(profile: Any) -> None:
    states = _torch.autograd.ProfilerState
    if getattr(profile, "profiler_kind", None) == states.KINETO_GPU_FALLBACK:
        profile.profiler_kind = states.KINETO


def _say_what_is_missing(name: str) -> Any:
    """Stand for ``torch._C.__getattr__``: functions of CUDA that are not simulated."""
    if name.startswith(("_cuda_", "_nccl_")):
        raise AttributeError(f"the simulated card has no torch._C.{name}: it is not simulated")
    raise AttributeError(f"module 'torch._C' has no attribute {name!r}")


def _refuse_graphs_and_pools() -> None:
    """Refuse what only a driver can do, where it is asked for."""
    for module, name in ((_cuda.graphs, "CUDAGraph"), (_cuda.memory, "MemPool")):
        if hasattr(module, name):
            getattr(module, name).__new__ = _refusing(name)
    _cuda.graphs._graph_pool_handle = _refusing("graph_pool_handle")
    # What ``torch._dynamo.reset`` imports where there is CUDA, to give up graphs.
    if not hasattr(_C, "_cuda_CUDAAllocator_AllocatorState"):
        _C._cuda_CUDAAllocator_AllocatorState = type("AllocatorState", (), {})


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise NotImplementedError(f"the simulated card has no torch.cuda.{name}: mark such tests")

    return refuse


def _look_through_face() -> None:
    """Let torch's Python functions run with the face on, instead of handing themselves to it.

    They ask ``has_torch_function``, which says yes under any mode; the face would then have to
    run them without itself, and they would see the host.
    """
    replacements = {
        _C._has_torch_function: _overridden,
        _C._has_torch_function_unary: lambda value: _overridden((value,)),
        _C._has_torch_function_variadic: lambda *values: _overridden(values),
    }
    for original, replacement in replacements.items():
        _torch.jit._builtins._register_builtin(replacement, "aten::has_torch_function")
        _replace_in_torch(original, replacement)


def _replace_in_torch(original: Any, replacement: Any) -> None:
    """Replace what torch's modules have imported by name."""
    modules = [sys.modules[name] for name in list(sys.modules) if name.partition(".")[0] == "torch"]
    for module in modules:
        names = [name for name, value in vars(module).items() if value is original]
        for name in names if module is not _C else ():
            setattr(module, name, replacement)


_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str))
_OURS = (Face, DeviceContext)


def _overridden(values: Any) -> bool:
    for value in values:
        kind: Any = type(value)
        if kind not in _PLAIN and _has_torch_function(kind):
            return bool(_C._is_torch_function_enabled())
    return any(
        not isinstance(_C._get_function_stack_at(position), _OURS)
        for position in range(_C._len_torch_function_stack())
    )


@functools.lru_cache(maxsize=1024)
def _has_torch_function(kind: type) -> bool:
    disabled = _C._disabled_torch_function_impl
    return getattr(kind, "__torch_function__", disabled) is not disabled


def _place_storages(memory: CardMemory) -> None:
    """Let storages say where they live: copying, pickling, saving and loading go by that."""
    storage_class: Any = torch.UntypedStorage
    base: Any = _C.StorageBase

    def device(storage: Any) -> torch.device:
        real: torch.device = memory.where_storage(storage) or base.device.__get__(storage)
        return real

    def new(cls: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        if device is None:
            return base.__new__(cls, *args, **kwargs)
        place = memory.device(device)
        if place.type != "cuda":
            return base.__new__(cls, *args, device=place, **kwargs)
        size = args[0] if args else 0
        block = memory.take(size if isinstance(size, int) else len(size), place)
        storage = base.__new__(cls, *args, **kwargs)
        memory.put(storage, block, place)
        return storage

    def resize(storage: Any, size: int) -> Any:
        memory.resize(storage, size)
        return base.resize_(storage, size)

    def is_shared(storage: Any) -> bool:
        return bool(memory.where_storage(storage)) or base.is_shared(storage)

    storage_class.device = property(device)
    storage_class.is_shared = is_shared
    storage_class.__new__ = new
    storage_class.resize_ = resize


def _let_autocast_reach_the_host() -> None:
    """Let ``autocast("cuda")`` cast host tensors, which is what tensors on the card are."""
    autocast: Any = torch.autocast
    enter, leave = autocast.__enter__, autocast.__exit__

    @functools.wraps(enter)
    def entered(self: Any) -> Any:
        result = enter(self)
        if self.device == "cuda":
            before = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
            self.__dict__.setdefault("_host_before", []).append(before)
            torch.set_autocast_enabled("cpu", self._enabled)
            torch.set_autocast_dtype("cpu", self.fast_dtype)
        return result

    @functools.wraps(leave)
    def left(self: Any, *error: Any) -> Any:
        if self.device == "cuda":
            enabled, dtype = self._host_before.pop()
            torch.set_autocast_enabled("cpu", enabled)
            torch.set_autocast_dtype("cpu", dtype)
        return leave(self, *error)

    autocast.__enter__, autocast.__exit__ = entered, left


def _group_by_seen_device(memory: CardMemory) -> None:
    """Let optimizers and gradient clipping group tensors by the device that the face shows."""
    original = _C._group_tensors_by_device_and_dtype

    def group(lists: Any, with_indices: bool = False) -> Any:
        if not any(memory.where(tensor) for tensor in lists[0]):
            return original(lists, with_indices)
        groups: dict[Any, tuple[list[list[Any]], list[int]]] = {}
        for index, first in enumerate(lists[0]):
            key = (first.device, first.dtype)
            tensors, indices = groups.setdefault(key, ([[] for _ in lists], []))
            for collected, values in zip(tensors, lists, strict=True):
                if values:
                    collected.append(values[index])
            if with_indices:
                indices.append(index)
        return groups

    _C._group_tensors_by_device_and_dtype = group


def _charge_for_showing() -> None:
    """Charge what ``repr`` of a tensor takes, which torch runs without any modes."""
    module: Any = _torch._tensor_str
    show = module._str_intern

    @functools.wraps(show)
    def show_and_charge(*args: Any, **kwargs: Any) -> Any:
        with charges_again():
            return show(*args, **kwargs)

    module._str_intern = show_and_charge


def _run_compiled_functions_eagerly() -> None:
    sys.modules["torch._dynamo.config"].disable = True  # type: ignore[attr-defined]  # a config module


def _expect_no_compiled_frames() -> None:
    """Let ``torch.compile(fullgraph=True)`` be content with nothing compiled (since torch 2.13)."""
    module: Any = sys.modules["torch._dynamo.eval_frame"]
    if hasattr(module, "set_fullgraph_compiled_frame_count"):
        # It says that a call around this one counts them.
        module.set_fullgraph_compiled_frame_count = lambda _count: 0


def _let_programs_make_tensors_beside_theirs() -> None:
    """Put what TorchScript makes where its arguments are: the devices that it knows are the host's.

    Else a model that was traced with ``torch.arange(n, device=x.device)`` in it could not run.
    """

    def beside_its_arguments(call: Any) -> Any:
        @functools.wraps(call)
        def call_beside(program: Any, *args: Any, **kwargs: Any) -> Any:
            with making_tensors_beside((*args, *kwargs.values())):
                return call(program, *args, **kwargs)

        return call_beside

    for kind in (_C.ScriptFunction, _C.ScriptMethod):
        kind.__call__ = beside_its_arguments(kind.__call__)


def _load_programs_on_the_host() -> None:
    """Let ``torch.jit.load`` put a program on the card by ``to``, which its C++ cannot."""
    load = _torch.jit.load

    @functools.wraps(load)
    def load_and_send(file: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        device = None if map_location is None else torch.device(map_location)
        if device is None or device.type != "cuda":
            return load(file, device, *args, **kwargs)
        return load(file, "cpu", *args, **kwargs).to(device)

    _torch.jit.load = sys.modules["torch.jit._serialization"].load = load_and_send  # type: ignore[attr-defined]  # a module


def _let_buckets_lie_on_the_card() -> None:
    """Charge what the C++ of ``DistributedDataParallel`` makes for gradients."""
    module: Any = sys.modules["torch.nn.parallel.distributed"]
    if not hasattr(module.dist, "Reducer"):  # built without distributed
        return

    class Reducer(module.dist.Reducer):  # type: ignore[misc]  # a C class
        def __init__(self, parameters: Any, *args: Any, **kwargs: Any) -> None:
            self._about = list(parameters)
            with making_tensors_beside(self._about):
                super().__init__(parameters, *args, **kwargs)

        def _rebuild_buckets(self) -> Any:
            with making_tensors_beside(self._about):
                return super()._rebuild_buckets()

    module.dist.Reducer = Reducer


def enter_everywhere(enter: _Enter) -> None:
    """Enter the modes in this thread for good, and where a thread or torch starts without them."""
    start = threading.Thread.start
    push_hooks = _C._autograd._push_saved_tensors_default_hooks

    @functools.wraps(start)
    def start_with_modes(thread: threading.Thread) -> None:
        run = thread.run

        def run_with_modes() -> None:
            del thread.run  # the instance's, which shadows its class's
            with enter():
                run()

        thread.run = run_with_modes  # type: ignore[method-assign]  # a start hook does not exist
        start(thread)

    def push_hooks_with_face(pack: Callable[[Any], Any], unpack: Callable[[Any], Any]) -> None:
        # Packing happens inside an operation, where the face is off.
        def pack_with_face(tensor: Any) -> Any:
            with face_again():
                return pack(tensor)

        push_hooks(pack_with_face, unpack)

    threading.Thread.start = start_with_modes  # type: ignore[method-assign,assignment]  # as above
    _C._autograd._push_saved_tensors_default_hooks = push_hooks_with_face
    _until_exit.enter_context(enter())
    atexit.register(_until_exit.close)  # else modules that leaving needs may be gone

"""What of CUDA beside its tensors programs ask: pinned memory, streams, events, old types."""

from __future__ import annotations

import gc
import os
import warnings

import pytest
from card_process import MIB, on_card


@on_card
def test_pinned_memory_has_its_own_figures():
    import torch

    def now(name):
        stats = torch.cuda.host_memory_stats()
        return [stats[f"{name}.{what}"] for what in ("current", "peak", "allocated", "freed")]

    torch.cuda.init()
    assert now("active_bytes") == [0, 0, 0, 0]
    first = torch.ones(10 * 1024, pin_memory=True)
    view = first[3:]
    second = torch.zeros(20 * 1024).pin_memory()
    assert second.pin_memory() is second
    assert first.is_pinned()
    assert view.is_pinned()
    assert not torch.ones(3).is_pinned()
    sizes = 16 * 1024 * 4, 32 * 1024 * 4
    assert now("active_bytes") == now("allocated_bytes") == [sum(sizes)] * 3 + [0]
    del first, view
    gc.collect()
    assert now("active_requests") == [1, 2, 2, 1]
    assert now("allocated_bytes") == [sum(sizes)] * 3 + [0]
    third = torch.empty(12 * 1024, pin_memory=True)  # finds the block of the first
    assert now("allocations") == [2, 2, 2, 0]
    del third
    torch._C._accelerator_emptyHostCache()
    assert now("allocated_bytes") == [sizes[1], sum(sizes), sum(sizes), sizes[0]]
    stats = torch.cuda.host_memory_stats()
    assert (stats["num_host_alloc"], stats["num_host_free"]) == (2, 1)
    torch.cuda.reset_peak_host_memory_stats()
    torch.cuda.reset_accumulated_host_memory_stats()
    assert now("allocated_bytes") == [sizes[1], sizes[1], 0, 0]
    assert torch.cuda.memory_allocated() == 0
    assert second.is_pinned()
    sparse = torch.eye(3).to_sparse()
    assert (sparse.is_pinned(), sparse.pin_memory().is_pinned()) == (False, True)
    assert not torch.ones(3, device="meta").is_pinned()


@on_card
def test_what_is_made_like_a_tensor_can_be_pinned():
    import torch

    made = torch.zeros(3)
    likes = torch.empty_like(made, pin_memory=True), torch.ones_like(made, pin_memory=True)
    from_card = torch.empty_like(made.cuda(), device="cpu", pin_memory=True)
    assert all(each.is_pinned() for each in (*likes, from_card))
    assert not any(each.is_cuda for each in (*likes, from_card))
    assert likes[1].tolist() == [1, 1, 1]


@on_card
def test_the_debug_mode_of_synchronisation_is_what_was_set():
    import torch

    assert torch.cuda.get_sync_debug_mode() == 0
    torch.cuda.set_sync_debug_mode("warn")
    assert torch.cuda.get_sync_debug_mode() == 1


@on_card
def test_memory_that_the_program_locks_itself_is_pinned():
    import torch

    tensor = torch.ones(20)
    runtime = torch.cuda.cudart()
    size = tensor.numel() * tensor.element_size()
    assert int(runtime.cudaHostRegister(tensor.data_ptr(), size, 0)) == 0
    assert tensor.is_pinned()
    assert tensor[19:].is_pinned()
    assert int(runtime.cudaHostUnregister(tensor.data_ptr())) == 0
    assert not tensor.is_pinned()


@on_card
def test_pinned_batches_of_a_data_loader_are_given_back():
    import torch

    data = torch.utils.data.TensorDataset(torch.ones(64, 3))
    loader = torch.utils.data.DataLoader(data, batch_size=16, pin_memory=True)
    torch.cuda.init()
    assert all(batch.is_pinned() for (batch,) in loader)
    del loader
    gc.collect()
    assert torch.cuda.host_memory_stats()["active_bytes.current"] == 0


@on_card
def test_a_stream_has_blocks_of_its_own():
    import torch

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        there = torch.empty(2 * MIB, dtype=torch.uint8, device="cuda")
    del there
    here = torch.empty(2 * MIB, dtype=torch.uint8, device="cuda")
    assert here.is_cuda
    assert torch.cuda.memory_reserved() == 40 * MIB
    streams = {each["stream"] for each in torch.cuda.memory_snapshot()}
    assert streams == {0, side.cuda_stream}


@on_card
def test_what_another_stream_uses_stays_active_until_memory_is_asked_for():
    import torch

    tensor = torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")
    tensor.record_stream(torch.cuda.Stream())
    torch.ones(3).record_stream(torch.cuda.Stream())  # on the host, where it means nothing
    del tensor
    stats = torch.cuda.memory_stats()
    assert torch.cuda.memory_allocated() == 0
    assert stats["active_bytes.all.current"] == 3 * MIB
    torch.empty(1, device="cuda")
    torch.cuda.empty_cache()
    assert torch.cuda.memory_stats()["active_bytes.all.current"] == 0
    assert torch.cuda.memory_reserved() == 0


@on_card
def test_events_measure_only_if_they_are_made_to():
    import torch

    plain, first, second = (torch.cuda.Event(enable_timing=on) for on in (False, True, True))
    with pytest.raises(ValueError, match="must be recorded before"):
        first.elapsed_time(second)
    for event in (plain, first, second):
        event.record()
    with pytest.raises(ValueError, match="created with argument 'enable_timing=True'"):
        first.elapsed_time(plain)
    assert first.elapsed_time(second) >= 0
    for kind in (torch.cuda.Event(True), torch.Event("cuda", enable_timing=True)):
        kind.record()
        assert first.elapsed_time(kind) >= 0


@on_card
def test_events_are_told_apart():
    import torch

    first, second = torch.cuda.Event(), torch.cuda.Event()
    assert (first.event_id, repr(first)) == (0, "<torch.cuda.Event uninitialized>")
    first.record()
    second.record()
    assert 0 != first.event_id != second.event_id
    assert repr(first) == f"<torch.cuda.Event {first.cuda_event:#x}>"
    number = first.event_id
    first.record()
    assert first.event_id == number


@on_card
def test_older_programs_name_the_types_of_the_card():
    import torch

    made = torch.cuda.FloatTensor([1, 2, 3])
    assert (made.is_cuda, made.dtype, made.tolist()) == (True, torch.float32, [1, 2, 3])
    assert torch.cuda.LongTensor(2, 3).shape == (2, 3)
    assert torch.cuda.memory_allocated() >= 512
    assert isinstance(made, torch.cuda.FloatTensor)
    assert not isinstance(made, torch.cuda.DoubleTensor)
    assert not isinstance(made.cpu(), torch.cuda.FloatTensor)
    assert not isinstance(None, torch.cuda.FloatTensor)
    assert made.type() == "torch.cuda.FloatTensor"
    for wanted in (torch.cuda.HalfTensor, "torch.cuda.HalfTensor"):
        assert made.type(wanted).dtype is torch.float16
        assert torch.ones(2).type(wanted).is_cuda
    assert torch.cuda.IntTensor.dtype is torch.int32
    assert torch.cuda.FloatTensor.is_cuda


@on_card
def test_more_than_any_card_has_is_refused_as_torch_refuses_it():
    import torch

    with pytest.raises(torch.OutOfMemoryError, match="more than 1EB memory"):
        torch.empty(2**60, dtype=torch.uint8, device="cuda")
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 512\.00 GiB"):
        torch.empty(2**39, dtype=torch.uint8, device="cuda")
    assert torch.cuda.memory_allocated() == 0


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [("garbage_collection_threshold:1.2", "threshold"), ("max_split_size_mb:1", "max_split_size")],
)
@on_card
def test_bad_settings_are_refused_and_change_nothing(settings, refusal):
    import torch

    torch._C._accelerator_setAllocatorSettings("max_split_size_mb:64")
    with pytest.raises((RuntimeError, ValueError), match=refusal):
        torch._C._accelerator_setAllocatorSettings(settings)
    torch.ones(1, device="cuda")
    assert torch.cuda.memory_stats()["max_split_size"] == 64 * MIB


@on_card
def test_settings_change_what_is_handed_out():
    import torch

    def allocated(size):
        tensor = torch.empty(size * MIB, dtype=torch.uint8, device="cuda")
        assert tensor.is_cuda
        return torch.cuda.memory_allocated() / MIB

    assert allocated(84) == 84
    torch._C._accelerator_setAllocatorSettings("roundup_power2_divisions:[64:8,128:2]")
    assert allocated(84) == 88
    torch._C._accelerator_setAllocatorSettings("")
    assert allocated(84) == 84


@on_card
def test_divisions_are_read_as_torch_reads_them():
    import ctypes
    import random
    from pathlib import Path

    import torch

    from pytest_gpumem.simulator.policy import Policy, read_settings

    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    own = "_ZN3c1016CachingAllocator26AcceleratorAllocatorConfig24roundup_power2_divisionsEm"
    if not hasattr(library, own):  # before torch 2.9
        return
    divisions = getattr(library, own)
    divisions.restype, divisions.argtypes = ctypes.c_size_t, [ctypes.c_size_t]
    chance = random.Random(7)  # noqa: S311  # no secret
    for _ in range(200):
        pairs = [
            f"{chance.choice([2 ** chance.randint(0, 17), '>'])}:{chance.choice([0, 1, 2, 4, 8])}"
            for _ in range(chance.randint(1, 5))
        ]
        text = f"roundup_power2_divisions:[{','.join(pairs)}]"
        torch._C._accelerator_setAllocatorSettings(text)
        policy, _ = read_settings(text, Policy())
        told = tuple(divisions(2**power) for power in range(20, 36))
        assert policy.divisions == told, text


@on_card
def test_pools_of_graphs_are_refused_in_a_sentence():
    import torch

    with pytest.raises(NotImplementedError, match=r"has no torch\.cuda\.graph_pool_handle"):
        torch.cuda.graph_pool_handle()


@on_card
def test_sparse_tensors_live_where_their_parts_do():
    import torch

    torch.sparse.check_sparse_tensor_invariants.disable()  # which torch warns of where it is open
    warnings.simplefilter("ignore")  # of its compressed sparse tensors being new
    before = torch.cuda.memory_allocated()
    dense = torch.eye(100, device="cuda")
    with_dense = torch.cuda.memory_allocated()
    sparse = dense.to_sparse()
    assert torch.cuda.memory_allocated() == with_dense + 512 + 2048  # values, indices
    assert (sparse.device, sparse.is_cuda, sparse.is_cpu) == (torch.device("cuda:0"), True, False)
    assert "device='cuda:0'" in repr(sparse)
    on_host = torch.eye(3).to_sparse()
    sent = on_host.to("cuda")
    assert (on_host.is_cuda, sent.is_cuda, sent.cpu().is_cuda) == (False, True, False)
    assert sent.cuda() is sent
    for made in (
        sparse @ dense,
        sparse.to_dense(),
        sparse.coalesce().values(),
        sparse.t(),
        sparse + sparse,
        sparse.to(torch.float64),
        torch.sparse_coo_tensor([[0], [1]], [2.0], (2, 2), device="cuda"),
        torch.sparse_coo_tensor((3, 3), device="cuda"),
        dense.to_sparse_csr(),
        dense.to_sparse_csc() @ dense,
        dense.to_sparse_bsr((2, 2)).values(),
    ):
        assert made.is_cuda
    with pytest.raises(RuntimeError, match="cuda:0 and cpu"):
        torch.sparse.mm(on_host, torch.eye(3, device="cuda"))
    del dense, sparse, sent, made
    gc.collect()
    assert torch.cuda.memory_allocated() == before


@on_card
def test_sparse_gradients_train_on_the_card():
    import torch

    torch.sparse.check_sparse_tensor_invariants.disable()
    table = torch.nn.Embedding(10, 3, sparse=True).cuda()
    optimizers = torch.optim.SGD(table.parameters()), torch.optim.SparseAdam(table.parameters())
    for optimizer in optimizers:
        table(torch.tensor([1, 2], device="cuda")).sum().backward()
        assert table.weight.grad.layout is torch.sparse_coo
        assert table.weight.grad.is_cuda
        optimizer.step()
        optimizer.zero_grad()
    values = torch.ones(2, device="cuda", requires_grad=True)
    indices = torch.tensor([[0, 1], [1, 0]], device="cuda")
    torch.sparse.sum(torch.sparse_coo_tensor(indices, values, (2, 2))).backward()
    assert values.grad.is_cuda


@on_card
def test_bad_settings_of_the_environment_are_refused_by_name():
    import torch

    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "max_split_size_mb:many"
    for _ in range(2):
        with pytest.raises(ValueError, match="PYTORCH_CUDA_ALLOC_CONF='max_split_size_mb:many': "):
            torch.ones(1, device="cuda")


@on_card
def test_a_stream_of_somebody_else_has_the_handle_that_was_given():
    import torch

    stream = torch.cuda.ExternalStream(77)
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream().cuda_stream == 77
        assert torch.ones(1, device="cuda").is_cuda


@on_card
def test_subclasses_of_tensor_are_made_of_tensors_and_of_numbers():
    import torch

    class Named(torch.Tensor):
        pass

    class Slotted(torch.Tensor):
        __slots__ = ("label",)

    leaf = torch.ones(2, device="cuda", requires_grad=True)
    for kind in (Named, Slotted):
        made = kind(leaf)
        assert (type(made), made.device) == (kind, leaf.device)
        made.label = "a"
        (made * 2).sum().backward()
        assert type(made + 1) is kind
        assert [type(kind(*args)) for args in (([1, 2],), (2, 3), (torch.ones(2),))] == [kind] * 3
    assert leaf.grad.tolist() == [4, 4]
    assert kind([1, 2]).tolist() == [1, 2]
    assert torch.Tensor([1, 2]).tolist() == [1, 2]
    assert type(torch.nn.Parameter(leaf)) is torch.nn.Parameter


@on_card
def test_generators_of_the_card_are_pickled():
    import pickle

    import torch

    generator = torch.Generator("cuda").manual_seed(5)
    generator.set_offset(100)
    torch.randn(3, device="cuda", generator=generator)
    again = pickle.loads(pickle.dumps(generator))  # noqa: S301  # its own
    assert (again.device, again.get_offset()) == (generator.device, 100)
    assert again.initial_seed() == 5
    drawn = [torch.randn(3, device="cuda", generator=each).tolist() for each in (generator, again)]
    assert drawn[0] == drawn[1]


@on_card
def test_a_type_of_the_card_may_be_the_default_one():
    import warnings

    import torch

    warnings.simplefilter("ignore")  # of torch's own: it is deprecated
    torch.set_default_tensor_type("torch.cuda.DoubleTensor")
    assert torch.ones(2).type() == "torch.cuda.DoubleTensor"
    torch.set_default_tensor_type(torch.cuda.FloatTensor)
    assert torch.nn.Linear(2, 2).weight.type() == "torch.cuda.FloatTensor"
    with pytest.raises(TypeError, match="only floating-point types"):
        torch.set_default_tensor_type(torch.cuda.LongTensor)
    torch.set_default_tensor_type(torch.DoubleTensor)
    assert torch.ones(2).type() == "torch.DoubleTensor"
    torch.set_default_device("cuda")
    torch.set_default_tensor_type(torch.FloatTensor)
    assert torch.ones(2).type() == "torch.cuda.FloatTensor"


@on_card
def test_dlpack_hands_over_memory_of_the_card():
    import numpy as np
    import torch
    from torch.utils.dlpack import to_dlpack

    tensor = torch.arange(6, dtype=torch.float32, device="cuda").view(2, 3)
    before = torch.cuda.memory_allocated()
    for shared in (torch.from_dlpack(tensor.T[1:]), torch.from_dlpack(to_dlpack(tensor.T[1:]))):
        assert shared.device == tensor.device
        assert shared.stride() == (1, 3)
        assert shared.data_ptr() == tensor.data_ptr() + 4
        shared.add_(10)
    assert tensor.tolist() == [[0, 21, 22], [3, 24, 25]]
    assert torch.from_dlpack(tensor[:0]).is_cuda
    assert torch.cuda.memory_allocated() == before  # no tensor is charged for it twice
    with pytest.raises((RuntimeError, BufferError), match=r"[Uu]nsupported device"):
        np.from_dlpack(tensor)
    del tensor
    assert torch.cuda.memory_allocated() == before
    del shared
    assert torch.cuda.memory_allocated() == 0


@on_card
def test_dlpack_copies_between_host_and_card():
    import numpy as np
    import torch

    tensor = torch.ones(2, device="cuda")
    on_host = np.from_dlpack(tensor, device="cpu")
    on_host += 1
    assert tensor.tolist() == [1, 1]
    shared = torch.from_dlpack(on_host)
    on_host += 1
    assert (shared.device.type, shared.tolist()) == ("cpu", [3, 3])
    sent = torch.from_dlpack(on_host, device="cuda")
    assert sent.is_cuda
    copied = torch.from_dlpack(tensor, copy=True)
    copied += 1
    assert (copied.device, tensor.tolist()) == (tensor.device, [1, 1])
    assert torch.cuda.memory_allocated() == 3 * 512


@on_card
def test_a_tensor_of_an_address_is_refused():
    import torch

    tensor = torch.ones(2, device="cuda")
    handed = type("Handed", (), {"__cuda_array_interface__": tensor.__cuda_array_interface__})
    for make in (torch.as_tensor, torch.tensor, torch.asarray):
        with pytest.raises(NotImplementedError, match="no tensor of an address"):
            make(handed(), device="cuda")

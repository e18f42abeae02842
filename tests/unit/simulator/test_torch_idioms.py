"""What suites for ``device="cuda"`` write, run on the simulated card."""

from __future__ import annotations

import copy
import io
import pickle
import re
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
from card_process import on_card, on_two_cards


def refused(kind, text):
    """Expect an error of ``kind`` whose text contains ``text``."""
    return pytest.raises(kind, match=re.escape(text))


@on_card
def test_factories_make_tensors_on_the_card():
    import torch

    made = [
        torch.empty(3, device="cuda"),
        torch.zeros(3, device="cuda:0"),
        torch.ones(3, device=torch.device("cuda")),
        torch.full((3,), 2.0, device=0),
        torch.rand(3, device="cuda"),
        torch.arange(3, device="cuda"),
        torch.eye(3, device="cuda"),
        torch.randperm(3, device="cuda"),
        torch.tensor([1, 2], device="cuda"),
        torch.as_tensor([1, 2], device="cuda"),
        torch.scalar_tensor(2.0, device="cuda"),
        torch.empty(600, 1000, device="cuda"),
    ]
    for tensor in made:
        assert tensor.is_cuda
        assert not tensor.is_cpu
        assert tensor.device == torch.device("cuda:0")
        assert tensor.get_device() == 0
    assert made[0].type() == "torch.cuda.FloatTensor"
    assert type(made[0]) is torch.Tensor


@on_card
def test_plain_tensors_stay_on_the_host_and_cost_nothing():
    import torch

    tensor = torch.ones(1000, 1000, requires_grad=True)
    (tensor @ tensor).sum().backward()
    assert tensor.grad.device.type == "cpu"
    assert tensor.get_device() == -1
    assert not torch.cuda.is_initialized()
    assert torch.cuda.memory_allocated() == 0


@on_card
def test_like_and_new_follow_their_tensor_unless_told_otherwise():
    import torch

    card, host = torch.ones(4, device="cuda"), torch.ones(4)
    for like in (torch.zeros_like, torch.empty_like, torch.ones_like, torch.rand_like):
        assert like(card).is_cuda
        assert not like(card, device="cpu").is_cuda
        assert like(host, device="cuda").is_cuda
    assert card.new_zeros(3).is_cuda
    assert card.new_tensor([1.0]).is_cuda
    assert card.new_full((700, 1000), 1.0).is_cuda
    assert not card.new_ones(3, device="cpu").is_cuda
    assert host.new_empty(3, device="cuda").is_cuda


@on_card
def test_as_tensor_and_from_numpy_never_share_memory_across_devices():
    import numpy as np
    import torch

    array = np.zeros(3)
    card = torch.as_tensor(array, device="cuda")
    card += 1
    host = torch.zeros(3)
    moved = torch.as_tensor(host, device="cuda")
    moved += 1
    assert array.sum() == 0
    assert host.sum() == 0
    assert not host.is_cuda
    assert torch.as_tensor(card).data_ptr() == card.data_ptr()
    assert not torch.as_tensor(card, device="cpu").is_cuda
    assert torch.asarray(card).is_cuda


@on_card
def test_a_device_context_and_the_default_device_reach_factories_and_modules():
    import torch

    with torch.device("cuda"):
        assert torch.ones(2).is_cuda
        assert torch.nn.Linear(2, 2).weight.is_cuda
        assert not torch.ones(2, device="cpu").is_cuda
        assert torch.get_default_device() == torch.device("cuda:0")
    assert not torch.ones(2).is_cuda
    torch.set_default_device("cuda")
    assert torch.tensor([1.0]).is_cuda
    assert torch.nn.functional.dropout(torch.ones(9)).is_cuda
    attention = torch.nn.MultiheadAttention(8, 2)
    assert attention(*[torch.ones(3, 2, 8)] * 3)[0].is_cuda
    torch.set_default_device(None)
    assert not torch.ones(2).is_cuda


@on_card
def test_to_cuda_and_cpu_copy_across_and_keep_what_is_there():
    import torch

    host = torch.arange(6.0).reshape(2, 3)
    for card in (host.to("cuda"), host.cuda(), host.to(0), host.cuda(0, non_blocking=True)):
        assert card.is_cuda
        assert card.tolist() == host.tolist()
        assert card.to("cuda") is card
        assert card.cuda() is card
    back = card.cpu()
    back += 1
    assert card.cpu().equal(host)
    assert not host.is_cuda
    half = host.to("cuda", torch.float16, non_blocking=True)
    assert (half.dtype, half.is_cuda) == (torch.float16, True)
    assert host.to(half).dtype is torch.float16
    assert host.to(half).is_cuda
    assert card.to(torch.float64).is_cuda
    assert card.to("cuda", copy=True) is not card
    assert card.t().cuda().stride() == (1, 3)
    assert host.t().cuda().stride() == (1, 3)
    with refused(NotImplementedError, "meta tensor"):
        torch.ones(2, device="meta").to("cuda")
    assert card.to("meta").is_meta


@on_card
def test_copy_between_devices_in_place():
    import torch

    host, card = torch.zeros(3), torch.ones(3, device="cuda")
    host.copy_(card)
    card[:] = host + 1
    assert host.tolist() == [1, 1, 1]
    assert card.tolist() == [2, 2, 2]
    assert not host.is_cuda


@on_card
def test_type_conversions_by_name_cross_devices():
    import torch

    assert torch.ones(2).type("torch.cuda.HalfTensor").is_cuda
    card = torch.ones(2, device="cuda")
    assert not card.type("torch.FloatTensor").is_cuda
    assert card.type(torch.float16).type() == "torch.cuda.HalfTensor"
    assert card.half().is_cuda


@on_card
def test_a_tensor_goes_where_the_one_is_whose_type_it_takes():
    import torch

    host, card = torch.ones(2), torch.zeros(3, dtype=torch.float64, device="cuda")
    sent, back = host.type_as(card), card.type_as(other=host)
    assert (sent.is_cuda, sent.dtype, sent.tolist()) == (True, torch.float64, [1, 1])
    assert (back.is_cuda, back.dtype, back.tolist()) == (False, torch.float32, [0, 0, 0])
    assert host.type_as(torch.zeros(1)) is host
    assert card.type_as(card) is card
    weights = torch.ones(2, requires_grad=True)
    weights.type_as(card).sum().backward()
    assert not weights.grad.is_cuda


@on_card
def test_gradients_come_back_to_the_device_of_their_tensor():
    import torch

    host = torch.ones(3, requires_grad=True)
    (host.cuda() * 2).sum().backward()
    assert host.grad.tolist() == [2, 2, 2]
    assert not host.grad.is_cuda
    card = torch.ones(3, device="cuda", requires_grad=True)
    card.to("cpu", torch.float64).sum().backward()
    assert card.grad.is_cuda
    assert card.grad.dtype is torch.float32
    (slope,) = torch.autograd.grad((host.cuda() ** 3).sum(), host, create_graph=True)
    host.grad = None
    slope.sum().backward()
    assert host.grad.tolist() == [6, 6, 6]


@on_card
def test_modules_train_on_the_card_to_the_values_of_the_cpu():
    import torch

    def train(device):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 1)]
        model = torch.nn.Sequential(*layers).to(device)
        optimizer = torch.optim.Adam(model.parameters(), foreach=False)
        data = torch.randn(32, 8).to(device)
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(data).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return model, loss

    model, loss = train("cuda")
    expected = train("cpu")[1]
    assert loss.is_cuda
    assert loss.cpu().equal(expected)
    assert all(p.is_cuda and p.grad.is_cuda for p in model.parameters())
    assert not any(p.is_cuda for p in model.cpu().parameters())


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
@pytest.mark.parametrize("variant", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}])
@on_card
def test_optimizers_keep_their_state_on_the_card(name, variant):
    import torch

    layer = torch.nn.Linear(4, 4).cuda()
    optimizer = getattr(torch.optim, name)(layer.parameters(), lr=0.1, **variant)
    layer(torch.ones(2, 4, device="cuda")).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    for state in optimizer.state.values():
        assert all(v.is_cuda for k, v in state.items() if k != "step" and v is not None)


@on_card
def test_autocast_casts_and_the_grad_scaler_steps():
    import torch

    layer, data = torch.nn.Linear(8, 8).cuda(), torch.ones(2, 8, device="cuda")
    with torch.autocast("cuda"):
        assert layer(data).dtype is torch.float16
        with torch.autocast("cuda", enabled=False):
            assert layer(data).dtype is torch.float32
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert layer(data).dtype is torch.bfloat16
    assert layer(data).dtype is torch.float32
    assert not torch.is_autocast_enabled("cpu")
    scaler, optimizer = torch.amp.GradScaler("cuda"), torch.optim.SGD(layer.parameters())
    scaler.scale(layer(data).sum()).backward()
    scaler.step(optimizer)
    scaler.update()


@on_card
def test_a_state_dict_is_saved_and_loaded_with_map_location_both_ways():
    import torch

    def saved(state):
        file = io.BytesIO()
        torch.save(state, file)
        return file.getvalue()

    def loaded(content, **options):
        return torch.load(io.BytesIO(content), **options)["weight"]

    layer = torch.nn.Linear(3, 3)
    from_host, from_card = saved(layer.state_dict()), saved(layer.cuda().state_dict())
    assert loaded(from_card).device == torch.device("cuda:0")
    assert not loaded(from_card, map_location="cpu").is_cuda
    assert not loaded(from_card, map_location=lambda storage, _: storage).is_cuda
    assert not loaded(from_host).is_cuda
    for card in ("cuda", torch.device("cuda"), {"cpu": "cuda:0"}):
        assert loaded(from_host, map_location=card).is_cuda
        assert loaded(from_host, map_location=card).cpu().equal(layer.weight.cpu())
    assert loaded(from_card, weights_only=False).is_cuda
    layer.load_state_dict(torch.load(io.BytesIO(from_host)))
    assert layer.weight.is_cuda


@on_card
def test_copies_and_pickles_keep_the_device():
    import torch

    tensor = torch.arange(5.0, device="cuda", requires_grad=True)
    deep = copy.deepcopy(tensor)
    assert deep.is_cuda
    assert deep.requires_grad
    assert deep.data_ptr() != tensor.data_ptr()
    assert pickle.loads(pickle.dumps(tensor)).equal(tensor)  # noqa: S301  # its own pickle
    assert copy.copy(tensor).is_cuda
    module = copy.deepcopy(torch.nn.Linear(2, 2).cuda())
    assert isinstance(module.weight, torch.nn.Parameter)
    assert module.weight.is_cuda


@on_card
def test_storages_tell_their_device():
    import torch

    storage = torch.ones(3, device="cuda").untyped_storage()
    assert storage.device == torch.device("cuda:0")
    assert storage.is_cuda
    assert not storage.cpu().is_cuda
    assert storage.cpu().cuda().is_cuda
    assert torch.UntypedStorage(8, device="cuda").is_cuda
    assert not torch.UntypedStorage(8).is_cuda
    before = torch.cuda.memory_allocated()
    listed = torch.UntypedStorage([1, 2, 3], device="cuda")
    assert listed.tolist() == [1, 2, 3]
    assert torch.cuda.memory_allocated() == before + 512


@on_card
def test_generators_on_the_card_repeat_and_are_not_the_hosts():
    import torch

    generator = torch.Generator(device="cuda").manual_seed(3)
    assert generator.device.type == "cuda"
    first = torch.randn(3, device="cuda", generator=generator)
    assert first.equal(torch.randn(3, device="cuda", generator=generator.manual_seed(3)))
    torch.empty(3, device="cuda").normal_(generator=generator)
    with refused(RuntimeError, "Expected a 'cuda' device type for generator but found 'cpu'"):
        torch.randn(3, device="cuda", generator=torch.Generator())
    assert isinstance(torch.default_generator, torch.Generator)
    torch.cuda.manual_seed(1)
    host_state, draw = torch.get_rng_state(), torch.rand(3, device="cuda")
    assert torch.get_rng_state().equal(host_state)
    torch.cuda.manual_seed(1)
    state = torch.cuda.get_rng_state()
    assert draw.equal(torch.rand(3, device="cuda"))
    torch.cuda.set_rng_state(state)
    assert draw.equal(torch.rand(3, device="cuda"))


@on_card
def test_initialising_cuda_leaves_the_hosts_random_numbers_alone():
    import torch

    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    first = torch.rand(2)
    torch.ones(1, device="cuda")
    assert torch.cat([first, torch.rand(2)]).equal(expected)


@on_card
def test_streams_and_events_are_accepted():
    import torch

    stream = torch.cuda.Stream()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream() == stream
        start.record()
        tensor = torch.ones(3, device="cuda")
        tensor.record_stream(stream)
        end.record()
    assert torch.cuda.current_stream() == torch.cuda.default_stream() != stream
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    assert end.query()
    assert start.elapsed_time(end) >= 0
    with stream:
        assert torch.cuda.current_stream() == stream
    with torch.cuda.device(0), torch.cuda.nvtx.range("part"):
        pass


@on_card
def test_numpy_wants_the_host_as_it_does_with_cuda():
    import numpy as np
    import torch

    tensor = torch.ones(2, device="cuda")
    text = (
        "can't convert cuda:0 device type tensor to numpy."
        " Use Tensor.cpu() to copy the tensor to host memory first."
    )
    for convert in (tensor.numpy, lambda: np.asarray(tensor)):
        with refused(TypeError, text):
            convert()
    assert tensor.cpu().numpy().sum() == 2
    assert tensor.numpy(force=True).sum() == 2
    assert tensor.tolist() == [1, 1]
    assert tensor[0].item() == 1


@on_card
def test_printing_names_the_device():
    import torch

    assert repr(torch.ones(2, device="cuda")) == "tensor([1., 1.], device='cuda:0')"
    assert "device" not in repr(torch.ones(2))


@pytest.mark.parametrize(
    "expression",
    [
        "card + host",
        "host + card",
        "torch.cat([card, host])",
        "torch.nn.functional.linear(card, torch.ones(4, 4))",
        "torch.nn.Embedding(4, 2)(card.long())",
        "host.add_(card)",
        "torch.tensor(1.0).add_(card[0])",
        "torch.where(host > 0, card, card)",
    ],
)
@on_card
def test_tensors_of_both_devices_do_not_mix(expression):
    import torch

    names = {"torch": torch, "card": torch.ones(4, device="cuda"), "host": torch.ones(4)}
    words = "Expected all tensors to be on the same device, but found at least two devices, "
    order = {"card + host": "cuda:0 and cpu!", "host + card": "cpu and cuda:0!"}
    with refused(RuntimeError, words + order.get(expression, "")):
        eval(expression, names)  # noqa: S307  # the parameters above


@on_card
def test_host_scalars_and_host_indices_are_accepted():
    import torch

    card = torch.arange(4.0, device="cuda")
    assert (card * torch.tensor(2.0)).is_cuda
    assert card[torch.tensor([0, 1])].is_cuda
    card[torch.tensor([True, False, True, False])] = 0
    assert card.tolist() == [0, 1, 0, 3]
    with refused(RuntimeError, "indices should be either on cpu or on the same device"):
        torch.ones(4)[card.long()]


@on_card
def test_a_second_card_is_refused():
    import torch

    for make in (lambda: torch.ones(2, device="cuda:1"), lambda: torch.cuda.set_device(1)):
        with refused(RuntimeError, "CUDA error: invalid device ordinal"):
            make()


@on_card
def test_operations_that_make_helper_tensors_inside_stay_on_the_card():
    import torch
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    functional = torch.nn.functional
    assert functional.one_hot(torch.tensor([0, 2], device="cuda")).is_cuda
    rnn = torch.nn.LSTM(3, 4, batch_first=True).cuda()
    data = torch.ones(2, 5, 3, device="cuda")
    packed = pack_padded_sequence(data, torch.tensor([5, 3]), batch_first=True)
    padded, lengths = pad_packed_sequence(rnn(packed)[0])
    assert padded.is_cuda
    assert not lengths.is_cuda
    padded.sum().backward()
    assert rnn.weight_hh_l0.grad.is_cuda
    images = torch.ones(2, 3, 8, 8, device="cuda")
    assert torch.nn.Conv2d(3, 4, 3).cuda()(images).is_cuda
    assert functional.scaled_dot_product_attention(*[images] * 3).is_cuda
    lengths = torch.tensor([5]), torch.tensor([1])
    chances = torch.ones(5, 1, 3, device="cuda", requires_grad=True).log_softmax(-1)
    functional.ctc_loss(chances, torch.tensor([[1]], device="cuda"), *lengths).backward()
    lengths = torch.tensor(5, device="cuda"), torch.tensor(1, device="cuda")
    one = torch.ones(5, 3, device="cuda").log_softmax(-1)  # without a batch
    assert functional.ctc_loss(one, torch.tensor([1], device="cuda"), *lengths).is_cuda
    assert torch.nn.LazyLinear(3, device="cuda")(data).is_cuda
    assert functional.cross_entropy(data[:, 0], torch.tensor([0, 1], device="cuda")).is_cuda
    assert torch.block_diag(data[0], data[1]).is_cuda


@on_card
def test_custom_functions_hooks_and_checkpoints_see_the_card():
    import torch
    from torch.utils.checkpoint import checkpoint

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            ctx.save_for_backward(value)
            return value * torch.full_like(value, 2.0)

        @staticmethod
        def backward(ctx, gradient):
            assert gradient.is_cuda
            assert ctx.saved_tensors[0].device.type == "cuda"
            return gradient * torch.full((4,), 2.0, device=gradient.device)

    value = torch.ones(2, 4, device="cuda", requires_grad=True)
    layer = torch.nn.Linear(4, 4).cuda()
    for reentrant in (True, False):
        checkpoint(
            lambda v: Doubled.apply(layer(v)), value, use_reentrant=reentrant
        ).sum().backward()
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        result = (value * value).exp().sum()
    result.backward()
    value.register_hook(lambda gradient: gradient * torch.ones(4, device=gradient.device))
    (value * 2).sum().backward()
    assert value.grad.is_cuda
    torch.sgn(value).sum().backward()


@on_card
def test_function_transforms_see_the_card():
    import torch

    value = torch.ones(5, 3, device="cuda")
    assert torch.func.grad(lambda x: (x**2).sum())(value).is_cuda
    assert torch.func.vmap(lambda x: (x * torch.ones(3, device=x.device)).sum())(value).is_cuda
    assert torch.autograd.functional.jacobian(lambda x: x**2, value[0]).is_cuda


@on_card
def test_inference_gives_the_values_of_the_cpu_in_every_grad_mode():
    import torch

    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32).eval()
    data = torch.randn(3, 2, 16)
    with torch.inference_mode():
        expected = layer(data)
        found = layer.cuda()(data.cuda())
    with torch.no_grad():
        assert layer(data.cuda()).equal(found)
    assert found.is_cuda
    assert found.cpu().equal(expected)


@on_card
def test_compiled_functions_run_eagerly():
    import warnings

    import torch

    warnings.simplefilter("ignore")  # torch's own, while it imports its compiler
    # What torch's own class of tests does after each.
    if hasattr(torch.compiler, "set_stance"):  # since torch 2.6
        torch.compiler.set_stance("default")
    torch._dynamo.reset()
    for whole in (False, True):
        doubled = torch.compile(lambda x: x * 2, fullgraph=whole)(torch.ones(2, device="cuda"))
        assert doubled.is_cuda


@on_card
def test_threads_started_later_have_the_card():
    import torch

    def work(number):
        value = torch.full((3,), float(number), device="cuda", requires_grad=True)
        (value * 2).sum().backward()
        return value.grad.is_cuda

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(20)))
    found = []

    class Own(threading.Thread):
        def run(self):
            found.append(torch.ones(2, device="cuda").is_cuda)

    thread = Own()
    thread.start()
    thread.join()
    assert found == [True]


@on_card
def test_data_loaders_pin_and_work_in_processes():
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(torch.arange(20.0))
    for workers in (0, 2):
        batches = DataLoader(data, batch_size=5, pin_memory=True, num_workers=workers)
        sums = []
        for (batch,) in batches:
            assert batch.is_pinned()
            sums.append(batch.cuda(non_blocking=True).sum().item())
        assert sums == [10, 35, 60, 85]
    assert not torch.ones(2).is_pinned()
    assert torch.empty(2, pin_memory=True).is_pinned()


@on_card
def test_there_are_no_tensors_of_mkldnn_on_a_card():
    import torch

    with refused(NotImplementedError, "CUDA has no tensors of MKL-DNN"):
        torch.eye(3, device="cuda").to_mkldnn()
    assert torch.eye(3).to_mkldnn().to_dense().sum() == 3


@on_card
def test_numbers_name_cards():
    import torch

    device = torch.device(0)
    assert device == torch.device("cuda:0") == torch.device(type="cuda", index=0)
    assert isinstance(device, torch.device)
    assert not isinstance("cuda:0", torch.device)
    assert torch.nn.Linear(2, 2).to(0).weight.is_cuda
    for where in (torch.cuda.current_device(), "cuda", torch.device("cuda")):
        assert torch.nn.Linear(2, 2).to(device=where).weight.is_cuda
    assert torch.nn.Linear(2, 2).to(torch.ones(1, device="cuda")).weight.is_cuda
    for copied in (copy.deepcopy(device), pickle.loads(pickle.dumps(device))):  # noqa: S301  # its own
        assert copied == device
    with torch.device(0):
        assert torch.ones(1).is_cuda
    with refused(RuntimeError, "at start of device string: gpu"):
        torch.device("gpu")


@on_card
def test_programs_are_traced_exported_and_loaded():
    import torch
    from torch._subclasses import FakeTensorMode

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()).cuda()
    batch = torch.ones(2, 4, device="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own
        exported = torch.export.export(model, (batch,)).module()
        assert torch.equal(exported(batch), model(batch))
        assert exported(batch).is_cuda
        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(model, batch), file)
        file.seek(0)
        assert torch.jit.load(file, map_location="cuda")(batch).is_cuda
    before = torch.cuda.memory_allocated()
    on_host = "CPU" in str(torch._C._dispatch_keys(batch))  # not so on the compiled card
    with FakeTensorMode():  # whose tensors cost nothing
        made = torch.ones(1000, 1000, device="cuda") + torch.ones(1000, 1000, device="cuda")
    assert made.device.type == ("cpu" if on_host else "cuda")
    assert torch.cuda.memory_allocated() == before


@on_card
def test_models_are_wrapped_for_distributed_training():
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model, batch = torch.nn.Linear(256, 256).cuda(), torch.ones(2, 256, device="cuda")
    before = torch.cuda.memory_allocated()
    parallel = torch.nn.parallel.DistributedDataParallel(model, device_ids=[0])
    # The buckets of gradients.
    assert torch.cuda.memory_allocated() - before >= 4 * 256 * 257
    for _ in range(3):
        parallel(batch).sum().backward()
    assert model.weight.grad.is_cuda
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own
        sharded = fully_shard(torch.nn.Linear(4, 4).cuda())
        sharded(batch[:, :4]).sum().backward()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("torch.cuda.CUDAGraph()", "the simulated card has no torch.cuda.CUDAGraph"),
        ("torch.cuda.MemPool()", "the simulated card has no torch.cuda.MemPool"),
        ("torch.cuda.tunable.is_enabled()", "the simulated card has no torch._C._cuda_tunableop"),
        ("torch.cuda.nccl.version()", "the simulated card has no torch._C._nccl_version"),
        ("torch._C.nonsense", "module 'torch._C' has no attribute 'nonsense'"),
    ],
)
@on_card
def test_what_is_not_simulated_is_refused_in_one_sentence(expression, words):
    import torch

    if torch.version.cuda and "torch._C._" in words:
        return  # a torch that was built for CUDA has it, and answers itself
    with refused((NotImplementedError, AttributeError), words) as caught:
        eval(expression, {"torch": torch})  # noqa: S307  # the parameters above
    assert "\n" not in str(caught.value)


@on_card
def test_the_profiler_is_quiet():
    import os

    import torch

    reading, writing = os.pipe()
    kept = os.dup(2)
    os.dup2(writing, 2)
    try:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            torch.ones(3, device="cuda") + 1
    finally:
        os.dup2(kept, 2)
        os.close(writing)
    with os.fdopen(reading) as pipe:
        assert "Failed to record" not in pipe.read()
    assert profile.key_averages()


@on_card
def test_a_suite_that_asks_for_the_accelerator_gets_the_card():
    import torch

    device = torch.accelerator.current_accelerator()
    assert device.type == "cuda"
    assert torch.accelerator.is_available()
    assert torch.accelerator.device_count() == 1
    torch.accelerator.empty_cache()
    tensor = torch.ones(1024, device=device)
    torch.accelerator.synchronize()
    if hasattr(torch.accelerator, "memory_allocated"):
        assert torch.accelerator.memory_allocated() == tensor.nbytes
    assert torch.accelerator.current_device_index() == 0
    assert torch.accelerator.current_stream() == torch.cuda.current_stream()


@on_card
@pytest.mark.parametrize("chosen", ["EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "FLASH_ATTENTION"])
def test_every_kernel_of_attention_can_be_chosen(chosen):
    import torch
    from torch.nn import functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query = torch.randn(1, 2, 16, 8, device="cuda", requires_grad=True)
    expected = functional.scaled_dot_product_attention(query, query, query)
    with sdpa_kernel(getattr(SDPBackend, chosen)):
        made = functional.scaled_dot_product_attention(query, query, query)
    assert made.is_cuda
    torch.testing.assert_close(made, expected)
    made.sum().backward()
    assert query.grad.is_cuda
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.math_sdp_enabled()


@on_card
def test_whole_numbers_are_counted_as_mixtures_of_experts_do():
    import torch

    experts = [3, 0, 3, 7, 3, 1]
    for kind in (torch.int32, torch.int64, torch.float32):
        chosen = torch.tensor(experts, dtype=kind, device="cuda")
        before = torch.cuda.memory_allocated()
        counts = torch.histc(chosen, bins=8, min=0, max=7)
        assert counts.tolist() == [1, 1, 0, 3, 0, 0, 0, 1]
        assert (counts.device, counts.dtype) == (chosen.device, kind)
        assert torch.cuda.memory_allocated() == before + 512
        assert chosen.histc(4).tolist() == [2, 3, 0, 1]
        del counts
    with refused(RuntimeError, "not implemented for 'Int'"):  # as before, on the host
        torch.histc(torch.tensor(experts, dtype=torch.int32))


@on_card
def test_kernels_of_custom_operators_in_python_are_a_cards_and_see_it():
    import torch

    own, two = torch.library.custom_op, "(Tensor batch, Tensor lengths) -> Tensor"

    @own("own::scaled", mutates_args=(), schema=two)
    def scaled(batch, lengths):
        assert lengths.device.type == "cpu"
        return batch * 2 + torch.zeros(3, device=batch.device)

    def backward(_context, gradient):
        return gradient * 2, None

    scaled.register_autograd(backward)
    lengths = torch.ones(2)  # which a card's kernel may find on the host
    batch = torch.ones(3, device="cuda", requires_grad=True)
    before = torch.cuda.memory_allocated()
    result = scaled(batch, lengths)
    assert (result.device, result.tolist()) == (batch.device, [2, 2, 2])
    assert torch.cuda.memory_allocated() == before + 512
    result.sum().backward()
    assert batch.grad.tolist() == [2, 2, 2]
    assert scaled(torch.ones(3), lengths).device.type == "cpu"

    one = "(Tensor batch) -> Tensor"

    @own("own::where", mutates_args=(), schema=one, device_types="cpu")
    def where(batch):
        return torch.zeros_like(batch)

    @where.register_kernel("cuda")
    def _(batch):
        assert batch.is_cuda
        return torch.ones_like(batch)

    assert (where(batch.detach()).sum(), where(torch.ones(3)).sum()) == (3, 0)
    library = torch.library.Library("own", "FRAGMENT")
    library.define("halves(Tensor batch) -> Tensor[]")
    library.impl("halves", lambda batch: [batch / 2], "CUDA")
    assert torch.ops.own.halves(batch.detach())[0].tolist() == [0.5] * 3
    with refused(NotImplementedError, "own::halves"):
        torch.ops.own.halves(torch.ones(3))


@on_two_cards
def test_tensors_are_filled_with_what_lies_elsewhere():
    import torch

    two = torch.tensor(2.0, device="cuda:0")
    for place in ("cpu", "cuda:0", "cuda:1"):
        filled = torch.ones(3, device=place)
        assert filled.fill_(two).tolist() == [2, 2, 2]
        assert filled.fill_(torch.tensor(3.0)).device == torch.device(place)
        filled[0] = two
        assert torch.fill(filled, 4.0).device == torch.device(place)
        assert filled.tolist() == [2, 3, 3]


@on_two_cards
def test_a_gradient_is_where_its_tensor_is():
    import torch

    parameter = torch.nn.Parameter(torch.ones(2, device="cuda"))
    parameter.grad = torch.ones(2, device="cuda:0")
    for place in ("cpu", "cuda:1"):
        with refused(RuntimeError, "attempting to assign a gradient"):
            parameter.grad = torch.ones(2, device=place)
    parameter.grad = None


@on_card
def test_programs_of_torchscript_make_tensors_where_their_arguments_are():
    import torch

    class Positions(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(8, 3)

        def forward(self, ids):
            places = torch.arange(ids.shape[1], device=ids.device)
            return self.table(ids) + self.table(places) + torch.ones(3, device=ids.device)

    model, ids = Positions().cuda(), torch.tensor([[1, 2, 3]], device="cuda")
    expected = model(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch 2.13 and newer: it is deprecated
        programs = torch.jit.trace(model, ids), torch.jit.script(model)
    for program in programs:
        for _ in range(3):  # it is compiled anew where the first runs showed it something
            result = program(ids)
            assert result.device == ids.device
            torch.testing.assert_close(result, expected)
        program(ids).sum().backward()
        assert model.table.weight.grad.is_cuda
        before = torch.cuda.memory_allocated()
        program(ids).sum().backward()
        assert torch.cuda.memory_allocated() == before


@on_card
def test_convolutions_and_sizes_are_traced_to_torchscript():
    import torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, images):
            seen = self.layers(images) * images.size(1) + 1
            return seen.reshape(images.shape[0], -1).mean(1)

    model = Model().eval()
    for place in ("cpu", "cuda"):
        images, others = torch.randn(2, 3, 8, 8).to(place), torch.randn(5, 3, 8, 8).to(place)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch 2.13 and newer: it is deprecated
            traced = torch.jit.trace(model.to(place), images)
        assert traced(others).device == others.device
        torch.testing.assert_close(traced(others), model(others))
        assert "_convolution" in str(traced.inlined_graph)

"""What only the compiled card can: below Python too, its tensors are a card's."""

from __future__ import annotations

import io
import os
import resource
import signal
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
from card_process import CONTEXT, MIB, on_compiled_cards

from pytest_gpumem.simulator.torch_face import compilation, proof


@on_compiled_cards
def test_what_is_made_on_a_card_is_there_for_every_layer_of_torch():
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.extend(a.device.type for a in args if isinstance(a, torch.Tensor))
            return func(*args, **(kwargs or {}))

    seen = []
    tensor = torch.ones(3, device="cuda")
    with Watching():
        tensor + tensor
    assert seen == ["cuda", "cuda"]
    assert type(torch.device(1)) is torch.device
    assert isinstance(tensor, torch.cuda.FloatTensor)
    assert not isinstance(tensor, torch.FloatTensor)
    shared = torch.from_dlpack(tensor)
    shared += 1
    assert (shared.device, tensor.tolist()) == (tensor.device, [2, 2, 2])
    assert torch.cuda.memory_allocated() == 512
    ragged = torch.nested.nested_tensor([tensor, tensor[:2]], layout=torch.jagged)
    assert (ragged + 1).is_cuda


@on_compiled_cards
def test_operations_of_the_host_are_as_they_were():
    import torch

    assert torch._C._len_torch_dispatch_stack() == torch._C._len_torch_function_stack() == 0
    with torch.autocast("cuda"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32
    assert not torch.cuda.is_initialized()


@on_compiled_cards
def test_autocast_goes_by_the_lists_of_cuda():
    import torch

    full = torch.ones(4, 4, device="cuda")
    half = full.half()
    with torch.autocast("cuda"):
        lower = (
            full @ full,
            torch.nn.functional.linear(full, full),
            torch.bmm(full[None], full[None]),
        )
        higher = half.exp(), half.sum(), half.softmax(-1), torch.nn.functional.mse_loss(half, half)
        widest = half + full
    assert {each.dtype for each in lower} == {torch.float16}
    assert {each.dtype for each in (*higher, widest)} == {torch.float32}


@on_compiled_cards
def test_threads_that_were_there_before_and_autograds_own_have_the_cards():
    import torch

    seen = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            main = threading.current_thread() is threading.main_thread()
            seen.append((main, torch.cuda.current_device(), torch.ones(1, device="cuda").device))
            return gradient

    leaf = torch.ones(3, device="cuda:1", requires_grad=True)
    Watched.apply(leaf).sum().backward()
    assert seen == [(False, 1, torch.device("cuda:1"))]

    def train(number):
        for _ in range(20):
            left, right = (torch.ones(9, 9, device=number % 2) for _ in range(2))
            (left.requires_grad_() @ right).sum().backward()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(train, range(8)))
    del leaf, seen[:]
    assert torch.cuda.memory_allocated(0) == torch.cuda.memory_allocated(1) == 0


def _sines(batch):
    return (batch * 2).sin() * batch + batch.tanh()


@on_compiled_cards
def test_programs_keep_the_card_that_is_written_in_them():
    import torch
    from torch._subclasses import FakeTensorMode

    class Counting(torch.nn.Module):
        def forward(self, batch):
            return batch + torch.arange(batch.shape[0], device=batch.device)

    batch = torch.ones(3, device="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own
        exported = torch.export.export(Counting(), (batch,))
        made = [node.kwargs.get("device") for node in exported.graph.nodes]
        assert torch.device("cuda:0") in made
        assert exported.module()(batch).tolist() == [1, 2, 3]
        program = torch.jit.script(Counting())
        chain = torch.jit.script(_sines)
        for _ in range(3):  # torch compiles at the second call
            assert program(batch).is_cuda
            assert chain(batch).is_cuda  # which a build for CUDA would fuse
        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(torch.nn.Linear(3, 3).cuda(), batch), file)
        file.seek(0)
        loaded = torch.jit.load(file, map_location="cuda:1")
        assert loaded(batch.to("cuda:1")).device == torch.device("cuda:1")
    before = torch.cuda.memory_allocated()
    with FakeTensorMode():
        made = torch.ones(2**40, device="cuda") + 1
    assert made.is_cuda
    assert torch.cuda.memory_allocated() == before


@on_compiled_cards
def test_what_wraps_and_spreads_tensors_says_where_they_are():
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    card = torch.device("cuda:0")
    batch = torch.ones(2, 4, device=card)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    spread = distribute_tensor(batch, init_device_mesh("cuda", (1,)), [Shard(0)])
    assert (spread + spread).device == spread.full_tensor().device == card
    gathered = [torch.empty_like(batch)]
    dist.all_gather(gathered, batch)
    sent = dist.all_reduce(batch, async_op=True)
    sent.wait()
    assert gathered[0].equal(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own
        sharded = fully_shard(torch.nn.Linear(4, 4).cuda())
        sharded(batch).sum().backward()
    assert sharded.weight.grad.device == card
    before = torch.cuda.memory_allocated()
    parallel = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(256, 256).cuda())
    assert torch.cuda.memory_allocated() - before >= 2 * 4 * 256 * 257  # and its buckets
    parallel(torch.ones(1, 256, device=card)).sum().backward()
    assert parallel.module.weight.grad.is_cuda
    dist.destroy_process_group()
    spread = torch.nn.DataParallel(torch.nn.Linear(4, 4).cuda())
    assert spread(batch).device == card


@on_compiled_cards
def test_kernels_that_only_cuda_has_give_the_values_of_the_cpu():
    import torch

    functional = torch.nn.functional
    torch.manual_seed(0)

    def gradients(device, run, *tensors):
        moved = [tensor.detach().to(device).requires_grad_() for tensor in tensors]
        result = run(*moved)
        result = result[0] if isinstance(result, tuple) else result
        return [result, *torch.autograd.grad(result.float().square().sum(), moved)]

    queries = torch.randn(2, 4, 8, 16)
    mask = torch.rand(2, 1, 8, 8) > 0.2
    networks = torch.nn.LSTM(4, 5, 2), torch.nn.GRU(4, 5)

    def attend(*pair, **how):
        return functional.scaled_dot_product_attention(pair[0], pair[1], pair[1], **how)

    cases = [
        (lambda *pair: attend(*pair, is_causal=True), queries, queries),
        (lambda *pair: attend(*pair, attn_mask=mask.to(pair[0].device)), queries, queries),
        *((lambda it, n=n: n.to(it.device)(it), torch.randn(3, 2, 4)) for n in networks),
        (lambda it: it.softmax(-1, dtype=torch.float32), torch.randn(4, 4).half()),
        (lambda it: it.log_softmax(-1, dtype=torch.float32), torch.randn(4, 4).half()),
    ]
    for run, *tensors in cases:
        for host, card in zip(
            gradients("cpu", run, *tensors), gradients("cuda", run, *tensors), strict=True
        ):
            assert card.is_cuda
            torch.testing.assert_close(card.cpu(), host)


@on_compiled_cards
def test_tensors_that_are_made_of_others_live_where_these_do():
    import torch

    torch.sparse.check_sparse_tensor_invariants.disable()  # which torch warns of where it is open
    warnings.simplefilter("ignore")  # of torch's own
    tensor = torch.eye(3, device="cuda:1")
    before = torch.cuda.memory_allocated(1)
    quantized = torch.quantize_per_tensor(tensor, 0.5, 0, torch.quint8)
    ragged = torch.nested.nested_tensor([tensor, tensor[:2]])
    assert torch.cuda.memory_allocated(1) == before + 2 * 512
    for made in (
        *(quantized, quantized[1:], quantized.dequantize(), quantized.cpu().to("cuda:1")),
        *(ragged, ragged + ragged, ragged.to_padded_tensor(0), ragged.cpu().to("cuda:1")),
        *(tensor.to_sparse().cpu().to("cuda:1"), tensor.to_sparse_csr().cpu().to("cuda:1")),
    ):
        assert made.device == tensor.device
    assert quantized.cpu().dequantize().equal(torch.eye(3))
    assert ragged.cpu().to_padded_tensor(0)[1].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    for sparse in (tensor.to_sparse(), tensor.to_sparse_csr()):
        sparse.values().add_(1)
        sparse.mul_(2)
        assert sparse.to_dense().equal(tensor * 4)
    indices = torch.zeros(1, 4, dtype=torch.long, device="cuda:1")
    uncoalesced = torch.sparse_coo_tensor(indices, torch.ones(4, device="cuda:1"), (2,))
    uncoalesced += uncoalesced.clone()
    assert uncoalesced.coalesce().to_dense().tolist() == [8, 0]
    assert torch.cuda.memory_allocated(0) == 0


@on_compiled_cards
def test_what_does_not_fit_is_refused_before_the_host_computes_it():
    import torch

    one = torch.ones(1, device="cuda")
    large, row = one.expand(2**28), one.expand(1, 2**14)  # of 1 GiB, and of nothing on the card
    torch.cuda.memory.set_per_process_memory_fraction(0.75)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = r"Tried to allocate (1024\.00 M|2\.00 G)iB"
    for ask in (
        lambda: torch.cat([large]),
        lambda: large + 1,
        lambda: row.T @ row,
        large.sort,
        lambda: large.to("cuda:1", torch.float64),
        lambda: one.repeat(2**28),
    ):
        with pytest.raises(torch.OutOfMemoryError, match=size):
            ask()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < 64 * 1024
    assert torch.cuda.memory_stats()["num_ooms"] == 5
    assert torch.cuda.max_memory_allocated() == 512


@on_compiled_cards
def test_autograd_works_on_the_streams_of_the_forward_pass():
    import torch

    side = torch.cuda.Stream()
    leaf = torch.ones(MIB, device="cuda", requires_grad=True)
    with torch.cuda.stream(side):
        loss = (leaf * leaf).sum()
    torch.cuda.empty_cache()
    loss.backward()
    assert torch.cuda.current_stream().stream_id == 0
    segments = torch.cuda.memory_snapshot()
    # The engine of its own accord says that the default stream uses what came from the side.
    assert {each["stream"] for each in segments} == {0, side.stream_id}
    made = [each for each in segments if each["stream"] == side.stream_id]
    assert sum(each["total_size"] for each in made) >= 4 * MIB


@on_compiled_cards
def test_memory_ends_with_the_last_who_needs_it():
    import torch

    tensor = torch.ones(MIB // 4, device="cuda")
    view, storage = tensor[:2], tensor.untyped_storage()
    del tensor
    assert torch.cuda.memory_allocated() == MIB
    del view
    assert torch.cuda.memory_allocated() == MIB
    storage.resize_(2 * MIB)
    assert torch.cuda.memory_allocated() == 2 * MIB
    del storage
    assert torch.cuda.memory_allocated() == 0
    most = torch.cuda.get_device_properties(0).total_memory - CONTEXT
    half = torch.empty(most // 2 + MIB, dtype=torch.uint8)
    for ask in (half.cuda, lambda: half.to("cuda:1"), lambda: torch.empty(2**45, device="cuda")):
        with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory\. Tried"):
            ask(), ask()  # the first one lives while the second is asked for
    assert torch.cuda.memory_allocated(0) == torch.cuda.memory_allocated(1) == 0


@on_compiled_cards
def test_what_cuda_has_no_deterministic_kernel_for_is_refused_where_that_is_asked_for():
    import torch

    pools = (
        (torch.nn.AvgPool3d(2), "avg_pool3d_backward_cuda"),
        (torch.nn.AdaptiveAvgPool3d(2), "adaptive_avg_pool3d_backward_cuda"),
        (torch.nn.ReflectionPad2d(1), "reflection_pad2d_backward_cuda"),
    )

    def pass_through(module, device):
        module(
            torch.ones(1, 2, 4, 4, 4, device=device)[:, 0, ...].requires_grad_()
        ).sum().backward()

    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        for module, kernel in pools:
            pass_through(module, "cpu")
            if deterministic:
                with pytest.raises(RuntimeError, match=kernel):
                    pass_through(module, "cuda")
            else:
                pass_through(module, "cuda")
    with pytest.raises(RuntimeError, match="_histc_cuda"):
        torch.histc(torch.ones(3, device="cuda"))


@on_compiled_cards
def test_lazy_clones_cost_their_bytes_with_the_first_write():
    import torch

    tensor = torch.ones(1024, device="cuda")
    clone = torch._lazy_clone(tensor)
    assert clone.sum().item() == 1024
    assert torch.cuda.memory_allocated() == 4096
    clone += 1
    assert torch.cuda.memory_allocated() == 8192
    assert (tensor[0].item(), clone[0].item()) == (1, 2)
    shared = torch._lazy_clone(tensor)
    del tensor
    assert torch.cuda.memory_allocated() == 8192
    assert shared.tolist() == [1] * 1024
    del clone, shared
    assert torch.cuda.memory_allocated() == 0


@on_compiled_cards
def test_what_torch_asks_of_cudas_libraries_has_an_answer():
    import torch

    assert "simulated card" in torch.__config__.show()
    plans = torch.backends.cuda.cufft_plan_cache
    plans.max_size = 10
    plans.clear()
    assert (plans.max_size, plans.size) == (10, 0)


@on_compiled_cards
def test_a_forked_child_has_the_cards_unless_cuda_was_used():
    import torch
    from card_process import in_child

    def use():
        return str(torch.ones(1, device="cuda").device)

    assert in_child(use) == (0, "cuda:0")
    use()
    status, said = in_child(use)
    assert os.WIFEXITED(status)
    assert "Cannot re-initialize CUDA in forked subprocess" in said


@on_compiled_cards
def test_what_a_handler_of_a_signal_raises_arrives_as_it_is():
    import torch

    class Limit(BaseException):
        pass

    def strike(*_):
        raise Limit

    def work():
        while True:
            tensor = torch.ones(64, 64, device="cuda")
            tensor @ tensor

    before = signal.signal(signal.SIGALRM, strike)
    try:
        for step in range(20):
            signal.setitimer(signal.ITIMER_REAL, 0.003 + 0.0007 * step)
            with pytest.raises(Limit):
                work()
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
def test_a_process_may_end_as_soon_as_backward_has_returned():
    library = compilation.library()
    ended = [
        subprocess.run(
            [sys.executable, "-m", proof.__name__, library], stderr=subprocess.PIPE, check=False
        )
        for _ in range(30)
    ]
    assert {(each.returncode, each.stderr) for each in ended} == {(0, b"")}

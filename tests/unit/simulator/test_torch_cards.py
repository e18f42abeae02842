"""Two simulated cards: where things are, what each is charged, what names the second one."""

from __future__ import annotations

import io
import os
import re

import pytest
from card_process import CONTEXT, MIB, TOTAL, in_child, on_two_cards


def fill(mib, device="cuda"):
    import torch

    return torch.empty(mib * MIB, dtype=torch.uint8, device=device)


def free():
    """Return what is free on each card of the machine, without taking a context there."""
    from pytest_gpumem.simulator import Simulation

    return [card.free() for card in Simulation.installed.cards]


@pytest.mark.parametrize(
    ("expression", "place"),
    [
        ("torch.ones(2, device='cuda:1')", 1),
        ("torch.ones(2, device='cuda')", 0),
        ("torch.ones(2, device=1)", 1),
        ("torch.tensor([1.0, 2.0], device=torch.device('cuda', 1))", 1),
        ("torch.as_tensor(first, device='cuda:1')", 1),
        ("first.to('cuda:1')", 1),
        ("first.to(second)", 1),
        ("first.cuda(1)", 1),
        ("second.cuda()", 0),
        ("second.to('cuda')", 0),
        ("second.cuda(torch.device('cuda:1'))", 1),
        ("host.cuda(1)", 1),
        ("torch.zeros_like(second)", 1),
        ("torch.zeros_like(second, device='cuda:0')", 0),
        ("second.new_zeros(3)", 1),
        ("second.new_tensor([1.0])", 1),
        ("second * torch.tensor(2.0)", 1),
        ("second[torch.tensor([0])]", 1),
        ("torch.cat([second, second])", 1),
        ("torch.nn.functional.dropout(second)", 1),
        ("torch.nn.Linear(2, 2).to('cuda:1')(second)", 1),
        ("torch.nn.Linear(2, 2).to(1)(second)", 1),
        ("torch.nn.Linear(2, 2, device='cuda:1').weight", 1),
        ("first.copy_(second)", 0),
        ("torch.rand(2, device='cuda:1', generator=torch.Generator('cuda:1'))", 1),
    ],
)
@on_two_cards
def test_a_result_is_on_its_card(expression, place):
    import torch

    first, second = torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:1")
    before = [torch.cuda.memory_allocated(0), torch.cuda.memory_allocated(1)]
    names = {"torch": torch, "first": first, "second": second, "host": torch.ones(2)}
    result = eval(expression, names)  # noqa: S307  # the parameters above
    assert result.device == torch.device("cuda", place)
    assert result.get_device() == place
    assert f"device='cuda:{place}'" in str(result)
    after = [torch.cuda.memory_allocated(0), torch.cuda.memory_allocated(1)]
    taken = [now - then for now, then in zip(after, before, strict=True)]
    assert taken[1 - place] == 0
    assert (taken[place] > 0) != any(result is each for each in (first, second))


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("first + second", "at least two devices, cuda:0 and cuda:1!"),
        ("second + first", "at least two devices, cuda:1 and cuda:0!"),
        ("second + host", "at least two devices, cuda:1 and cpu!"),
        ("first @ second", "at least two devices, cuda:0 and cuda:1!"),
        ("second.sum() * first", "at least two devices, cuda:1 and cuda:0!"),
        ("torch.cat([first, second])", "at least two devices, cuda:0 and cuda:1!"),
        ("first[second.long()]", "the same device as the indexed tensor (cuda:0)"),
        ("second.numpy()", "can't convert cuda:1 device type tensor to numpy"),
        ("torch.ones(2, device='cuda:2')", "CUDA error: invalid device ordinal"),
        ("torch.cuda.set_device(2)", "CUDA error: invalid device ordinal"),
        ("host.to(2)", "CUDA error: invalid device ordinal"),
        ("host.to(-1)", "Device index must not be negative"),
        ("torch.cuda.get_device_properties(2)", "Invalid device id"),
    ],
)
@on_two_cards
def test_what_cannot_be_is_refused(expression, words):
    import torch

    first, second = torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:1")
    names = {"torch": torch, "first": first, "second": second, "host": torch.ones(2)}
    with pytest.raises((RuntimeError, TypeError, AssertionError), match=re.escape(words)):
        eval(expression, names)  # noqa: S307  # the parameters above


@on_two_cards
def test_each_card_counts_for_itself():
    import torch

    first, second = fill(100), fill(200, "cuda:1")
    del first
    torch.cuda.empty_cache()
    assert [torch.cuda.memory_allocated(index) for index in (0, 1)] == [0, 200 * MIB]
    assert [torch.cuda.max_memory_allocated(index) for index in (0, 1)] == [100 * MIB, 200 * MIB]
    del second
    torch.cuda.reset_peak_memory_stats("cuda:1")
    assert [torch.cuda.max_memory_allocated(index) for index in (0, 1)] == [100 * MIB, 0]
    assert torch.cuda.mem_get_info(1) == (TOTAL - CONTEXT - 200 * MIB, TOTAL)
    assert torch.cuda.memory_reserved(1) == 200 * MIB
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info(1) == (TOTAL - CONTEXT, TOTAL)
    assert f"process {os.getpid():>10d} uses" in torch.cuda.list_gpu_processes(1)


@on_two_cards
def test_the_error_names_the_card_and_its_own_figures():
    import torch

    kept = fill(600), fill(50, "cuda:1")
    torch.cuda.set_per_process_memory_fraction(0.5, 1)
    seen = []
    torch._C._cuda_attach_out_of_memory_observer(lambda *told: seen.append(told))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        fill(500, "cuda:1")
    assert "GPU 1 has a total capacity of 1024.00 MiB of which 874.00 MiB is free" in str(
        caught.value
    )
    assert "512.00 MiB allowed; Of the allocated memory 50.00 MiB" in str(caught.value)
    assert seen == [(1, 500 * MIB, TOTAL, TOTAL - CONTEXT - 50 * MIB)]
    assert len(kept) == 2
    fill(300)  # the first card has no such limit


@on_two_cards
def test_the_context_is_on_the_cards_that_are_used_alone():
    import torch

    assert torch.cuda.device_count() == 2
    assert torch.cuda.get_device_name(1) == torch.cuda.get_device_name(0)
    assert free() == [TOTAL, TOTAL]
    torch.cuda.set_device(1)
    assert free() == [TOTAL, TOTAL - CONTEXT]
    assert fill(10).device.index == 1
    assert free() == [TOTAL, TOTAL - CONTEXT - 10 * MIB]
    assert torch.cuda.memory_allocated(0) == 0
    assert free()[0] == TOTAL


@on_two_cards
def test_the_current_card_is_a_threads_own_and_comes_back():
    import threading

    import torch

    seen = []
    with torch.cuda.device(1):
        assert torch.ones(1, device="cuda").get_device() == 1
        thread = threading.Thread(target=lambda: seen.append(torch.cuda.current_device()))
        thread.start()
        thread.join()
        with torch.cuda.device_of(torch.ones(1, device="cuda:0")):
            assert torch.cuda.current_device() == 0
        assert torch.cuda.current_device() == 1
    assert torch.cuda.current_device() == 0
    assert seen == [0]
    stream = torch.cuda.Stream(device=1)
    with torch.cuda.stream(stream):
        assert torch.cuda.current_device() == 1
        assert torch.cuda.current_stream() == stream
    assert torch.cuda.current_device() == 0
    assert (
        torch.cuda.current_stream() == torch.cuda.default_stream(0) != torch.cuda.default_stream(1)
    )
    event = torch.cuda.Event()
    event.record(stream)
    assert event.device == stream.device == torch.device("cuda:1")
    with torch.device("cuda:1"):
        assert torch.ones(1).get_device() == 1


@on_two_cards
def test_gradients_and_values_cross_between_the_cards():
    import torch

    there = torch.arange(4.0, device="cuda:1", requires_grad=True)
    here = torch.arange(4.0, device="cuda:0", requires_grad=True)
    (there.to("cuda:0") * here).sum().backward()
    assert there.grad.device == torch.device("cuda:1")
    assert there.grad.tolist() == here.tolist()
    assert here.grad.device == torch.device("cuda:0")
    optimizer = torch.optim.Adam([there, here])
    optimizer.step()
    states = {str(value["exp_avg"].device) for value in optimizer.state.values()}
    assert states == {"cuda:0", "cuda:1"}
    assert torch.nn.utils.clip_grad_norm_([there, here], 1.0).isfinite()


@on_two_cards
def test_random_numbers_are_each_cards_own():
    import torch

    torch.manual_seed(0)
    first, second = torch.rand(3, device="cuda:0"), torch.rand(3, device="cuda:1")
    assert first.tolist() == second.tolist()  # all cards have the seed
    torch.cuda.set_rng_state(torch.cuda.get_rng_state("cuda:0"), "cuda:1")
    torch.rand(3, device="cuda:0")
    state = torch.cuda.get_rng_state_all()
    assert not torch.equal(state[0], state[1])
    assert torch.Generator("cuda:1").device == torch.device("cuda:1")


@on_two_cards
def test_gloo_stands_for_nccl():
    import torch
    import torch.distributed as dist

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.get_backend() == "gloo"
    for backend in (None, "NCCL", dist.Backend.NCCL, "cpu:gloo,cuda:nccl"):
        group = dist.new_group([0], backend=backend)
        for place in ("cuda:0", "cuda:1"):
            tensor = torch.ones(2, device=place)
            dist.all_reduce(tensor, group=group)
            assert tensor.tolist() == [1, 1]
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2).cuda(), device_ids=[0])
    model(torch.ones(1, 2, device="cuda")).sum().backward()
    assert model.module.weight.grad.is_cuda
    dist.barrier()
    dist.destroy_process_group()


@on_two_cards
def test_what_was_saved_on_the_second_card_comes_back_there():
    import torch

    def load(**how):
        file.seek(0)
        return torch.load(file, **how).device

    file = io.BytesIO()
    torch.save(torch.ones(3, device="cuda:1"), file)
    assert load() == torch.device("cuda:1")
    assert load(map_location="cuda:0") == torch.device("cuda:0")
    assert load(map_location={"cuda:1": "cuda:0"}) == torch.device("cuda:0")
    assert load(map_location="cpu") == torch.device("cpu")


@on_two_cards
def test_a_history_and_a_snapshot_tell_the_cards_apart():
    import torch

    torch.cuda.memory._record_memory_history()
    kept = fill(30), fill(40, "cuda:1")
    told = torch.cuda.memory._snapshot()
    assert [
        [each["size"] // MIB for each in device if each["action"] == "alloc"]
        for device in told["device_traces"]
    ] == [[30], [40]]
    assert [each["device"] for each in torch.cuda.memory_snapshot()] == [0, 1]
    assert len({each["address"] for each in told["segments"]}) == len(kept)


@on_two_cards
def test_pieces_go_to_several_cards_and_come_back():
    import torch
    from torch.cuda import comm

    model = torch.nn.Linear(3, 3).cuda()
    batch = torch.randn(7, 3, device="cuda")
    parallel = torch.nn.DataParallel(model)
    result = parallel(batch)
    assert result.device == torch.device("cuda:0")
    assert torch.allclose(result, model(batch))
    result.sum().backward()
    assert model.weight.grad.device == torch.device("cuda:0")
    assert torch.cuda.max_memory_allocated(1) > 0
    parts = comm.scatter(batch, (0, 1), (3, 4))
    assert [(len(part), part.get_device()) for part in parts] == [(3, 0), (4, 1)]
    assert torch.equal(comm.gather(parts), batch)
    assert comm.gather(parts, destination="cpu").device == torch.device("cpu")
    assert [each.get_device() for each in comm.broadcast(batch, (1, 0))] == [1, 0]
    assert comm.reduce_add([batch, batch.to("cuda:1")], 1).get_device() == 1
    assert torch.cuda.can_device_access_peer(0, 1)


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        ("1", [1]),
        ("1,0", [1, 0]),
        ("0,1", [0, 1]),
        ("0,7", [0]),
        ("uuid", [1]),
        ("", []),
        ("0,0", []),
    ],
)
@on_two_cards
def test_a_process_sees_the_cards_that_are_visible_in_their_order(visible, seen):
    import torch

    from pytest_gpumem.simulator import Simulation

    def look():
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
        assert torch.cuda.device_count() == len(seen)
        assert torch.cuda.is_available() == bool(seen)
        for index in range(len(seen)):
            uuid = str(torch.cuda.get_device_properties(index).uuid)
            assert cards[seen[index]].uuid == f"GPU-{uuid}"
            fill(index + 1, f"cuda:{index}")
            assert torch.cuda.get_device_properties(index).pci_bus_id == seen[index] + 1
        used = [bool(total - left) for total, left in zip((TOTAL, TOTAL), free(), strict=True)]
        assert used == [place in seen for place in (0, 1)]

    cards = Simulation.installed.cards
    visible = cards[1].uuid if visible == "uuid" else visible
    assert in_child(look) == (0, "")

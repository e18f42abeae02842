"""What tensors cost on the simulated card, and what happens when it is full."""

from __future__ import annotations

import gc
import os
import re
import signal

import pytest
from card_process import CONTEXT, MIB, TOTAL, in_child, on_card

GRAMMAR = re.compile(
    r"CUDA out of memory\. Tried to allocate (?P<tried>\S+ \w+)\. GPU 0 has a total capacity of"
    r" (?P<total>\S+ \w+) of which (?P<free>\S+ \w+) is free\. "
    r"(?P<others>(?:Process \d+ has \S+ \w+ memory in use\. )*)"
    r"(?:Including non-PyTorch memory, this process has (?P<own>\S+ \w+) memory in use\. )"
    r"(?P<others2>(?:Process \d+ has \S+ \w+ memory in use\. )*)"
    r"(?:(?P<allowed>\S+ \w+) allowed; )?"
    r"Of the allocated memory (?P<allocated>\S+ \w+) is allocated by PyTorch, and"
    r" (?P<cached>\S+ \w+) is reserved by PyTorch but unallocated\."
    r" If reserved but unallocated memory is large try setting"
    r" PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation\."
    r"  See documentation for Memory Management  \(https://(docs\.)?pytorch\.org/\S+\)"
)


def fill(mib):
    import torch

    return torch.empty(mib * MIB, dtype=torch.uint8, device="cuda")


def refusal(work):
    """Return the text of the out-of-memory error that ``work`` must raise."""
    import torch

    with pytest.raises(torch.OutOfMemoryError) as caught:
        work()
    return str(caught.value)


def card():
    import torch

    return torch.cuda.mem_get_info()


@on_card
def test_a_tensor_of_1_mib_adds_exactly_1_mib_until_it_is_deleted():
    import torch

    tensor = fill(1)
    assert torch.cuda.memory_allocated() == MIB
    view = tensor[10:].view(-1)
    assert torch.cuda.memory_allocated() == MIB
    del tensor
    assert torch.cuda.memory_allocated() == MIB
    del view
    assert torch.cuda.memory_allocated() == 0
    assert torch.cuda.max_memory_allocated() == MIB
    assert torch.cuda.memory_reserved() == 2 * MIB
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == 0


@on_card
def test_the_peak_counts_operands_and_results_together():
    import torch

    left, right = fill(4), fill(4)
    result = left + right
    assert torch.cuda.max_memory_allocated() == 12 * MIB
    del result
    torch.cuda.reset_peak_memory_stats()
    left += right
    assert torch.cuda.max_memory_allocated() == 8 * MIB
    stats = torch.cuda.memory_stats()
    assert stats["allocation.all.current"] == 2
    assert stats["requested_bytes.all.current"] == 8 * MIB
    assert "CUDA OOMs: 0" in torch.cuda.memory_summary()


@on_card
def test_dropout_costs_a_mask_of_bytes():
    import torch

    value = torch.ones(MIB, device="cuda")
    kept = torch.nn.functional.dropout(value.requires_grad_())
    assert torch.cuda.memory_allocated() == (4 + 4 + 1) * MIB
    assert kept.grad_fn is not None


@on_card
def test_saved_activations_are_freed_with_the_graph():
    import torch

    value = torch.ones(MIB, device="cuda", requires_grad=True)
    loss = value.exp().sum()
    assert torch.cuda.memory_allocated() == 8 * MIB + 512
    loss.backward()
    assert torch.cuda.memory_allocated() == 8 * MIB + 512
    assert value.grad.nbytes == 4 * MIB
    del loss, value
    assert torch.cuda.memory_allocated() == 0


@on_card
def test_adam_costs_two_more_of_each_parameter():
    import torch

    layer = torch.nn.Linear(512, 512, bias=False).cuda()
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 512, device="cuda")).sum().backward()
    assert torch.cuda.memory_allocated() == 2 * MIB
    optimizer.step()
    assert torch.cuda.memory_allocated() == 4 * MIB


@on_card
def test_a_resized_storage_is_charged_anew():
    import torch

    tensor = fill(1)
    tensor.resize_(4 * MIB)
    assert torch.cuda.memory_allocated() == 4 * MIB
    tensor.untyped_storage().resize_(0)
    assert torch.cuda.memory_allocated() == 0
    out = torch.empty(0, device="cuda")
    torch.add(torch.ones(MIB // 4, device="cuda"), 1, out=out)
    assert torch.cuda.memory_allocated() == MIB
    out.set_(fill(2).untyped_storage())
    assert torch.cuda.memory_allocated() == 2 * MIB


@on_card
def test_a_cycle_is_freed_by_the_collector():
    import torch

    gc.disable()
    cycle = [fill(1)]
    cycle.append(cycle)
    del cycle
    assert torch.cuda.memory_allocated() == MIB
    gc.collect()
    assert torch.cuda.memory_allocated() == 0


@on_card
def test_an_empty_tensor_costs_nothing_and_is_on_the_card():
    import torch

    assert torch.empty(0, device="cuda").is_cuda
    assert torch.cuda.memory_allocated() == 0


@on_card
def test_the_context_is_taken_by_the_first_call_that_needs_it():
    import torch

    assert torch.cuda.is_available()
    assert torch.cuda.device_count() == 1
    torch.manual_seed(0)
    torch.cuda.empty_cache()
    torch.ones(2) + 1
    assert not torch.cuda.is_initialized()
    assert torch.cuda.memory_stats() == {}
    torch.cuda.current_device()
    assert torch.cuda.is_initialized()
    assert card() == (TOTAL - CONTEXT, TOTAL)
    tensor = fill(30)
    assert card() == (TOTAL - CONTEXT - tensor.nbytes, TOTAL)


@on_card
def test_the_card_describes_itself():
    import pynvml
    import torch

    properties = torch.cuda.get_device_properties(0)
    assert properties.total_memory == TOTAL
    assert properties.name == torch.cuda.get_device_name()
    assert torch.cuda.get_device_capability() == (properties.major, properties.minor)
    assert torch.cuda.is_bf16_supported()
    assert torch.version.cuda
    assert torch.backends.cudnn.is_available()
    assert torch.backends.cudnn.version() > 90000
    assert torch.cuda.get_arch_list() == [f"sm_{properties.major}{properties.minor}"]
    assert properties.max_threads_per_block == 1024
    said = f"_CudaDeviceProperties(name='{properties.name}', major=8, minor=0, total_memory=1024MB,"
    assert repr(properties).startswith(said)
    assert {properties: "of a cache"}[properties]
    nvml = torch.cuda._get_pynvml_handler()
    assert pynvml.nvmlDeviceGetCudaComputeCapability(nvml) == torch.cuda.get_device_capability()
    assert pynvml.nvmlDeviceGetPciInfo(nvml).bus == properties.pci_bus_id
    assert pynvml.nvmlDeviceGetUUID(nvml) == f"GPU-{properties.uuid}"
    torch.ones(1, device="cuda")
    assert f"process {os.getpid():>10d} uses" in torch.cuda.list_gpu_processes()


@on_card
def test_hidden_cards_are_not_there():
    import torch

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    assert not torch.cuda.is_available()
    with pytest.raises(RuntimeError, match="No CUDA GPUs are available"):
        torch.ones(1, device="cuda")


@on_card
def test_the_error_has_pytorchs_words_and_figures():
    kept = fill(500)
    found = GRAMMAR.fullmatch(refusal(lambda: fill(600)))
    assert found
    assert found["tried"] == "600.00 MiB"
    assert found["total"] == "1024.00 MiB"
    assert found["free"] == "424.00 MiB"
    assert found["own"] == "600.00 MiB"
    assert found["allocated"] == "500.00 MiB"
    assert found["cached"] == "0 bytes"
    assert kept.is_cuda


@pytest.mark.parametrize("make", ["empty", "zeros", "ones", "new_ones", "expand"])
@on_card
def test_what_no_host_could_hold_is_refused_before_it_is_made(make):
    import torch

    one = torch.ones(1, device="cuda")
    size = 2**44
    makers = {
        "empty": lambda: torch.empty(size, device="cuda"),
        "zeros": lambda: torch.zeros(size, device="cuda"),
        "ones": lambda: torch.ones(2, size // 2, device="cuda"),
        "new_ones": lambda: one.new_ones(size),
        "expand": lambda: one.expand(size).clone(),
    }
    assert "Tried to allocate 65536.00 GiB" in refusal(makers[make])


@on_card
def test_memory_is_there_again_after_a_caught_error():
    import torch

    def too_much():
        first = fill(400)
        return (first + 1) + (first + 2)

    gc.disable()
    try:
        too_much()
    except torch.OutOfMemoryError:
        assert torch.cuda.memory_allocated() == 400 * MIB  # ``first``, which its frame knows
    assert torch.cuda.memory_allocated() == 0
    assert fill(800).is_cuda
    assert torch.cuda.memory_stats()["num_ooms"] == 1


@on_card
def test_an_error_inside_backward_keeps_its_type():
    import torch

    class Greedy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value * 1

        @staticmethod
        def backward(ctx, gradient):
            return gradient + fill(2000).sum()

    value = torch.ones(1, device="cuda", requires_grad=True)
    assert "Tried to allocate 1.95 GiB" in refusal(Greedy.apply(value).backward)
    big = torch.ones(60 * MIB, device="cuda", requires_grad=True)
    refusal((big.exp().sum() * big.exp().sum()).backward)


@on_card
def test_an_error_inside_module_cuda_leaves_the_rest_usable():
    import torch

    model = torch.nn.Linear(32 * MIB, 8, bias=False, device="meta").to_empty(device="cpu")
    assert "1024.00 MiB" in refusal(model.cuda)
    assert not model.weight.is_cuda
    assert torch.nn.Linear(2, 2).cuda().weight.is_cuda


@on_card
def test_the_memory_fraction_is_a_limit_and_is_named():
    import torch

    torch.cuda.set_per_process_memory_fraction(0.25)
    found = GRAMMAR.fullmatch(refusal(lambda: fill(300)))
    assert found
    assert found["allowed"] == "256.00 MiB"
    assert torch.cuda.get_per_process_memory_fraction() == 0.25
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert fill(300).is_cuda


@on_card
def test_observers_hear_of_the_error():
    import torch

    heard = []
    torch._C._cuda_attach_out_of_memory_observer(lambda *figures: heard.append(figures))
    refusal(lambda: fill(2000))
    assert heard == [(0, 2000 * MIB, TOTAL, TOTAL - CONTEXT)]


@on_card
def test_the_history_names_the_line_that_allocated():
    import torch

    def frames_of_blocks():
        segments = torch.cuda.memory._snapshot()["segments"]
        return [block["frames"] for segment in segments for block in segment["blocks"]]

    before = fill(1)
    torch.cuda.memory._record_memory_history("state")
    kept = torch.ones(3, device="cuda")
    also = kept + 1
    innermost = [frames[0] for frames in frames_of_blocks() if frames]
    assert {frame["name"] for frame in innermost} == {
        "test_the_history_names_the_line_that_allocated"
    }
    assert innermost[0]["filename"] == __file__
    torch.cuda.memory._record_memory_history(None)
    later = kept + 2
    assert len([frames for frames in frames_of_blocks() if frames]) == 2
    del also
    assert len([frames for frames in frames_of_blocks() if frames]) == 1
    assert before.is_cuda
    assert later.is_cuda


@pytest.mark.parametrize(
    ("statement", "notes"),
    [
        (
            "torch._C._accelerator_setAllocatorSettings('expandable_segments:True')",
            "expandable_segments:True of",
        ),
        ("torch._C._accelerator_setAllocatorSettings('max_split_size_mb:64')", None),
        ("torch._C._accelerator_setAllocatorSettings('expandable_segments:False')", None),
        ("torch.cuda.memory.caching_allocator_enable(False)", "caching_allocator_enable(False)"),
        ("torch.cuda.memory.caching_allocator_enable(True)", None),
    ],
)
@on_card
def test_a_setting_that_is_not_obeyed_is_said_once(statement, notes):
    import torch

    from pytest_gpumem.simulator import Simulation

    for _ in range(2):
        exec(statement, {"torch": torch})  # noqa: S102  # the parameters above
        fill(1)
    told = Simulation.installed.notes
    assert len(told) == (notes is not None)
    assert notes is None or notes in told[0]


@on_card
def test_settings_of_the_environment_that_are_not_obeyed_are_said():
    from pytest_gpumem.simulator import Simulation

    wanted = "roundup_power2_divisions:[256:1,>:4], backend:native,expandable_segments:True"
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = wanted
    fill(1)
    (told,) = Simulation.installed.notes
    ignored = "expandable_segments:True of PYTORCH_CUDA_ALLOC_CONF"
    assert told == f"the simulated card does not obey {ignored}"


@pytest.mark.parametrize(
    ("context", "allocates", "frees"),
    [
        (None, None, None),
        ("state", None, None),
        ("alloc", "made", "made"),
        ("all", "made", "freed"),
    ],
)
@on_card
def test_the_history_keeps_the_stacks_that_are_asked_for(context, allocates, frees):
    import torch

    def made():
        return fill(1)

    def freed():
        kept.clear()

    torch.cuda.memory._record_memory_history(context=context)
    kept = [made()]
    freed()
    events = torch.cuda.memory._snapshot()["device_traces"][0]
    assert [each["action"] for each in events] == [
        "segment_alloc",
        "alloc",
        "free_requested",
        "free_completed",
    ]
    who = [
        next((each["name"] for each in event["frames"] if each["name"] in {"made", "freed"}), "")
        if "frames" in event
        else None
        for event in events
    ]
    assert who == [allocates, allocates, frees, frees]


@on_card
def test_the_history_tells_the_addresses_of_tensors_and_the_last_events():
    import torch

    record, snapshot = torch.cuda.memory._record_memory_history, torch.cuda.memory._snapshot
    early = fill(1)
    address = early.data_ptr()
    record(max_entries=6)
    late = fill(2)
    told = late.data_ptr()
    del early
    refusal(lambda: fill(2000))
    snapshot()
    trace = snapshot()["device_traces"][0]
    segment = trace[3]["addr"]
    assert [(each["action"], each.get("addr")) for each in trace] == [
        ("alloc", told),
        ("free_requested", address),
        ("free_completed", address),
        ("segment_free", segment),
        ("oom", None),
        ("snapshot", 0),
    ]
    assert trace[4]["size"] == 2000 * MIB
    assert trace[4]["device_free"] > 0
    assert trace[4]["frames"][0]["filename"] == __file__
    assert trace == sorted(trace, key=lambda each: each["time_us"])
    record(None)
    assert snapshot()["device_traces"] == [[]]
    for words in ({"enabled": "some"}, {"context": "free"}, {"stacks": "c++"}):
        with pytest.raises(RuntimeError, match="expected"):
            record(**words)
    assert late.is_cuda


@on_card
@pytest.mark.parametrize(("context", "told"), [("state", False), ("alloc", False), ("all", True)])
def test_who_gave_a_segment_back_is_told_with_all_context(context, told):
    import torch

    torch.cuda.memory._record_memory_history(context=context)
    del (made := [fill(2)])[0]
    assert not made
    torch.cuda.empty_cache()
    trace = torch.cuda.memory._snapshot()["device_traces"][0]
    assert "segment_free" in {event["action"] for event in trace}
    assert (
        any(frame["name"] == "empty_cache" for event in trace for frame in event.get("frames", ()))
        == told
    )


@on_card
def test_a_tensor_lies_where_the_snapshot_has_its_block():
    import torch

    torch.cuda.memory._record_memory_history()
    kept = [fill(size) for size in (1, 3, 30)]
    of_storage = torch.UntypedStorage(5 * MIB, device="cuda")
    grown = torch.empty(4, device="cuda").resize_(2 * MIB)
    blocks = {}
    for segment in torch.cuda.memory._snapshot()["segments"]:
        place = segment["address"]
        for block in segment["blocks"]:
            assert block["address"] == place
            blocks[place] = block
            place += block["size"]
        assert place == segment["address"] + segment["total_size"]
    told = [tensor.untyped_storage().data_ptr() for tensor in (*kept, grown)]
    for address in (*told, of_storage.data_ptr()):
        assert blocks[address]["state"] == "active_allocated"
        assert blocks[address]["frames"]
    assert [tensor.data_ptr() for tensor in (*kept, grown)] == told
    assert kept[2][7:].data_ptr() == kept[2].data_ptr() + 7
    assert kept[2][:0].data_ptr() == torch.empty(0, device="cuda").data_ptr() == 0
    on_host = torch.ones(3)
    assert on_host[1:].data_ptr() == on_host.data_ptr() + 4
    assert on_host.data_ptr() not in blocks


@on_card
def test_an_address_is_handed_out_again():
    import torch

    first = torch.empty(1000, device="cuda")
    address = first.data_ptr()
    shared = first.view(10, 100)
    assert torch.empty(1000, device="cuda").data_ptr() != address
    del first, shared
    assert torch.ones(1000, device="cuda").data_ptr() == address


@on_card
def test_torch_finds_the_tensors_of_a_cycle_in_the_snapshot():
    import gc

    import torch
    from torch.utils.viz._cycles import observe_tensor_cycles

    seen = []
    disarm = observe_tensor_cycles(seen.append)
    try:
        cycle = [torch.ones(3, device="cuda")]
        cycle.append(cycle)
        del cycle
        gc.collect()
        torch.cuda.memory_allocated()  # the observer waits for a call after the collection
    finally:
        disarm()
        torch.cuda.memory._record_memory_history(None)
    assert seen
    assert "test_torch_memory.py" in seen[0]


@on_card
def test_what_torch_draws_of_a_snapshot_is_drawn_of_the_simulated_ones():
    import torch
    from torch.cuda._memory_viz import segment_plot, segsum, trace, trace_plot

    torch.cuda.memory._record_memory_history()
    kept = [fill(number + 1) for number in range(5)]
    del kept[1:3]
    torch.cuda.empty_cache()
    told = torch.cuda.memory._snapshot()
    for draw in (trace_plot, segment_plot, segsum, trace):
        assert len(draw(told)) > 100, draw


@on_card
def test_raw_allocations_count():
    import torch

    address = torch.cuda.caching_allocator_alloc(3 * MIB)
    assert torch.cuda.memory_allocated() == 3 * MIB
    torch.cuda.caching_allocator_delete(address)
    assert torch.cuda.memory_allocated() == 0
    reserved = torch.cuda.memory_reserved()
    again = torch.cuda.caching_allocator_alloc(3 * MIB, stream=torch.cuda.Stream())
    assert torch.cuda.memory_reserved() == 2 * reserved  # what is free belongs to another stream
    torch.cuda.caching_allocator_delete(again)


@on_card
def test_threads_and_collected_cycles_leave_the_account_at_zero():
    from concurrent.futures import ThreadPoolExecutor

    import torch

    def work(number):
        cycle = [torch.ones(1000 * (number % 7 + 1), device="cuda") * number]
        cycle.append(cycle)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(400)))
    gc.collect()
    assert torch.cuda.memory_allocated() == 0


@on_card
def test_a_fork_of_an_initialised_process_is_refused():
    import torch

    kept = torch.ones(2, device="cuda")
    text = (
        "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing,"
        " you must use the 'spawn' start method"
    )

    def child():
        torch.manual_seed(0)
        assert not torch.cuda.is_initialized()
        for work in (lambda: torch.ones(2, device="cuda"), lambda: kept + 1):
            with pytest.raises(RuntimeError, match=text):
                work()

    before = card()
    assert in_child(child) == (0, "")
    assert card() == before
    assert torch.cuda.memory_allocated() == 512


@on_card
def test_a_fork_before_cuda_is_a_process_of_its_own():
    import torch

    def child():
        kept = fill(100)
        return (kept.is_cuda, torch.cuda.memory_allocated())

    assert in_child(child) == (0, str((True, 100 * MIB)))
    assert not torch.cuda.is_initialized()


class Neighbour:
    """Another process that holds memory of the card until it is told to go."""

    def __init__(self, mib):
        ready, tell = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            signal.alarm(60)
            kept = fill(mib)
            os.write(tell, b"1")
            signal.pause()
            os._exit(int(kept.is_cuda))
        os.read(ready, 1)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@on_card
def test_processes_share_the_card_and_errors_name_the_others():
    neighbour = Neighbour(500)
    try:
        found = GRAMMAR.fullmatch(refusal(lambda: fill(400)))
        assert found
        others = found["others"] + found["others2"]
        assert others == f"Process {neighbour.pid} has 600.00 MiB memory in use. "
        assert found["own"] == "100.00 MiB"
        assert fill(300).is_cuda
    finally:
        neighbour.kill()


@on_card
def test_the_memory_of_a_killed_process_is_free_for_the_next_allocation():
    neighbour = Neighbour(700)
    refusal(lambda: fill(400))
    neighbour.kill()
    assert fill(900).is_cuda


@on_card
def test_a_context_that_does_not_fit_is_cudas_out_of_memory():
    import torch

    neighbour = Neighbour(880)
    kind = getattr(torch, "AcceleratorError", RuntimeError)
    with pytest.raises(kind, match="CUDA error: out of memory"):
        torch.ones(1, device="cuda")
    neighbour.kill()
    assert torch.ones(1, device="cuda").is_cuda


@on_card
def test_a_false_assertion_on_the_card_loses_the_context_for_good():
    import torch

    kind = getattr(torch, "AcceleratorError", RuntimeError)
    tensor = torch.zeros(4, device="cuda")
    torch._assert_async(torch.ones(1, device="cuda"))
    torch.cuda.synchronize()
    torch._assert_async(tensor[:1])  # which is seen by the next call
    for call in (torch.cuda.synchronize, lambda: tensor + 1, lambda: fill(1), tensor.cpu):
        with pytest.raises(kind, match="CUDA error: device-side assert triggered"):
            call()
    assert (tensor.shape, torch.ones(2).sum().item()) == ((4,), 2)


@pytest.mark.parametrize(
    "call",
    [
        "row[at(5)]",
        "row.__setitem__(at(5), 1)",
        "row.index_select(0, at(7))",
        "row.index_add_(0, at(7), table[0, :1])",
        "row.gather(0, at(-4))",
        "row.scatter_(0, at(9), 1.0)",
        "row.take(at(9))",
        "functional.embedding(at(9), table)",
        "functional.nll_loss(table, torch.tensor([1, 5], device='cuda'))",
        "functional.binary_cross_entropy(row * 3, row)",
    ],
)
@on_card
def test_what_lies_outside_is_asserted_by_the_kernel_that_finds_it(call):
    import torch

    names = {
        "torch": torch,
        "functional": torch.nn.functional,
        "at": lambda index: torch.tensor([index], device="cuda"),
        "row": torch.ones(3, device="cuda"),
        "table": torch.ones(2, 2, device="cuda"),
    }
    kind = getattr(torch, "AcceleratorError", RuntimeError)
    for statement in (call, "row + 1"):
        with pytest.raises(kind, match="CUDA error: device-side assert triggered"):
            eval(statement, names)  # noqa: S307  # of this table


@on_card
def test_what_is_wrong_before_a_kernel_begins_ends_no_context():
    import torch

    row, first = torch.ones(3, device="cuda"), torch.zeros(1, dtype=torch.long, device="cuda")
    for call, kind, said in (
        (lambda: row[5], IndexError, "index 5 is out of bounds"),
        (lambda: row.index_select(2, first), IndexError, "Dimension out of range"),
        (lambda: row.gather(0, first[None]), RuntimeError, "same number of dimensions"),
        (lambda: torch.ones(3)[torch.tensor([5])], IndexError, "index 5 is out of bounds"),
    ):
        with pytest.raises(kind, match=said):
            call()
    assert (row + row).tolist() == [2, 2, 2]

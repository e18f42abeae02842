from __future__ import annotations

import sys
import textwrap

import pytest
import torch
from states import same

from pytest_gpumem import GpuConsolidator, get_gpu_consolidator
from pytest_gpumem.archive import shared
from pytest_gpumem.archive.store import ArchiveStore
from pytest_gpumem.errors import DiskError

SUITE = """
import gc, pytest, torch
from pytest_gpumem import ArchiveStore, GpuConsolidator, get_gpu_consolidator

MIB = 2**20

@pytest.fixture(scope="session")
def model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.Linear(1024, 1024, False))
    model.tied = torch.nn.Linear(1024, 1024, bias=False)
    model.tied.weight = model[1].weight
    return model.cuda()
"""


@pytest.fixture
def run(run_on_card):
    """Run a suite with a model, on a card of 100 MiB."""

    def _run(source, *arguments):
        text = SUITE + textwrap.dedent(source)
        return run_on_card("100MiB", text, "--gpumem-consolidate-above=75%", *arguments)

    return _run


@pytest.mark.skipif(sys.platform == "win32", reason="the simulated card needs POSIX locks")
def test_models_are_consolidated_when_the_card_fills_up_and_wake_when_they_are_used(run):
    run(
        """
        def test_a_model_comes_back_bit_for_bit_on_use(model):
            consolidator = get_gpu_consolidator()
            before = {name: each.cpu() for name, each in model.state_dict().items()}
            x = torch.ones(1, 1024, device="cuda")
            wanted = model(x).detach().cpu()  # a graph would keep the weights
            held = torch.cuda.memory_allocated()
            done = consolidator.consolidate_gpu_memory(
                [{"data": model, "type": "linear", "metadata": {"name": "m"}}], process_context="c"
            )

            assert done.refused == () and done.items == 1
            assert done.freed_allocator >= 8 * MIB == done.bytes_before - 4096
            assert done.freed_driver >= 8 * MIB
            assert torch.cuda.memory_allocated() == held - done.freed_allocator
            assert consolidator.sleeping_bytes(model) == 8 * MIB + 4096
            assert consolidator.store.entry(done.ids[0]).context == "c"
            assert torch.equal(model(x).cpu(), wanted)
            assert model.tied.weight is model[1].weight and model[0].weight.is_cuda
            assert torch.cuda.memory_allocated() == held
            after = {name: each.cpu() for name, each in model.state_dict().items()}
            assert [*before] == [*after]
            assert all(torch.equal(before[name], after[name]) for name in before)
            assert consolidator.sleeping_bytes(model) == 0
            assert {type(each) for each in model.parameters()} == {torch.nn.Parameter}

        def test_asking_for_the_state_wakes_too_and_a_sleeper_is_not_archived_empty(model):
            consolidator = get_gpu_consolidator()
            item = {"data": model}
            first = consolidator.consolidate_gpu_memory([item]).ids
            assert consolidator.consolidate_gpu_memory([item]).ids == first
            assert model.state_dict()["0.weight"].shape == (1024, 1024)

        def test_an_optimizer_sleeps_and_steps(model):
            optimizer = torch.optim.Adam(model.parameters())
            model(torch.ones(1, 1024, device="cuda")).sum().backward()
            optimizer.step()
            kept = {n: p.clone() for n, p in optimizer.state[model[0].weight].items()}
            done = get_gpu_consolidator().consolidate_gpu_memory([{"data": optimizer}])
            assert done.freed_allocator >= 16 * MIB
            assert get_gpu_consolidator().sleeping_bytes(optimizer) >= 16 * MIB
            get_gpu_consolidator().restore(optimizer)
            assert all(torch.equal(optimizer.state[model[0].weight][n], kept[n]) for n in kept)
            get_gpu_consolidator().consolidate_gpu_memory([{"data": optimizer}])
            optimizer.step()
            model.zero_grad()

        def test_when_the_store_cannot_write_the_model_stays(model, tmp_path, monkeypatch):
            consolidator = GpuConsolidator(ArchiveStore(tmp_path / "s", key=b"k" * 32, quota=1000))
            held = torch.cuda.memory_allocated()
            done = consolidator.consolidate_gpu_memory([{"data": model}, {"data": {"f": print}}])
            assert len(done.refused) == 2 and "is full" in done.refused[0]
            assert torch.cuda.memory_allocated() == held and model[0].weight.shape == (1024, 1024)

        def test_filling_the_card(model, gpu_consolidator):
            gpu_consolidator.register(model, type="linear")
            assert not gpu_consolidator.should_consolidate()
            model.load = torch.zeros(70 * MIB, dtype=torch.uint8, device="cuda")
            assert gpu_consolidator.should_consolidate()

        def test_the_model_went_after_the_test_before(model, gpu_consolidator):
            assert gpu_consolidator.sleeping_bytes(model) and gpu_consolidator.idle
            entry = gpu_consolidator.store.entries()[-1]
            assert (entry.type, entry.context) == ("linear", "test_filling_the_card")
            model.load = None
            model(torch.ones(1, 1024, device="cuda"))
            assert not gpu_consolidator.idle

        def test_a_model_that_is_dropped_is_not_kept_alive(gpu_consolidator):
            model = torch.nn.Linear(8, 8).cuda()
            gpu_consolidator.register(model)
            gpu_consolidator.consolidate_gpu_memory([{"data": model}])
            del model
            gc.collect()
            assert all(nap.awake for nap in gpu_consolidator._naps)
            assert len(gpu_consolidator._registered) == 1
            gpu_consolidator.store.delete(gpu_consolidator.store.entries()[-1].id)
        """
    )


def test_in_track_mode_nothing_is_consolidated_unasked(run):
    run(
        """
        def test_fill(model):
            get_gpu_consolidator().register(model)
            model.load = torch.zeros(70 * MIB, dtype=torch.uint8, device="cuda")

        def test_still_there(model, consolidate_gpu_memory):
            assert not get_gpu_consolidator().sleeping_bytes(model)

        def test_gone(model):
            assert get_gpu_consolidator().sleeping_bytes(model)
        """,
        "--gpumem=track",
    )


def test_without_a_card_states_are_archived_and_nothing_is_freed(tmp_path):
    consolidator = GpuConsolidator(ArchiveStore(tmp_path / "store", key=b"k" * 32))
    state = {"w": torch.ones(3)}
    done = consolidator.consolidate_gpu_memory([{"data": state, "type": "x"}, {"type": "no data"}])

    assert not consolidator.should_consolidate()
    assert (done.items, len(done.ids), len(done.refused)) == (2, 1, 1)
    assert done.freed_allocator == 0
    same(consolidator.store.get(done.ids[0]), state)
    assert "consolidated 2 items: 12 B to " in str(done)


def test_a_store_that_cannot_be_opened_is_named(tmp_path):
    def broken():
        raise DiskError("cannot use the store")

    done = GpuConsolidator(broken).consolidate_gpu_memory([{"data": {"w": torch.ones(3)}}])
    assert done.refused == ("cannot use the store",)


def test_there_is_one_consolidator_until_it_is_configured_anew(tmp_path):
    one = get_gpu_consolidator()
    assert get_gpu_consolidator() is one
    shared.configure(above=0.5)
    try:
        assert get_gpu_consolidator() is not one
        assert get_gpu_consolidator().above == 0.5
    finally:
        shared.configure()

from __future__ import annotations

import sys

import pytest

SUITE = """
import threading
from concurrent.futures import ThreadPoolExecutor
import pytest, torch
from pytest_gpumem import ArchiveStore, GpuConsolidator, ModelPool
from pytest_gpumem.routing.resource_manager import shared

MIB = 2**20

def sleeps(model):
    return GpuConsolidator().sleeping_bytes(model) > 0

def both(first, second):
    # Runs two functions at once; returns what each raised.
    errors = [None, None]
    def run(at, function):
        try:
            function()
        except Exception as error:
            errors[at] = error
    threads = [threading.Thread(target=run, args=each, daemon=True)
               for each in enumerate((first, second))]
    [each.start() for each in threads]
    [each.join(20) for each in threads]
    assert not any(each.is_alive() for each in threads), "they wait for each other"
    return errors

def linear(calls=None):
    if calls is not None:
        calls.append(1)
    return torch.nn.Linear(2048, 2048, bias=False)  # 16 MiB

@pytest.fixture
def pool(tmp_path):
    pool = ModelPool(GpuConsolidator(ArchiveStore(tmp_path / "s", key=b"k" * 32)))
    yield pool
    pool.clear()

def test_racing_threads_load_once(pool):
    calls, start = [], threading.Barrier(8)

    def ask(_):
        start.wait()
        return pool.get("m", lambda: linear(calls))

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(ask, range(8)))
    assert len(calls) == 1 and all(each is found[0] for each in found)
    assert found[0].weight.is_cuda

def test_the_least_recently_used_goes_first_and_wakes_bit_for_bit(pool):
    a, b = pool.get("a", linear), pool.get("b", linear)
    before = a.weight.detach().cpu().clone()
    pool.get("b")
    assert pool.consolidate(1) >= 16 * MIB
    assert sleeps(a) and not sleeps(b)
    assert torch.equal(pool.get("a").weight.cpu(), before) and a.weight.is_cuda

def test_a_pinned_model_stays(pool):
    with pool.use("m", linear) as model:
        assert pool.consolidate() == 0 and not sleeps(model)
    assert pool.consolidate() >= 16 * MIB

def test_unloading_frees_and_twice_is_harmless(pool):
    pool.get("m", linear)
    freed = pool.unload("m")
    assert freed.allocated >= 16 * MIB and freed.driver >= 16 * MIB
    assert pool.unload("m") == (0, 0)

def test_an_object_gets_a_model_that_is_loaded_when_it_is_used(pool):
    class Agent:
        _embedding_model = None

    calls = []
    agent = pool.attach(Agent(), "_embedding_model", "m", lambda: linear(calls))
    assert not calls
    assert agent._embedding_model(torch.ones(1, 2048, device="cuda")).shape == (1, 2048)
    assert calls == [1]

def test_a_full_disk_leaves_the_model_usable(tmp_path):
    store = ArchiveStore(tmp_path / "s", key=b"k" * 32, quota=1000)
    pool = ModelPool(GpuConsolidator(store))
    model = pool.get("m", linear)
    assert pool.consolidate() == 0
    assert model.weight.is_cuda and not sleeps(model)
    pool.clear()

def test_a_model_that_cannot_be_moved_stays_on_the_cpu(pool):
    class Stubborn(torch.nn.Linear):
        def _apply(self, *a, **k):
            raise NotImplementedError("it stays")

    with pytest.raises(NotImplementedError):
        Stubborn(2, 2).cuda()
    assert not pool.get("m", lambda: Stubborn(2, 2)).weight.is_cuda

def test_a_model_that_came_on_the_card_and_cannot_be_moved_stays_there(pool):
    class Stubborn(torch.nn.Linear):
        def _apply(self, *a, **k):
            raise NotImplementedError("it stays")

    model = pool.get("m", lambda: Stubborn(2, 2, device="cuda"))
    assert model.weight.is_cuda
    with shared.ban("for this test"):
        assert pool.get("m").weight.is_cuda
    pool.unload("m")
    assert model.weight.is_cuda

def test_an_attached_model_is_loaded_again_after_it_was_unloaded(pool):
    agent = pool.attach(type("Agent", (), {})(), "model", "m", linear)
    assert agent.model.weight.is_cuda
    with pool.use("m") as model:
        assert model.weight is agent.model.weight
    del model
    assert pool.unload("m").allocated >= 16 * MIB
    assert agent.model.weight.is_cuda

def test_what_cannot_be_archived_by_two_functions_comes_back(tmp_path):
    class Other:
        def __init__(self, w):
            self.w = w

    def save(other):
        w, other.w = other.w, None
        return {"w": w}

    pool = ModelPool(GpuConsolidator(ArchiveStore(tmp_path / "s", key=b"k" * 32, quota=1000)))
    pool.register_framework(Other, save=save, load=lambda s: Other(s["w"]))
    kept = torch.arange(MIB, device="cuda")
    pool.get("o", lambda: Other(kept.clone()))
    assert pool.consolidate() == 0
    assert torch.equal(pool.get("o").w, kept)
    for breaks in (ArchiveStore.put, ArchiveStore.need, save):  # by errors that are not ours
        def broken(*args, breaks=breaks, **kwargs):
            if breaks is not save:
                raise ZeroDivisionError
            raise MemoryError

        with pytest.MonkeyPatch.context() as patch:
            if breaks is save:
                pool._frameworks[0] = pool._frameworks[0]._replace(save=broken)
            else:
                patch.setattr(ArchiveStore, breaks.__name__, broken)
            pool.consolidator.store.quota = None
            assert pool.consolidate() == 0
        assert torch.equal(pool.get("o").w, kept)
    pool.clear()

def test_other_frameworks_come_by_two_functions(pool):
    class Other:
        def __init__(self, w):
            self.w = w

    pool.register_framework(Other, save=lambda o: {"w": o.w}, load=lambda s: Other(s["w"]))
    pool.get("o", lambda: Other(torch.full((MIB,), 7.0, device="cuda")))
    assert pool.consolidate() >= 4 * MIB
    assert not any(pool.consolidator.store.forget(keep_last=0))  # it is needed
    assert pool.get("o").w.sum().item() == 7 * MIB

def test_loaders_that_ask_for_each_other_are_an_error(pool):
    meet = threading.Barrier(2, timeout=10)

    def asks_for(other):
        def load():
            meet.wait()
            pool.get(other, linear)
            return linear()
        return load

    errors = both(lambda: pool.get("a", asks_for("b")), lambda: pool.get("b", asks_for("a")))
    assert [str(each) for each in errors if each and "ask for one another" in str(each)]
    with pytest.raises(RuntimeError, match="'own' asks for that model"):
        pool.get("own", lambda: pool.get("own"))
    assert "own" not in pool and pool.get("a", linear).weight.is_cuda

def test_a_load_that_fails_leaves_nothing(pool):
    def broken():
        raise ValueError("no such file")

    for ask in (lambda: pool.get("m", broken), lambda: pool.use("m", broken).__enter__()):
        with pytest.raises(ValueError, match="no such file"):
            ask()
        assert "m" not in pool and list(pool) == []
    assert pool.get("m", linear).weight.is_cuda

def test_a_module_has_one_pin_whatever_its_names(pool):
    model = pool.get("a", linear)
    assert pool.get("b", lambda: model) is model
    pool.pin("a")
    assert pool.consolidate() == 0 and pool.consolidator.idle and not sleeps(model)
    assert not any(pool.unload("b")) and model.weight.is_cuda
    pool.unpin("a")
    assert pool.consolidate() >= 16 * MIB

def test_models_that_share_a_parameter_are_on_one_device(pool):
    def sharing():
        model = torch.nn.Sequential(linear(), linear())
        model[0].weight = one.weight
        return model

    one = pool.get("one", linear)
    two = pool.get("two", sharing)
    assert {str(each.device) for each in two.parameters()} == {"cuda:0"}
    before = [each.detach().cpu().clone() for each in two.parameters()]
    with pool.use("one"):
        assert pool.consolidate() == 0 and not sleeps(two)
    assert pool.consolidate() >= 32 * MIB
    with shared.ban("for this test"):
        pool.get("two")
        assert {each.device.type for m in (one, two) for each in m.parameters()} == {"cpu"}
    assert all(torch.equal(*each) for each in zip(before, two.parameters()))
    assert two[0].weight is one.weight
    pool.get("two")
    assert {each.device.type for m in (one, two) for each in m.parameters()} == {"cuda"}

def test_unloading_waits_for_those_who_use_it(pool):
    inside, done = threading.Event(), []

    def use():
        with pool.use("m", linear) as model:
            inside.set()
            for _ in range(50):
                model(torch.ones(1, 2048, device="cuda"))
            done.append(model.weight.is_cuda)

    def unload():
        assert inside.wait(10)
        pool.unload("m")
        done.append("unloaded")

    assert both(use, unload) == [None, None] and done == [True, "unloaded"]
    with pool.use("m", linear):
        pool.unload("m")  # by itself

def test_who_begins_to_use_a_model_as_it_is_unloaded_has_one_of_the_pool(pool):
    unloading = threading.Thread(target=pool.unload, args=("m",))

    class Users(list):
        def append(self, user):
            unloading.start()
            unloading.join(0.5)
            super().append(user)

    pool.get("m", linear)
    pool._entries["m"].users = Users()
    with pool.use("m", linear):
        unloading.join(0.2)
        assert "m" in pool
    unloading.join()
    assert "m" not in pool

def test_users_that_unload_each_others_models_are_an_error(pool):
    meet = threading.Barrier(2, timeout=10)

    def unload(mine, other):
        def run():
            with pool.use(mine, linear):
                meet.wait()
                pool.unload(other)
        return run

    errors = both(unload("a", "b"), unload("b", "a"))
    assert [str(each) for each in errors if each] == [
        str(next(each for each in errors if each))
    ] and "waits for this one" in str(errors)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the simulated card needs POSIX locks")
def test_models_are_shared_and_sleep_and_wake(run_on_card):
    run_on_card("400MiB", SUITE)

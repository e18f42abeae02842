"""Models that sleep, and what else goes on: C++, graphs, keys, interrupts, a user's own classes."""

from __future__ import annotations

import copy
import signal
import threading
import time

import pytest
import torch
from torch import nn

from pytest_gpumem.archive import torch_private
from pytest_gpumem.archive.asleep import nap_of
from pytest_gpumem.archive.store import ArchiveStore
from pytest_gpumem.errors import ArchiveError, InUseError, KeyRefusedError, WrongKeyError
from pytest_gpumem.tracking import reach

pytestmark = pytest.mark.usefixtures("host_is_a_card")
X = torch.linspace(-1, 1, 24).view(4, 6)


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))


def same(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) and type(a) is type(b) for a, b in pairs)


def asleep(consolidator, model):
    done = consolidator.consolidate_gpu_memory([{"data": model}])
    assert done.refused == ()
    assert all(map(nap_of, model.parameters()))
    return done.ids[0]


def test_cpp_that_would_lose_a_gradient_is_an_error_and_right_the_second_time(consolidator):
    model, awake = linear(), linear()
    for use in (torch.Tensor, lambda w: torch.asarray(w, copy=True)):
        asleep(consolidator, model)
        with pytest.raises(InUseError, match="awake now: do that again"):
            use(model[0].weight)
        assert not any(map(nap_of, model.parameters()))
        assert torch.equal(use(model[0].weight), use(awake[0].weight))


@pytest.mark.parametrize("there", [torch.as_tensor, torch.asarray])
def test_cpp_that_would_get_a_copy_of_the_tensor_itself_is_an_error(consolidator, there):
    model = linear().requires_grad_(False)
    asleep(consolidator, model)
    with pytest.raises(InUseError, match="want the tensor itself; it is awake now: do that again"):
        there(model[0].weight, device="cpu").add_(1)
    assert there(model[0].weight, device="cpu") is model[0].weight


@pytest.mark.filterwarnings("ignore:.*jit.script.*is deprecated")
def test_a_scripted_function_gets_its_gradient(consolidator):
    def twice(x):
        return x * 2

    model = linear()
    asleep(consolidator, model)
    torch.jit.script(twice)(x=model[0].weight).sum().backward()
    assert torch.equal(model[0].weight.grad, torch.full((6, 6), 2.0))


def test_a_sleeper_is_nobodys_content(consolidator):
    model, awake = linear(), linear()
    asleep(consolidator, model)
    other = torch.ones(6, 6)
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        other.data = model[0].weight
    with pytest.raises(RuntimeError, match="device type 'meta'"):
        other.grad = model[0].weight
    with torch_private.plainly(), pytest.raises(RuntimeError, match="Cannot access data pointer"):
        model[0].weight.data_ptr()  # what an extension asks for
    assert torch.equal(other, torch.ones(6, 6))
    assert same(model, awake)


def test_cpp_that_keeps_a_sleeper_is_led_to_the_tensor(consolidator):
    model, awake = linear(), linear()
    asleep(consolidator, model)
    kept = nap_of(model[0].weight)._stand_ins[0]  # what C++ returns that has kept the shell
    with torch.no_grad():
        model(X)
        assert torch.equal(kept * 2, awake[0].weight * 2)
        kept.add_(1)
        awake[0].weight.add_(1)
    assert same(model, awake)


def test_a_transformer_layer_takes_the_faster_way_as_an_awake_one_does(consolidator, monkeypatch):
    taken = []
    way = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *args: (taken.append(1), way(*args))[1]
    )
    model = nn.TransformerEncoderLayer(6, 2, 16, batch_first=True).eval()
    awake = copy.deepcopy(model)
    asleep(consolidator, model)
    with torch.no_grad():
        assert torch.equal(model(X[None]), awake(X[None]))
    assert len(taken) == 2


def test_gradients_of_an_earlier_graph_wake_what_they_are_for(consolidator):
    models = [nn.Embedding(6, 4), nn.Embedding(6, 4)]
    models[1].load_state_dict(models[0].state_dict())
    seen = []
    models[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p is p_of[0]))
    p_of = [each.weight for each in models]
    losses = [each(torch.tensor([1, 2])).sum() for each in models]  # needs no weight to go back
    asleep(consolidator, models[0])
    for each in losses:
        each.backward()
    assert torch.equal(*[each.weight.grad for each in models])
    assert seen == [True]
    assert same(*models)
    # Torch's own of a hook stays: another thread may be about to call it.
    assert models[0].weight._backward_hooks == {}


def test_a_registered_hook_of_a_gradient_outlives_sleep(consolidator):
    model = linear()
    seen = []
    handle = model[0].weight.register_hook(lambda grad: seen.append(grad.shape))
    asleep(consolidator, model)
    model(X).sum().backward()
    assert seen == [(6, 6)]
    handle.remove()


def test_one_that_slept_can_be_swapped(consolidator):
    model = linear()
    consolidator.register(model)
    asleep(consolidator, model)
    model(X)
    torch.utils.swap_tensors(model[0].weight, nn.Parameter(torch.ones(6, 6)))
    assert torch.equal(model[0].weight, torch.ones(6, 6))


def test_a_class_that_takes_no_such_hook_is_refused_and_unharmed(consolidator):
    class Own(nn.Linear):
        def register_forward_pre_hook(self, hook):
            return super().register_forward_pre_hook(hook)

    model = nn.Sequential(nn.Linear(6, 6), Own(6, 6))
    awake = copy.deepcopy(model)
    (told,) = consolidator.consolidate_gpu_memory([{"data": model}]).refused
    assert "TypeError" in told
    assert not any(each._forward_pre_hooks for each in model.modules())
    assert torch.equal(model(X), awake(X))
    assert same(model, awake)


def test_what_looks_whether_a_test_keeps_memory_wakes_nothing(consolidator):
    model = linear()
    asleep(consolidator, model)
    reach.holds_memory(model)
    assert all(map(nap_of, model.parameters()))


def test_one_that_a_cuda_graph_may_read_stays_awake(consolidator, monkeypatch):
    class Graph:
        pass

    model = linear()
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", object())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    graph = Graph()
    (told,) = consolidator.consolidate_gpu_memory([{"data": model}]).refused
    assert "a CUDA graph reads weights from where they were" in told
    del graph
    asleep(consolidator, model)


@pytest.fixture
def interruptible():
    """Let an interrupt raise: what a shell runs in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("moment", ["falls asleep", "wakes"])
def test_an_interrupt_loses_nothing(consolidator, monkeypatch, moment):
    model, awake = linear(), linear()
    name = "put" if moment == "falls asleep" else "get_tensors"
    original = getattr(ArchiveStore, name)

    def slowly(self, *args, **kwargs):
        signal.raise_signal(signal.SIGINT)  # the main thread waits for this one
        time.sleep(0.2)
        return original(self, *args, **kwargs)

    if moment == "wakes":
        asleep(consolidator, model)
    with monkeypatch.context() as patch:
        patch.setattr(ArchiveStore, name, slowly)
        with pytest.raises(KeyboardInterrupt):
            consolidator.consolidate_gpu_memory([{"data": model}]) if name == "put" else model(X)
    assert torch.equal(model(X), awake(X))
    for each in threading.enumerate():
        if each.name == "gpumem":
            each.join()  # it goes on, and what it does then is no less whole
    assert torch.equal(model(X), awake(X))
    assert same(model, awake)
    with torch.no_grad():
        model[0].weight.add_(1)
        awake[0].weight.add_(1)
    assert torch.equal(model(X), awake(X))


def lose(path):
    for name in ("key", "key-copy"):
        (path / name).unlink(missing_ok=True)


def change(path):
    for name in ("key", "key-copy"):
        content = bytearray((path / name).read_bytes())
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(content)


def make_unreadable(path):
    lose(path)
    for name in ("key", "key-copy"):
        (path / name).mkdir()


def rotate(path):
    ArchiveStore(path, key=b"k" * 32).rotate(b"n" * 32)


@pytest.mark.parametrize("what", [lose, change, make_unreadable, rotate])
def test_a_key_that_goes_while_a_model_sleeps(consolidator, what):
    model, awake, third = linear(), linear(), linear()
    name = asleep(consolidator, model)
    asleep(consolidator, third)
    path = consolidator.store.path
    what(path)
    with pytest.raises((KeyRefusedError, WrongKeyError, ArchiveError)) as told:
        ArchiveStore(path, key=b"k" * 32).get(name)
    assert "\n" not in str(told.value)
    if what is rotate:
        assert torch.equal(ArchiveStore(path, key=b"n" * 32).get(name)["0.bias"], awake[0].bias)
    assert torch.equal(model(X), awake(X))  # this process knows the secret
    assert same(third, awake)
    done = consolidator.consolidate_gpu_memory([{"data": model}])
    assert len(done.ids) + len(done.refused) == 1
    assert torch.equal(model(X), awake(X))

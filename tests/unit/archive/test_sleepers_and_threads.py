"""Models that are to sleep while another thread is in the middle of something with them."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import threading
import time
from queue import SimpleQueue

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from pytest_gpumem.archive import bystanders, torch_private
from pytest_gpumem.archive.asleep import nap_of

pytestmark = pytest.mark.usefixtures("host_is_a_card")
X = torch.linspace(-1, 1, 24).view(4, 6)


class Pause:
    """A place at which another thread stops until it is told to go on."""

    def __init__(self):
        self._here, self._go = threading.Event(), threading.Event()

    def __call__(self, *_):
        self._here.set()
        assert self._go.wait(30)

    @contextlib.contextmanager
    def of(self, work):
        """Run ``work`` in a thread, up to here for the block, and then to its end."""
        raised = []

        def run():
            try:
                work()
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        assert self._here.wait(30)
        try:
            yield
        finally:
            self._go.set()
            thread.join(30)
        assert raised == []


class Pausing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, pause):
        ctx.pause = pause
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.pause()
        return grad.clone(), None


def loss_of(model):
    return model(torch.tensor([1, 2])).sum()


def deep(model):
    loss = loss_of(model)
    for _ in range(20_000):
        loss = loss + 1
    return loss


def again(model):
    loss_of(model).backward()
    return loss_of(model).backward


def edge(model):
    loss = loss_of(model)
    return lambda: torch.autograd.backward([get_gradient_edge(loss)], [torch.ones(())])


class Recomputing(torch.autograd.Function):
    """As a checkpoint does: a backward pass within one."""

    @staticmethod
    def forward(ctx, x, model):
        ctx.model = model
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            loss_of(ctx.model).backward(grad)
        return grad, None


def recomputed(model):
    return Recomputing.apply(torch.ones((), requires_grad=True), model).backward


PASSES = {
    "backward": lambda model: loss_of(model).backward,
    "a second gradient": again,
    "create_graph": lambda model: lambda: loss_of(model).backward(create_graph=True),
    "a deep graph": lambda model: deep(model).backward,
    "a GradientEdge": edge,
    "a checkpoint": recomputed,
}


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("kind", PASSES)
def test_a_thread_on_the_way_to_a_gradient_past_the_hook_that_wakes(consolidator, kind):
    model = nn.Embedding(6, 4)  # needs no weight to go back
    twin = copy.deepcopy(model)
    backward, pause = PASSES[kind](model), Pause()
    model.weight.register_hook(pause)
    with pause.of(backward):
        done = consolidator.consolidate_gpu_memory([{"data": model}])
    assert "its memory is in use: a graph" in done.refused[0]
    PASSES[kind](twin)()
    assert torch.equal(model.weight.grad, twin.weight.grad)


@pytest.mark.parametrize("saved", [False, True])
def test_a_thread_that_goes_back_and_has_not_come_to_a_tensor_yet(consolidator, saved):
    model = nn.Embedding(6, 4)
    twin = copy.deepcopy(model)
    loss, losses = model(torch.tensor([1, 2])), twin(torch.tensor([1, 2]))
    if saved:  # by the graph, which is not over with it
        loss, losses = loss * model.weight[:2], losses * twin.weight[:2]
    pause = Pause()
    with pause.of(Pausing.apply(loss, pause).sum().backward):
        consolidator.consolidate_gpu_memory([{"data": model}])
    losses.sum().backward()
    assert torch.equal(model.weight.grad, twin.weight.grad)


def test_only_what_is_in_a_graph_stays_awake_while_a_thread_goes_back(consolidator):
    model, idle, other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    pause, loss = Pause(), model.bias.sum() + other.bias.sum()
    other.bias.register_hook(pause)
    with pause.of(loss.backward):
        done = consolidator.consolidate_gpu_memory([{"data": model}, {"data": idle}])
        assert done.refused == ()
        assert nap_of(model.bias) is None
        assert all(map(nap_of, [model.weight, *idle.parameters()]))
    assert torch.equal(model.bias.grad, torch.ones(4))


def test_a_graph_that_was_made_by_a_call_that_had_begun_before(consolidator, monkeypatch):
    model, twin = nn.Embedding(6, 4), nn.Embedding(6, 4)
    twin.load_state_dict(model.state_dict())
    losses = []

    def finish_a_call(*_):
        with torch_private.plainly():  # it had asked the class already
            losses.append(loss_of(model))
        return False

    monkeypatch.setattr(bystanders, "refuse", finish_a_call)
    done = consolidator.consolidate_gpu_memory([{"data": model}])
    assert "its memory is in use: a graph" in done.refused[0]
    for each in (losses[0], loss_of(twin)):
        each.backward()
    assert torch.equal(model.weight.grad, twin.weight.grad)


def test_a_thread_whose_function_is_written_in_c(consolidator):
    model, stop = nn.Linear(6, 6), SimpleQueue()
    work = functools.partial(stop.get, timeout=60)
    work.of = [model.weight]
    thread = threading.Thread(target=work)
    thread.start()
    while sys._current_frames()[thread.ident].f_code is not threading.Thread.run.__code__:
        time.sleep(0.01)
    time.sleep(0.01)
    (told,) = consolidator.consolidate_gpu_memory([{"data": model}]).refused
    stop.put(None)
    thread.join()
    assert f"the thread {thread.name!r} computes with it" in told
    assert consolidator.consolidate_gpu_memory([{"data": model}]).refused == ()


class Holder:
    def __init__(self, model, there, go):
        self.model, self.all, self.there, self.go = model, {"a": [model]}, there, go

    def a_chain(self):
        return (self.model[0].weight, self.there.set(), self.go.acquire())

    def an_iterator(self):
        return (next(self.model.parameters()), self.there.set(), self.go.acquire())

    def a_container(self):
        return (self.all["a"][0], self.there.set(), self.go.acquire())

    def a_list(self):
        models, there = [self.model], self.there.set()
        return models[0] is there or (models[0][0], self.go.acquire())

    def lines(self):
        self.there.set()
        return self.go.acquire(
            self.model[0].weight is not None,
        )

    def elsewhere(self):
        models = [self.model]
        assert models is not None
        self.there.set()
        return self.go.acquire()


@pytest.mark.parametrize("name", [name for name in vars(Holder) if name[0] != "_"])
def test_a_thread_in_a_call_that_names_the_model_though_no_variable_is(consolidator, name):
    model = nn.Sequential(nn.Linear(6, 6))
    there, go = threading.Event(), threading.Lock()
    go.acquire()
    thread = threading.Thread(target=getattr(Holder(model, there, go), name))
    thread.start()
    assert there.wait(30)
    time.sleep(0.01)
    refused = consolidator.consolidate_gpu_memory([{"data": model}]).refused
    go.release()
    thread.join()
    assert [f"the thread {thread.name!r} computes with it" in each for each in refused] == (
        [] if name == "elsewhere" else [True]
    )

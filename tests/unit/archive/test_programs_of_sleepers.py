"""Random programs over models and optimizers that sleep and wake, against twins that never do."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pytest_gpumem.archive import sleep
from pytest_gpumem.archive.consolidator import GpuConsolidator
from pytest_gpumem.archive.store import ArchiveStore

MEMORY = "/dev/shm"  # noqa: S108  # a directory of a random name is made there
SOAK = settings.get_current_profile_name() == "soak"
X = torch.linspace(-1, 1, 8).view(2, 4)
OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    lambda p: torch.optim.AdamW(p, 0.01, foreach=False),
    lambda p: torch.optim.RMSprop(p, 0.01),
]


class World:
    """Three models, some of whose parts are shared, with an optimizer each."""

    def __init__(self, kinds):
        torch.manual_seed(0)
        self.models = [
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)) for _ in range(3)
        ]
        self.kinds = kinds
        self.optimizers = [
            OPTIMIZERS[kind](m.parameters()) for kind, m in zip(kinds, self.models, strict=False)
        ]
        self.views, self.graphs = [], []

    def train(self, at, _):
        self.optimizers[at].zero_grad()
        self.models[at](X).pow(2).sum().backward()
        self.optimizers[at].step()

    def infer(self, at, _):
        with torch.inference_mode():
            return self.models[at](X).clone()

    def scale(self, at, other):
        with torch.no_grad():
            self.models[at][0].weight.mul_(1 + other / 8)

    def tie(self, at, other):
        self.models[at][2].weight = self.models[other][2].weight

    def replace(self, at, _):
        self.models[at][2] = nn.Linear(4, 4)
        self.optimizers[at] = OPTIMIZERS[self.kinds[at]](self.models[at].parameters())

    def load(self, at, other):
        self.models[at].load_state_dict(self.models[other].state_dict())

    def load_optimizer(self, at, _):
        self.optimizers[at].load_state_dict(copy.deepcopy(self.optimizers[at].state_dict()))

    def copy(self, at, other):
        self.models[at] = copy.deepcopy(self.models[other])
        self.optimizers[at] = OPTIMIZERS[self.kinds[at]](self.models[at].parameters())

    def swap_data(self, at, other):
        one, two = self.models[at][0].weight, self.models[other][0].weight
        one.data, two.data = two.data, one.data

    def view(self, at, other):
        self.views.append(self.models[at][0].weight.data[other])

    def write_views(self, _at, other):
        for each in self.views:
            each.add_(other + 1)

    def drop_views(self, _at, _other):
        self.views.clear()

    def graph(self, at, _):
        self.graphs.append(self.models[at](X.clone().requires_grad_()).tanh().sum())

    def backward(self, _at, _other):
        for each in self.graphs:
            try:
                each.backward()
            except RuntimeError as error:
                if "modified by an inplace operation" not in str(error):  # a weight has changed
                    raise
        self.graphs.clear()


ACTIONS = [name for name in vars(World) if not name.startswith("_")]
STEP = st.tuples(st.sampled_from(ACTIONS), st.integers(0, 2), st.integers(0, 2))
SLEEP = st.tuples(
    st.sampled_from(["sleep", "sleep", "sleep_optimizer", "sleep_all", "restore", "restore_all"]),
    st.integers(0, 2),
    st.just(0),
)
PROGRAM = st.tuples(
    st.lists(st.integers(0, 3), min_size=3, max_size=3),
    st.lists(STEP | SLEEP, min_size=4, max_size=24),
)


@pytest.fixture(scope="module")
def consolidator():
    memory = MEMORY if Path(MEMORY).is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as store:
        yield GpuConsolidator(ArchiveStore(store, key=b"k" * 32))


@pytest.fixture(scope="module", autouse=True)
def host_is_a_card():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sleep, "is_on_card", lambda tensor: not tensor.is_meta)
        yield


def nap(consolidator, world, name, at):
    if name.startswith("restore"):
        consolidator.restore(None if name == "restore_all" else world.models[at])
        return
    items = {
        "sleep": [world.models[at]],
        "sleep_optimizer": [world.optimizers[at]],
        "sleep_all": [*world.models, *world.optimizers],
    }[name]
    done = consolidator.consolidate_gpu_memory([{"data": each} for each in items])
    assert all("in use" in each for each in done.refused), done.refused


def bits(world):
    found = []
    for model in world.models:
        for each in [*model.parameters(), *model.buffers()]:
            found += [each.detach().clone(), each.grad]
    for optimizer, model in zip(world.optimizers, world.models, strict=True):
        for each in model.parameters():
            found += list(optimizer.state.get(each, {}).values())
    return found


@settings(max_examples=2000 if SOAK else 40)
@given(PROGRAM)
def test_a_program_gives_what_it_gives_without_sleep(consolidator, program):
    kinds, steps = program
    world, twin = World(kinds), World(kinds)
    for at, (name, *arguments) in enumerate(steps):
        if hasattr(World, name):
            outs = []
            for each in (world, twin):
                torch.manual_seed(at)
                outs.append(getattr(each, name)(*arguments))
            assert outs[0] is None or torch.equal(*outs)
        else:
            nap(consolidator, world, name, arguments[0])
    one, other = bits(world), bits(twin)
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(torch.as_tensor(a), torch.as_tensor(b))

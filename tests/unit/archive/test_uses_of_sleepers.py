"""Whatever is done with a sleeping model gives what an awake one gives."""

from __future__ import annotations

import pkgutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import uses
from hypothesis import settings
from torch import nn

from pytest_gpumem.archive import torch_private
from pytest_gpumem.archive.asleep import AsleepTensor, nap_of, wake
from pytest_gpumem.archive.consolidator import GpuConsolidator
from pytest_gpumem.archive.store import ArchiveStore

pytestmark = [pytest.mark.usefixtures("host_is_a_card"), pytest.mark.filterwarnings("ignore")]
MEMORY = "/dev/shm"  # noqa: S108  # a directory of a random name is made there
SHARE = 1 if settings.get_current_profile_name() == "soak" else 11
"""Of the uses one in so many is tried with each kind, all of them with the first."""


@pytest.fixture(scope="module")
def consolidator():
    # In memory, where there is such a place: each use is an archive that waits for the disk.
    memory = MEMORY if Path(MEMORY).is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as store:
        yield GpuConsolidator(ArchiveStore(store, key=b"k" * 32))


def made(kind):
    torch.manual_seed(3)
    return uses.MODULES[kind]()


def outcome(use, module):
    torch.manual_seed(7)
    try:
        return use(module)
    except Exception as error:  # whatever it is, both have the same
        return type(error), str(error).partition("\n")[0]


def flat(value):
    if isinstance(value, nn.UninitializedParameter):
        return "lazy"
    if isinstance(value, torch.Tensor):
        if value.is_meta:
            return "meta", tuple(value.shape)
        plain = value.detach().resolve_conj().resolve_neg()
        bits = (plain.int_repr() if plain.is_quantized else plain).contiguous().flatten()
        return (
            type(value).__name__, str(value.dtype), tuple(value.shape), value.stride(),
            value.requires_grad, value.device.type,
            bits.cpu().view(torch.uint8).numpy().tobytes() if bits.numel() else b"",
        )  # fmt: skip
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, dict):
        return [(key, flat(each)) for key, each in value.items()]
    if isinstance(value, (list, tuple)):
        return [flat(each) for each in value]
    return value


def state(module):
    return flat(
        [
            (name, each, None if isinstance(each, nn.UninitializedParameter) else each.grad)
            for name, each in [*module.named_parameters(), *module.named_buffers()]
        ]
    )


def possible(kind):
    """Yield the uses that can be tried with a kind, by their names."""
    for name, use in uses.USES.items():
        # torch itself crashes where a transform meets a lazy module's first call.
        crashes = kind == "lazy" and name.startswith("func.")
        if not crashes and name not in uses.TOO_LARGE.get(kind, ()):
            yield name, use


def tried(kind):
    """Return some of them; over all kinds each several times."""
    at = [*uses.MODULES].index(kind)
    return [*possible(kind)] if at == 0 else [*possible(kind)][at % SHARE :: SHARE]


SLOW = {"minilm": pytest.mark.slow}


@pytest.mark.parametrize(
    "kind", [pytest.param(each, marks=SLOW.get(each, ())) for each in uses.MODULES]
)
def test_asleep_is_as_awake(kind, consolidator):
    wrong, slept = compared(kind, tried(kind), consolidator)
    assert not wrong, "\n".join(str(each)[:600] for each in wrong)
    assert slept == (0 if kind == "lazy" else len(tried(kind)))


def compared(kind, these, consolidator):
    """Return what came out otherwise asleep than awake, and how many had slept, of these uses."""
    wrong, slept = [], 0
    for name, use in these:
        awake, asleep = made(kind), made(kind)
        done = consolidator.consolidate_gpu_memory([{"data": asleep}])
        naps = [each for each in asleep.parameters() if nap_of(each)]
        slept += bool(naps) and not done.refused
        results = [outcome(use, awake), outcome(use, asleep)]
        if flat(results[0]) != flat(results[1]) or state(awake) != state(asleep):
            wrong.append((name, *results))
    return wrong, slept


def test_the_private_names_of_torch_that_sleep_needs_are_there():
    for module, name in torch_private._WAYS_TO_C:
        assert hasattr(pkgutil.resolve_name(module), name), f"torch {torch.__version__}"
    torch_private.before_c(wake)
    ways = [
        getattr(pkgutil.resolve_name(module), name) for module, name in torch_private._WAYS_TO_C
    ]
    assert all(hasattr(each, "__wrapped__") for each in ways)
    one, other = torch.ones(2), torch_private.shell(AsleepTensor, torch.ones(3))
    torch_private.swap(one, other)
    assert (torch_private.is_shell(one), one.shape) == (True, (3,))
    torch_private.swap(one, other)
    assert (torch_private.is_shell(one), one.shape) == (False, (2,))
    module = nn.Linear(6, 6)
    assert torch_private.holders(module.weight) == 0, f"torch {torch.__version__}"
    loss = module(torch.ones(1, 6)).sum()
    assert torch_private.holders(module.weight) == 0, "the node that gathers its gradient"
    graph = module(torch.ones(1, 6, requires_grad=True))
    assert torch_private.holders(module.weight) > 0, "a graph that will need it"
    del loss, graph
    content = module.weight.data
    assert torch_private.storage_holders(content.untyped_storage()) == 2
    assert torch_private.main_memory(content.untyped_storage())
    assert torch_private.main_memory(content.to("meta").untyped_storage()) is None

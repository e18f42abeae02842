"""Whatever fails while a model sleeps: it is there, or one error names its archive."""

from __future__ import annotations

import copy
import errno
import gc
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pytest_gpumem.archive.asleep import nap_of
from pytest_gpumem.archive.consolidator import GpuConsolidator
from pytest_gpumem.archive.store import ArchiveStore
from pytest_gpumem.errors import ArchiveError

pytestmark = pytest.mark.usefixtures("host_is_a_card")
X = torch.linspace(-1, 1, 24).view(4, 6)
CALLS = ["open", "pwrite", "preadv", "fsync", "ftruncate", "rename", "unlink", "mkdir", "scandir"]


@pytest.fixture
def consolidator(tmp_path):
    return GpuConsolidator(ArchiveStore(tmp_path, key=b"k" * 32))


class Faults:
    """Lets the system refuse one of the calls to come."""

    def __init__(self, monkeypatch, code):
        self.left = 0
        self.code = code
        for name in CALLS:
            monkeypatch.setattr(os, name, self._wrapped(getattr(os, name)))

    def _wrapped(self, call):
        def refusing(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                raise OSError(self.code, os.strerror(self.code))
            return call(*args, **kwargs)

        return refusing


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))


def refused(use):
    try:
        use()
    except ArchiveError as error:
        return error


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EMFILE], ids=errno.errorcode.get)
def test_a_fault_at_each_call_of_falling_asleep_and_of_waking(consolidator, monkeypatch, code):
    awake = linear()
    faults = Faults(monkeypatch, code)
    failed = {"fall asleep": 0, "wake": 0}
    for step in failed:
        for number in range(1, 400):
            model = linear()
            faults.left = number if step == "fall asleep" else 0
            done = consolidator.consolidate_gpu_memory([{"data": model}])
            hit = faults.left <= 0
            assert bool(nap_of(model[0].weight)) != bool(done.refused)
            if step == "wake":
                faults.left = number
                error = refused(lambda model=model: model(X))
                hit = faults.left <= 0
                assert error is None or done.ids[0] in str(error)
                assert bool(nap_of(model[0].weight)) == bool(error)
                failed[step] += bool(error)
            failed[step] += len(done.refused)
            faults.left = 0
            assert torch.equal(model(X), awake(X))
            if not hit:
                break
        else:
            pytest.fail("faults without end")
    assert failed["fall asleep"] > 10
    assert failed["wake"] > 2
    assert consolidator.store.verify(read_data=True) == ()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "entry"])
def test_a_damaged_archive_is_named_and_another_way_out_is_open(consolidator, damage):
    model, awake = linear(), linear()
    (name,) = consolidator.consolidate_gpu_memory([{"data": model}]).ids
    store = consolidator.store
    state = store.path / "states" / store.entry(name).content
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "entry":
        (store.path / "entries" / name).unlink()
    elif damage == "remove":
        state.unlink()
    else:
        state.unlink()
        state.write_bytes(content if damage == "flip" else content[:100])
    for use in (model, model[0].weight.mul, lambda _: consolidator.restore(model)):
        with pytest.raises(ArchiveError, match=f"sleeps in the archive {name} cannot be woken"):
            use(X)
    for part, other in zip(model, awake, strict=True):
        part.weight, part.bias = nn.Parameter(other.weight), nn.Parameter(other.bias)
    assert torch.equal(model(X), awake(X))


def test_without_memory_to_wake_in_it_sleeps_on(consolidator, monkeypatch):
    model, awake = linear(), linear()
    consolidator.consolidate_gpu_memory([{"data": model}])

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(ArchiveStore, "get_tensors", full)
        with pytest.raises(torch.OutOfMemoryError):
            model(X)
        assert nap_of(model[0].weight) is not None
    assert torch.equal(model(X), awake(X))


def test_a_use_while_it_is_archived_keeps_it_awake_and_leaves_nothing(consolidator, monkeypatch):
    put = ArchiveStore.put
    uses = [
        lambda m: m(X),
        lambda m: m[0].weight.data.add_(1),
        consolidator.restore,
        lambda m: kept.append(m[0].weight.data),
    ]
    for use in uses:
        kept: list[torch.Tensor] = []
        model, awake = linear(), linear()

        def using(self, *args, use=use, model=model, **kwargs):
            name = put(self, *args, **kwargs)
            use(model)
            return name

        with monkeypatch.context() as patch:
            patch.setattr(ArchiveStore, "put", using)
            done = consolidator.consolidate_gpu_memory([{"data": model}])
        if use is not uses[2]:
            use(awake)
        assert done.ids == ()
        assert done.refused == (
            "cannot consolidate a Sequential now: it was used while it was archived",
        )
        assert torch.equal(model(X), awake(X))
    assert consolidator.store.entries() == []


def test_a_forked_child_of_a_consolidation_has_the_model_awake(consolidator, monkeypatch):
    model, awake = linear(), linear()
    put = ArchiveStore.put
    status = []

    def forking(self, *args, **kwargs):
        pid = os.fork()
        if not pid:
            good = all(
                torch.equal(a, b)
                for a, b in zip(model.parameters(), awake.parameters(), strict=True)
            )
            os._exit(0 if good else 1)
        status.append(os.waitpid(pid, 0)[1])
        return put(self, *args, **kwargs)

    monkeypatch.setattr(ArchiveStore, "put", forking)
    assert len(consolidator.consolidate_gpu_memory([{"data": model}]).ids) == 1
    assert status == [0]
    assert torch.equal(model(X), awake(X))


def test_a_kill_leaves_what_slept_whole():
    program = Path(__file__).parents[2] / "soak" / "sleepers_kills.py"
    done = subprocess.run(
        [sys.executable, program, "--every=23"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"at calls of os: [3-9] kills; [1-9]", done.stdout), done.stdout


def test_what_sleeps_leaves_no_trace_when_it_is_awake(consolidator):
    model = linear()
    classes = [type(each) for each in model.parameters()]
    twin = copy.deepcopy(model)
    for _ in range(3):
        consolidator.consolidate_gpu_memory([{"data": model}])
        assert [type(each) for each in model.parameters()] != classes
        model(X)
    assert [type(each) for each in model.parameters()] == classes
    assert [vars(each) for each in model.parameters()] == [vars(each) for each in twin.parameters()]
    assert not any(each._forward_pre_hooks for each in model.modules())
    kept = [each.data for each in model.parameters()]
    done = consolidator.consolidate_gpu_memory([{"data": model}])
    assert len(done.refused) == 1
    assert "its memory is in use" in done.refused[0]
    assert len(kept) == 4  # as long as these are there
    assert not any(each._forward_pre_hooks for each in model.modules())
    gc.collect()
    assert not list((consolidator.store.path / "asleep").iterdir())

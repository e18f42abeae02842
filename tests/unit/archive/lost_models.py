"""Ways in which models were lost, or answered wrongly; run on a simulated card by its test."""

from __future__ import annotations

import copy
import gc
import io
import os
import threading

import pytest
import torch
from torch import nn

from pytest_gpumem import ArchiveStore, GpuConsolidator
from pytest_gpumem.errors import ArchiveError

X = torch.linspace(-1, 1, 24).view(4, 6)


@pytest.fixture
def consolidator(tmp_path):
    return GpuConsolidator(ArchiveStore(tmp_path / "store", key=b"k" * 32))


@pytest.fixture
def sleep(consolidator):
    def _sleep(*data):
        done = consolidator.consolidate_gpu_memory([{"data": each} for each in data])
        assert done.refused == ()
        return done.ids

    return _sleep


def linear(size=6):
    torch.manual_seed(0)
    return nn.Linear(size, size).cuda()


def trained():
    torch.manual_seed(0)
    model = nn.Linear(6, 6).cuda()
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    optimizer.zero_grad()
    model(X.cuda()).sum().backward()
    optimizer.step()


def same(one, other):
    return all(
        torch.equal(a.cpu(), b.cpu()) and a.shape == b.shape
        for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize("damage", ["flip", "truncate", "zero", "remove"])
def test_an_archive_that_is_there_already_is_read_before_anything_is_freed(
    sleep, consolidator, damage
):
    model, awake = linear(), linear()
    sleep(model)
    model(X.cuda())
    (state,) = (consolidator.store.path / "states").iterdir()
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"flip": content, "truncate": content[:-20], "zero": bytes(len(content))}
    state.unlink()
    if damage != "remove":
        state.write_bytes(damaged[damage])
    sleep(model)
    assert torch.equal(model(X.cuda()), awake(X.cuda()))


def test_models_that_share_a_parameter(sleep):
    for size in (6, 1):
        one, other = linear(size), linear(size)
        other.weight = one.weight
        twin = copy.deepcopy(other)
        sleep(one, other)
        x = torch.ones(1, size, device="cuda")
        expected = twin(x)
        assert torch.equal(one(x), expected)
        assert torch.equal(other(x), expected)
        assert other.weight is one.weight
        assert one.weight.shape == (size, size)


def test_waking_while_parameters_are_swapped(sleep):
    model, awake = linear(), linear()
    sleep(model)
    zeros = {
        name: torch.zeros(each.shape, device="cuda") for name, each in awake.named_parameters()
    }
    assert not torch.func.functional_call(model, zeros, (X.cuda(),)).any()
    assert same(model, awake)
    sleep(model)
    kept = {}
    for name, each in model.named_parameters():
        kept[name], each.data = each.data, zeros[name]
    model(X.cuda())
    for name, each in model.named_parameters():
        each.data = kept[name]
    assert same(model, awake)


def test_parts_that_were_replaced_added_and_removed_while_it_slept(sleep):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).cuda()
    first = copy.deepcopy(model[0])
    sleep(model)
    model[1] = head = nn.Linear(6, 6).cuda()
    kept = copy.deepcopy(head)
    model.append(nn.Linear(6, 6).cuda())
    added = copy.deepcopy(model[2])
    model(X.cuda())
    assert same(model[0], first)
    assert same(model[1], kept)
    assert same(model[2], added)
    sleep(model)
    del model[0]
    model(X.cuda())
    assert same(model[0], kept)
    assert same(model[1], added)


def test_an_optimizer_that_is_given_another_state_while_it_sleeps(sleep):
    (model, optimizer), (twin, twins) = trained(), trained()
    other = copy.deepcopy(twins.state_dict())
    sleep(optimizer)
    for each in (optimizer, twins):
        each.load_state_dict(copy.deepcopy(other))
    for _ in range(2):
        step(model, optimizer)
        step(twin, twins)
    assert same(model, twin)


def test_a_model_with_a_state_that_cannot_be_built(sleep, consolidator):
    class Odd(nn.Linear):
        def get_extra_state(self):
            found = torch.ones(2)
            found.itself = found
            return found

        def set_extra_state(self, state):
            pass

    odd, awake = Odd(6, 6).cuda(), linear()
    twin = copy.deepcopy(odd)
    done = consolidator.consolidate_gpu_memory([{"data": odd}, {"data": awake}])
    assert len(done.ids) + len(done.refused) == 2
    assert torch.equal(odd(X.cuda()), twin(X.cuda()))


def test_one_that_cannot_wake_does_not_keep_the_others_asleep(sleep, consolidator):
    lost, others = linear(), [nn.Linear(6, 6).cuda() for _ in range(3)]
    twins = copy.deepcopy(others)
    ids = sleep(others[0], lost, *others[1:])
    entry = consolidator.store.entry(ids[1])
    (consolidator.store.path / "states" / entry.content).unlink()
    with pytest.raises(ArchiveError, match=ids[1]):
        consolidator.restore()
    with pytest.raises(ArchiveError, match=ids[1]):
        lost(X.cuda())
    del lost
    gc.collect()
    consolidator.restore()
    assert all(map(same, others, twins))


def test_a_thread_that_trains_is_not_disturbed(consolidator):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 256), nn.Linear(256, 6)).cuda()
    twin = copy.deepcopy(model)
    done = threading.Event()

    def train(model):
        for _ in range(40):
            with torch.no_grad():
                for each in model.parameters():
                    each.mul_(0.99).add_(0.01)

    def train_it():
        train(model)
        done.set()

    thread = threading.Thread(target=train_it)
    thread.start()
    while not done.is_set():
        consolidator.consolidate_gpu_memory([{"data": model}])
    thread.join()
    train(twin)
    assert same(model, twin)


USES = {
    "reset": lambda m: (torch.manual_seed(1), m.reset_parameters()),
    "clamp_": lambda m: m.weight.data.clamp_(-0.1, 0.1),
    "mul_": lambda m: m.weight.data.mul_(2),
    "data +=": lambda m: m.weight.data.__iadd__(1),
    "equal": lambda m: torch.equal(m.weight, m.weight + 1),
    "norm": lambda m: m.weight.norm().item(),
    "numel": lambda m: m.weight.numel(),
    "shape": lambda m: tuple(m.weight.shape),
    "vector": lambda m: nn.utils.parameters_to_vector(m.parameters()).tolist(),
    "deepcopy": lambda m: copy.deepcopy(m.weight).tolist(),
    "data": lambda m: m.weight.data.tolist(),
    "copy_": lambda m: torch.empty(6, 6, device="cuda").copy_(m.weight.data).tolist(),
}


@pytest.mark.parametrize("use", USES)
def test_what_is_done_with_a_sleeping_tensor_is_done(sleep, use):
    model, awake = linear(), linear()
    sleep(model)
    with torch.no_grad():
        results = [USES[use](each) for each in (model, awake)]
    assert str(results[0]) == str(results[1])
    assert same(model, awake)


def test_one_element(sleep):
    model, awake = linear(1), linear(1)
    sleep(model)
    with torch.no_grad():
        for each in (model, awake):
            each.weight.add_(1)
            each.bias.copy_(torch.ones(1, device="cuda"))
    assert same(model, awake)


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [saved, copy.deepcopy], ids=["save", "deepcopy"])
def test_a_sleeping_optimizer_is_copied_whole(sleep, copied):
    _, optimizer = trained()
    sleep(optimizer)
    moments = [each["exp_avg"] for each in copied(optimizer).state.values()]
    assert [tuple(each.shape) for each in moments] == [(6, 6), (6,)]


def test_a_graph_from_before_it_slept(sleep, consolidator):
    model, awake = linear(), linear()
    outs = [m(X.cuda().requires_grad_()) for m in (model, awake)]
    outs = [out.relu() @ m.weight for out, m in zip(outs, (model, awake), strict=True)]
    consolidator.consolidate_gpu_memory([{"data": model}])
    for out in outs:
        out.sum().backward()
    assert all(
        torch.equal(a.grad, b.grad)
        for a, b in zip(model.parameters(), awake.parameters(), strict=False)
    )


def test_waking_in_inference_mode(sleep):
    model, awake = linear(600), linear(600)
    sleep(model)
    x = torch.ones(1, 600, device="cuda")
    with torch.inference_mode():
        assert torch.equal(model(x), awake(x))
    assert not model.weight.is_inference()
    model(x).sum().backward()
    assert model.weight.grad is not None


def test_hooks_of_others_run_before(sleep, consolidator):
    kinds = [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda m: (nn.utils.prune.l1_unstructured(m, "weight", 0.5), m)[1],
    ]
    import torch.nn.utils.prune

    for kind in kinds:
        model, awake = (kind(nn.Linear(6, 6)) for _ in range(2))
        awake.load_state_dict(model.state_dict())
        model, awake = model.cuda().eval(), awake.cuda().eval()
        with torch.no_grad():
            model(X.cuda()), awake(X.cuda())
        sleep(model)
        with torch.no_grad():
            assert torch.equal(model(X.cuda()), awake(X.cuda()))


def test_transforms(sleep):
    for use in (
        lambda m: torch.func.jacrev(m)(X.cuda()),
        lambda m: torch.func.jacrev(lambda w: (w * w).sum())(m.weight),
        lambda m: torch.func.vmap(m)(X.cuda()),
    ):
        model, awake = linear(), linear()
        sleep(model)
        assert torch.equal(use(model), use(awake))


def test_a_foreign_error_is_one_items(consolidator):
    class Odd(nn.Linear):
        def named_parameters(self, *args, **kwargs):
            raise ZeroDivisionError("of its own")

        def state_dict(self, *args, **kwargs):
            raise ZeroDivisionError("of its own")

    deep = {}
    for _ in range(5000):
        deep = {"in": deep}
    models = [linear(), nn.LazyLinear(3).cuda(), Odd(6, 6), linear()]
    items = [{"data": each} for each in [*models[:3], deep]]
    done = consolidator.consolidate_gpu_memory([*items, {"data": models[3]}])
    assert (len(done.ids), len(done.refused)) == (2, 3)
    assert "cannot consolidate a Odd: ZeroDivisionError: of its own" in done.refused


def test_an_archive_that_a_sleeper_needs_is_not_forgotten(sleep, consolidator):
    model, awake = linear(), linear()
    (name,) = sleep(model)
    other = ArchiveStore(consolidator.store.path, key=b"k" * 32)
    assert other.forget(keep_last=0).decayed == 0
    assert other.forget(max_stored=0).decayed == 0
    with pytest.raises(ArchiveError, match=f"cannot delete {name}: a model that sleeps needs it"):
        other.delete(name)
    model(X.cuda())
    assert same(model, awake)
    assert other.forget(keep_last=0).decayed == 1


def test_a_dropped_sleepers_archive_and_a_dead_processs_may_go(sleep, consolidator):
    model = linear()
    sleep(model)
    del model
    gc.collect()
    assert consolidator.store.forget(keep_last=0).decayed == 1
    name = consolidator.store.put({"a": torch.ones(2)})
    pid = os.fork()
    if not pid:
        consolidator.store.need(name)
        os._exit(0)
    os.waitpid(pid, 0)
    assert consolidator.store.forget(keep_last=0).decayed == 1


def test_by_hand(sleep, consolidator):
    model, awake = linear(), linear()
    (name,) = sleep(model)
    awake.load_state_dict(consolidator.store.get(name))
    assert same(model, awake)


def test_a_model_above_a_sleeping_one_can_be_copied_when_its_own_tensors_are_awake(sleep):
    for number, viewed in ((1, False), (4, True)):
        model = nn.Sequential(linear())
        model.register_buffer("own", torch.ones(number, device="cuda"))
        view = model.own[:2] if viewed else None
        sleep(model)
        copied = copy.deepcopy(model)
        assert not copied._forward_pre_hooks
        assert torch.equal(copied(X.cuda()), model(X.cuda()))
        del view


def test_cards_finish_what_was_begun_on_any_stream_before_it_is_read(sleep, monkeypatch):
    order = []
    put = ArchiveStore.put

    def noted(*args, **kwargs):
        order.append("put")
        return put(*args, **kwargs)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: order.append("synchronize"))
    monkeypatch.setattr(ArchiveStore, "put", noted)
    sleep(linear())
    assert order == ["synchronize", "put"]


def test_a_view_of_its_memory_keeps_a_model_awake(consolidator):
    model = linear()
    row = model.weight.data[0]
    consolidator.consolidate_gpu_memory([{"data": model}])
    row.zero_()
    assert not model.weight[0].any()
    del row
    assert consolidator.consolidate_gpu_memory([{"data": model}]).refused == ()
    graph = (model(X.cuda().requires_grad_()) @ model.weight).sum()
    held = torch.cuda.memory_allocated()
    consolidator.consolidate_gpu_memory([{"data": model}])
    assert torch.cuda.memory_allocated() >= held - 1024
    graph.backward()
    assert model.weight.grad.any()

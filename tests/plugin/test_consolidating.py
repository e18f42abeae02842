"""What is registered leaves the card after a test that filled it, and comes back when used."""

import pytest

from pytest_gpumem.archive.store import ArchiveStore

SUITE = """
import pytest
from pytest_gpumem import get_gpu_consolidator

@pytest.fixture(scope="module")
def model():
    model = torch.nn.Linear(1024, 1024, bias=False).cuda()
    get_gpu_consolidator().register(model, type="linear")
    return model

def test_small(model):
    KEPT.append(take(1024))

def test_filling(model):
    assert model.weight.numel() == 2**20, "nothing was consolidated while there was room"
    KEPT.append(take(70 * 1024))

def test_after(model):
    assert get_gpu_consolidator().sleeping_bytes(model)
    KEPT.clear()
    assert model(torch.ones(1, 1024, device="cuda")).shape == (1, 1024)
    assert model.weight.numel() == 2**20
"""
OTHER = "def test_a():\n    pass\n\ndef test_b():\n    pass\n"
CARD = (
    "--gpumem-simulate=100MiB",
    "--gpumem-simulate-context=1MiB",
    "--gpumem-headroom=0B",
    "--gpumem-consolidate-above=60%",
    "--gpumem-archive=store",
)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.mark.parametrize(
    "workers",
    [
        (),
        pytest.param(
            ("-n", "2", "--gpumem-schedule=off", "--dist=loadfile"), marks=pytest.mark.slow
        ),
    ],
    ids=["plain", "n2"],
)
def test_only_a_test_that_fills_the_card_sends_models_to_the_archive(
    run, tmp_path, config, workers
):
    done = run(SUITE, *CARD, *workers, test_other=OTHER)

    assert done.outcomes == {"passed": 5}, done.output
    store = ArchiveStore(tmp_path / "store", key=tmp_path / "config" / "gpumem" / "archive.key")
    (entry,) = store.entries()
    assert (entry.type, entry.context) == ("linear", "test_filling")


def test_nothing_is_registered_so_nothing_is_made(run, tmp_path, config):
    done = run("def test_full():\n    KEPT.append(take(70 * 1024))\n", *CARD)

    assert done.outcomes == {"passed": 1}
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "config").exists()

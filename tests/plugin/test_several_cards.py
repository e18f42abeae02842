"""Several simulated cards: which one each test and each process uses, and who says so."""

import pytest
from harness import run_pytest

TWO = ("-p", "gpumem", "--gpumem-simulate", "1GiB*2", "--gpumem-simulate-context", "64MiB")
SUITE = """
import os
import subprocess
import sys
import time

import pytest
import torch

CHILD = "import torch; torch.empty(50 * 2**20, dtype=torch.uint8, device='cuda:1')"
RANK = '''
import os
import torch
import torch.distributed as dist

rank = int(os.environ["LOCAL_RANK"])
torch.cuda.set_device(rank)
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8).cuda(), device_ids=[rank])
model(torch.ones(2, 8, device="cuda") * rank).sum().backward()
assert model.module.weight.grad[0, 0].item() == 1.0
kept = torch.empty(30 * 2**20, dtype=torch.uint8, device="cuda")
assert kept.get_device() == rank
dist.destroy_process_group()
'''


def fill(mib, device="cuda"):
    return torch.empty(mib * 2**20, dtype=torch.uint8, device=device)


@pytest.mark.gpu(count=2)
def test_both():
    assert torch.cuda.device_count() == 2
    kept = fill(100), fill(200, "cuda:1")


@pytest.mark.parametrize("number", range(4))
def test_one(number):
    kept = fill(600)
    time.sleep(0.5)


KEPT = []


def test_leak():
    KEPT.append(fill(10, "cuda:1"))


def test_child():
    subprocess.run([sys.executable, "-c", CHILD], check=True)


@pytest.mark.gpu(count=2)
def test_ranks(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launcher, str(tmp_path / "rank.py")], check=True)
"""


def taken(test, cards):
    """Return the MiB that a test took by the card's place in the run."""
    return {
        cards.index(each.card): (max(each.peak - each.baseline, each.children_peak)) >> 20
        for each in test.cards
        if each.peak - each.baseline or each.children_peak
    }


# Ranks take long to start.
@pytest.mark.parametrize(
    "mode",
    [("-k", "not ranks"), pytest.param(("-n", "2"), marks=pytest.mark.slow)],
    ids=["plain", "n2"],
)
def test_each_test_is_charged_on_the_cards_that_it_uses(tmp_path, mode):
    (tmp_path / "test_two.py").write_text(SUITE)
    run = run_pytest(tmp_path, *TWO, *mode, "-v", "--gpumem-json=run.json", "--gpumem-html=p.html")
    cards = [each.uuid for each in run.record.cards]

    spread = "-n" in mode
    assert run.outcomes["passed"] == (8 if spread else 7), run.output
    assert run.status == 0
    assert len(cards) == 2
    assert sorted(taken(run.test("test_both"), cards).values()) == [100, 200]
    assert list(taken(run.test("test_child"), cards).values()) == [50]
    if spread:
        assert list(taken(run.test("test_ranks"), cards).values()) == [30, 30]
    assert list(taken(run.test("test_leak"), cards).values()) == [10]
    ones = [taken(run.test(f"test_one[{number}]"), cards) for number in range(4)]
    assert [list(each.values()) for each in ones] == [[600]] * 4
    # Workers begin on different cards; one process has the first.
    assert {place for each in ones for place in each} == ({0, 1} if spread else {0})
    for uuid in cards:
        assert f"Simulated CUDA card {uuid[-8:]} of 1.00 GiB" in run.output or spread
        assert f"{uuid[-8:]}  test_two.py::test_both" in run.section
        assert uuid[-8:] in (tmp_path / "p.html").read_text()


def test_visible_devices_are_those_of_the_simulated_cards(tmp_path):
    suite = "import pytest\n@pytest.mark.gpu(count=2)\ndef test_both(): pass\n"
    (tmp_path / "test_two.py").write_text(suite)
    run = run_pytest(tmp_path, *TWO, env={"CUDA_VISIBLE_DEVICES": "1"})

    assert run.status == 1
    assert "needs 2 cards; no process that runs tests sees more than 1 card" in run.output

"""What cuBLAS takes on a simulated card that was told to have it do so."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from card_process import library

from pytest_gpumem.simulator.card import SharedCard

if TYPE_CHECKING:
    from pathlib import Path

WORKSPACE = 8320 * 1024

PROGRAM = f"""
import sys, threading
from pathlib import Path
from pytest_gpumem.simulator import Simulation
library = Path(sys.argv[1]) if sys.argv[1] else None
Simulation.start([2**30], 2**20, {WORKSPACE}, library).install()
import torch

def taken(act):
    before = torch.cuda.memory_allocated()
    kept = act()
    return round((torch.cuda.memory_allocated() - before) / {WORKSPACE}, 2)

x = torch.ones(4, 4, device="cuda", requires_grad=True)
host = torch.ones(4, 4)
side = torch.cuda.Stream()

def on_side():
    with torch.cuda.stream(side):
        x @ x

def in_thread():
    thread = threading.Thread(target=lambda: x @ x)
    thread.start()
    thread.join()

def too_much():
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    rest = torch.empty(free - free % 2**21, dtype=torch.uint8, device="cuda")
    try:
        torch.nn.functional.linear(x, x)
    except torch.OutOfMemoryError as error:
        return str(error).split(". ")[1]
    return rest

print([taken(act) for act in (
    lambda: x * x, lambda: host @ host, lambda: x @ x, lambda: torch.nn.functional.linear(x, x),
    lambda: (x @ x).sum().backward(), lambda: (x @ x).sum().backward(), on_side, in_thread,
    torch._C._cuda_clearCublasWorkspaces, lambda: torch.bmm(x[None], x[None]),
)], too_much(), sep="; ")
"""


@pytest.mark.parametrize("compiled", [False, True])
def test_each_thread_and_stream_that_multiplies_takes_one(compiled: bool) -> None:
    command = [sys.executable, "-W", "error", "-c", PROGRAM, library() if compiled else ""]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    taken, refusal = run.stdout.strip().split("; ")
    # Autograd works in a thread of its own; what was given back is taken again.
    assert [float(each) for each in taken.strip("[]").split(",")] == [0, 0, 1, 0, 1, 0, 1, 1, -4, 1]
    assert refusal == "Tried to allocate 20.00 MiB"


def test_who_joins_the_card_knows_it(tmp_path: Path) -> None:
    SharedCard.create(tmp_path / "card", total=2**30, context=0, workspace=7).close()
    card = SharedCard.open(tmp_path / "card")
    assert (card.workspace, card.total, card.free()) == (7, 2**30, 2**30)
    card.close()


def test_a_negative_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workspace of -1 bytes: below 0"):
        SharedCard.create(tmp_path / "card", total=5, context=0, workspace=-1)

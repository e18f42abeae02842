"""The card that a replay runs on: a simulated one, or a real one of which little is left."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from pytest_gpumem.simulator import Simulation
from pytest_gpumem.units import format_bytes, parse_bytes

WORKERS = 4
TOTAL = parse_bytes("3.81GiB")
CONTEXT = parse_bytes("384MiB")
FOR_TENSORS = TOTAL - WORKERS * CONTEXT
"""What the workers' contexts leave, on a real card too."""
REHEARSED_TOTAL = parse_bytes("8GiB")
REHEARSED_CONTEXT = parse_bytes("610MiB")
"""What a process costs on an NVIDIA H200 (docs/figures.md)."""
HOG = """
import os, sys
if path := os.environ.get("GPUMEM_SIMULATE_CARD"):
    from pytest_gpumem.simulator import Simulation
    Simulation.attach(path).install()
import torch
from pytest_gpumem import devices

card = devices.find_cards().cards[0]
before = devices.driver_reading(card).used
square = torch.ones(32, 32, device="cuda")
float((square @ square).sum())
context = devices.driver_reading(card).used - before - torch.cuda.memory_reserved()
left = int(sys.argv[1]) + int(sys.argv[2]) * context
kept = []
while (free := torch.cuda.mem_get_info()[0]) > left + 2**21:
    kept.append(torch.empty(min(2**30, free - left), dtype=torch.uint8, device="cuda"))
print(context, torch.cuda.mem_get_info()[0], card.name, sep="|", flush=True)
sys.stdin.read()
"""
"""Takes all of a card but so many bytes and room for so many contexts as large as its own."""


class CardOfReplay(NamedTuple):
    """What the runs need to know of their card; sizes in bytes."""

    name: str
    room: int
    """What one process's tensors can have."""
    environment: dict[str, str]
    arguments: tuple[str, ...] = ()
    """For pytest."""


def simulated() -> CardOfReplay:
    """Return a card as small as the real suite's; each run makes one."""
    return CardOfReplay(
        f"a simulated card of {format_bytes(TOTAL)}", TOTAL - CONTEXT, _simulate(TOTAL, CONTEXT)
    )


@contextmanager
def real() -> Iterator[CardOfReplay]:
    """Yield the first real card, which another process fills up as long as this lasts.

    What is left is what the simulated card has: the same room for tensors, beside as many contexts
    of this card's size.

    Raises:
        SystemExit: when there is none, or it cannot be filled.

    """
    hog = subprocess.Popen(
        [sys.executable, "-c", HOG, str(FOR_TENSORS), str(WORKERS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with hog:
        told = hog.stdout.readline() if hog.stdout else ""
        if not told:
            raise SystemExit("there is no real card, or it could not be filled up")
        context, free, name = told.strip().split("|", 2)
        yield CardOfReplay(
            f"{format_bytes(int(free))} of {name}, a context taking {format_bytes(int(context))}",
            int(free) - int(context),
            {},
            (f"--gpumem-context={context}B",),
        )


@contextmanager
def rehearsed() -> Iterator[CardOfReplay]:
    """Yield what ``real`` yields, with a simulated card as the real one."""
    simulation = Simulation.start([REHEARSED_TOTAL], REHEARSED_CONTEXT)
    variable = "GPUMEM_SIMULATE_CARD"
    os.environ[variable] = simulation.path
    try:
        with real() as card:
            environment = {variable: simulation.path} | _simulate(None, REHEARSED_CONTEXT)
            yield card._replace(name=f"a rehearsal: {card.name}", environment=environment)
    finally:
        del os.environ[variable]
        simulation.close()


def _simulate(total: int | None, context: int) -> dict[str, str]:
    sizes = {"GPUMEM_SIMULATE_CONTEXT": f"{context}B"}
    return sizes if total is None else sizes | {"GPUMEM_SIMULATE": f"{total}B"}

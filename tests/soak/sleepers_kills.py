"""SIGKILL at each call of falling asleep and of waking; then the store is looked at.

``python tests/soak/sleepers_kills.py [--every 1]``. At each call of Python's ``os`` that has to do
with files, and, where there is strace and every one is tried, at each system call of any kind. What
a killed process had said to be asleep is whole in its archive, for whoever comes next; nothing is
kept from being forgotten by it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "archive"))

import kills

from pytest_gpumem.archive import sleep
from pytest_gpumem.archive.consolidator import GpuConsolidator
from pytest_gpumem.archive.store import ArchiveStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CALLS = ["open", "pwrite", "preadv", "fsync", "ftruncate", "rename", "unlink", "mkdir", "close"]


def linear() -> nn.Module:
    """Return the model, the same each time."""
    torch.manual_seed(0)
    return nn.Linear(300, 300)


def main() -> int:
    """Kill until a process comes to its end; return 0 if nothing was lost."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=1, help="of the calls one in so many")
    every = parser.parse_args().every
    torch.set_num_threads(1)  # a child has no threads but its own
    sleep.is_on_card = lambda tensor: not tensor.is_meta
    with tempfile.TemporaryDirectory() as folder:  # what it imports is no step of it
        naps(Path(folder))(str)()
    told("calls of os", at_calls_of_os(every))
    if every == 1 and kills.STRACE is not None:
        told("system calls", at_system_calls())
    return 0


def told(what: str, rounds: Callable[[Path], Iterator[tuple[str, list[str]]]]) -> None:
    """Look at the store after each round, and print what came of all of them."""
    killed = asleep = 0
    with tempfile.TemporaryDirectory() as folder:
        for at, said in rounds(Path(folder)):
            killed += said[-1:] != ["end"]
            asleep += look(folder, at, said)
    print(f"at {what}: {killed} kills; {asleep} times a model was asleep, and its archive whole")


def look(folder: str, at: str, said: list[str]) -> int:
    """Return how many models a process had said to be asleep; all are there."""
    store = ArchiveStore(folder, key=kills.KEY)
    problems = store.verify(read_data=True)
    if problems:
        raise SystemExit(f"after a kill at {at}: {problems}")
    names = [each.split()[1] for each in said if each.startswith("asleep")]
    for name in names:
        if not torch.equal(store.get(name)["weight"], linear().weight.detach()):
            raise SystemExit(f"after a kill at {at}: {name} has another content")
    store.forget(keep_last=0)
    if store.entries():
        raise SystemExit(f"after a kill at {at}: something is kept")
    return len(names)


def naps(folder: Path) -> Callable[[Callable[[str], object]], Callable[[], None]]:
    """Return what prepares two naps of a model, and says so."""

    def prepare(say: Callable[[str], object]) -> Callable[[], None]:
        here = GpuConsolidator(ArchiveStore(folder, key=kills.KEY))
        model = linear()

        def work() -> None:
            for _ in range(2):
                done = here.consolidate_gpu_memory([{"data": model}])
                say(f"asleep {done.ids[0]}")
                model(torch.ones(1, 300))
                say("awake")
            say("end")

        return work

    return prepare


def at_system_calls() -> Callable[[Path], Iterator[tuple[str, list[str]]]]:
    """Kill at each system call of each kind, by strace."""

    def rounds(folder: Path) -> Iterator[tuple[str, list[str]]]:
        counts = kills.calls_of(naps(folder), folder.with_name(f"{folder.name}.strace"))
        for call, count in sorted(counts.items()):
            for at in range(1, count + 1):
                yield f"{call} {at}", kills.kill_at(naps(folder), call, at)

    return rounds


def at_calls_of_os(every: int) -> Callable[[Path], Iterator[tuple[str, list[str]]]]:
    """Kill at each call of ``CALLS``, until a process comes to its end."""

    def rounds(folder: Path) -> Iterator[tuple[str, list[str]]]:
        for number in range(1, 2000, every):
            said = kills.ended(*kills.child(lambda say, left=number: dying(folder, say, left)))
            yield f"call {number}", said
            if said[-1:] == ["end"]:
                return

    return rounds


def dying(folder: Path, say: Callable[[str], object], left: int) -> None:
    """Sleep and wake until the call of that number, which is the end."""
    for name in CALLS:
        original = getattr(os, name)

        def counted(*args: object, original: object = original, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)  # type: ignore[operator]

        setattr(os, name, counted)
    naps(folder)(say)()


if __name__ == "__main__":
    sys.exit(main())

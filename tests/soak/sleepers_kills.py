"""SIGKILL at each system call of falling asleep and of waking; then the store is looked at.

``python tests/soak/sleepers_kills.py [--every 1]``. What a killed process had said to be asleep is
whole in its archive, for whoever comes next; nothing is kept from being forgotten by it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile

import torch
from torch import nn

from pytest_gpumem.archive import sleep
from pytest_gpumem.archive.consolidator import GpuConsolidator
from pytest_gpumem.archive.store import ArchiveStore

KEY = b"k" * 32
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
    model = linear()
    kills = asleep = 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, 2000, every):
            said = killed(folder, number)
            kills += said[-1:] != ["end"]
            store = ArchiveStore(folder, key=KEY)
            problems = store.verify(read_data=True)
            if problems:
                raise SystemExit(f"after a kill at call {number}: {problems}")
            for name in [each.split()[1] for each in said if each.startswith("asleep")]:
                asleep += 1
                found = store.get(name)
                if not torch.equal(found["weight"], model.weight.detach()):
                    raise SystemExit(f"after a kill at call {number}: {name} has another content")
            store.forget(keep_last=0)
            if store.entries():
                raise SystemExit(f"after a kill at call {number}: something is kept")
            if said[-1:] == ["end"]:
                break
    print(f"{kills} kills; {asleep} times a model was asleep, and its archive whole")
    return 0


def killed(folder: str, number: int) -> list[str]:
    """Let a child sleep and wake until its call of that number; return what it said."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            left = number
            for name in CALLS:
                original = getattr(os, name)

                def counted(*args: object, original: object = original, **kwargs: object) -> object:
                    nonlocal left
                    left -= 1
                    if not left:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return original(*args, **kwargs)  # type: ignore[operator]

                setattr(os, name, counted)
            here = GpuConsolidator(ArchiveStore(folder, key=KEY))
            model = linear()
            for _ in range(2):
                done = here.consolidate_gpu_memory([{"data": model}])
                os.write(writing, f"asleep {done.ids[0]}\n".encode())
                model(torch.ones(1, 300))
                os.write(writing, b"awake\n")
            os.write(writing, b"end\n")
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read().split("\n")[:-1]
    os.waitpid(pid, 0)
    return said


if __name__ == "__main__":
    sys.exit(main())

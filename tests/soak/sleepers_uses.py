"""Each way to use a module, with each kind of module, awake and asleep on a simulated card.

``python tests/soak/sleepers_uses.py [--compiled] [--every 1] [--kinds linear,tied]``. The table is
that of ``tests/unit/archive/uses.py``, which the unit tests try with tensors of the host. On the
compiled card torch's own C++ takes the tensors for those of a card; there a forked child gets no
card, as on a real one, and quantised tensors are refused. What is an ``InUseError`` the first time
has to be right the second time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "archive"))

from pytest_gpumem.errors import InUseError
from pytest_gpumem.simulator import Simulation

if TYPE_CHECKING:
    from collections.abc import Callable

MEMORY = "/dev/shm"  # noqa: S108  # a directory of a random name is made there


def main() -> int:
    """Try them; return 0 if nothing came out otherwise."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--every", type=int, default=1, help="of the uses one in so many")
    parser.add_argument("--kinds", default="", help="of module; default: all")
    options = parser.parse_args()
    library = None
    if options.compiled:
        from pytest_gpumem.simulator.torch_face import compilation

        library = compilation.library()
    simulation = Simulation.start([4 * 2**30], 2**20, library=library)
    simulation.install()
    try:
        left_out = {"minilm"}  # which is loaded for the host, whatever the default device
        if options.compiled:
            left_out |= {"forked child", "quantised"}
        return tried(options.kinds.split(",") if options.kinds else [], options.every, left_out)
    finally:
        simulation.close()


def again(use: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a use that is tried once more if a first time could not be right."""

    def used(module: Any) -> Any:
        try:
            return use(module)
        except InUseError:
            return use(module)

    return used


def tried(kinds: list[str], every: int, left_out: set[str]) -> int:
    """Print how many uses gave the same with each kind, and those that did not."""
    import test_uses_of_sleepers as table
    import torch
    import uses

    from pytest_gpumem import ArchiveStore, GpuConsolidator

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_default_device("cuda")
    on_host = uses.inputs
    uses.inputs = lambda: on_host().cuda()  # in other threads there is no default
    failed = 0
    memory = MEMORY if Path(MEMORY).is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as store:
        consolidator = GpuConsolidator(ArchiveStore(store, key=b"k" * 32))
        for at, kind in enumerate(kinds or [each for each in uses.MODULES if each not in left_out]):
            start = time.monotonic()
            these = [
                (name, again(use)) for name, use in table.possible(kind) if name not in left_out
            ][at % every :: every]
            wrong, slept = table.compared(kind, these, consolidator)
            failed += len(wrong)
            seconds = time.monotonic() - start
            print(f"{kind}: {len(these)} uses, {slept} asleep, {seconds:.0f} s", flush=True)
            for each in wrong:
                print("   ", *(str(part)[:300] for part in each), sep="\n        ", flush=True)
    print(f"{failed} came out otherwise")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())

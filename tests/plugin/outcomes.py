"""Small suites that end in every way, with xdist, and how they end without the plugin."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from harness import WITHOUT_TORCH, write_suite
from neutral import NO_AUTOLOAD, run_outcomes

from pytest_gpumem.simulator.card import SharedCard

CARD, CONTEXT = 2**30, 64 * 2**20
PLUGINS = ("-p", "xdist")
HEAD = """
import os, signal
import pytest
from without_torch import ALLOCATOR

@pytest.fixture
def broken(): raise ValueError("set-up")

@pytest.fixture
def untidy():
    yield
    raise ValueError("teardown")

@pytest.fixture
def too_large(): raise ValueError("what --gpumem-too-large=fail makes of it")
"""
TESTS = {
    "passes": "def {}(): pass",
    "fails": "def {}(): assert 0",
    "skips": "def {}(): pytest.skip('no')",
    "xfails": "@pytest.mark.xfail\ndef {}(): assert 0",
    "breaks": "def {}(broken): pass",
    "is untidy": "def {}(untidy): pass",
    "fails untidily": "def {}(untidy): assert 0",
    "exits": "def {}(): os._exit(3)",
    "is killed": "def {}(): os.kill(os.getpid(), signal.SIGSEGV)",
    "takes some": "@pytest.mark.gpu(vram='100MiB')\n"
    "def {}(): ALLOCATOR.take(2**20); ALLOCATOR.give(2**20)",
    "runs out": "@pytest.mark.gpu\ndef {}(): ALLOCATOR.take(2**31)",
    "runs out unmarked": "def {}(): ALLOCATOR.take(2**31)",
    "catches it": "def {}():\n    with pytest.raises(RuntimeError): ALLOCATOR.take(2**31)",
    "is too large": "@pytest.mark.gpu(vram='3GiB')\ndef {}(): raise SystemError('ran')",
    "is far too large": "@pytest.mark.gpu(vram=2**80)\ndef {}(): raise SystemError('ran')",
}
"""How a test ends, and its source."""
TOO_LARGE = ("is too large", "is far too large")


class Case(NamedTuple):
    """One suite and how it is run."""

    tests: tuple[str, ...]
    """Of ``TESTS``."""
    workers: int = 2
    arguments: tuple[str, ...] = ()
    skip: bool = False
    """Whether tests larger than the card are skipped."""
    uncollected: bool = False
    """Whether a second file cannot be imported."""


def draw(chance: random.Random) -> Case:
    """Return a case; large tests and ends of a worker are frequent."""
    often = (*TESTS, *TOO_LARGE, "is too large", "exits", "runs out")
    tests = tuple(chance.choice(often) for _ in range(chance.choice((0, 1, 1, 2, 2, 3, 3))))
    few = ((), (), (), ("-x",), ("--maxfail=2",), ("-k", "not 0"), ("-k", "nothing"))
    more = ((), (), ("--max-worker-restart=0",), ("--max-worker-restart=1",))
    return Case(
        tests,
        chance.randint(1, 4),
        chance.choice(few) + chance.choice(more),
        chance.random() < 0.3,
        chance.random() < 0.1,
    )


def difference(directory: Path, case: Case) -> str:
    """Return how the case's run with the plugin differs from one without it; "" if it does not."""
    directory.mkdir(exist_ok=True)
    shutil.copy(WITHOUT_TORCH, directory)
    ours = (
        *("-p", "gpumem", f"--gpumem-simulate-card={directory / 'card'}"),
        f"--gpumem-too-large={'skip' if case.skip else 'fail'}",
    )
    endings = []
    for options, without in ((("-p", "no:gpumem"), True), (ours, False)):
        sources = [_source(test, number, case, without) for number, test in enumerate(case.tests)]
        files = {"test_it": "\n\n".join([HEAD, *sources])}
        if case.uncollected:
            files["test_missing"] = "import nothing_of_this_name"
        write_suite(directory, **files)
        (directory / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
        for name in ("card", "card.lock"):
            (directory / name).unlink(missing_ok=True)
        SharedCard.create(directory / "card", total=CARD, context=CONTEXT).close()
        arguments = (*PLUGINS, *options, f"-n{case.workers}", *case.arguments)
        env = NO_AUTOLOAD | {"GPUMEM_SIMULATE_CARD": str(directory / "card")}
        endings.append(run_outcomes(directory, arguments, env))
    (_, bare), (finished, with_us) = endings
    if "INTERNALERROR" in finished.output:
        return finished.output
    if _ends_early(case.arguments):
        # Which tests still run is a matter of chance.
        both = {name for name, _ in bare} & {name for name, _ in with_us}
        bare, with_us = ({each for each in found if each[0] in both} for found in (bare, with_us))
    if bare == with_us:
        return ""
    return f"{sorted(bare)}\nwithout the plugin, with it\n{sorted(with_us)}\n{finished.output}"


def _source(test: str, number: int, case: Case, without: bool) -> str:
    name = f"test_{number}"
    if without and test in TOO_LARGE:
        if case.skip:
            return f"@pytest.mark.skip\ndef {name}(): pass"
        return f"def {name}(too_large): pass"
    return TESTS[test].format(name)


def _ends_early(arguments: Sequence[str]) -> bool:
    return any(each.startswith(("-x", "--maxfail", "--max-worker")) for each in arguments)

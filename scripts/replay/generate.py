"""Write the suite that is replayed: 4,479 tests in the mix of a real suite that ran out of memory.

The real one ran on a card of 3.81 GiB with four workers: 188 out-of-memory events, 116 errors,
87 failures, 87 skips, 95.6 % passed, and 136 times an agent without ``_embedding_model``. What is
known of it is that mix. The sizes and durations here are chosen, not yet tuned to it;
they are no measurement of the real suite. The same seed writes the same suite.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SUITE = Path(__file__).with_name("suite")
TESTS = 4_479
SKIPS = 87
OWN_FAILURES = 12
"""Tests of no memory that fail, with and without the plugin."""
AGENTS_WITHOUT_MODEL = 136
IN_FIXTURE = 100
"""Of them, those that register in a fixture: an error, and no failure."""
FAULTY = ("CodeAgent", "EnhancedCodeAgent", "OrchestratorAgent")
SECONDS = 0.055
"""Median duration of a test without the card."""
SPREAD = 0.9
"""Standard deviation of the logarithm of durations."""

HEAD = "import lab\nimport pytest\n\n"
MINILM = """
TEXTS = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "The train leaves at noon."]


@pytest.mark.parametrize("number", range({n}))
def test_meaning(sentence_transformer, number):
    cat, kitten, train = sentence_transformer.encode(TEXTS, convert_to_tensor=True)
    assert cat @ kitten > cat @ train
"""
ENCODER = """
MODEL_MIB = {size}


@pytest.mark.parametrize(("mib", "seconds"), {cases}, ids=range({n}))
def test_batch(encoder, mib, seconds):
    assert encoder.encode(["a", "b"], mib, seconds) == 2
"""
SHARED_MODEL = """
@pytest.mark.parametrize(("mib", "seconds"), {cases}, ids=range({n}))
def test_shared_model(mib, seconds):
    model = lab.load_model("{name}", {size})
    assert model.encode(["a", "b"], mib, seconds) == 2
"""
ROUTED = """
@pytest.mark.parametrize(("mib", "seconds"), {cases}, ids=range({n}))
def test_routed_batch(device, mib, seconds):
    assert lab.work(mib, seconds, device) == mib
"""
AGENTS = """
WORKSPACE_MIB = {size}


@pytest.mark.parametrize("registered", {fixture}, indirect=True, ids=str)
def test_knows_its_role(registered, workspace):
    assert workspace.known[type(registered).__name__] == 1


@pytest.mark.parametrize(("kind", "mib", "seconds"), {cases}, ids=str)
def test_registers_and_works(create, workspace, kind, mib, seconds):
    agent = create(kind)
    workspace.register(agent)
    assert agent._embedding_model.encode(["a"], mib, seconds) == 1
"""
PHI = """
@pytest.mark.parametrize(("mib", "seconds"), {cases}, ids=range({n}))
def test_phi(mib, seconds):
    assert lab.phi(32, mib, seconds) == 32
"""
SERVER = """
@pytest.mark.gpu(vram="1GiB")
@pytest.mark.parametrize(("mib", "seconds"), {cases}, ids=range({n}))
def test_server_answers(mib, seconds):
    lab.call_server(mib, seconds)
"""
LEAK = """
HISTORY = []


@pytest.mark.parametrize(("mib", "seconds"), {cases}, ids=range({n}))
def test_remembers(mib, seconds):
    HISTORY.append(lab.torch.empty({size} * lab.MIB, dtype=lab.torch.uint8, device="cuda"))
    assert lab.work(mib, seconds) == mib
"""
FRAGMENTS = """
@pytest.mark.parametrize(("mib", "seconds"), {cases}, ids=range({n}))
def test_ragged_batches(mib, seconds):
    pieces = [lab.torch.empty(12 * lab.MIB, dtype=lab.torch.uint8, device="cuda") for _ in range(8)]
    del pieces[::2]
    assert lab.work(mib, seconds) == mib
"""
CORE = """
import time


@pytest.mark.parametrize("seconds", {cases}, ids=range({n}))
def test_rules(seconds):
    time.sleep(seconds)
"""
SKIPPED = """

@pytest.mark.parametrize("number", range({n}))
@pytest.mark.skip(reason="needs a service")
def test_service(number):
    raise AssertionError
"""
FAILING = """

@pytest.mark.parametrize("number", range({n}))
def test_provider_of_model(number):
    assert {{"gpt-4": "ollama"}}["gpt-4"] == "openai"
"""


class Chance(random.Random):
    """A source of chance that adds up the durations it gave."""

    seconds = 0.0

    def duration(self, factor: float = 1.0) -> float:
        """Return how long a test sleeps, in seconds; ``factor`` times the median of all."""
        chosen = round(min(2.0, factor * SECONDS * self.lognormvariate(0, SPREAD)), 4)
        self.seconds += chosen
        return chosen


class Written(NamedTuple):
    """What a suite consists of."""

    tests: int
    seconds: float
    """What its tests sleep."""


@dataclass(frozen=True)
class Kind:
    """Modules of one kind: how many tests in all and in each, and how a module is written."""

    folder: str
    name: str
    tests: int
    per_module: int
    write: Callable[[Chance, int, int], str]
    """Given a source of chance, the module's number and its tests."""


def _log_uniform(rng: Chance, low: int, high: int) -> int:
    return round(low * math.pow(high / low, rng.random()))


def _cases(
    rng: Chance, number: int, low: int, high: int, factor: float = 1.5
) -> list[tuple[int, float]]:
    """Return MiB and seconds of ``number`` tests whose sizes are alike, as in one module."""
    size = _log_uniform(rng, low, high)
    return [
        (max(1, round(size * rng.lognormvariate(0, 0.15))), rng.duration(factor))
        for _ in range(number)
    ]


def _minilm(_rng: Chance, _number: int, tests: int) -> str:
    return HEAD + MINILM.format(n=tests)


def _encoder(rng: Chance, _number: int, tests: int) -> str:
    size = _log_uniform(rng, 70, 300)
    return HEAD + ENCODER.format(size=size, cases=_cases(rng, tests, 10, 60), n=tests)


def _shared_model(rng: Chance, number: int, tests: int) -> str:
    size = rng.randint(80, 120)
    cases = _cases(rng, tests, 8, 40)
    return HEAD + SHARED_MODEL.format(size=size, name=f"model-{number}", cases=cases, n=tests)


def _routed(rng: Chance, _number: int, tests: int) -> str:
    return HEAD + ROUTED.format(cases=_cases(rng, tests, 20, 120), n=tests)


def _too_large(rng: Chance, _number: int, tests: int) -> str:
    """Write batches larger than the card: they work on the CPU only."""
    cases = [(rng.randint(5_000, 5_600), rng.duration()) for _ in range(tests)]
    return HEAD + ROUTED.format(cases=cases, n=tests)


def _phi(rng: Chance, _number: int, tests: int) -> str:
    return HEAD + PHI.format(cases=_cases(rng, tests, 60, 500, 3.0), n=tests)


def _whole_phi(rng: Chance, _number: int, tests: int) -> str:
    """Write what needs most of the card, and finds it taken when it comes last."""
    cases = [(rng.randint(1_700, 1_900), rng.duration(3.0)) for _ in range(tests)]
    return HEAD + PHI.format(cases=cases, n=tests)


def _whole_encoder(rng: Chance, _number: int, tests: int) -> str:
    return HEAD + ENCODER.format(size=1_500, cases=_cases(rng, tests, 10, 60), n=tests)


def _server(rng: Chance, _number: int, tests: int) -> str:
    return HEAD + SERVER.format(cases=_cases(rng, tests, 100, 400, 10.0), n=tests)


def _leak(rng: Chance, _number: int, tests: int) -> str:
    return HEAD + LEAK.format(size=rng.randint(2, 4), cases=_cases(rng, tests, 8, 40), n=tests)


def _fragments(rng: Chance, _number: int, tests: int) -> str:
    return HEAD + FRAGMENTS.format(cases=_cases(rng, tests, 30, 110), n=tests)


def _agents(total: int, faulty: int, in_fixture: int) -> Callable[[Chance, int, int], str]:
    """Return what writes modules of agents, ``faulty`` of ``total`` without their model."""
    in_test = faulty - in_fixture
    modules = -(-total // 20)

    def share(number: int, all_of_them: int) -> int:
        return all_of_them * (number + 1) // modules - all_of_them * number // modules

    def write(rng: Chance, number: int, tests: int) -> str:
        def kinds(bad: int, number: int) -> list[str]:
            some = [rng.choice(FAULTY) for _ in range(bad)] + ["PlannerAgent"] * (number - bad)
            rng.shuffle(some)
            return some

        bad_fixtures, bad_tests = share(number, in_fixture), share(number, in_test)
        half = max(bad_fixtures, tests // 2)
        cases = [
            (kind, *case)
            for kind, case in zip(
                kinds(bad_tests, tests - half), _cases(rng, tests - half, 6, 40), strict=True
            )
        ]
        return HEAD + AGENTS.format(
            size=rng.randint(8, 24), fixture=kinds(bad_fixtures, half), cases=cases
        )

    return write


def _core(total: int, skips: int, failures: int) -> Callable[[Chance, int, int], str]:
    """Return what writes modules without the card; of ``total`` tests some skip and some fail."""
    written = 0

    def write(rng: Chance, _number: int, tests: int) -> str:
        nonlocal written
        begin, written = written, written + tests
        skipped = skips * written // total - skips * begin // total
        # Rounded the other way, so that a short last module has room for its share of both.
        failing = -(-failures * written // total) + (-failures * begin // total)
        plain = tests - skipped - failing
        text = HEAD.replace("import lab\n", "")
        text += CORE.format(cases=[rng.duration() for _ in range(plain)], n=plain) if plain else ""
        text += SKIPPED.format(n=skipped) if skipped else ""
        return text + (FAILING.format(n=failing) if failing else "")

    return write


def kinds(scale: float, *, minilm: bool = True) -> Iterator[Kind]:
    """Yield what the suite consists of, ``scale`` times as many tests of each.

    Without ``minilm`` stand-ins take the place of the real all-MiniLM-L6-v2.
    """

    def part(tests: int) -> int:
        return max(1, round(tests * scale))

    agents = part(400)
    card = (
        # Two, because each process that loads it computes for seconds, and has a large heap then.
        Kind("embeddings", "minilm", 2, 2, _minilm if minilm else _encoder),
        Kind("embeddings", "encoder", part(262), 12, _encoder),
        Kind("embeddings", "routed", part(36), 12, _routed),
        Kind("embeddings", "shared_model", part(230), 10, _shared_model),
        Kind("embeddings", "too_large", part(8), 8, _too_large),
        Kind(
            *("agents", "agents", agents, 20),
            _agents(agents, part(AGENTS_WITHOUT_MODEL), part(IN_FIXTURE)),
        ),
        Kind("consciousness", "phi", part(240), 12, _phi),
        Kind("mcp", "server", part(5), 5, _server),
        Kind("whole_network", "whole_encoder", part(12), 12, _whole_encoder),
        Kind("whole_network", "whole_phi", part(22), 11, _whole_phi),
        Kind("consciousness", "remembering", part(40), 10, _leak),
        Kind("consciousness", "ragged", part(60), 10, _fragments),
    )
    yield from card
    rest = part(TESTS) - sum(kind.tests for kind in card)
    yield Kind("core", "rules", rest, 40, _core(rest, part(SKIPS), part(OWN_FAILURES)))


def write(folder: Path, seed: int = 1, scale: float = 1.0, *, minilm: bool = True) -> Written:
    """Write the suite into a new ``folder``; return what it consists of."""
    shutil.copytree(SUITE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    tests, seconds = 0, 0.0
    for kind in kinds(scale, minilm=minilm):
        place = folder / "tests" / kind.folder
        place.mkdir(parents=True, exist_ok=True)
        rng = Chance(f"{seed} {kind.name}")
        for number, begin in enumerate(range(0, kind.tests, kind.per_module)):
            text = kind.write(rng, number, min(kind.per_module, kind.tests - begin))
            (place / f"test_{kind.name}_{number:02}.py").write_text(text)
        tests += kind.tests
        seconds += rng.seconds
    return Written(tests, seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """Write a suite and say how large it is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="made, and must not be there yet")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="times as many tests as 4,479")
    options = parser.parse_args(argv)
    tests, seconds = write(options.folder, options.seed, options.scale)
    print(f"{tests} tests in {options.folder}, which sleep {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the plugin costs a suite that allocates nothing, beside bare pytest, xdist and its peers.

Every variant runs the same generated suites of trivial tests, 100 in each file, in fresh processes,
interleaved over several rounds. Times are wall and CPU seconds of the whole process and its
workers; a ratio of wall time is the median over rounds of "this variant / its baseline in the same
round", of CPU time that of the least seconds of either, which other work on the machine changes
least. A start of an interpreter, with and without what children of tests find in their environment,
is timed apart.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

SIZES = (1_000, 4_000, 16_000)
"""Tests: what each costs must not depend on how many ran before it."""
TESTS_PER_FILE = 100
PEER_TESTS = 1_000
IMPORT_TARGET_MS = 10.0
AGENT_TARGET_MS = 1.0
DONT_WRITE = "PYTHONDONTWRITEBYTECODE"
"""With it every run would compile every module again, which no user's run does."""
NOTHING = ("-p", "nothing")
"""An empty plugin: for each that is named with ``-p`` pytest looks through all packages that are
installed, which is no cost of the one that is found."""
SIMULATE = ("-p", "gpumem", "--gpumem=on", "--gpumem-simulate", "3.81GiB")
XDIST = ("-p", "xdist", "-n", "2")

# With automatic collection off, every collection that happens was asked for by somebody.
CONFTEST = '''
import gc, json, os, sys

if os.environ.get("BENCH_CHILD"):
    import subprocess
    import pytest

    CHILD = """
import os, sys
from pytest_gpumem.simulator import Simulation
card = os.environ.get("GPUMEM_SIMULATE_CARD")
assert not card or Simulation.attach(card).cards[0].join()
print("joined", flush=True)
sys.stdin.read()
"""

    @pytest.fixture(scope="session", autouse=True)
    def child():
        command, pipe = [sys.executable, "-c", CHILD], subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe) as process:
            process.stdout.readline()
            yield
            process.stdin.close()

if os.environ.get("BENCH_TORCH"):
    import torch
    torch.ones(1, device=os.environ["BENCH_TORCH"])

if os.environ.get("BENCH_PROBE"):
    collections = []

    def pytest_collection_finish():
        gc.disable()
        gc.callbacks.append(lambda phase, info: phase == "start" and collections.append(info))

    def pytest_sessionfinish():
        found = {"collections": len(collections), "torch": "torch" in sys.modules}
        with open(os.environ["BENCH_PROBE"], "w") as file:
            json.dump(found, file)
'''


@dataclass(frozen=True)
class Variant:
    """One way to run the suite; ``torch`` is the device the suite touches first, if any."""

    name: str
    args: tuple[str, ...] = ()
    baseline: str = "bare"
    path: tuple[Path, ...] = ()
    torch: str = ""
    child: bool = False
    """Whether a fixture's process lives all the while, with a context on the card if any."""
    target: float | None = None
    peer: bool = False

    def command(self, suite: Path) -> list[str]:
        """Return the command line that runs ``suite``."""
        quiet = ("-q", "-p", "no:cacheprovider")
        return [sys.executable, "-m", "pytest", *quiet, *self.args, str(suite)]

    def environment(self, **extra: str) -> dict[str, str]:
        """Return the environment: only the plugins that ``args`` name are loaded."""
        path = os.pathsep.join(map(str, self.path))
        settings = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": path}
        found = os.environ | settings | {"BENCH_TORCH": self.torch} | extra
        found["BENCH_CHILD"] = "1" if self.child else ""
        # Without it every run would compile every module again, which no user's run does.
        found.pop(DONT_WRITE, None)
        found.pop("PYTHONSAFEPATH", None)  # the empty plugin lies in the working directory
        return found


@dataclass(frozen=True)
class Timing:
    """Seconds of one process."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Row:
    """One line of the result."""

    name: str
    tests: int
    seconds: float
    extra_us: float
    """Microseconds of wall time that a test takes more than in the baseline."""
    ratio: float
    cpu_ratio: float
    baseline: str
    target: float | None


def variants(peers: Path | None, pytest8: Path | None) -> list[Variant]:
    """Return what is compared; peers only where they are installed."""
    torch, child = "bare, torch loaded", "bare, a child that lives all the while"
    found = [
        Variant("bare", NOTHING),
        Variant("gpumem, no GPU", ("-p", "gpumem"), target=1.05),
        Variant("gpumem on, a card", SIMULATE, target=1.15),
        Variant(torch, NOTHING, torch="cpu"),
        Variant("gpumem on, torch active on the card", SIMULATE, torch, torch="cuda", target=1.08),
        Variant("xdist -n 2", (*NOTHING, *XDIST)),
        Variant("xdist -n 2, gpumem on, a card", (*XDIST, *SIMULATE), "xdist -n 2", target=1.10),
        Variant(child, NOTHING, child=True),
        Variant(
            "gpumem on, a child on the card, not sampled",
            (*SIMULATE, "--gpumem-sample-interval=0"),
            child,
            child=True,
        ),
        Variant("gpumem on, a child on the card", SIMULATE, child, child=True),
    ]
    if peers:
        found.append(
            Variant("pytest-memray", ("-p", "memray", "--memray"), path=(peers,), peer=True)
        )
    if peers and pytest8:
        # pytest-monitor 1.6 reports one error per module on pytest 9.
        old = (pytest8, peers)
        found.append(Variant("bare, pytest 8", path=(pytest8,)))
        found.append(Variant("pytest-monitor", ("-p", "monitor"), "bare, pytest 8", old, peer=True))
    return found


def chosen(compared: list[Variant], only: re.Pattern[str] | None) -> list[Variant]:
    """Return the variants in whose names ``only`` is found, and their baselines."""
    if only is None:
        return compared
    wanted = [each for each in compared if only.search(each.name)]
    names = {name for each in wanted for name in (each.name, each.baseline)}
    return [each for each in compared if each.name in names]


def write_suite(folder: Path, tests: int) -> Path:
    """Write a suite of ``tests`` trivial tests and return its folder."""
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "nothing.py").write_text("")
    for first in range(0, tests, TESTS_PER_FILE):
        numbers = range(first, min(tests, first + TESTS_PER_FILE))
        body = "\n\n".join(f"def test_{number}():\n    assert True" for number in numbers)
        (folder / f"test_file_{first // TESTS_PER_FILE}.py").write_text(body)
    return folder


def run(variant: Variant, suite: Path) -> Timing:
    """Run ``suite`` once and return its times.

    Raises:
        SystemExit: with pytest's output, when a test did not pass.

    """
    # The suite is the working directory: pytest-monitor writes its database there.
    before, cpu_before = time.perf_counter(), children_cpu()
    done = subprocess.run(
        variant.command(suite),
        check=False,
        env=variant.environment(),
        cwd=suite,
        capture_output=True,
        text=True,
    )
    wall, cpu = time.perf_counter() - before, children_cpu() - cpu_before
    if done.returncode:
        raise SystemExit(f"{variant.name} failed:\n{done.stdout}{done.stderr}")
    return Timing(wall, cpu)


def children_cpu() -> float:
    """Return the CPU seconds of all processes that this one started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(
    compared: list[Variant], suites: dict[int, Path], rounds: int, peer_rounds: int
) -> list[Row]:
    """Run everything in turn, ``rounds`` times, and return one row per variant and size."""
    timings: dict[tuple[str, int], list[Timing]] = {}
    for number in range(rounds):
        for tests, suite in suites.items():
            for variant in compared:
                if variant.peer and (tests != PEER_TESTS or number >= peer_rounds):
                    continue
                timings.setdefault((variant.name, tests), []).append(run(variant, suite))
            print(f"round {number + 1} of {rounds}, {tests:,} tests", file=sys.stderr)
    return [
        row(variant, tests, timings[variant.name, tests], timings[variant.baseline, tests])
        for variant in compared
        for tests in suites
        if (variant.name, tests) in timings
    ]


def row(variant: Variant, tests: int, mine: list[Timing], baseline: list[Timing]) -> Row:
    """Return the medians of one variant at one size."""
    # Round by round: what slows the machine for a while slows both sides of a pair. A baseline
    # may have run in more rounds than its peer.
    pairs = list(zip(mine, baseline, strict=False))
    return Row(
        name=variant.name,
        tests=tests,
        seconds=statistics.median(timing.wall for timing in mine),
        extra_us=statistics.median(one.wall - base.wall for one, base in pairs) / tests * 1e6,
        ratio=statistics.median(one.wall / base.wall for one, base in pairs),
        cpu_ratio=min(timing.cpu for timing in mine) / min(timing.cpu for timing in baseline),
        baseline=variant.baseline,
        target=variant.target,
    )


def probe(variant: Variant, suite: Path, scratch: Path) -> dict[str, int]:
    """Return how many collections were asked for while tests ran, and if torch was imported."""
    report = scratch / "probe.json"
    environment = variant.environment(BENCH_PROBE=str(report))
    subprocess.run(
        variant.command(suite), env=environment, cwd=suite, capture_output=True, check=True
    )
    found: dict[str, int] = json.loads(report.read_text())
    return found


def import_ms(repeat: int = 9) -> float:
    """Return the least CPU milliseconds of importing the plugin where pytest is imported."""
    code = (
        "import time, pytest; start = time.process_time(); import pytest_gpumem.plugin;"
        "print((time.process_time() - start) * 1e3)"
    )
    command = [sys.executable, "-c", code]
    compiled = {name: value for name, value in os.environ.items() if name != DONT_WRITE}
    return min(
        float(subprocess.run(command, capture_output=True, check=True, env=compiled).stdout)
        for _ in range(repeat)
    )


def agent_ms(repeat: int = 40) -> tuple[float, float]:
    """Return what the agent adds to the start of an interpreter, least CPU milliseconds.

    In a child of a run on a simulated card, and in any other process.
    """
    child = {"GPUMEM_FAMILY": "1|/none/1:1-00|test_it", "GPUMEM_SIMULATE_CARD": "/none"}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for ours in (False, True) * repeat:
        before = children_cpu()
        environment = os.environ | (child if ours else {})
        subprocess.run([sys.executable, "-c", ""], env=environment, check=True)
        seconds[ours].append(children_cpu() - before)
    line = (Path(__file__).parents[2] / "pytest_gpumem.pth").read_text(encoding="utf-8")
    others = min(timeit.repeat(line, number=1_000, repeat=5))  # seconds for 1,000 are its ms
    return (min(seconds[True]) - min(seconds[False])) * 1e3, others


def print_table(rows: list[Row]) -> None:
    """Print the rows as a Markdown table."""
    print("| variant | tests | seconds | us more per test | ratio | CPU ratio | against | target |")
    print("|---|---:|---:|---:|---:|---:|---|---|")
    for each in rows:
        target = f"<= {each.target:.2f}" if each.target else ""
        print(
            f"| {each.name} | {each.tests:,} | {each.seconds:.2f} | {each.extra_us:.0f} "
            f"| {each.ratio:.2f} | {each.cpu_ratio:.2f} | {each.baseline} | {target} |"
        )


def sizes(text: str) -> list[int]:
    """Return the numbers of tests that ``text`` lists.

    Raises:
        ValueError: when one is no number.

    """
    return [int(part) for part in text.split(",")]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = ",".join(map(str, SIZES))
    parser.add_argument("--tests", type=sizes, default=default, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--peer-rounds", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--only", type=re.compile, metavar="REGEX", help="variants to run, beside their baselines"
    )
    parser.add_argument("--peers", type=Path, help="folder with pytest-memray and pytest-monitor")
    parser.add_argument("--pytest8", type=Path, help="folder with pytest 8, for pytest-monitor")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and return 0."""
    options = parse(argv)
    peers = options.peers and options.peers.resolve()
    pytest8 = options.pytest8 and options.pytest8.resolve()
    compared = chosen(variants(peers, pytest8), options.only)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        suites = {tests: write_suite(scratch / str(tests), tests) for tests in options.tests}
        smallest = suites[min(suites)]
        probes = {
            variant.name: probe(variant, smallest, scratch)
            for variant in compared
            if "gpumem" in variant.args and "xdist" not in variant.args
        }
        rows = measure(compared, suites, options.rounds, options.peer_rounds)
    machine = (
        f"{dt.datetime.now(dt.timezone.utc):%Y-%m-%d}, {os.cpu_count()} CPUs, "
        f"Python {platform.python_version()}, pytest {version('pytest')}, {options.rounds} rounds"
    )
    plugin_ms, (agent, others) = import_ms(), agent_ms()
    print(machine, end="\n\n")
    print_table(rows)
    print(f"\nImport of the plugin: {plugin_ms:.1f} ms (target: <= {IMPORT_TARGET_MS:.0f} ms).")
    print(
        f"The agent at the start of an interpreter: {agent:.2f} ms in a child of a run (target: "
        f"<= {AGENT_TARGET_MS:.0f} ms), {others * 1e3:.1f} us in any other process."
    )
    for name, found in probes.items():
        torch = "imported" if found["torch"] else "not imported"
        print(f"{name}: gc ran {found['collections']} times on request; torch {torch}.")
    if options.json:
        figures = {"machine": machine, "import_ms": plugin_ms, "agent_ms": agent, "probes": probes}
        figures["rows"] = [asdict(each) for each in rows]
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

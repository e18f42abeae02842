"""Measure how tests that share one card are spread over xdist workers, on sleeping tests.

The card is the simulated one without torch: a test takes its context and its peak from the card's
ledger, sleeps, and gives the peak back; what does not fit is an out-of-memory failure, as on a real
card. Everything else is real: pytest, xdist's workers, the scheduler, the learned history.

The suite: 4,479 tests in 150 modules, families of about six, log-normal durations, 15 % of them
on the card, in modules of their own or ``--shuffled``, with peaks of 50 MiB to 2 GiB on a card of
3.81 GiB with a context of 384 MiB per process. ``--gpu-factor 4`` makes the tests on the card four
times longer. Durations are scaled so that the lower bound, max(sum / workers, VRAM-time / room,
longest), is ``--seconds``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from pytest_gpumem.simulator.card import SharedCard
from pytest_gpumem.units import parse_bytes

MIB = 2**20
CARD = parse_bytes("3.81GiB")
CONTEXT = 384 * MIB
SEED = 1

CONFTEST = '''
import json, os, time
from pathlib import Path

import pytest

from pytest_gpumem.sharing import xdist_scheduler
from pytest_gpumem.sharing.history import History
from pytest_gpumem.simulator.card import SharedCard

HERE = Path(__file__).parent
POLICY = os.environ["BENCH_POLICY"]
PLAN = json.loads((HERE / "plan.json").read_text())
CARD = SharedCard.open(HERE / "card")
LOG = open(HERE / f"log-{os.getpid()}", "w", buffering=1)


class OutOfMemoryError(RuntimeError):
    pass


def work(number, properties):
    """Sleep as long as the test takes, holding its bytes; note when."""
    duration, peak = PLAN[number]
    asked = time.monotonic()
    if peak and POLICY == "filelock":
        from filelock import FileLock

        with FileLock(HERE / "lock"):
            use(asked, duration, peak, properties)
    else:
        use(asked, duration, peak, properties)


def use(asked, duration, peak, properties):
    begun = time.monotonic()
    oom = bool(peak) and not (CARD.join() and CARD.reserve(peak))
    if not oom:
        time.sleep(duration)
        if peak:
            CARD.release(peak)
    LOG.write(json.dumps({"asked": asked, "begun": begun, "ended": time.monotonic()}) + "\\n")
    if oom:
        raise OutOfMemoryError("CUDA out of memory")
    if peak:
        usage = {"card": CARD.uuid, "reserved_peak": peak}
        record = json.dumps({"cards": [usage], "fixtures": [], "oom": ""})
        properties.append(("gpumem_record", record))


def marked(items):
    """Tests on the card are marked with gpu(), which does not say how much they take."""
    numbers = [item.callspec.params["number"] for item in items]
    return [
        (index, None, 1, False)
        for index, number in enumerate(numbers)
        if PLAN[number][1] and POLICY != "gpumem-unmarked"
    ]


@pytest.fixture(scope="module", autouse=True)
def set_up():
    LOG.write('{"set_up": 1}\\n')


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if POLICY == "group" and PLAN[item.callspec.params["number"]][1]:
            item.add_marker(pytest.mark.xdist_group("gpu"))


def pytest_configure(config):
    if not POLICY.startswith("gpumem"):
        return
    if hasattr(config, "workerinput"):
        plugin = xdist_scheduler.worker_plugin(
            config,
            needs=marked,
            cards=lambda: [(CARD.uuid, CARD.total, CARD.total - CARD.free(), 0)],
            holding=lambda: {CARD.uuid: (CARD.context, 0)} if CARD.joined else {},
            release=lambda: None,
            is_oom=lambda error: isinstance(error, OutOfMemoryError),
        )
    else:
        settings = xdist_scheduler.SchedulerSettings(
            CARD.context, 0, optimistic=POLICY == "gpumem-optimistic"
        )
        history = History.load(HERE / "history.json")
        config.pluginmanager.register(Learning(history))
        plugin = xdist_scheduler.controller_plugin(config, history.expect, settings)
    config.pluginmanager.register(plugin)


class Learning:
    def __init__(self, history):
        self.history = history

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            # The record comes with the call already: no fixture adds to it.
            record = dict(report.user_properties).get("gpumem_record")
            peak = json.loads(record)["cards"][0]["reserved_peak"] if record else 0
            self.history.note(report.nodeid, peak, report.duration, bool(record))

    def pytest_sessionfinish(self):
        self.history.save(HERE / "history.json")
'''

MODULE = """
import pytest
from conftest import work

{tests}
"""

TEST = """
@pytest.mark.parametrize("number", {numbers})
def test_{name}(number, request):
    work(number, request.node.user_properties)
"""


class Job(NamedTuple):
    """One test of the suite: seconds, and bytes on the card (0: none)."""

    duration: float
    peak: int


class Policy(NamedTuple):
    """One way to run the suite."""

    name: str
    key: str
    args: tuple[str, ...] = ()
    forget: bool = False
    """Whether nothing has been learned before."""


POLICIES = (
    Policy("load, no control", "load"),
    Policy("load, `FileLock` in a fixture", "filelock"),
    Policy("loadgroup, all GPU tests in one `xdist_group`", "group", ("--dist", "loadgroup")),
    Policy("scheduler, first run", "gpumem", forget=True),
    Policy("scheduler, second run", "gpumem"),
    Policy("scheduler, first run, optimistic", "gpumem-optimistic", forget=True),
    Policy("scheduler, first run, no marks", "gpumem-unmarked", forget=True),
)


@dataclass(frozen=True)
class Row:
    """The figures of one run."""

    name: str
    passed: int
    failed: int
    retried: int
    bound_ratio: float
    """Makespan, from the first test's start to the last one's end, over the lower bound."""
    idle: float
    """Share of the workers' time in which no test ran."""
    blocked: float
    """Share of the workers' time in which a test waited for the lock."""
    set_ups: int


def make_tests(count: int, modules: int, gpu_factor: float, *, shuffled: bool) -> list[list[Job]]:
    """Return the tests of each module, not yet scaled."""
    rng = random.Random(SEED)  # noqa: S311  # the same suite every time
    found = [
        Job(rng.lognormvariate(-1.0, 1.2), _peak(rng) if number < 0.15 * count else 0)
        for number in range(count)
    ]
    found = [
        test._replace(duration=test.duration * (gpu_factor if test.peak else 1)) for test in found
    ]
    if shuffled:
        rng.shuffle(found)
    size = -(-count // modules)
    parts = [found[start : start + size] for start in range(0, count, size)]
    rng.shuffle(parts)
    return parts


def _peak(rng: random.Random) -> int:
    """Return 50 MiB to 2 GiB, log-uniform."""
    return int(50 * MIB * (2048 / 50) ** rng.random())


def lower_bound(tests: list[Job], workers: int) -> float:
    """Return the least seconds any schedule can take."""
    work = sum(test.duration for test in tests) / workers
    area = sum(test.duration * test.peak for test in tests) / (CARD - CONTEXT)
    return max(work, area, *(test.duration for test in tests))


def write_suite(folder: Path, parts: list[list[Job]], scale: float) -> None:
    """Write the suite, with its durations multiplied by ``scale``."""
    tests = [test for part in parts for test in part]
    plan = [(test.duration * scale, test.peak) for test in tests]
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text("[pytest]\n")
    first = 0
    for number, part in enumerate(parts):
        families = [
            range(start, min(start + 6, first + len(part)))
            for start in range(first, first + len(part), 6)
        ]
        text = "".join(
            TEST.format(numbers=list(numbers), name=f"family_{numbers[0]}") for numbers in families
        )
        (folder / f"test_module_{number:03}.py").write_text(MODULE.format(tests=text))
        first += len(part)


def run(policy: Policy, suite: Path, workers: int, bound: float) -> Row:
    """Run the suite once.

    Raises:
        SystemExit: with pytest's output, when it did not come to its end.

    """
    for path in (*suite.glob("log-*"), *suite.glob("card*")):
        path.unlink()
    if policy.forget:
        (suite / "history.json").unlink(missing_ok=True)
    SharedCard.create(suite / "card", total=CARD, context=CONTEXT).close()
    # Of the installed plugins only those that the suite is about.
    plugins = ("-p", "xdist", "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", "-q", *plugins, f"-n{workers}", *policy.args]
    environment = os.environ | {"BENCH_POLICY": policy.key, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [*command, str(suite)],
        cwd=suite,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1):
        raise SystemExit(f"{policy.name} failed:\n{done.stdout}{done.stderr}")
    return read(policy, suite, done.stdout, workers, bound)


def read(policy: Policy, suite: Path, output: str, workers: int, bound: float) -> Row:
    """Return the figures that a run left."""
    lines: list[dict[str, Any]] = [
        json.loads(line) for path in suite.glob("log-*") for line in path.read_text().splitlines()
    ]
    ran = [line for line in lines if "begun" in line]
    makespan = max(line["ended"] for line in ran) - min(line["asked"] for line in ran)
    busy = sum(line["ended"] - line["begun"] for line in ran)
    blocked = sum(line["begun"] - line["asked"] for line in ran)
    last = output.strip().splitlines()[-1]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", last)}
    return Row(
        name=policy.name,
        passed=counts.get("passed", 0),
        failed=counts.get("failed", 0),
        retried=counts.get("rerun", 0),
        bound_ratio=makespan / bound,
        idle=1 - (busy + blocked) / (workers * makespan),
        blocked=blocked / (workers * makespan),
        set_ups=sum("set_up" in line for line in lines),
    )


def print_table(rows: list[Row]) -> None:
    """Print the rows as a Markdown table."""
    print(
        "| policy | passed | OOM | retried | makespan / bound | idle | blocked | module set-ups |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row.name} | {row.passed} | {row.failed} | {row.retried} | {row.bound_ratio:.3f} "
            f"| {row.idle:.1%} | {row.blocked:.1%} | {row.set_ups} |"
        )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tests", type=int, default=4479, help="default: %(default)s")
    parser.add_argument("--modules", type=int, default=150, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=30.0, help="lower bound of a run")
    parser.add_argument("--gpu-factor", type=float, default=1.0, help="4: GPU tests 4x longer")
    parser.add_argument("--shuffled", action="store_true", help="GPU tests in all modules")
    parser.add_argument("--quick", action="store_true", help="400 tests in 20 modules, 3 seconds")
    parser.add_argument("--only", metavar="WORD", default="", help="policies whose name has it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and return 0."""
    options = parse(argv)
    if options.quick:
        options.tests, options.modules, options.seconds = 400, 20, 3.0
    parts = make_tests(
        options.tests, options.modules, options.gpu_factor, shuffled=options.shuffled
    )
    tests = [test for part in parts for test in part]
    scale = options.seconds / lower_bound(tests, options.workers)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        suite = Path(name)
        write_suite(suite, parts, scale)
        for policy in POLICIES:
            if options.only in policy.name:
                rows.append(run(policy, suite, options.workers, options.seconds))
                print(f"done: {policy.name}", file=sys.stderr)
    on_card = sum(test.duration for test in tests if test.peak)
    share = on_card / sum(test.duration for test in tests)
    print(
        f"{os.cpu_count()} CPUs, Python {platform.python_version()}, pytest {version('pytest')}, "
        f"xdist {version('pytest-xdist')}: {options.tests} tests in {len(parts)} modules, "
        f"{share:.0%} of their time on the card, {options.workers} workers, lower bound "
        f"{options.seconds:.0f} s\n"
    )
    print_table(rows)
    if options.json:
        options.json.write_text(json.dumps([row.__dict__ for row in rows], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

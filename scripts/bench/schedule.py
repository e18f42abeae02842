"""Measure how tests that share one card are spread over xdist workers, on sleeping tests.

The card is the simulated one without torch: a test takes its context and its peak from the card's
ledger, sleeps, and gives the peak back; what does not fit is an out-of-memory failure, as on a real
card. Everything else is real: pytest, xdist's workers, the scheduler, the leases, the learned
history. The suite is that of ``scenario.py``, scaled so that its lower bound is ``--seconds``.

The first row, plain ``--dist load`` on a card that is never full, is what pytest and xdist cost by
themselves; what a policy loses by waiting is the difference to it.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from pytest_gpumem.simulator.card import SharedCard

sys.path.insert(0, str(Path(__file__).parent))

from scenario import CARD, CONTEXT, Case, Scenario

ENDLESS = 2**50
"""Bytes of a card that is never full."""

CONFTEST = '''
import json, os, time
from pathlib import Path

import pytest
from pytest_gpumem.plugin.state import GRANT
from without_torch import ALLOCATOR

HERE = Path(__file__).parent
POLICY = os.environ["BENCH_POLICY"]
PLAN = json.loads((HERE / "plan.json").read_text())
LOG = open(HERE / f"log-{os.getpid()}", "w", buffering=1)


def work(number, before):
    duration, peak = PLAN[number]
    asked = time.monotonic()
    if peak and POLICY == "filelock":
        from filelock import FileLock

        with FileLock(HERE / "lock"):
            use(asked, number)
    else:
        use(before, number)


def use(asked, number):
    duration, peak = PLAN[number]
    begun = time.monotonic()
    try:
        if peak:
            ALLOCATOR.take(peak)
            time.sleep(duration)
            ALLOCATOR.give(peak)
        else:
            time.sleep(duration)
    finally:
        told = {"test": number, "asked": asked, "begun": begun, "ended": time.monotonic()}
        LOG.write(json.dumps(told) + "\\n")


@pytest.fixture(scope="module", autouse=True)
def set_up():
    LOG.write('{"set_up": 1}\\n')


@pytest.fixture
def before(request):
    """When the test would have begun without its lease, for which it waits before its set-up."""
    grant = request.node.stash.get(GRANT, None)
    return time.monotonic() - (grant.waited if grant else 0.0)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        _, peak = PLAN[item.callspec.params["number"]]
        if peak and POLICY == "group":
            item.add_marker(pytest.mark.xdist_group("gpu"))
        elif peak and POLICY in ("gpumem-known", "gpumem-leases"):
            item.add_marker(pytest.mark.gpu(vram=peak))
        elif peak and POLICY != "gpumem-unmarked":
            item.add_marker(pytest.mark.gpu)
'''

MODULE = """
import pytest
from conftest import work

{tests}
"""

TEST = """
@pytest.mark.parametrize("number", {numbers})
def {name}(number, before):
    work(number, before)
"""


class Policy(NamedTuple):
    """One way to run the suite."""

    name: str
    key: str
    args: tuple[str, ...] = ()
    forget: bool = True
    """Whether nothing has been learned before."""
    card: int = CARD


OURS = ("-p", "gpumem", "--gpumem-history=history.json", "--gpumem-headroom=0B")
BASIS = Policy("load, card never full", "load", card=ENDLESS)
"""What the others are compared with."""
POLICIES = (
    Policy("load, no control", "load"),
    Policy("load, `FileLock` around each", "filelock"),
    Policy("loadgroup, one `xdist_group` (*)", "group", ("--dist", "loadgroup")),
    Policy("load, our leases, peaks marked", "gpumem-leases", (*OURS, "--gpumem-schedule=off")),
    Policy("scheduler, first run", "gpumem", OURS),
    Policy("scheduler, second run", "gpumem", OURS, forget=False),
    Policy("scheduler, first run, peaks marked", "gpumem-known", OURS),
    Policy("scheduler, first run, no marks", "gpumem-unmarked", OURS),
)
"""In this order: the second run knows what the one before it taught."""
FOOTNOTE = "(*) xdist 3.8 does not group under pytest 9.2: pytest-xdist#1386."


@dataclass(frozen=True)
class Row:
    """The figures of one run."""

    name: str
    passed: int
    failed: int
    retried: int
    makespan: float
    """Seconds from the first test's start to the last one's end."""
    idle: float
    """Share of the workers' time in which no test ran."""
    idle_ms: float
    """The same in milliseconds per test."""
    blocked: float
    """Share of the workers' time in which a test waited for the lock."""
    set_ups: int


def write_suite(folder: Path, cases: Sequence[Case]) -> None:
    """Write the suite."""
    (folder / "plan.json").write_text(json.dumps([(case.duration, case.peak) for case in cases]))
    (folder / "conftest.py").write_text(CONFTEST)
    shutil.copy(Path(__file__).with_name("without_torch.py"), folder)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    numbered = list(enumerate(cases))
    for module, own in groupby(numbered, lambda each: each[1].module):
        tests = "".join(
            TEST.format(name=family, numbers=[number for number, _ in kin])
            for family, kin in groupby(own, lambda each: each[1].family)
        )
        (folder / f"{module}.py").write_text(MODULE.format(tests=tests))


def run(policy: Policy, suite: Path, workers: int) -> Row:
    """Run the suite once.

    Raises:
        SystemExit: with pytest's output, when it did not come to its end.

    """
    for path in (*suite.glob("log-*"), *suite.glob("card*")):
        path.unlink()
    if policy.forget:
        (suite / "history.json").unlink(missing_ok=True)
    SharedCard.create(suite / "card", total=policy.card, context=CONTEXT).close()
    # Of the installed plugins only those that the suite is about.
    plugins = ("-p", "xdist", "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", "-q", *plugins, f"-n{workers}", *policy.args]
    environment = os.environ | {
        "BENCH_POLICY": policy.key,
        "GPUMEM_SIMULATE_CARD": str(suite / "card"),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONDONTWRITEBYTECODE": "",
    }
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
    return read(policy, suite, done.stdout, workers)


def read(policy: Policy, suite: Path, output: str, workers: int) -> Row:
    """Return the figures that a run left."""
    lines: list[dict[str, Any]] = [
        json.loads(line) for path in suite.glob("log-*") for line in path.read_text().splitlines()
    ]
    ran = [line for line in lines if "begun" in line]
    makespan = max(line["ended"] for line in ran) - min(line["asked"] for line in ran)
    busy = sum(line["ended"] - line["begun"] for line in ran)
    blocked = sum(line["begun"] - line["asked"] for line in ran)
    idle = workers * makespan - busy - blocked
    last = output.strip().splitlines()[-1]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", last)}
    return Row(
        name=policy.name,
        passed=counts.get("passed", 0),
        failed=counts.get("failed", 0) + counts.get("errors", 0) + counts.get("error", 0),
        retried=counts.get("rerun", 0),
        makespan=makespan,
        idle=idle / (workers * makespan),
        idle_ms=1000 * idle / len(ran),
        blocked=blocked / (workers * makespan),
        set_ups=sum("set_up" in line for line in lines),
    )


def measure(scenario: Scenario, options: argparse.Namespace) -> Iterator[Row]:
    """Yield the figures of each policy, that of plain load first."""
    with tempfile.TemporaryDirectory() as name:
        suite = Path(name)
        write_suite(suite, scenario.cases(options.workers, options.seconds))
        for policy in (BASIS, *POLICIES):
            if policy is BASIS or any(word in policy.name for word in options.only or [""]):
                yield run(policy, suite, options.workers)
                print(f"done: {policy.name}", file=sys.stderr)


def print_table(rows: Sequence[Row], bound: float) -> None:
    """Print the rows as a Markdown table; ratios are to the bound and to the first row."""
    basis = rows[0]
    titles = (
        *("policy", "passed", "OOM", "retried", "of bound", "of load"),
        *("idle", "idle a test", "blocked", "set-ups", "of load"),
    )
    print("| " + " | ".join(titles) + " |")
    print("|---|" + "---:|" * (len(titles) - 1))
    for row in rows:
        print(
            f"| {row.name} | {row.passed} | {row.failed} | {row.retried} "
            f"| {row.makespan / bound:.3f} | {row.makespan / basis.makespan:.3f} "
            f"| {row.idle:.1%} | {row.idle_ms:.2f} ms | {row.blocked:.1%} "
            f"| {row.set_ups} | {row.set_ups / basis.set_ups:.2f} |"
        )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="all four scenarios, in ~25 minutes")
    parser.add_argument("--gpu-factor", type=float, default=1.0, help="4: GPU tests 4x longer")
    parser.add_argument("--shuffled", action="store_true", help="GPU tests in all modules")
    parser.add_argument("--unrelated", action="store_true", help="peaks differ within families")
    parser.add_argument("--tests", type=int, default=4479, help="default: %(default)s")
    parser.add_argument("--modules", type=int, default=150, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=30.0, help="lower bound of a run")
    parser.add_argument("--quick", action="store_true", help="400 tests in 20 modules, 3 seconds")
    parser.add_argument("--only", metavar="WORD", action="append", help="policies named so")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and return 0."""
    options = parse(argv)
    if options.quick:
        options.tests, options.modules, options.seconds = 400, 20, 3.0
    mixes = [(options.gpu_factor, options.shuffled)]
    if options.all:
        mixes = [(factor, shuffled) for factor in (1, 4) for shuffled in (False, True)]
    print(
        f"{dt.date.today()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, "
        f"pytest {version('pytest')}, xdist {version('pytest-xdist')}: {options.tests} tests in "
        f"{options.modules} modules, {options.workers} workers, lower bound {options.seconds:g} s"
    )
    found = {}
    for factor, shuffled in mixes:
        scenario = Scenario(factor, shuffled, options.unrelated, options.tests, options.modules)
        cases = scenario.cases(options.workers, options.seconds)
        share = sum(case.duration for case in cases if case.peak) / (
            sum(case.duration for case in cases)
        )
        rows = list(measure(scenario, options))
        print(f"\n{scenario}: {share:.0%} of the time is on the card\n")
        print_table(rows, options.seconds)
        print(f"\n{FOOTNOTE}", flush=True)
        found[str(scenario)] = [row.__dict__ for row in rows]
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

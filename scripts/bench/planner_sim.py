"""How near to the shortest possible run the planner comes, in simulation; or what it costs.

The suite of ``scenario.py`` runs on 4 simulated workers, without pytest: all that is lost is lost
by the policy. V1 is its mix; in V2 the GPU tests last 4 times as long. ``--scale`` measures the
planner itself instead: time per decision and memory with 100,000 tests, 64 workers and 8 cards.

Baselines: round-robin; xdist's own ``--dist load`` scheduler; the same with one lock around every
GPU test. A test that starts when the card has no room for it runs out of memory at once.
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
import sys
import time
import tracemalloc
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpumem.scheduling.commands import Run
from pytest_gpumem.scheduling.estimates import PlannedTest
from pytest_gpumem.scheduling.history import History
from pytest_gpumem.scheduling.planner import Planner
from pytest_gpumem.scheduling.simulation import Actual, Host, Machine, Result, simulate

sys.path.insert(0, str(Path(__file__).parent))

import scenario
from scenario import CARD, CONTEXT, MIB, Scenario

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

GIB = 2**30
SECONDS = 1_350.0
WORKERS = 4
MACHINE = Machine(CARD, CONTEXT, WORKERS, oom_part=0.1)


def suite(seed: int, *, factor: float, clustered: bool, unrelated: bool) -> list[Actual]:
    """Return the suite; GPU tests last ``factor`` times as long."""
    mix = Scenario(factor, not clustered, unrelated, seed=seed)
    return [
        Actual(f"{module}.py::{family}[{number}]", module, peak > 0, duration, peak)
        for number, (module, family, duration, peak) in enumerate(mix.cases(WORKERS, SECONDS))
    ]


def again(cases: Sequence[Actual], seed: int) -> list[Actual]:
    """Return the suite as it is another time: peaks vary by 3 %, durations by 25 %."""
    rng = random.Random(seed)  # noqa: S311  # a scenario, no secret
    return [
        case._replace(
            peak=round(case.peak * rng.lognormvariate(0, 0.03)),
            duration=case.duration * rng.lognormvariate(0, 0.25),
        )
        for case in cases
    ]


def bound(cases: Sequence[Actual]) -> float:
    """Return the seconds that no schedule can go below."""
    return scenario.lower_bound(
        [scenario.Case(c.module, "", c.duration, c.peak) for c in cases], WORKERS
    )


class Locked(Host):
    """Workers of which one at a time runs a GPU test, as a lock in a fixture has it."""

    def __init__(self, tests: Sequence[Actual], machine: Machine) -> None:
        super().__init__(tests, machine)
        self._lock: deque[int] = deque()
        """Workers that hold or wait for it."""

    def begin(self, worker: int) -> None:
        """Let a test begin once its worker has the lock, if it is a GPU test."""
        if self.tests[self.queues[worker][0]].gpu and worker not in self._lock:
            self._lock.append(worker)
            if self._lock[0] != worker:
                return
        super().begin(worker)

    def step(self) -> tuple[int, int, bool]:
        """Let the next test end, and the next one have the lock."""
        worker, test, oom = super().step()
        if self.tests[test].gpu:
            self._lock.popleft()
            if self._lock:
                super().begin(self._lock[0])
        return worker, test, oom


def planned(
    cases: Sequence[Actual], history: History | None, *, marked: bool = True
) -> list[PlannedTest]:
    """Return what the planner is told: the truth, or what ``history`` and marks say."""
    if history is None:
        return [PlannedTest(c.nodeid, c.gpu, c.peak, c.duration, c.module) for c in cases]
    tests = []
    for case in cases:
        expected = history.expect(case.nodeid)
        tests.append(
            PlannedTest(
                case.nodeid,
                expected.gpu or (marked and case.gpu),
                expected.peak,
                expected.duration,
                case.module,
                seen=expected.source == "learned",
            )
        )
    return tests


def run_planner(
    cases: Sequence[Actual],
    history: History | None,
    *,
    marked: bool = True,
) -> tuple[Result, History]:
    """Return the run under the planner, and what it taught."""
    tests = planned(cases, history, marked=marked)
    result = simulate(tests, cases, MACHINE)
    learned = History()
    for case in (cases[test] for test in result.ended):
        learned.note(case.nodeid, case.peak, case.duration, case.gpu)
    return result, learned


def _result(host: Host) -> Result:
    """Return a run in which each test without room fails."""
    return Result(host.now, host.ooms, (-1,) * host.ooms, setups=host.setups)


class _Config:
    """As much of pytest's configuration as xdist's scheduler reads."""

    def getvalue(self, _name: str) -> list[str]:
        return ["popen"] * WORKERS

    def getoption(self, _name: str) -> None:
        return None


class _Silence:
    """A log that nobody reads."""

    def __init__(self) -> None:
        self.loadsched = lambda *_: None


class _Gateway(NamedTuple):
    id: str


class _Node:
    """As much of a worker as xdist's scheduler sees."""

    def __init__(self, number: int, queue: deque[int]) -> None:
        self.number = number
        self.gateway = _Gateway(f"gw{number}")
        self.shutting_down = False
        self.sent = queue

    def send_runtest_some(self, indexes: Sequence[int]) -> None:
        self.sent.extend(indexes)

    def shutdown(self) -> None:
        self.shutting_down = True


def run_load(cases: Sequence[Actual], *, locked: bool = False) -> Result:
    """Return the run under xdist's own scheduler, with one lock for GPU tests if ``locked``."""
    from xdist.scheduler import LoadScheduling  # type: ignore[import-untyped]

    host = Locked(cases, MACHINE) if locked else Host(cases, MACHINE)
    sent: list[deque[int]] = [deque() for _ in range(WORKERS)]
    nodes: list[Any] = [_Node(number, sent[number]) for number in range(WORKERS)]
    config: Any = _Config()
    silence: Any = _Silence()
    scheduler = LoadScheduling(config, silence)
    for node in nodes:
        scheduler.add_node(node)
        scheduler.add_node_collection(node, [case.nodeid for case in cases])
    scheduler.schedule()
    while True:
        for worker, node in enumerate(nodes):
            # A worker starts a test when it knows the one after it, or that there is none.
            ready = len(sent[worker]) > 1 or (node.shutting_down and sent[worker])
            if ready and not host.running[worker]:
                host.queues[worker].append(sent[worker].popleft())
            host.start(worker)
        if not host.ends:
            break
        worker, test, _ = host.step()
        scheduler.mark_test_complete(nodes[worker], test, 0)
    return _result(host)


def run_round_robin(cases: Sequence[Actual]) -> Result:
    """Return the run where test after test goes to worker after worker."""
    host = Host(cases, MACHINE)
    for test in range(len(cases)):
        host.queues[test % WORKERS].append(test)
    while True:
        for worker in range(WORKERS):
            host.start(worker)
        if not host.ends:
            return _result(host)
        host.step()


POLICIES: dict[str, Callable[[list[Actual], int], Result]] = {
    "round-robin": lambda cases, _: run_round_robin(cases),
    "load": lambda cases, _: run_load(cases),
    "load + exclusive lock": lambda cases, _: run_load(cases, locked=True),
    "planner, known": lambda cases, _: run_planner(cases, None)[0],
    "planner, first run": lambda cases, _: run_planner(cases, History())[0],
    "planner, first run, no marks": lambda cases, _: run_planner(cases, History(), marked=False)[0],
    "planner, second run": lambda cases, seed: run_planner(
        cases, run_planner(again(cases, seed), History())[1]
    )[0],
}


def compare(seeds: int, *, unrelated: bool) -> None:
    """Print the table of all policies on all mixes."""
    print(f"{'mix':<14}{'policy':<32}{'of bound: mean':>15}{'max':>7}", end="")
    print(f"{'OOMs':>7}{'failed':>8}{'set-ups':>9}{'of load':>9}")
    for factor, clustered in ((1, True), (1, False), (4, True), (4, False)):
        suites = [
            suite(seed, factor=factor, clustered=clustered, unrelated=unrelated)
            for seed in range(seeds)
        ]
        load = statistics.fmean(run_load(cases).setups for cases in suites)
        mix = f"V{1 if factor == 1 else 2} {'clustered' if clustered else 'shuffled'}"
        for name, policy in POLICIES.items():
            results = [policy(cases, seed) for seed, cases in enumerate(suites)]
            ratios = [r.seconds / bound(c) for r, c in zip(results, suites, strict=True)]
            setups = statistics.fmean(result.setups for result in results)
            print(
                f"{mix:<14}{name:<32}{statistics.fmean(ratios):>15.3f}{max(ratios):>7.3f}"
                f"{statistics.fmean(r.ooms for r in results):>7.1f}"
                f"{statistics.fmean(len(r.felled) for r in results):>8.1f}"
                f"{setups:>9.0f}{setups / load:>9.2f}"
            )


def large_run(tests: int) -> list[PlannedTest]:
    """Return so many known tests, 40 % on the card, with peaks of 1 to 50 GiB."""
    rng = random.Random(0)  # noqa: S311  # a scenario, no secret
    return [
        PlannedTest(
            f"tests/test_{test // 30}.py::test_{test // 6}[{test % 6}]",
            gpu := rng.random() < 0.4,
            round(GIB * 50 ** rng.random()) if gpu else None,
            rng.lognormvariate(0, 1.0),
            f"tests/test_{test // 30}.py",
        )
        for test in range(tests)
    ]


def large_planner(tests: Sequence[PlannedTest], workers: int, cards: int) -> Planner:
    """Return a planner of ``tests`` with its workers."""
    keys = [("", f"GPU-{card}") for card in range(cards)]
    totals = dict.fromkeys(keys, 80 * GIB)
    planner = Planner(tests, totals, context=GIB // 2, headroom=GIB // 2)
    for worker in range(workers):
        first = worker % cards
        planner.add_worker(str(worker), keys[first:] + keys[:first])
    return planner


def scale(count: int, workers: int, cards: int) -> None:
    """Print what the planner itself takes on a large run of known tests."""
    tests = large_run(count)
    tracemalloc.start()
    planner = large_planner(tests, workers, cards)
    planner.commands()
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    planner = large_planner(tests, workers, cards)
    began = time.perf_counter()
    pending = planner.commands()
    first = time.perf_counter() - began
    ends: list[tuple[float, int, str]] = []
    free = dict.fromkeys(map(str, range(workers)), 0.0)
    now = 0.0
    taken: list[float] = []
    while True:
        for command in pending:
            if isinstance(command, Run):
                free[command.worker] = max(now, free[command.worker])
                free[command.worker] += tests[command.test].duration
                heapq.heappush(ends, (free[command.worker], command.test, command.worker))
        if not ends:
            break
        now, test, name = heapq.heappop(ends)
        began = time.perf_counter()
        planner.finished(name, test, duration=tests[test].duration, peak=tests[test].peak)
        pending = planner.commands()
        taken.append(time.perf_counter() - began)
    if not planner.done:
        raise SystemExit("the planner is stuck")
    taken.sort()
    p50, p99 = (taken[int(share * len(taken))] * 1e6 for share in (0.5, 0.99))
    total = sum(test.duration for test in tests)
    print(f"{count} tests, {workers} workers, {cards} cards of 80 GiB")
    print(f"first commands: {first:.2f} s; peak memory: {memory / MIB:.1f} MiB")
    print(
        f"a decision: p50 {p50:.0f} us, p99 {p99:.0f} us, max {taken[-1] * 1e3:.2f} ms; "
        f"{sum(taken) / count * 1e6:.1f} us a test"
    )
    print(f"makespan / (all time / workers): {now / (total / workers):.3f}")


def main() -> None:
    """Run the comparison, or the measurement of the planner itself."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--unrelated", action="store_true", help="peaks differ within families")
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--tests", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--cards", type=int, default=8)
    args = parser.parse_args()
    if args.scale:
        scale(args.tests, args.workers, args.cards)
    else:
        compare(args.seeds, unrelated=args.unrelated)


if __name__ == "__main__":
    main()

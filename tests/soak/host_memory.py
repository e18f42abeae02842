"""How many workers ``-n auto`` starts for generated suites, against the best number.

Each suite is run by the planner on simulated workers, with each number of them; a worker keeps some
main memory, a test takes some. The best number is the least whose run is within 2 % of the shortest
one. Right is a number within one of the best, or whose run is within 5 % of the shortest: on a
plateau all numbers are equal. What is reckoned with is a model: one suite in twenty may be wrong.

    python tests/soak/host_memory.py --suites 100
"""

from __future__ import annotations

import argparse
import heapq
import random
import sys

from pytest_gpumem.devices.host import Host
from pytest_gpumem.scheduling.commands import Flush, Reset, Run
from pytest_gpumem.scheduling.estimates import PlannedTest
from pytest_gpumem.scheduling.history import Learned
from pytest_gpumem.scheduling.planner import Planner
from pytest_gpumem.scheduling.workers import worker_count

MIB = 2**20
MOST = 16
"""CPUs."""


def suite(seed: int) -> tuple[list[PlannedTest], int, int]:
    """Return tests, the bytes that a worker keeps, and those of the machine."""
    rng = random.Random(seed)  # noqa: S311  # the same suites each time
    room = rng.choice([1, 2, 4, 8, 16]) * 1024
    each = rng.choice([40, 100, 300, 900])
    kinds = [(rng.choice([0, 5, 50, 200]), rng.uniform(0.05, 2)) for _ in range(3)]
    kinds += [
        (rng.uniform(0.1, 0.9) * room, rng.uniform(0.2, 8)) for _ in range(rng.choice([0, 1, 2]))
    ]
    tests = []
    for number in range(rng.randint(20, 150)):
        ram, seconds = rng.choice(kinds[:3]) if rng.random() < 0.8 else rng.choice(kinds)
        ram, seconds = int(ram * rng.uniform(0.8, 1.2)) * MIB, seconds * rng.uniform(0.5, 1.5)
        module = f"m{number % 5}.py"
        tests.append(PlannedTest(f"{module}::t{number}", False, None, seconds, module, ram=ram))
    return tests, each * MIB, room * MIB


def run(tests: list[PlannedTest], workers: int, room: int) -> float:
    """Return the seconds of a run in which tests may take ``room`` bytes beside the workers."""
    planner = Planner(tests, {}, context=0, headroom=0, rooms={"": max(0, room)})
    names = [f"w{number}" for number in range(workers)]
    for name in names:
        planner.add_worker(name, [])
    queues: dict[str, list[int]] = {name: [] for name in names}
    ends: list[tuple[float, str]] = []
    running: set[str] = set()
    now = 0.0
    while not planner.done:
        for command in planner.commands():
            if isinstance(command, Run):
                queues[command.worker].append(command.test)
            elif isinstance(command, Flush | Reset):
                planner.flushed(command.worker)
        for name in names:
            if queues[name] and name not in running:
                running.add(name)
                heapq.heappush(ends, (now + tests[queues[name][0]].duration, name))
        taken = sum(tests[queues[name][0]].ram for name in running)
        largest = max((tests[queues[name][0]].ram for name in running), default=0)
        assert taken <= room or largest > room * 7 // 8, "more than there is"
        if ends:
            now, name = heapq.heappop(ends)
            running.remove(name)
            test = queues[name].pop(0)
            planner.finished(name, test, duration=tests[test].duration, peak=0)
    return now


def main() -> int:
    """Compare the numbers; return 1 if too many are wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--suites", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    wrong = near = 0
    for seed in range(options.seed, options.seed + options.suites):
        tests, each, room = suite(seed)
        known = [Learned(0, test.duration, 1, gpu=False, ram=test.ram) for test in tests]
        told = worker_count(
            MOST,
            Host(MOST, room),
            (),
            known,
            context=0,
            headroom=0,
            scheduled=True,
            each_ram=each,
            packs_ram=True,
        )
        assert told is not None
        counts = range(1, min(MOST, max(1, room // each)) + 1)
        largest = max(test.ram for test in tests)
        able = [count for count in counts if count == 1 or room - count * each >= largest]
        seconds = {count: run(tests, count, room - count * each) for count in able}
        shortest = min(seconds.values())
        best = min(count for count in able if seconds[count] <= 1.02 * shortest)
        ours = seconds.get(told.workers, float("inf"))
        close = abs(told.workers - best) <= 1
        near += close
        right = close or ours <= 1.05 * shortest
        wrong += not right
        print(
            f"{seed:4} {len(tests):4} tests, {each / MIB:4.0f} MiB a worker, {room >> 30:3} GiB: "
            f"{told.workers:2} workers {ours:7.1f} s, best {best:2} {shortest:7.1f} s"
            f"{'' if right else '  WRONG'}"
        )
    print(f"{near} of {options.suites} within one worker of the best; {wrong} wrong")
    return wrong > options.suites // 20


if __name__ == "__main__":
    sys.exit(main())

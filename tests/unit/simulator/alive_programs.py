"""Random programs, each with a ledger of what every line of it had alive at its peak.

The ledger knows sizes from what the program asked for, and nothing of the allocator. It is set
against what a recorded test is told to have had alive.
"""

from __future__ import annotations

import contextlib
import gc
import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytest_gpumem.tracking.tracker import Tracker

MIB = 2**20
SIZES = (1, 511, 512, 513, 1000, 4096, 70_000, MIB - 1, MIB, MIB + 1, 3 * MIB, 11 * MIB)
MOST = 400 * MIB
TEST, EARLIER = "test_it.py::test_it", "test_it.py::test_before"


class Ledger:
    """What is alive, and what was at the peak of the test's own turns."""

    def __init__(self) -> None:
        self.alive: dict[int, tuple[str, str, int]] = {}
        self.owner = "this test"
        self.peak = -1
        self.at_peak: Counter[tuple[str, str]] = Counter()
        self._next = 0

    @property
    def size(self) -> int:
        return sum(size for _, _, size in self.alive.values())

    def came(self, where: str, size: int) -> int:
        self._next += 1
        if size:
            self.alive[self._next] = where, self.owner, size
        self.look()
        return self._next

    def went(self, number: int) -> None:
        self.alive.pop(number, None)

    def look(self) -> None:
        if self.owner == "this test" and self.size > self.peak:
            self.peak = self.size
            self.at_peak = Counter()
            for where, owner, size in self.alive.values():
                self.at_peak[where, owner] += size


def by_a(size: int) -> Any:
    import torch

    return torch.empty(size, dtype=torch.uint8, device="cuda")


def by_b(size: int) -> Any:
    made = [by_b_within(size) for _ in range(1)]
    return made.pop()


def by_b_within(size: int) -> Any:
    import torch

    made = torch.ones(size, dtype=torch.uint8)
    return made.to("cuda")


def by_module(size: int) -> Any:
    import torch

    return torch.nn.ParameterList([torch.zeros(size)]).to("cuda")[0].data


def by_thread(size: int) -> Any:
    made: list[Any] = []
    thread = threading.Thread(target=lambda: made.append(by_a(size)))
    thread.start()
    thread.join()
    return made[0]


def copied(tensor: Any) -> Any:
    return tensor.clone()


def joined(one: Any, two: Any) -> Any:
    import torch

    return torch.cat([one, two])


def resized(tensor: Any, size: int) -> None:
    tensor.untyped_storage().resize_(size)


def line(function: Callable[..., Any], after: int) -> str:
    code = function.__code__
    return f"{Path(code.co_filename).name}:{code.co_firstlineno + after} {code.co_name}"


A, B, MODULE = line(by_a, 3), line(by_b_within, 4), line(by_module, 3)
COPIED, JOINED, RESIZED = line(copied, 1), line(joined, 3), line(resized, 1)


class Program:
    """One random test: some hundred steps, fixtures, leaks of an earlier test, cycles, threads."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311  # no secret
        self.ledger = Ledger()
        self.kept: list[tuple[int, Any]] = []
        self.cycles: list[int] = []
        self.tracker = Tracker(root=Path(__file__).parent)
        self.fixtures: list[Any] = []

    def run(self) -> None:
        gc.collect()
        gc.disable()
        try:
            self.before()
            self.tracker.recordings.record_next(TEST)
            self.tracker.begin_test(TEST)
            self.ledger.look()
            for _ in range(self.random.choice((3, 30, 150))):
                self.step()
            self.compare()
        finally:
            gc.enable()

    def before(self) -> None:
        import torch

        torch.zeros(1, device="cuda")
        self.tracker.begin_test(EARLIER)
        self.ledger.owner = f"left by {EARLIER}"
        for _ in range(self.random.randrange(4)):
            size = self.random.choice(SIZES)
            self.kept.append((self.ledger.came("", size), by_a(size)))
        self.tracker.end_test()
        self.ledger.owner = "this test"

    def step(self) -> None:
        # What makes the tracker look at the whole heap is rare: it takes most of the time.
        often = self.make, self.drop, self.copy, self.join, self.resize, self.make_cycle, self.alias
        weights = 5, 3, 1, 1, 1, 1, 1
        if self.random.random() < 0.06:
            often, weights = (self.collect, self.fail, self.empty_cache), (1, 1, 1)
        elif self.random.random() < 0.04:
            often, weights = (self.begin_fixture, self.end_fixture), (1, 1)
        self.random.choices(often, weights)[0]()

    def make(self) -> None:
        size = self.random.choice((0, *SIZES))
        if self.ledger.size + 4 * size > MOST:
            return
        function, where, each = self.random.choice(
            ((by_a, A, 1), (by_b, B, 1), (by_thread, A, 1), (by_module, MODULE, 4))
        )
        made = function(size)
        self.kept.append((self.ledger.came(where, each * size), made))

    def pick(self) -> tuple[int, Any] | None:
        return self.random.choice(self.kept) if self.kept else None

    def drop(self) -> None:
        if self.kept:
            number, _ = self.kept.pop(self.random.randrange(len(self.kept)))
            if all(number != other for other, _ in self.kept):
                self.ledger.went(number)

    def alias(self) -> None:
        if picked := self.pick():
            self.kept.append((picked[0], picked[1].view(-1)))

    def copy(self) -> None:
        picked = self.pick()
        if picked and self.ledger.size + picked[1].nbytes <= MOST:
            self.kept.append((self.ledger.came(COPIED, picked[1].nbytes), copied(picked[1])))

    def join(self) -> None:
        one, two = self.pick(), self.pick()
        if one and two and one[1].dtype == two[1].dtype:
            size = one[1].nbytes + two[1].nbytes
            if size and self.ledger.size + size <= MOST:
                self.kept.append((self.ledger.came(JOINED, size), joined(one[1], two[1])))

    def resize(self) -> None:
        size = self.random.choice(SIZES)
        if self.ledger.size + 2 * size > MOST:
            return
        number, tensor = self.ledger.came(A, size), by_a(size)
        self.kept.append((self.ledger.came(RESIZED, 2 * size), tensor))
        resized(tensor, 2 * size)
        self.ledger.went(number)

    def make_cycle(self) -> None:
        if self.ledger.size + MIB <= MOST:
            cycle = [by_a(5000)]
            cycle.append(cycle)
            self.cycles.append(self.ledger.came(A, 5000))

    def collect(self) -> None:
        gc.collect()
        self.collected()

    def collected(self) -> None:
        for number in self.cycles:
            self.ledger.went(number)
        self.cycles.clear()

    def begin_fixture(self) -> None:
        if self.ledger.owner == "this test":
            name = f"made{len(self.fixtures)}"
            self.fixtures.append(self.tracker.begin_fixture(name, "module"))
            self.ledger.owner = f"fixture {name!r} (module)"

    def end_fixture(self) -> None:
        if self.ledger.owner != "this test":
            self.tracker.end_fixture(self.fixtures[-1], None)
            self.ledger.owner = "this test"
            self.ledger.look()

    def fail(self) -> None:
        import torch

        with contextlib.suppress(torch.OutOfMemoryError):
            by_a(2**31)

    def empty_cache(self) -> None:
        import torch

        torch.cuda.empty_cache()

    def compare(self) -> None:
        self.end_fixture()
        expected, peak = self.ledger.at_peak, self.ledger.peak
        self.kept.clear()
        self.tracker.end_test()
        (told,) = self.tracker.recordings.end(felled=False) or (None,)
        found: Counter[tuple[str, str]] = Counter()
        for group in () if told is None else told.groups:
            found[group.where, group.owner] += group.size
        assert found == expected, (found - expected, expected - found)
        assert peak == (0 if told is None else told.size)


def check(seeds: range) -> None:
    """Run the programs of these seeds and compare each.

    Raises:
        AssertionError: when a line, or the peak, is another one.

    """
    for seed in seeds:
        try:
            Program(seed).run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error

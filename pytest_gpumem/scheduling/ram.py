"""Main memory, which tests share beside the cards: a second number in the rule of who may run.

What a test takes of it is marked or learned. Most tests take so little that it never matters who
runs beside them: for them a share is set aside, and they run as if there were no such thing. Each
of the others is given what it needs, by the rule that cards go by, or runs with no other of them.
Sizes are bytes.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from typing import TYPE_CHECKING

from pytest_gpumem import admission
from pytest_gpumem.admission import Claim
from pytest_gpumem.scheduling.history import FAMILY_MARGIN, family, with_margin

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pytest_gpumem.scheduling.estimates import PlannedTest
    from pytest_gpumem.scheduling.places import Worker

WORTH_A_LEASE = 64 * 2**20
"""Bytes of main memory for which a test takes a lease: to fill as many takes 100 times as long."""
_SLACK = 1.02
"""What fewer packed tests may cost of the shortest run: they do not go module by module."""


def largest_unpacked(tests: Iterable[tuple[int, float]], workers: int, room: int) -> int | None:
    """Return the bytes up to which tests are not packed; None: none is, for all fit at once.

    As few are as keep the run short: for those that are not, what the largest of them needs is set
    aside in each worker, and that much less is there for the others, whose byte-seconds the run
    cannot be shorter than / the rest.

    Args:
        tests: bytes and seconds of each.
        workers: that share the main memory.
        room: bytes that tests may take of it.

    """
    known = sorted(tests)
    if workers < 2 or sum(ram for ram, _ in known[-workers:]) <= room:
        return None
    even = sum(seconds for _, seconds in known) / workers
    areas = [min(ram, room) * seconds for ram, seconds in known]
    packed = sum(areas)
    largest = min(known[-1][0], room * 7 // 8)  # one that no room is for runs all the same
    bounds = [(max(even, packed / max(1, room)), 0)]
    for (ram, _), area in zip(known, areas, strict=True):
        packed = max(0.0, packed - area)
        rest = room - workers * ram
        if rest < largest:
            break
        bounds.append((max(even, packed / max(1, rest)), ram))
    shortest = min(seconds for seconds, _ in bounds)
    return max(ram for seconds, ram in bounds if seconds <= _SLACK * shortest)


def run_time(tests: Sequence[tuple[int, float]], workers: int, room: int) -> float:
    """Return about how many seconds a run takes whose workers share main memory.

    As the planner runs it: whoever is idle takes the largest of the packed tests that there is room
    for, and else one of the others. Arguments as for ``largest_unpacked``.
    """
    small = largest_unpacked(tests, workers, room)
    if small is None:
        longest = max((seconds for _, seconds in tests), default=0.0)
        return max(longest, sum(seconds for _, seconds in tests) / workers)
    packed = sorted(test for test in tests if test[0] > small)
    others = [seconds for ram, seconds in tests if ram <= small][::-1]
    free = room - workers * small
    taken, now, idle = 0, 0.0, workers
    ends: list[tuple[float, int]] = []
    while packed or others or ends:
        while idle and (packed or others):
            at = bisect_right(packed, (free - taken, math.inf)) if taken else len(packed)
            if packed and at:
                ram, seconds = packed.pop(at - 1)
            elif others:
                ram, seconds = 0, others.pop()
            else:
                break
            taken += ram
            idle -= 1
            heapq.heappush(ends, (now + seconds, ram))
        now, ram = heapq.heappop(ends)
        taken -= ram
        idle += 1
    return now


class MainMemory:
    """Who has what of the main memory of each host.

    Args:
        tests: all tests; they are known by their index here.
        rooms: bytes that tests may take, by host; of others nothing is known, and nothing limited.

    """

    def __init__(self, tests: Sequence[PlannedTest], rooms: Mapping[str, int]) -> None:
        self._tests = tests
        self._rooms = rooms
        self._claims: dict[str, dict[str, Claim]] = {host: {} for host in rooms}
        """By host and worker."""
        self._small: int | None = None
        """Tests that take more are packed; None: none is."""
        self._set_aside = 0
        """For those that are not, on each host."""
        self._seen: dict[str, int] = {}
        """The most that tests of a family took in this run, of those that took much."""

    def open(self, workers: Iterable[Worker]) -> None:
        """Decide which tests are packed, now that the workers are known."""
        names = [worker.host for worker in workers if worker.host in self._rooms]
        each = max(map(names.count, set(names)), default=0)
        room = min((self._rooms[name] for name in names), default=0)
        tests = (
            [(test.ram, test.duration / len(set(names))) for test in self._tests] if each else ()
        )
        self._small = largest_unpacked(tests, each, room)
        self._set_aside = each * (self._small or 0)

    def packs(self, test: int) -> bool:
        """Return whether ``test`` may run only where there is room for it."""
        return self._small is not None and self._tests[test].ram > self._small

    def room(self, worker: Worker) -> int | None:
        """Return the bytes that a packed test may take at ``worker`` now; None: any number.

        As where no other one runs: nothing that ends would make more room.
        """
        if worker.host not in self._rooms:
            return None
        claims = [claim for name, claim in self._claims[worker.host].items() if name != worker.name]
        if not any(claim.extra for claim in claims):
            return None
        claims.append(Claim(worker.grown, 0, exclusive=False))
        return admission.room(self._rooms[worker.host], 0, self._set_aside, claims)

    def fits(self, worker: Worker, test: int) -> bool:
        """Return whether ``test`` may start at ``worker`` now, as far as main memory goes."""
        if not self.packs(test):
            return True
        room = self.room(worker)
        return room is None or self._tests[test].ram <= room

    def took(self, test: int, size: int) -> None:
        """Take note that ``test`` took ``size`` bytes: its relatives may take as much."""
        if size >= WORTH_A_LEASE:
            kin = family(self._tests[test].nodeid)
            self._seen[kin] = max(size, self._seen.get(kin, 0))

    def to_lease(self, worker: Worker, test: int) -> int:
        """Return the bytes for which ``test`` takes a lease at ``worker``, 0 for none.

        Packed or not: other runs on the machine know nothing of this one's plan. One of which
        nothing else is known takes it for what its relatives took in this run.
        """
        size = self._tests[test].ram
        if not size and self._seen:
            kin = family(self._tests[test].nodeid)
            size = with_margin(self._seen.get(kin, 0), FAMILY_MARGIN)
        return size if size >= WORTH_A_LEASE and worker.host in self._rooms else 0

    def start(self, worker: Worker, test: int) -> None:
        """Set aside what ``test`` needs at ``worker``."""
        if self._small is not None:
            self._claim(worker, self._tests[test].ram if self.packs(test) else 0)

    def end(self, worker: Worker) -> None:
        """Take back what was set aside for the test that ``worker`` ran."""
        if self._small is not None:
            self._claim(worker, 0)

    def keeps(self, worker: Worker, size: int) -> None:
        """Take note that ``worker`` keeps ``size`` more than before its first test."""
        worker.grown = size
        extra = self._claims.get(worker.host, {}).get(worker.name, admission.NOTHING).extra
        self._claim(worker, extra)

    def leave(self, worker: Worker) -> None:
        """Forget a worker that ended."""
        self._claims.get(worker.host, {}).pop(worker.name, None)

    def _claim(self, worker: Worker, extra: int) -> None:
        if worker.host in self._rooms:
            claim = Claim(worker.grown, extra, exclusive=False)
            self._claims[worker.host][worker.name] = claim

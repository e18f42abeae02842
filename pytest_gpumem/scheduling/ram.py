"""Main memory, which tests share beside the cards: a second number in the rule of who may run.

What a test takes of it is marked or learned. Most tests take so little that it never matters who
runs beside them: for them a share is set aside, and they run as if there were no such thing. Each
of the others is given what it needs, by the rule that cards go by, or runs with no other of them.
Sizes are bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gpumem import admission
from pytest_gpumem.admission import Claim

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pytest_gpumem.scheduling.estimates import PlannedTest
    from pytest_gpumem.scheduling.places import Worker

_SLACK = 1.02
"""What fewer packed tests may cost of the shortest run: they do not go module by module."""


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

    def open(self, workers: Iterable[Worker]) -> None:
        """Decide which tests are packed, now that the workers are known.

        None where all that can run at once fit. Else as few as keep the run short: for those that
        are not, what the largest of them needs is set aside in each worker, and that much less
        is there for the others, whose byte-seconds the run cannot be shorter than / the rest.
        """
        names = [worker.host for worker in workers if worker.host in self._rooms]
        each = max(map(names.count, set(names)), default=0)
        tests = sorted((test for test in self._tests if test.ram), key=lambda test: test.ram)
        room = min((self._rooms[name] for name in names), default=0)
        if each < 2 or sum(test.ram for test in tests[-each:]) <= room:
            return
        even = sum(test.duration for test in self._tests) / len(names)
        areas = [min(test.ram, room) * test.duration / len(set(names)) for test in tests]
        packed = sum(areas)
        largest = min(tests[-1].ram, room * 7 // 8)  # one that no room is for runs all the same
        bounds = [(max(even, packed / max(1, room)), 0)]
        for test, area in zip(tests, areas, strict=True):
            packed = max(0.0, packed - area)
            rest = room - each * test.ram
            if rest < largest:
                break
            bounds.append((max(even, packed / rest), test.ram))
        shortest = min(seconds for seconds, _ in bounds)
        self._small = max(ram for seconds, ram in bounds if seconds <= _SLACK * shortest)
        self._set_aside = each * self._small

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

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

        None where all that can run at once fit. Else those are left alone of which one in each
        worker fits beside the largest test.
        """
        names = [worker.host for worker in workers if worker.host in self._rooms]
        count = max(map(names.count, set(names)), default=0)
        needs = sorted((test.ram for test in self._tests if test.ram), reverse=True)
        room = min((self._rooms[name] for name in names), default=0)
        if count > 1 and sum(needs[:count]) > room:
            largest = min(needs[0], room * 7 // 8)  # one that no room is for runs all the same
            fair = (room - largest) // count
            self._small = max((need for need in needs if need <= fair), default=0)
            self._set_aside = count * self._small

    def packs(self, test: int) -> bool:
        """Return whether ``test`` may run only where there is room for it."""
        return self._small is not None and self._tests[test].ram > self._small

    def fits(self, worker: Worker, test: int) -> bool:
        """Return whether ``test`` may start at ``worker`` now, as far as main memory goes.

        Where no other test that is packed runs, it may: nothing that ends would make more room.
        """
        if not self.packs(test) or worker.host not in self._rooms:
            return True
        claims = self._claims[worker.host]
        others = [claim for name, claim in claims.items() if name != worker.name]
        if not any(claim.extra for claim in others):
            return True
        new = Claim(worker.grown, self._tests[test].ram, exclusive=False)
        return admission.fits(self._rooms[worker.host], 0, self._set_aside, others, new)

    def start(self, worker: Worker, test: int) -> None:
        """Set aside what ``test`` needs at ``worker``."""
        self._claim(worker, self._tests[test].ram if self.packs(test) else 0)

    def end(self, worker: Worker) -> None:
        """Take back what was set aside for the test that ``worker`` ran."""
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

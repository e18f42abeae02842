"""Which test runs where and when: the scheduler's decisions, as a state machine.

It is told what happened (``finished``, ``resident``, ``flushed``, ``remove_worker``) and answers
with ``commands``. It reads no clock and starts nothing; the same reports give the same commands.
Here events are written into the ``State``; why a worker is given a test is in ``policy``.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from pytest_gpumem.scheduling import contexts, lanes, policy
from pytest_gpumem.scheduling.backlog import Backlog, Lane
from pytest_gpumem.scheduling.cluster import Cluster
from pytest_gpumem.scheduling.estimates import Estimates, PlannedTest
from pytest_gpumem.scheduling.fixtures import SetUpOrder
from pytest_gpumem.scheduling.history import family
from pytest_gpumem.scheduling.ram import MainMemory
from pytest_gpumem.scheduling.state import State

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from pytest_gpumem.scheduling.commands import CardKey, Command
    from pytest_gpumem.scheduling.places import Worker


class Planner:
    """Plans one run.

    Args:
        tests: what to run; commands name tests by their index here.
        cards: bytes of each card.
        context: bytes that a process keeps on a card once it used it.
        headroom: bytes of each card that are never given out.
        others: bytes that other programs use, by card.
        rooms: bytes of main memory that tests may take, by host; those of others are not limited.
        leasing: identities of wide fixtures that take a lease, as their code says.

    """

    def __init__(
        self,
        tests: Sequence[PlannedTest],
        cards: Mapping[CardKey, int],
        *,
        context: int,
        headroom: int,
        others: Mapping[CardKey, int] | None = None,
        rooms: Mapping[str, int] = MappingProxyType({}),
        leasing: Collection[str] = (),
    ) -> None:
        most = max(0, max(cards.values(), default=0) - headroom - context)
        seen = Estimates(tests, most=most, leasing=leasing)
        order = SetUpOrder(tests)
        self._tests = tests
        self._seen = seen
        self._order = order
        self._cluster = Cluster(
            tests, seen, cards, others or {}, context=context, headroom=headroom
        )
        self._backlog = Backlog(tests, seen, order.late_modules)
        self._ram = ram = MainMemory(tests, rooms)
        self._state = State(tests, seen, order, self._cluster, self._backlog, ram=ram)
        self.asking: Collection[str] = self._state.asking
        """Workers that may be given something: while there are none, nothing is to be done."""
        self._started = False

    @property
    def done(self) -> bool:
        """Whether every test has ended."""
        return self._state.left == 0

    def retries(self, test: int) -> bool:
        """Return whether ``test``, which runs, will run again if it is reported out of memory.

        The first time if anything of others was on its cards, the next time if they were shared
        unexpectedly. It does not where nobody who is left has a card for it.
        """
        if not self._cluster.has_cards_for(test):
            return False
        workers = self._cluster.workers.values()
        worker = next(each for each in workers if each.given and each.given[0] == test)
        first = test not in self._seen.ooms
        return worker.disturbed or (first and self._cluster.accompanied(worker))

    # Reports

    def add_worker(self, worker: str, cards: Sequence[CardKey], host: str = "") -> None:
        """Let ``worker``, a process that holds nothing yet, run tests.

        Nothing happens if it is known already.

        Args:
            worker: its name.
            cards: those that it sees, in its order; its GPU tests run on the first ones. Cards
                that the planner was not told of do not count.
            host: whose main memory it uses.

        """
        if worker not in self._cluster.workers:
            self._asks(self._cluster.join(worker, cards, host))
            self._state.until_replan = 0

    def remove_worker(self, worker: str) -> int | None:
        """Forget a worker that ended; return the test it was running, which counts as ended."""
        gone = self._cluster.leave(worker)
        self._state.asking.pop(worker, None)
        crashed = gone.given.popleft() if gone.given else None
        if crashed is not None:
            self._ended(gone, crashed)
            lanes.setter_ended(self._state, crashed)
        self._ram.leave(gone)
        for test in gone.given:
            self._backlog.add(test, Lane.CPU)
        self._backlog.cpu.release(gone.cpu)
        self._backlog.shared.release(gone.gpu)
        reserved = gone.card.own_reservation
        if reserved is not None and not gone.card.workers:
            lanes.admit(self._state, reserved.end())
        self._state.changed = True
        self._state.until_replan = 0
        return crashed

    def requeue(self, test: int) -> None:
        """Run a test again that had ended."""
        self._state.left += 1
        lanes.admit(self._state, test)
        self._state.changed = True

    def finished(
        self,
        worker: str,
        test: int,
        *,
        duration: float,
        peak: int | None,
        fixtures: int = 0,
        oom: bool = False,
        felled: bool = False,
        ram: int = 0,
    ) -> None:
        """Take note that ``test`` ended.

        Args:
            worker: who ran it.
            test: its index.
            duration: seconds it took.
            peak: highest bytes beyond what the process kept before it; None when not known.
            fixtures: bytes that the wider fixtures it uses hold.
            oom: whether it ran out of memory and ``retries`` said so: it is planned again, alone.
            felled: whether it ran out of memory and is not tried again.
            ram: highest bytes of main memory beyond what its process had before it, if known.

        """
        ran, seen = self._cluster.workers[worker], self._seen
        gpu = bool(ran.using)
        self._state.until_replan -= 1
        if ram:
            self._ram.took(test, ram)
        if oom or felled:
            # What was expected was too little, for its relatives too. When it ended, and what it
            # had by then, tells nothing of them.
            seen.used_card(test, seen.need(test), seen.fixtures(test))
        else:
            seen.took(test, duration, gpu=gpu, nothing=peak == 0 and not fixtures)
            if gpu or peak or fixtures:
                seen.used_card(test, peak, fixtures)
        if (peak or fixtures) and not self._tests[test].gpu:
            self._state.until_replan = 0
        ran.given.remove(test)
        self._ended(ran, test, again=oom)
        # One that has enough to do is given nothing, and nobody else waits for anything.
        if self._state.asking or len(ran.given) <= ran.refill:
            self._asks(ran)
        if oom:
            seen.ooms[test] += 1
            self.requeue(test)
        elif self._backlog.holders.scouts:
            lanes.setter_ended(self._state, test)

    def _ended(self, worker: Worker, test: int, *, again: bool = False) -> None:
        """Give back what a test had reserved, and let those go that waited for its peak.

        They wait on where it runs ``again``: what it had no room for, they would not have either.
        """
        self._state.left -= 1
        self._cluster.end(worker)
        self._ram.end(worker)
        worker.ran = self._tests[test]
        worker.set_up = self._order.after(test, worker.set_up)
        if self._backlog.families.scouts and not again:
            lanes.scout_ended(self._state, family(worker.ran.nodeid))

    def returned(self, worker: str, tests: Collection[int]) -> None:
        """Take note that ``worker`` does not run ``tests``, if any, which it was handed ahead.

        A test before them had used a card although that was not expected.
        """
        if not tests:
            return
        told = self._cluster.workers[worker]
        for test in tests:
            told.given.remove(test)
            lanes.admit(self._state, test)
        told.to_set_up = told.set_up
        for each in told.given:
            told.to_set_up = self._order.after(each, told.to_set_up)
        self._asks(told)

    def resident(
        self,
        worker: str,
        size: int,
        card: CardKey | None = None,
        fixtures: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """Take note of what ``worker`` keeps on a card (default: its own).

        Args:
            worker: its name.
            size: bytes, its context included.
            card: where.
            fixtures: of these, the bytes that its wider fixtures hold, by identity; "" is for those
                of which it is not known whose they are.

        """
        told = self._cluster.workers[worker]
        if fixtures:
            running = self._tests[told.given[0]].wide if told.given else ()
            self._seen.stands(fixtures, (*running, *told.set_up))
        where = told.card if card is None else self._cluster.cards.get(card)
        if where is not None:
            self._state.changed |= self._cluster.keeps(told, where, size, fixtures)

    def begins(self, worker: str, fixture: str) -> None:
        """Take note that ``worker`` sets up a wide fixture that begins to hold something of a card.

        Until it stands, no further worker is sent a test that uses it.
        """
        if given := self._cluster.workers[worker].given:
            lanes.begins(self._state, fixture, given[0])

    def stands(self, fixture: str, *, leases: bool) -> None:
        """Take note that what a wide fixture holds was told, and whether that is by a lease."""
        lanes.stands(self._state, fixture, leases=leases)

    def main_memory(self, worker: str, size: int, *, too_large: bool = False) -> None:
        """Take note of what ``worker`` keeps of main memory.

        Args:
            worker: its name.
            size: bytes more than before its first test.
            too_large: whether it is to be replaced, when it goes on to another module.

        """
        told = self._cluster.workers[worker]
        told.too_large |= too_large
        self._ram.keeps(told, size)
        self._state.changed = True

    def foreign(self, card: CardKey, size: int) -> None:
        """Take note of what other programs use of ``card``."""
        where = self._cluster.cards[card]
        self._state.changed |= where.others != size
        where.others = size

    def used(self, card: CardKey, size: int) -> None:
        """Take note of what anybody uses of ``card``; what the workers do not is foreign."""
        if card in self._cluster.cards:
            self.foreign(card, self._cluster.foreign(self._cluster.cards[card], size))

    def flushed(self, worker: str) -> None:
        """Take note that ``worker`` did what ``Flush`` or ``Reset`` asked."""
        told = self._cluster.workers[worker]
        self._cluster.gave_back(told)
        self._asks(told)

    def keeping(self) -> list[str]:
        """Return the workers for which there is no test now and which may keep fixtures."""
        asking = self._state.asking.items()
        return [name for name, each in asking if each.idle and each.given_back < 2]

    def stalled(self, worker: str) -> None:
        """Take note that ``worker`` has been idle while a test beside it did not go on.

        It may wait for what the worker's fixtures hold. Those of modules and classes are given
        back at once, those of the session the next time.
        """
        self._cluster.workers[worker].stalled = True
        self._state.changed = True

    def _asks(self, worker: Worker) -> None:
        """Take note that ``worker`` may be given something."""
        self._state.asking[worker.name] = worker
        self._state.changed = True

    # Commands

    def commands(self) -> list[Command]:
        """Return what to do now; each command is given once."""
        state = self._state
        if not self._started:
            self._started = True
            lanes.open_lanes(state)
        if state.until_replan <= 0 and state.asking:
            contexts.replan(state)
        while state.changed:
            state.changed = False
            workers = [*state.asking.values()]
            if len(workers) > 1:  # those with a context first: the others are for CPU tests
                workers.sort(key=lambda each: not each.kept)
            for worker in workers:
                policy.serve(state, worker)
        told, state.out = state.out, []
        return told

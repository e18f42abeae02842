"""Which test runs where and when: the scheduler's decisions, as a state machine.

It is told what happened (``finished``, ``resident``, ``flushed``, ``remove_worker``) and answers
with ``commands``. It reads no clock and starts nothing; the same reports give the same commands.

- GPU tests come first. As many workers hold a CUDA context as make the run shortest; the others
  run CPU tests, which also fill the waits of the former.
- Long tests come first, longest first; the others go module by module, so that module fixtures
  are set up rarely. A worker whose module is done takes the next one, and at the end half of what
  another worker still has. While GPU tests are not what the run waits for, a worker ends its
  module, CPU tests and all, before it goes to GPU tests elsewhere.
- The first test that does not fit is kept for the card and may be passed by a limited number
  of smaller ones, so that none starves.
- A GPU test of which nothing is known runs alone. One of each family goes first; its peak is
  then expected of the others.
- Where not every worker has room for a context, a test of which nothing is known but that others
  of its module turned out to use a card counts as a GPU test, until one of its family used none.
- Short CPU tests are handed out ahead, many at once, to workers that no GPU test can want. A
  worker in which one of them uses a card all the same returns those behind it.
- A test that runs out of memory beside others, or beside what they keep, runs again, alone on its
  cards. A test never seen before may use a card although nobody said so: if one ran beside it,
  and memory was short once more, it runs a last time when no such test is left.
- A test that catches its own OutOfMemoryError cannot be seen to have run out of memory: it is not
  run again, and on the first run without marks it may have shared the card unexpectedly.
- When no GPU test runs on a card and none fits, idle workers give back module fixtures, then
  session fixtures, as many of them as it takes; after that the test runs alone whatever the
  numbers say. What a worker kept even then, such as leaks, it is not asked for again.
- A worker sets up no wide fixture beside one that it would never find beside it in plain xdist
  (see ``fixtures``). It takes other tests first, and gives back what it has if there are none.
- A running test may wait for something that the fixtures of an idle worker hold: a lock, a port, a
  database. A worker is stopped as soon as no test waits for one, as in plain xdist; one that is
  idle before gives its fixtures back whenever a test beside it stalls.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem import admission
from pytest_gpumem.admission import Claim
from pytest_gpumem.scheduling.estimates import Estimates, PlannedTest
from pytest_gpumem.scheduling.fixtures import NOTHING, SetUpOrder, of_session
from pytest_gpumem.scheduling.history import family
from pytest_gpumem.scheduling.piles import Pile, Portion
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

LONG = 0.01
"""Tests longer than this part of the shortest possible run are long..."""
OUTLIER = 2
"""... if they last this many times the average; else all tests of a small suite would be."""
LOOK = 8
"""Tests of a queue that are looked at for one that fits."""
PATIENCE = 64
"""Tests that may pass one that waits for room on a card."""
SLACK = 0.7
"""Part of the shortest possible run beyond which GPU tests are urgent. As many contexts are opened
as keep them below it, where that can be."""
DRAIN = 4
"""Tests that must run alone, per card, for which the card stops taking others."""
AHEAD = 0.1
"""Seconds of CPU tests that wait at a worker. They are handed out in one message, and the next
ones when half of them are done: a round trip for each would cost more than a short test."""
AHEAD_TESTS = 256
REPLAN = 32
"""Tests after which the number of contexts is thought over."""


CardKey = tuple[str, str]
"""Host and UUID of a card: simulated ones and MIG slices may have equal UUIDs on two hosts."""


class Grant(NamedTuple):
    """What is set aside for a test on each of its cards."""

    size: int | None
    """Bytes beyond what its worker keeps; None: the whole card."""
    cards: int
    alone: bool


class Run(NamedTuple):
    """Let ``worker`` run ``test`` after those it was given before."""

    worker: str
    test: int
    grant: Grant | None = None
    """None for a test that is expected to use no card."""


class Flush(NamedTuple):
    """Let idle ``worker`` tear down module and class fixtures, then report ``flushed``."""

    worker: str


class Reset(NamedTuple):
    """Let idle ``worker`` tear down session fixtures too, then report ``flushed``."""

    worker: str


class Stop(NamedTuple):
    """Every test has ended or is with another worker; ``worker`` shall tear everything down."""

    worker: str


class Fail(NamedTuple):
    """``test`` can never run."""

    test: int
    why: str


Command = Run | Flush | Reset | Stop | Fail


class _Reservation:
    """A test that waits for room on its cards."""

    def __init__(self, test: int, cards: Sequence[_Card]) -> None:
        self.test = test
        self.cards = cards
        """The first is that of the workers that will run it."""
        self.passed = 0
        """Tests that passed it."""


class _Card:
    """One card and who is on it."""

    def __init__(self, total: int, others: int) -> None:
        self.total = total
        self.others = others
        self.workers: list[_Worker] = []
        self.claims: dict[str, Claim] = {}
        """Of each process that keeps anything on the card."""
        self.users: list[_Worker] = []
        """Workers that run a GPU test on it."""
        self.exclusive = False
        self.contexts = 1
        """Workers that are to hold a context."""
        self.urgent = True
        """Whether GPU tests are, or are about to be, what the run waits for."""
        self.reserved: _Reservation | None = None

    @property
    def running(self) -> int:
        """GPU tests that run on it."""
        return len(self.users)


class _Worker:
    """One process that runs tests."""

    def __init__(self, name: str, ring: tuple[_Card, ...], context: int) -> None:
        self.name = name
        self.ring = ring
        """Its own card first."""
        self.card = ring[0]
        self.resident: dict[_Card, int] = {}
        self.standing: dict[_Card, int] = {}
        """Of these, what its wider fixtures hold."""
        self.given: deque[int] = deque()
        """The test it runs, and those it was handed to run next."""
        self.refill = 1
        """With so many given, it is handed further ones."""
        self.cpu: Portion | None = None
        self.gpu: Portion | None = None
        self.using: tuple[_Card, ...] = ()
        """The cards of the GPU test it runs."""
        self.asked = 0
        """Bytes set aside for it on each of them."""
        self.disturbed = False
        """Whether a test that may use these cards unexpectedly ran at the same time."""
        self.outlived = False
        """Whether a worker has gone that was on these cards when the test began."""
        self.group = ""
        """Module whose fixtures it has."""
        self.set_up = NOTHING
        """Wide fixtures that it has..."""
        self.to_set_up = NOTHING
        """... and those that it will have after all that it was given."""
        self.out_of_order = False
        """Whether a test was kept from it that may not follow what it has set up."""
        self.given_back = 0
        """1 after a flush, 2 after a reset, 0 once it ran a test again."""
        self.waiting = False
        """Whether it was told to flush or reset and has not done so yet."""
        self.stalled = False
        """Whether a test may wait for what it keeps."""
        self.stopped = False
        self.stays = context
        """Bytes that it cannot give back: its context, and what it kept after its last reset."""

    @property
    def kept(self) -> int:
        """Bytes it keeps on its own card; 0 if it has no context there."""
        return self.resident.get(self.card, 0)

    @property
    def owed(self) -> int:
        """Bytes of these that it may give back."""
        return max(0, self.kept - self.stays)

    @property
    def idle(self) -> bool:
        return not self.given and not self.waiting


class Planner:
    """Plans one run.

    Args:
        tests: what to run; commands name tests by their index here.
        cards: bytes of each card.
        context: bytes that a process keeps on a card once it used it.
        headroom: bytes of each card that are never given out.
        others: bytes that other programs use, by card.
        optimistic: guess unknown peaks from those seen so far, with a small margin, instead of
            running such tests alone first; a wrong guess costs a second run of the test, alone.

    """

    def __init__(
        self,
        tests: Sequence[PlannedTest],
        cards: Mapping[CardKey, int],
        *,
        context: int,
        headroom: int,
        others: Mapping[CardKey, int] | None = None,
        optimistic: bool = False,
    ) -> None:
        self._tests = tests
        self._context = context
        self._headroom = headroom
        self._optimistic = optimistic
        most = max(cards.values(), default=0) - headroom - context
        self._seen = Estimates(tests, most=max(0, most), optimistic=optimistic)
        self._need = self._seen.need
        self._pace = self._seen.pace
        self._order = SetUpOrder(tests)
        foreign = others or {}
        self._cards = {key: _Card(total, foreign.get(key, 0)) for key, total in cards.items()}
        self._nothing = _Card(-1, 0)
        """The card of workers that have none."""
        self._rings: set[tuple[_Card, ...]] = set()
        """What workers see or saw; one that crashed will be replaced, one that was stopped not."""
        self._workers: dict[str, _Worker] = {}
        self._asking: dict[str, _Worker] = {}
        """Workers that may be given something."""
        self._changed = True
        """Whether anything was reported since the last commands."""
        self._started = False
        self._left = len(tests)
        self._until_replan = 0
        # Tests that wait.
        self._cpu = Pile(tests)
        self._gpu = Pile(tests)
        self._big = Portion()
        """GPU tests that would not fit once all contexts are there, largest peak first."""
        self._wide = Portion()
        """GPU tests on several cards."""
        self._alone = Portion()
        """GPU tests that need their card for themselves."""
        self._last = Portion()
        """Of these, those that also need that no test runs which may use it unexpectedly."""
        self._unscouted: dict[str, deque[int]] = {}
        """By family of unknown peak: tests that wait for the first one's peak."""
        self._unscouted_time = 0.0
        self._tallest = 0
        """Largest expected peak in the GPU pile, ever."""
        self._packed = 0.0
        self._area = 0.0
        """Seconds and byte-seconds of the waiting GPU tests that may share a card."""

    @property
    def done(self) -> bool:
        """Whether every test has ended."""
        return self._left == 0

    def retries(self, test: int) -> bool:
        """Return whether ``test``, which runs, will run again if it is reported out of memory.

        The first time if anything of others was on its cards, the next time if they were shared
        unexpectedly. It does not where nobody who is left has a card for it.
        """
        cards = self._tests[test].cards
        if not any(len(ring) >= cards and self._nothing not in ring for ring in self._rings):
            return False
        worker = next(
            each for each in self._workers.values() if test in itertools.islice(each.given, 1)
        )
        return worker.disturbed or (test not in self._seen.ooms and self._accompanied(worker))

    def _accompanied(self, worker: _Worker) -> bool:
        """Return whether others may use or keep what ``worker``, alone, would find free.

        What they held and gave back meanwhile is not known: that they have a context says enough.
        """
        others = (each for each in self._workers.values() if each is not worker)
        return (
            worker.outlived
            or any(card.others for card in worker.using or worker.ring)
            or any(self._is_beside(each, worker) for each in others)
        )

    def _is_beside(self, other: _Worker, worker: _Worker) -> bool:
        """Return whether ``other`` may use or keep what ``worker``, alone, would find free."""
        unseen = any(not self._tests[test].seen for test in other.given)
        for card in worker.using or worker.ring:
            if card is self._nothing or card not in other.ring:
                continue
            alone = card.exclusive and worker in card.users
            if unseen or (self._owes(other) if alone else other.name in card.claims):
                return True
        return False

    # Reports

    def add_worker(self, worker: str, cards: Sequence[CardKey]) -> None:
        """Let ``worker``, a process that holds nothing yet, run tests.

        Nothing happens if it is known already.

        Args:
            worker: its name.
            cards: those that it sees, in its order; its GPU tests run on the first ones. Cards
                that the planner was not told of do not count.

        """
        if worker in self._workers:
            return
        ring = tuple(self._cards[key] for key in cards if key in self._cards)
        added = _Worker(worker, ring or (self._nothing,), self._context)
        self._rings.add(added.ring)
        added.card.workers.append(added)
        self._workers[worker] = self._asking[worker] = added
        self._changed = True
        self._until_replan = 0

    def remove_worker(self, worker: str) -> int | None:
        """Forget a worker that ended; return the test it was running, which counts as ended."""
        gone = self._workers.pop(worker)
        self._asking.pop(worker, None)
        gone.card.workers.remove(gone)
        for each in self._workers.values():
            # The report that a test of theirs ran out of memory may come a moment later.
            each.outlived |= bool(each.given) and self._is_beside(gone, each)
        crashed = gone.given.popleft() if gone.given else None
        if crashed is not None:
            self._ended(gone, crashed)
        for card in gone.ring:
            card.claims.pop(worker, None)
        for test in gone.given:
            self._cpu.add(test)
        self._cpu.release(gone.cpu)
        self._gpu.release(gone.gpu)
        reserved = gone.card.reserved
        if reserved is not None and not gone.card.workers and reserved.cards[0] is gone.card:
            self._admit(_unreserve(reserved))
        self._changed = True
        self._until_replan = 0
        return crashed

    def requeue(self, test: int) -> None:
        """Run a test again that had ended."""
        self._left += 1
        self._admit(test)
        self._changed = True

    def finished(
        self,
        worker: str,
        test: int,
        *,
        duration: float,
        peak: int | None,
        fixtures: int = 0,
        oom: bool = False,
    ) -> None:
        """Take note that ``test`` ended.

        Args:
            worker: who ran it.
            test: its index.
            duration: seconds it took.
            peak: highest bytes beyond what the process kept before it; None when not known.
            fixtures: bytes that the wider fixtures it uses hold.
            oom: whether it ran out of memory and ``retries`` said so: it is planned again, alone.

        """
        ran = self._workers[worker]
        gpu = bool(ran.using)
        if not oom:
            self._seen.took(test, duration, gpu=gpu)
        self._until_replan -= 1
        self._asking[worker] = ran
        if oom:
            # What was expected was too little, for its relatives too.
            self._seen.used_card(test, self._need(test), self._seen.fixtures(test))
        elif gpu or peak:
            self._seen.used_card(test, peak, fixtures)
        if peak == 0 and not oom:
            self._seen.used_none(test)
        if peak and not self._tests[test].gpu:
            self._until_replan = 0
        ran.given.remove(test)
        self._ended(ran, test)
        if oom:
            self._seen.ooms[test] += 1
            self.requeue(test)

    def _ended(self, worker: _Worker, test: int) -> None:
        """Give back what a test had reserved, and let those go that waited for its peak."""
        self._left -= 1
        self._changed = True
        for card in worker.using:
            card.users.remove(worker)
            card.exclusive = False
            self._claim(worker, card, 0)
        worker.using = ()
        worker.disturbed = worker.outlived = False
        worker.set_up = self._order.after(test, worker.set_up)
        self._scouted(family(self._tests[test].nodeid))

    def _scouted(self, kin: str) -> None:
        """Let a family's tests go whose first one ended; send the next one if it told nothing."""
        waiting = self._unscouted.get(kin)
        if waiting is None:
            return
        if self._seen.scouted(kin) or not waiting:
            del self._unscouted[kin]
            for test in waiting:
                self._unscouted_time -= self._tests[test].duration
                self._admit(test)
        else:
            test = waiting.popleft()
            self._unscouted_time -= self._tests[test].duration
            self._alone.add(test, self._tests[test].duration)
        if not self._unscouted:
            self._until_replan = 0

    def returned(self, worker: str, test: int) -> None:
        """Take note that ``worker`` does not run ``test``, which was handed out ahead.

        A test before it had used a card although that was not expected.
        """
        told = self._workers[worker]
        told.given.remove(test)
        told.to_set_up = told.set_up
        for each in told.given:
            told.to_set_up = self._order.after(each, told.to_set_up)
        self._admit(test)
        self._asking[worker] = told
        self._changed = True

    def resident(
        self, worker: str, size: int, card: CardKey | None = None, fixtures: int = 0
    ) -> None:
        """Take note of what ``worker`` keeps on a card (default: its own).

        Args:
            worker: its name.
            size: bytes, its context included.
            card: where.
            fixtures: of these, the bytes that its wider fixtures hold.

        """
        told = self._workers[worker]
        where = told.card if card is None else self._cards.get(card)
        if where is None:
            return
        before = told.resident.get(where, 0), told.standing.get(where, 0)
        if before == (size, fixtures):
            return
        told.resident[where], told.standing[where] = size, fixtures
        told.stays = max(self._context, min(told.stays, told.kept))
        claim = where.claims.get(worker)
        self._claim(told, where, claim.extra if claim else 0)
        self._changed = True

    def foreign(self, card: CardKey, size: int) -> None:
        """Take note of what other programs use of ``card``."""
        where = self._cards[card]
        self._changed |= where.others != size
        where.others = size

    def used(self, card: CardKey, size: int) -> None:
        """Take note of what anybody uses of ``card``; what the workers do not is foreign."""
        where = self._cards.get(card)
        if where is not None:
            uses = (self._uses(each, where) for each in self._workers.values())
            self.foreign(card, admission.foreign(size, uses, where.others))

    def _uses(self, worker: _Worker, card: _Card) -> tuple[int, int]:
        """Return the least and the most that ``worker`` may be using of ``card``."""
        if card not in worker.ring:
            return 0, 0
        claim = card.claims.get(worker.name, admission.NOTHING)
        least, most = admission.bounds(claim, card.total)
        if worker.waiting:
            least = 0  # it gives back, and has not said yet what
        if self._may_surprise(worker):
            most = card.total
        return least, most

    def flushed(self, worker: str) -> None:
        """Take note that ``worker`` did what ``Flush`` or ``Reset`` asked."""
        told = self._workers[worker]
        told.waiting = False
        told.set_up = of_session(told.set_up) if told.given_back == 1 else NOTHING
        told.to_set_up = told.set_up
        if told.given_back > 1:
            told.stays = max(self._context, told.kept)
        self._asking[worker] = told
        self._changed = True

    def keeping(self) -> list[str]:
        """Return the workers for which there is no test now and which may keep fixtures."""
        return [name for name, each in self._asking.items() if each.idle and each.given_back < 2]

    def stalled(self, worker: str) -> None:
        """Take note that ``worker`` has been idle while a test beside it did not go on.

        It may wait for what the worker's fixtures hold. Those of modules and classes are given
        back at once, those of the session the next time.
        """
        self._workers[worker].stalled = True
        self._changed = True

    # Commands

    def commands(self) -> list[Command]:
        """Return what to do now; each command is given once."""
        out: list[Command] = []
        if not self._started:
            self._start(out)
        if self._until_replan <= 0:
            self._replan()
        while self._changed:
            self._changed = False
            # Those with a context first: the others are for CPU tests.
            for worker in sorted(self._asking.values(), key=lambda each: not each.kept):
                self._serve(worker, out)
        return out

    def _serve(self, worker: _Worker, out: list[Command]) -> None:
        """Give ``worker`` something to do, if there is anything."""
        if not worker.given and not worker.waiting and not self._hand_out(worker, out):
            if self._all_given():
                self._stop(worker, out)
            return
        del self._asking[worker.name]
        if worker.given and not worker.using:
            self._hand_out_ahead(worker, out)

    def _stop(self, worker: _Worker, out: list[Command]) -> None:
        del self._asking[worker.name]
        worker.stopped = True
        self._rings = {each.ring for each in self._workers.values() if not each.stopped}
        out.append(Stop(worker.name))

    def _all_given(self) -> bool:
        """Return whether no test waits for a worker."""
        return self._left == sum(len(each.given) for each in self._workers.values())

    def _hand_out(self, worker: _Worker, out: list[Command]) -> bool:
        worker.out_of_order = False
        test = self._pick_gpu(worker)
        if test is None and self._held_up(worker.card) and self._ask_back(worker, out):
            return True
        if test is None and worker.out_of_order and worker.card.urgent:
            self._give_back(worker, out)
            return True
        if test is None:
            test = self._pick_cpu(worker)
        # Who has nothing else to do gives back for any test: the last resort waits for that.
        if test is None and self._ask_back(worker, out):
            return True
        if test is None:
            test = self._last_resort(worker, out)
        if test is not None:
            self._run(worker, test, out)
        elif worker.stalled or (worker.out_of_order and not self._room_comes(worker)):
            self._give_back(worker, out)
        else:
            return False
        return True

    def _room_comes(self, worker: _Worker) -> bool:
        """Return whether ``worker`` had better keep its fixtures for a GPU test that waits."""
        return bool(worker.kept and worker.card.running) and self._gpu_waits()

    def _in_order(self, worker: _Worker, test: int) -> bool:
        """Return whether ``test`` may follow what ``worker`` will have set up."""
        if not worker.to_set_up or self._order.permits(test, worker.to_set_up):
            return True
        worker.out_of_order = True
        return False

    def _run(self, worker: _Worker, test: int, out: list[Command]) -> None:
        worker.given.append(test)
        worker.to_set_up = self._order.after(test, worker.to_set_up)
        worker.group = self._tests[test].group
        worker.given_back = 0
        worker.stalled = False
        if not worker.using and not self._tests[test].seen:
            for card in worker.ring:
                for other in card.users:
                    other.disturbed = True
        out.append(Run(worker.name, test, self._grant(worker, test)))

    def _grant(self, worker: _Worker, test: int) -> Grant | None:
        if not worker.using or worker.given[0] != test:
            return None
        size = None if self._need(test) is None else worker.asked
        return Grant(size, len(worker.using), worker.using[0].exclusive)

    def _hand_out_ahead(self, worker: _Worker, out: list[Command]) -> None:
        """Hand out further CPU tests, unless the worker may get a GPU test next.

        Not the last ones: another worker may be free earlier.
        """
        if len(worker.given) > worker.refill or (self._gpu_waits() and self._may_use(worker)):
            return
        pace = self._pace(gpu=False)
        first, *rest = (pace * self._tests[test].duration for test in worker.given)
        ahead = sum(rest)
        while len(self._cpu) and len(worker.given) < AHEAD_TESTS:
            portion = self._cpu_portion(worker)
            if portion is None:
                break
            test = portion.tests[0]
            duration = pace * self._tests[test].duration
            last = first + ahead > pace * self._cpu.time / len(self._workers)
            if ahead + duration > AHEAD or last or self._on_card(test):
                break
            self._run(worker, self._cpu.take(portion, test), out)
            ahead += duration
        worker.refill = max(1, len(worker.given) // 2)

    def _gpu_waits(self) -> bool:
        waits = len(self._gpu) or self._alone.tests or self._wide.tests or self._big.tests
        return bool(waits) or any(card.reserved for card in self._cards.values())

    # Choosing a CPU test

    def _pick_cpu(self, worker: _Worker) -> int | None:
        while len(self._cpu):
            portion = self._cpu_portion(worker)
            if portion is None:
                worker.out_of_order = True
                break
            test = self._cpu.take(portion, portion.tests[0])
            if not self._on_card(test):
                return test
            self._admit(test)
            self._changed = True  # it may be what a worker has room for that was asked before
        return None

    def _on_card(self, test: int) -> bool:
        """Return whether ``test`` uses a card, or is better not taken for one that does not.

        Where not every worker has room for a context, never-seen tests of a module that uses a
        card would run out of memory in those that have none.
        """
        return self._seen.on_card(test) or (self._seen.suspect(test) and self._crowded())

    def _crowded(self) -> bool:
        """Return whether a card has no room for a context of each of its workers."""
        return any(self._capacity(card, len(card.workers)) < 0 for card in self._cards.values())

    def _cpu_portion(self, worker: _Worker) -> Portion | None:
        """Return where the next CPU test of ``worker`` waits, None if all are out of order."""
        suits = self._order.suits(worker.to_set_up)
        long = self._cpu.long if self._cpu.long.tests and suits(self._cpu.long.tests[0]) else None
        # A long test would keep a worker with a context from the GPU tests.
        if long is not None and not (worker.kept and self._gpu_waits()):
            return long
        worker.cpu = self._cpu.adopt(worker.group, worker.cpu, suits)
        return worker.cpu or long

    # Choosing a GPU test

    def _pick_gpu(self, worker: _Worker) -> int | None:
        card = worker.card
        if card.exclusive or not self._may_use(worker):
            return None
        reserved = card.reserved
        home = reserved is not None and reserved.cards[0] is card
        closed = self._closed(card)
        suits = reserved and home and (closed or self._suits(worker, reserved.test))
        goes = reserved and suits and self._may_go(worker, reserved.test)
        if reserved and goes and self._in_order(worker, reserved.test):
            return self._launch(worker, _unreserve(reserved))
        if not closed:
            for portion in self._portions(worker):
                lone = portion is self._alone or portion is self._last
                may_go = self._may_go if lone else self._fits
                for test in list(itertools.islice(portion.tests, LOOK)):
                    if not may_go(worker, test):
                        self._reserve(worker, portion, test)
                    elif self._in_order(worker, test):
                        return self._launch(worker, self._take(portion, test))
        return self._from_elsewhere(worker)

    def _suits(self, worker: _Worker, test: int) -> bool:
        """Return whether ``test`` would not take ``worker`` out of a module too early."""
        return self._tests[test].group == worker.group or not self._settled(worker)

    def _settled(self, worker: _Worker) -> bool:
        """Return whether ``worker`` had better end its module before it goes elsewhere."""
        if worker.card.urgent:
            return False
        cpu = worker.cpu
        if cpu is not None and cpu.tests and cpu.group == worker.group:
            return True
        # Scouts hurry on: others of their families wait for them.
        return self._cpu.free(worker.group) and not self._unscouted

    def _may_go(self, worker: _Worker, test: int) -> bool:
        """Return whether a test that waits for room has it, or can never have more than now.

        Contexts stay: a test that does not fit beside those there are would wait in vain.
        """
        if test in self._seen.ooms and any(map(self._owes, worker.card.workers)):
            return False  # it gets all the room that there can be
        if self._fits(worker, test):
            return True
        cards = self._cards_for(worker, test)
        if _busy(cards) or len(cards) < self._tests[test].cards:
            return False
        # What other programs use may be theirs for good: the lease waits for it, not for ever.
        return not any(map(self._owes, worker.card.workers))

    def _may_use(self, worker: _Worker) -> bool:
        """Return whether ``worker`` has a context or may open one."""
        card = worker.card
        if card is self._nothing or worker.kept:
            return card is not self._nothing
        holders = sum(each.kept > 0 for each in card.workers)
        if not holders:
            return True
        # A test of unknown peak runs alone and should find as much room as there can be.
        if holders >= card.contexts or self._unscouted:
            return False
        tallest = self._whole(self._big.tests[0]) if self._big.tests else self._tallest
        return self._capacity(card, len(card.claims) + 1) >= tallest

    def _capacity(self, card: _Card, contexts: int) -> int:
        """Return the bytes for tests on ``card`` beside so many contexts."""
        return card.total - card.others - self._headroom - contexts * self._context

    def _closed(self, card: _Card) -> bool:
        """Return whether the card must empty before it takes further tests."""
        if card.reserved:
            return card.reserved.passed >= PATIENCE
        if not card.running or len(self._alone.tests) < DRAIN * len(self._cards):
            return False
        # Not for tests that what the workers keep would hold up all the same: the others would
        # run one by one.
        return any(self._would_go(card, test) for test in itertools.islice(self._alone.tests, LOOK))

    def _would_go(self, card: _Card, test: int) -> bool:
        """Return whether ``test``, which must run alone, could if no test ran on ``card``."""
        if test in self._seen.ooms and any(map(self._owes, card.workers)):
            return False
        idle = [claim._replace(extra=0) for claim in card.claims.values()]
        return self._whole(test) <= admission.room(card.total, card.others, self._headroom, idle)

    def _portions(self, worker: _Worker) -> Iterator[Portion]:
        """Yield where to look for a GPU test, best first."""
        if self._settled(worker):
            if self._gpu.free(worker.group):
                worker.gpu = self._gpu_portion(worker)
            if worker.gpu is not None and worker.gpu.group == worker.group:
                yield worker.gpu
            return
        empty = not worker.card.running
        # Where one worker does all, its module's tests come first.
        if empty and max(worker.card.contexts, len(worker.card.claims)) > 1:
            yield self._alone
        yield self._wide
        yield self._big
        yield self._gpu.long
        worker.gpu = self._gpu_portion(worker)
        if worker.gpu is not None:
            yield worker.gpu
        if empty:
            yield self._alone
        if self._last.tests and empty and not (len(self._cpu) or self._disturbers(worker.card)):
            yield self._last

    def _gpu_portion(self, worker: _Worker) -> Portion | None:
        suits = self._order.suits(worker.to_set_up)
        portion = self._gpu.adopt(worker.group, worker.gpu, suits)
        if portion is None and len(self._gpu) > len(self._gpu.long.tests):
            worker.out_of_order = True
        return portion

    def _disturbers(self, card: _Card) -> bool:
        """Return whether tests run that may use ``card`` unexpectedly."""
        return any(
            card in worker.ring and self._may_surprise(worker) for worker in self._workers.values()
        )

    def _may_surprise(self, worker: _Worker) -> bool:
        """Return whether ``worker`` runs a test that may use its cards unexpectedly."""
        return not worker.using and any(not self._tests[test].seen for test in worker.given)

    def _take(self, portion: Portion, test: int) -> int:
        """Remove a GPU test from where it waits."""
        duration = self._tests[test].duration
        if portion is self._alone or portion is self._last:
            return portion.take(test, duration)
        self._packed = max(0.0, self._packed - duration)
        self._area = max(0.0, self._area - self._whole(test) * duration)
        if portion is self._wide or portion is self._big:
            return portion.take(test, duration)
        return self._gpu.take(portion, test)

    def _reserve(self, worker: _Worker, portion: Portion, test: int) -> None:
        """Keep cards for the first test that does not fit, so that it cannot starve."""
        cards = self._cards_for(worker, test)
        shared = self._need(test) is not None and portion is not self._alone
        taken = any(card.reserved for card in cards)
        # Not for one that waits for other programs to end: smaller ones may as well go first.
        if shared and not taken and self._possible(cards, test, beside_others=True):
            reservation = _Reservation(self._take(portion, test), cards)
            for card in cards:
                card.reserved = reservation

    def _from_elsewhere(self, worker: _Worker) -> int | None:
        """Return a test that waits for another card, if it fits here and nothing else is left."""
        for card in self._cards.values() if not len(self._gpu) else ():
            reserved = card.reserved
            fits = reserved and self._fits(worker, reserved.test)
            if reserved and fits and self._in_order(worker, reserved.test):
                return self._launch(worker, _unreserve(reserved))
        return None

    def _cards_for(self, worker: _Worker, test: int) -> tuple[_Card, ...]:
        """Return the cards that ``test`` would use at ``worker``; too few if there are no more."""
        return worker.ring[: self._tests[test].cards]

    def _fits(self, worker: _Worker, test: int) -> bool:
        cards = self._cards_for(worker, test)
        if len(cards) < self._tests[test].cards:
            return False
        if (self._need(test) is None or self._tests[test].exclusive) and _busy(cards):
            return False
        return all(self._asks(worker, card, test) <= self._room(worker, card) for card in cards)

    def _whole(self, test: int) -> int:
        """Return what ``test`` needs in a process that keeps nothing but its context."""
        return (self._need(test) or 0) + self._seen.fixtures(test)

    def _asks(self, worker: _Worker, card: _Card, test: int) -> int:
        """Return what ``test`` needs on ``card`` beyond what ``worker`` keeps there."""
        kept, standing = self._baseline(worker, card), worker.standing.get(card, 0)
        fixtures = self._seen.fixtures(test)
        return (self._need(test) or 0) + admission.missing(fixtures, self._context, kept, standing)

    def _room(self, worker: _Worker, card: _Card) -> int:
        """Return the bytes that a test of ``worker`` may take on ``card``; negative: none."""
        if card.exclusive:
            return -1
        claims = [claim for name, claim in card.claims.items() if name != worker.name]
        claims.append(Claim(self._baseline(worker, card), 0, exclusive=False))
        return admission.room(card.total, card.others, self._headroom, claims)

    def _baseline(self, worker: _Worker, card: _Card) -> int:
        """Return what ``worker`` keeps on ``card`` while it runs a test there."""
        return max(self._context, worker.resident.get(card, 0))

    def _possible(self, cards: Sequence[_Card], test: int, *, beside_others: bool = False) -> bool:
        """Return whether ``test`` fits on ``cards`` when they are empty, other programs aside."""
        claim = Claim(self._context, self._whole(test), exclusive=False)
        return len(cards) == self._tests[test].cards and not any(
            admission.never_fits(card.total - beside_others * card.others, self._headroom, claim)
            for card in cards
        )

    # Claims

    def _launch(self, worker: _Worker, test: int, *, alone: bool = False) -> int:
        """Reserve what ``test`` needs, or all, and return it."""
        exclusive = alone or self._need(test) is None or self._tests[test].exclusive
        worker.asked = 0
        worker.using = self._cards_for(worker, test)
        worker.disturbed = exclusive and any(map(self._disturbers, worker.using))
        for card in worker.using:
            worker.resident[card] = self._baseline(worker, card)
            if card.reserved:
                card.reserved.passed += 1
            card.users.append(worker)
            card.exclusive = exclusive
            asked = self._asks(worker, card, test)
            worker.asked = max(worker.asked, asked)
            self._claim(worker, card, asked)
        return test

    def _claim(self, worker: _Worker, card: _Card, extra: int) -> None:
        resident = worker.resident.get(card, 0)
        exclusive = card.exclusive and card in worker.using
        if resident or extra or exclusive:
            card.claims[worker.name] = Claim(resident, extra, exclusive=exclusive)
        else:
            card.claims.pop(worker.name, None)

    # When nothing fits

    def _held_up(self, card: _Card) -> bool:
        """Return whether a GPU test waits for what idle workers keep on ``card``.

        Others may wait only until a worker has ended its module.
        """
        if card.reserved:
            return True
        waiting = (itertools.islice(each.tests, LOOK) for each in (self._alone, self._last))
        lone = list(itertools.chain.from_iterable(waiting))
        return bool(lone) and not any(self._would_go(card, test) for test in lone)

    def _ask_back(self, worker: _Worker, out: list[Command]) -> bool:
        """Let a worker give back its fixtures if they keep a GPU test from a card's room."""
        if worker.card.running or not self._owes(worker):
            return False
        if not self._gpu_waits() and not self._last.tests:
            return False
        if self._enough_comes_back(worker):
            return False
        self._give_back(worker, out)
        return True

    def _give_back(self, worker: _Worker, out: list[Command]) -> None:
        """Let a worker tear down what it keeps: fixtures of modules first, then all."""
        out.append((Reset if worker.given_back else Flush)(worker.name))
        worker.given_back += 1
        worker.waiting = True
        worker.stalled = False
        worker.group = ""

    def _owes(self, worker: _Worker) -> bool:
        return worker.given_back < 2 and worker.owed > 0

    def _enough_comes_back(self, worker: _Worker) -> bool:
        """Return whether what was asked of others may do for the test that waits for room.

        Each flush costs a worker the set-up of its fixtures, and a collection of garbage.
        """
        card, reserved = worker.card, worker.card.reserved
        if reserved is None or len(reserved.cards) > 1 or self._alone.tests or self._last.tests:
            return False
        lacks = self._asks(worker, card, reserved.test) - self._room(worker, card)
        return lacks <= sum(each.owed for each in card.workers if each.waiting)

    def _last_resort(self, worker: _Worker, out: list[Command]) -> int | None:
        """Return a GPU test to run alone although it does not fit, when all else was tried.

        Tests that can never run are given up.
        """
        able = self._may_use(worker) or worker.card is self._nothing
        if not able or not all(each.idle and not self._owes(each) for each in worker.card.workers):
            return None
        reserved = worker.card.reserved
        home = reserved is not None and reserved.cards[0] is worker.card
        free = home and reserved and not _busy(reserved.cards)
        if reserved and free and self._in_order(worker, reserved.test):
            return self._launch(worker, _unreserve(reserved), alone=True)
        for portion in self._portions(worker):
            for test in list(itertools.islice(portion.tests, LOOK)):
                cards = self._cards_for(worker, test)
                free = self._possible(cards, test) and not _busy(cards)
                if free and self._in_order(worker, test):
                    return self._launch(worker, self._take(portion, test), alone=True)
                if not self._possible_anywhere(test):
                    self._give_up(self._take(portion, test), out)
        return None

    def _possible_anywhere(self, test: int) -> bool:
        """Return whether ``test`` fits on the empty cards of some worker."""
        count = self._tests[test].cards
        return any(self._possible(ring[:count], test) for ring in self._rings)

    def _give_up(self, test: int, out: list[Command]) -> None:
        planned = self._tests[test]
        why = self._why_never(test)
        out.append(Fail(test, why))
        self._left -= 1
        self._changed = True
        self._scouted(family(planned.nodeid))

    def _why_never(self, test: int) -> str:
        """Return in words what ``test`` needs, and the most that it finds at any worker."""
        nodeid, count = self._tests[test].nodeid, self._tests[test].cards
        rings = [ring for ring in self._rings if self._nothing not in ring]
        sizes = [min(card.total for card in ring[:count]) for ring in rings if len(ring) >= count]
        if not sizes:
            return admission.why_too_many(nodeid, count, max(map(len, rings), default=0))
        each = "the card" if count == 1 else f"each of the {count} cards"
        there_is = f"{each} that a worker uses first has {format_bytes(max(sizes))} at most"
        return admission.why_too_large(
            nodeid,
            self._whole(test),
            count,
            there_is,
            context=self._context,
            headroom=self._headroom,
        )

    # Sorting tests by how they have to run

    def _start(self, out: list[Command]) -> None:
        """Sort all tests, now that the workers are known."""
        self._started = True
        on_cpu: list[int] = []
        shared: list[int] = []
        for test, planned in enumerate(self._tests):
            if not planned.gpu:
                on_cpu.append(test)
            elif not self._possible_anywhere(test):
                self._give_up(test, out)
            elif self._lone(test) or planned.cards > 1:
                self._admit(test)
            else:
                shared.append(test)
        for test in shared:
            self._packed += self._tests[test].duration
            self._area += self._whole(test) * self._tests[test].duration
        self._fill(on_cpu, shared)

    def _lone(self, test: int) -> bool:
        """Return whether ``test`` must have its cards for itself, if nothing more is learned."""
        unknown = self._need(test) is None and not self._optimistic
        return unknown or self._tests[test].exclusive or test in self._seen.ooms

    def _run_alone(self, test: int) -> None:
        """Let ``test`` run alone, or wait for the peak of one of its family that does."""
        planned, ooms = self._tests[test], self._seen.ooms[test]
        kin = family(planned.nodeid)
        scout = not (self._optimistic or planned.exclusive or self._seen.scouted(kin))
        if ooms > 1:
            self._last.add(test, planned.duration)
        elif self._need(test) is None and scout and not ooms and kin in self._unscouted:
            self._unscouted[kin].append(test)
            self._unscouted_time += planned.duration
        else:
            self._alone.add(test, planned.duration)
            if self._need(test) is None and scout:
                self._unscouted.setdefault(kin, deque())

    def _fill(self, on_cpu: Sequence[int], shared: Sequence[int]) -> None:
        """Pile up the tests that run as they come."""
        total = sum(test.duration for test in self._tests)
        longest = max((test.duration for test in self._tests), default=0.0)
        space = sum(self._capacity(card, 1) for card in self._cards.values())
        bound = max(total / max(1, len(self._workers)), longest, self._area / max(1, space))
        long = max(LONG * bound, OUTLIER * total / max(1, len(self._tests)))
        # Modules with GPU tests come last: their CPU tests may find the fixtures set up.
        self._cpu = Pile(self._tests, later={test.group for test in self._tests if test.gpu})
        self._cpu.fill(on_cpu, long)
        self._replan()
        rooms = (self._capacity(card, card.contexts) for card in self._cards.values())
        room = min(rooms, default=0)
        need = {test: self._whole(test) for test in shared}
        for test in sorted(shared, key=lambda test: -need[test]):
            if need[test] <= room:
                self._tallest = need[test]
                break
            self._big.add(test, self._tests[test].duration)
        self._gpu.fill([test for test in shared if need[test] <= room], long)

    def _admit(self, test: int) -> None:
        """Put one test where it belongs."""
        planned = self._tests[test]
        whole = self._whole(test)
        if not self._on_card(test):
            self._cpu.add(test)
        elif self._lone(test) or whole > self._roomiest():
            self._run_alone(test)
        else:
            self._packed += planned.duration
            self._area += whole * planned.duration
            if planned.cards > 1:
                self._wide.add(test, planned.duration)
            else:
                self._gpu.add(test)
                self._tallest = max(self._tallest, whole)

    def _roomiest(self) -> int:
        """Return the bytes for tests on the card that has most, beside the contexts there are.

        What other programs use now they may give back.
        """
        rooms = (
            self._capacity(card, max(1, len(card.claims))) + card.others
            for card in self._cards.values()
        )
        return max(rooms, default=0)

    # How many contexts

    def _replan(self) -> None:
        """Choose how many workers of each card hold a context."""
        self._until_replan = REPLAN
        self._changed = True
        for card in self._cards.values():
            counts = range(1, max(1, len(card.workers)) + 1)
            card.contexts = min(counts, key=functools.partial(self._makespan, card))
            gpu, even = self._bounds(card, card.contexts)
            card.urgent = gpu > SLACK * even

    def _makespan(self, card: _Card, contexts: int) -> float:
        """Return the seconds that the rest may take with so many contexts on ``card``."""
        gpu, even = self._bounds(card, contexts)
        return max(gpu / SLACK, even)

    def _bounds(self, card: _Card, contexts: int) -> tuple[float, float]:
        """Return the least seconds for its GPU tests with so many contexts, and for all tests.

        The first are the larger of GPU time / contexts and VRAM-time / room beside the contexts,
        after what runs alone; the second are all time / workers.
        """
        workers = max(1, len(self._workers))
        room = self._capacity(card, contexts)
        gpu = self._pace(gpu=True)
        alone = gpu * self._alone.work
        packed = gpu * (self._packed + max(0.0, self._unscouted_time))
        even = (self._pace(gpu=False) * self._cpu.time + alone + packed) / workers
        if room <= 0:
            return float("inf"), even
        part = len(card.workers) / workers
        return part * (alone + max(packed / contexts, gpu * self._area / room)), even


def _busy(cards: Iterable[_Card]) -> bool:
    return any(card.running for card in cards)


def _unreserve(reservation: _Reservation) -> int:
    for card in reservation.cards:
        card.reserved = None
    return reservation.test

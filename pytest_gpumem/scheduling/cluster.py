"""The cards and workers of a run: who has what, and what a test would find where.

A few writers (``join``, ``leave``, ``stop``, ``start``, ``end``, ``surprises``, ``keeps``,
``gave_back``) say what happened; all else are questions. Sizes are bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gpumem import admission
from pytest_gpumem.admission import Claim
from pytest_gpumem.scheduling.fixtures import NOTHING, of_session, outlives
from pytest_gpumem.scheduling.places import Card, Worker, busy
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_gpumem.scheduling.commands import CardKey
    from pytest_gpumem.scheduling.estimates import Estimates, PlannedTest


class Cluster:
    """All cards and workers.

    Args:
        tests: all tests; they are known by their index here.
        seen: what to expect of them.
        cards: bytes of each card.
        others: bytes that other programs use, by card.
        context: bytes that a process keeps on a card once it used it.
        headroom: bytes of each card that are never given out.

    """

    def __init__(
        self,
        tests: Sequence[PlannedTest],
        seen: Estimates,
        cards: Mapping[CardKey, int],
        others: Mapping[CardKey, int],
        *,
        context: int,
        headroom: int,
    ) -> None:
        self._tests = tests
        self._seen = seen
        self._context = context
        self._headroom = headroom
        self.cards = {key: Card(total, others.get(key, 0)) for key, total in cards.items()}
        self.lasting = {each.name for test in tests for each in test.wide if outlives(each, test)}
        """The fixtures that outlive a module."""
        self._nothing = Card(-1, 0)
        """The card of workers that have none."""
        self._rings: set[tuple[Card, ...]] = set()
        """What workers see or saw; one that crashed will be replaced, one that was stopped not."""
        self.workers: dict[str, Worker] = {}

    # What happens

    def join(self, name: str, cards: Sequence[CardKey], host: str = "") -> Worker:
        """Add a worker that sees ``cards``; those that nobody told of do not count."""
        ring = tuple(self.cards[key] for key in cards if key in self.cards)
        worker = Worker(name, ring or (self._nothing,), self._context, host)
        self._rings.add(worker.ring)
        worker.card.workers.append(worker)
        self.workers[name] = worker
        return worker

    def leave(self, name: str) -> Worker:
        """Forget a worker that ended, with all that it kept and that was set aside for it."""
        worker = self.workers.pop(name)
        for each in self.workers.values():
            each.had_company |= bool(each.given) and self._beside(each, worker)
        worker.card.workers.remove(worker)
        self.end(worker)
        for card in worker.ring:
            card.claims.pop(name, None)
        return worker

    def stop(self, worker: Worker) -> None:
        """Take note that ``worker`` is given nothing more."""
        worker.stopped = True
        self._rings = {each.ring for each in self.workers.values() if not each.stopped}

    def start(self, worker: Worker, test: int, *, alone: bool = False) -> None:
        """Set aside what GPU test ``test`` needs at ``worker``, or its whole cards."""
        exclusive = alone or self.is_exclusive(test)
        worker.asked = 0
        worker.using = self.cards_for(worker, test)
        worker.disturbed = exclusive and any(map(self.disturbed, worker.using))
        for card in worker.using:
            worker.resident[card] = self._baseline(worker, card)
            if card.reserved:
                card.reserved.passed += 1
            card.users.append(worker)
            card.exclusive = exclusive
            asked = self.asks(worker, card, test)
            worker.asked = max(worker.asked, asked)
            self._claim(worker, card, asked)

    def end(self, worker: Worker) -> None:
        """Take back what was set aside for the test that ``worker`` ran."""
        for card in worker.using:
            card.users.remove(worker)
            card.exclusive = False
            self._claim(worker, card, 0)
        worker.using = ()
        worker.disturbed = worker.had_company = False

    def surprises(self, worker: Worker) -> None:
        """Take note that ``worker`` starts a test that may use its cards unexpectedly."""
        for card in worker.ring:
            for other in card.users:
                other.disturbed = True

    def keeps(self, worker: Worker, card: Card, size: int, fixtures: Mapping[str, int]) -> bool:
        """Take note of what ``worker`` keeps on ``card``; return whether that is new."""
        before = worker.resident.get(card, 0), worker.standing.get(card, {})
        if before == (size, fixtures):
            return False
        worker.resident[card], worker.standing[card] = size, fixtures
        worker.stays = max(self._context, min(worker.stays, worker.kept))
        # Fixtures of the module before that were torn down made the room for its test's own.
        runs = card in worker.using
        self._claim(worker, card, self.asks(worker, card, worker.given[0]) if runs else 0)
        return True

    def gave_back(self, worker: Worker) -> None:
        """Take note that ``worker`` tore down what it was asked for."""
        worker.waiting = False
        worker.set_up = of_session(worker.set_up) if worker.given_back == 1 else NOTHING
        worker.to_set_up = worker.set_up
        if worker.given_back > 1:
            worker.stays = max(self._context, worker.kept)

    def foreign(self, card: Card, used: int) -> int:
        """Return what others than the workers use of ``card``, of which ``used`` are in use."""
        uses = (self._uses(each, card) for each in self.workers.values())
        return admission.foreign(used, uses, card.others)

    def _uses(self, worker: Worker, card: Card) -> tuple[int, int]:
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

    def _claim(self, worker: Worker, card: Card, extra: int) -> None:
        resident = worker.resident.get(card, 0)
        exclusive = card.exclusive and card in worker.using
        if resident or extra or exclusive:
            card.claims[worker.name] = Claim(resident, extra, exclusive=exclusive)
        else:
            card.claims.pop(worker.name, None)

    # What there is

    def capacity(self, card: Card, contexts: int) -> int:
        """Return the bytes for tests on ``card`` beside so many contexts."""
        return card.total - card.others - self._headroom - contexts * self._context

    def crowded(self) -> bool:
        """Return whether a card has no room for a context of each of its workers."""
        return any(self.capacity(card, len(card.workers)) < 0 for card in self.cards.values())

    def roomiest(self) -> int:
        """Return the bytes for tests on the card that has most, beside the contexts there are.

        What other programs use now they may give back.
        """
        rooms = (
            self.capacity(card, max(1, len(card.claims))) + card.others
            for card in self.cards.values()
        )
        return max(rooms, default=0)

    def disturbed(self, card: Card) -> bool:
        """Return whether tests run that may use ``card`` unexpectedly."""
        return any(
            card in worker.ring and self._may_surprise(worker) for worker in self.workers.values()
        )

    def _may_surprise(self, worker: Worker) -> bool:
        """Return whether ``worker`` runs a test that may use its cards unexpectedly."""
        return not worker.using and any(not self._tests[test].seen for test in worker.given)

    def accompanied(self, worker: Worker) -> bool:
        """Return whether others may use or keep what ``worker``, alone, would find free."""
        others = (each for each in self.workers.values() if each is not worker)
        return (
            worker.had_company
            or any(card.others for card in worker.using or worker.ring)
            or any(self._beside(worker, each) for each in others)
        )

    def _beside(self, worker: Worker, other: Worker) -> bool:
        """Return whether ``other`` may use or keep what ``worker``, alone, would find free.

        What it held and gave back meanwhile is not known: that it has a context says enough.
        """
        for card in worker.using or worker.ring:
            if card not in other.ring or card is self._nothing:
                continue
            alone = card.exclusive and worker in card.users
            kept = other.owes if alone else other.name in card.claims or other in card.users
            if kept or any(not self._tests[test].seen for test in other.given):
                return True
        return False

    # What a test would find

    def cards_for(self, worker: Worker, test: int) -> tuple[Card, ...]:
        """Return the cards that ``test`` would use at ``worker``; too few if there are no more."""
        return worker.ring[: self._tests[test].cards]

    def is_exclusive(self, test: int) -> bool:
        """Return whether ``test`` shares its cards with no other."""
        return self._seen.need(test) is None or self._tests[test].exclusive

    def fits(self, worker: Worker, test: int) -> bool:
        """Return whether ``test`` has room at ``worker`` now."""
        cards, alone = self.cards_for(worker, test), self.is_exclusive(test)
        if len(cards) < self._tests[test].cards or (alone and busy(cards)):
            return False
        return all(
            self.asks(worker, card, test) <= self.room(worker, card)
            or (not alone and self._takes_nothing(worker, card, test))
            for card in cards
        )

    def _takes_nothing(self, worker: Worker, card: Card, test: int) -> bool:
        """Return whether ``test`` takes no more of ``card`` than ``worker`` keeps there anyway.

        It need not wait, however full the card is: an engine may outgrow what was expected of it.
        """
        has_context = worker.resident.get(card, 0) >= self._context
        return has_context and not card.exclusive and not self.asks(worker, card, test)

    def may_go(self, worker: Worker, test: int) -> bool:
        """Return whether a test that waits for room has it, or can never have more than now.

        Contexts stay: a test that does not fit beside those there are would wait in vain.
        """
        cards = self.cards_for(worker, test)
        owed = any(card.owed_beside(worker, self._there(worker, card, test)) for card in cards)
        if test in self._seen.ooms and owed:
            return False  # it gets all the room that there can be
        if self.fits(worker, test):
            return True
        # What other programs use may be theirs for good: the lease waits for it, not for ever.
        return not (owed or busy(cards) or len(cards) < self._tests[test].cards)

    def would_go(self, card: Card, test: int) -> bool:
        """Return whether ``test``, which must run alone, could if no test ran on ``card``."""
        if test in self._seen.ooms and card.owed:
            return False
        kept = sum(claim.resident for claim in card.claims.values())
        return self._seen.whole(test) <= self.capacity(card, 0) - kept

    def asks(self, worker: Worker, card: Card, test: int) -> int:
        """Return what ``test`` needs on ``card`` beyond what ``worker`` keeps there."""
        kept, standing = self._baseline(worker, card), self._there(worker, card, test)
        need, fixtures = self._seen.need(test), self._seen.fixtures(test)
        # A test that takes nothing itself makes no context: its fixtures' processes have theirs.
        context = 0 if need == 0 else self._context
        return (need or 0) + admission.missing(fixtures, context, kept, standing)

    def _there(self, worker: Worker, card: Card, test: int) -> int:
        """Return what fixtures hold at ``worker`` that are ``test``'s own, or make way for them."""
        planned, fixtures = self._tests[test], worker.standing.get(card)
        if not fixtures:
            return 0
        stay = fixtures if worker.group == planned.group else self.lasting
        return worker.holds(card, but={*stay} - {"", *(each.name for each in planned.wide)})

    def room(self, worker: Worker, card: Card) -> int:
        """Return the bytes that a test of ``worker`` may take on ``card``; negative: none."""
        if card.exclusive:
            return -1
        claims = [claim for name, claim in card.claims.items() if name != worker.name]
        claims.append(Claim(self._baseline(worker, card), 0, exclusive=False))
        return admission.room(card.total, card.others, self._headroom, claims)

    def _baseline(self, worker: Worker, card: Card) -> int:
        """Return what ``worker`` keeps on ``card`` while it runs a test there."""
        return max(self._context, worker.resident.get(card, 0))

    def possible(self, cards: Sequence[Card], test: int, *, beside_others: bool = False) -> bool:
        """Return whether ``test`` fits on ``cards`` when they are empty, other programs aside."""
        claim = Claim(self._context, self._seen.whole(test), exclusive=False)
        return len(cards) == self._tests[test].cards and not any(
            admission.never_fits(card.total - beside_others * card.others, self._headroom, claim)
            for card in cards
        )

    def possible_anywhere(self, test: int) -> bool:
        """Return whether ``test`` fits on the empty cards of some worker."""
        count = self._tests[test].cards
        return any(self.possible(ring[:count], test) for ring in self._rings)

    def has_cards_for(self, test: int) -> bool:
        """Return whether some worker sees as many cards as ``test`` uses."""
        count = self._tests[test].cards
        return any(len(ring) >= count and self._nothing not in ring for ring in self._rings)

    def why_never(self, test: int) -> str:
        """Return in words what ``test`` needs, and the most that it finds at any worker."""
        nodeid, count = self._tests[test].nodeid, self._tests[test].cards
        rings = [ring for ring in self._rings if self._nothing not in ring]
        sizes = [min(card.total for card in ring[:count]) for ring in rings if len(ring) >= count]
        if not sizes:
            return admission.why_too_many(nodeid, count, max(map(len, rings), default=0))
        each = "the card" if count == 1 else f"each of the {count} cards"
        there_is = f"{each} that a worker uses first has {format_bytes(max(sizes))} at most"
        costs = {"context": self._context, "headroom": self._headroom}
        return admission.why_too_large(nodeid, self._seen.whole(test), count, there_is, **costs)

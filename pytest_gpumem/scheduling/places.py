"""A card and a worker of a run, as the scheduler knows them. Sizes are bytes."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from pytest_gpumem.scheduling.fixtures import NOTHING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from pytest_gpumem.admission import Claim
    from pytest_gpumem.scheduling.estimates import PlannedTest
    from pytest_gpumem.scheduling.piles import Portion


class Reservation:
    """A test that waits for room on its cards."""

    def __init__(self, test: int, cards: Sequence[Card]) -> None:
        self.test = test
        self.cards = cards
        """The first is that of the workers that will run it."""
        self.passed = 0
        """Tests that passed it."""

    def end(self) -> int:
        """Keep the cards no longer; return the test."""
        for card in self.cards:
            card.reserved = None
        return self.test


class Card:
    """One card and who is on it."""

    def __init__(self, total: int, others: int) -> None:
        self.total = total
        self.others = others
        self.workers: list[Worker] = []
        self.claims: dict[str, Claim] = {}
        """Of each process that keeps anything on the card."""
        self.users: list[Worker] = []
        """Workers that run a GPU test on it."""
        self.exclusive = False
        self.contexts = 1
        """Workers that are to hold a context."""
        self.urgent = True
        """Whether GPU tests are, or are about to be, what the run waits for."""
        self.reserved: Reservation | None = None
        """A test that it is kept for."""

    @property
    def own_reservation(self) -> Reservation | None:
        """The test that it is kept for, if that waits for the workers of this card."""
        reserved = self.reserved
        return reserved if reserved is not None and reserved.cards[0] is self else None

    @property
    def running(self) -> int:
        """GPU tests that run on it."""
        return len(self.users)

    @property
    def holders(self) -> int:
        """Workers that have a context on it."""
        return sum(each.resident.get(self, 0) > 0 for each in self.workers)

    @property
    def idle(self) -> bool:
        """Whether nobody uses it, and its workers are idle and have given back what they can."""
        return not self.users and all(each.idle and not each.owes for each in self.workers)

    @property
    def owed(self) -> bool:
        """Whether a worker has something to give back."""
        return any(each.owes for each in self.workers)

    def owed_beside(self, worker: Worker, own: int) -> bool:
        """Return whether anybody has more to give back than ``worker`` its ``own`` bytes.

        These it would take again: its next test's fixtures hold them.
        """
        others = (each for each in self.workers if each is not worker)
        return (worker.owes and worker.owed > own) or any(each.owes for each in others)


class Worker:
    """One process that runs tests."""

    def __init__(self, name: str, ring: tuple[Card, ...], context: int, host: str = "") -> None:
        self.name = name
        self.host = host
        self.ring = ring
        """Its own card first; if it sees none, one that has no bytes."""
        self.card = ring[0]
        self.resident: dict[Card, int] = {}
        self.standing: dict[Card, Mapping[str, int]] = {}
        """Of these, what its wider fixtures hold, by identity."""
        self.given: deque[int] = deque()
        """The test it runs, and those it was handed to run next."""
        self.refill = 1
        """With so many given, it is handed further ones."""
        self.cpu: Portion | None = None
        self.gpu: Portion | None = None
        self.using: tuple[Card, ...] = ()
        """The cards of the GPU test it runs."""
        self.asked = 0
        """Bytes set aside for it on each of them."""
        self.disturbed = False
        """Whether a test that may use these cards unexpectedly ran at the same time."""
        self.had_company = False
        """Whether somebody left meanwhile whose share of the cards its test may have lacked."""
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
        self.ran: PlannedTest | None = None
        """The test that it ran last; what it was handed since it may have returned."""
        self.grown = 0
        """Bytes of main memory that it keeps more than before its first test."""
        self.too_large = False
        """Whether it is to be replaced, when it goes on to another module."""
        self.stays = context
        """Bytes that it cannot give back: its context, and what it kept after its last reset."""

    @property
    def sees_card(self) -> bool:
        """Whether it sees any card."""
        return self.card.total >= 0

    @property
    def kept(self) -> int:
        """Bytes it keeps on its own card; 0 if it has no context there."""
        return self.resident.get(self.card, 0)

    @property
    def owed(self) -> int:
        """Bytes of these that it may give back."""
        return max(0, self.kept - self.stays)

    @property
    def owes(self) -> bool:
        """Whether something comes back from it: it is giving back, or can be asked to.

        Once told to, it has what it keeps until it says so; a test sent before would lack it.
        """
        return (self.waiting or self.given_back < 2) and self.owed > 0

    @property
    def idle(self) -> bool:
        """Whether it has nothing to do."""
        return not self.given and not self.waiting

    def holds(self, card: Card, *, but: Collection[str]) -> int:
        """Return what its wide fixtures hold on ``card``, but for those of these names."""
        fixtures = self.standing.get(card)
        if not fixtures:  # as with most: this is asked at each decision
            return 0
        return sum(size for name, size in fixtures.items() if name not in but)


def busy(cards: Iterable[Card]) -> bool:
    """Return whether a GPU test runs on one of ``cards``."""
    return any(card.running for card in cards)

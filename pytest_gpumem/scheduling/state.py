"""What decisions rest on: events write it (``planner``), rules ask and change it (``policy``)."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_gpumem.scheduling.backlog import Backlog
    from pytest_gpumem.scheduling.cluster import Cluster
    from pytest_gpumem.scheduling.commands import Command
    from pytest_gpumem.scheduling.estimates import Estimates, PlannedTest
    from pytest_gpumem.scheduling.fixtures import SetUpOrder
    from pytest_gpumem.scheduling.places import Worker
    from pytest_gpumem.scheduling.ram import MainMemory


class State:
    """One run as it is now."""

    def __init__(
        self,
        tests: Sequence[PlannedTest],
        seen: Estimates,
        order: SetUpOrder,
        cluster: Cluster,
        backlog: Backlog,
        *,
        ram: MainMemory,
    ) -> None:
        self.tests = tests
        self.seen = seen
        self.order = order
        self.cluster = cluster
        self.backlog = backlog
        self.ram = ram
        self.asking: dict[str, Worker] = {}
        """Workers that may be given something."""
        self.changed = True
        """Whether a worker that was given nothing may be given something now."""
        self.moved: set[str] = set()
        """Wide fixtures whose tests do not wait as CPU tests any more."""
        self.left = len(tests)
        """Tests that have not ended."""
        self.until_replan = 0
        """Tests after which the number of contexts is thought over."""
        self.out: list[Command] = []
        """What is to be done and was not told yet."""

    @cached_property
    def modules_of(self) -> dict[str, set[str]]:
        """By wide fixture, the modules whose tests use it."""
        found: dict[str, set[str]] = {}
        for test in self.tests:
            for each in test.wide:
                found.setdefault(each.name, set()).add(test.group)
        return found

    @property
    def gpu_waits(self) -> bool:
        """Whether a GPU test waits for a worker or for room."""
        if self.backlog.gpu_waits:
            return True
        return any(card.reserved for card in self.cluster.cards.values())

    @property
    def all_given(self) -> bool:
        """Whether no test waits for a worker."""
        return self.left == sum(len(each.given) for each in self.cluster.workers.values())

"""What a module, and the whole run, leave on the cards when all of their own fixtures are gone.

A scope's account holds what came to stay with it, whoever of it was running; a test's verdict
cannot know that what a fixture of its module held was kept by somebody else as well.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from pytest_gpumem.records import ScopeUsage
from pytest_gpumem.tracking import release
from pytest_gpumem.tracking.accounts import Fixture, Owner, Scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from pytest_gpumem.tracking.meter import Meters
    from pytest_gpumem.tracking.turns import Turns
    from pytest_gpumem.tracking.verdict import TensorLedger, Verdicts


class Scopes:
    """Judges scopes as they end, and sets calls of a test aside that do not count.

    Args:
        turns: who runs.
        meters: of the cards.
        tensors: whose doing they are.
        end_teardowns: lets nothing more be charged to fixtures that are torn down.
        remember: lays the tensors that are new at the door of who runs.

    """

    def __init__(
        self,
        turns: Turns,
        meters: Meters,
        tensors: TensorLedger,
        end_teardowns: Callable[[], None],
        remember: Callable[[], None],
    ) -> None:
        self._turns = turns
        self._meters = meters
        self._tensors = tensors
        self._end_teardowns = end_teardowns
        self._remember = remember
        self.told: list[ScopeUsage] = []
        """What has become known and was not reported."""

    def begin(self, scope: Scope) -> None:
        """Start charging a module or the session, before the first of its fixtures is set up."""
        self._end_teardowns()
        self._remember()
        scope.since = self._tensors.newest
        self._turns.scopes.append(scope)

    def end(
        self,
        scope: Scope,
        errors: Sequence[BaseException] = (),
        let_go: Callable[[], Mapping[int, str]] = dict,
    ) -> tuple[ScopeUsage, ...]:
        """Return what a scope left, all of whose fixtures are gone; the next report tells it too.

        The test after which it ends is not over yet: ``errors`` and ``let_go`` as for its end.
        """
        self._end_teardowns()
        left: tuple[ScopeUsage, ...] = ()
        if self._stayed(scope):
            passing = let_go()
            verdicts = self._tensors.second_look(
                errors, lambda: self._stayed(scope), lambda: self._judge(scope, passing)
            )
            left = tuple(
                ScopeUsage(scope.scope, scope.name, uuid, each.leaked, each.holders, each.note)
                for (_, uuid), each in verdicts.items()
                if each.leaked
            )
        self._turns.scopes.remove(scope)
        self.told += left
        return left

    def _judge(self, scope: Scope, passing: Mapping[int, str]) -> Verdicts:
        self._meters.settle()
        self._remember()
        wider = {each.name for each in self._turns.standing if not scope.outlives(each)}
        cards = self._meters.uuids()
        return self._tensors.judge_since(scope.since, scope.kept(), cards, passing, wider)

    def report(self) -> tuple[ScopeUsage, ...]:
        """Return what has become known since it was asked for last."""
        told, self.told = tuple(self.told), []
        return told

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """Let what comes to stay of the running test meanwhile be what it starts from."""
        self._meters.boundary()
        self._remember()
        # As a wider fixture's, it is not the test's.
        calls = Fixture("calls before the one that counts", "class")
        self._turns.begin_set_up(calls)
        try:
            yield
        finally:
            # Else what is collected later would make up for a leak.
            if self._stayed(calls):
                release.collect(lambda: self._stayed(calls))
            self._remember()
            self._turns.leave(calls)
            self._turns.rebase(self._meters)

    def _stayed(self, owner: Owner) -> bool:
        self._meters.boundary()
        return bool(owner.kept())

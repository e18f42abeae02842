"""A test that runs and is not measured unless something happens in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_gpumem.tracking.children import Children
    from pytest_gpumem.tracking.process_changes import ProcessChanges


class PassedBy:
    """Sees to what could not be found out later: who started which child, and who set what.

    That is enough while no framework is loaded. The tracker may begin to measure at any moment.

    Args:
        left: watches what tests set for the whole process.

    """

    def __init__(self, left: ProcessChanges) -> None:
        self._left = left
        self.number = -1
        """By which the test's children know it; -1 when there is no such test."""
        self.stirred = False
        """Whether children were noticed as the test ended: the system tells that once."""

    def begin(self, nodeid: str, children: Children | None, *, at_once: bool) -> None:
        """Let a test run; ``at_once`` says that nobody ran since the last one ended."""
        if not at_once:
            self._left.look(by_test=False)
        self.number = 0 if children is None else children.enter(nodeid)
        self.stirred = False

    def end(self, children: Children | None) -> bool:
        """Return whether nothing happened in the test, which is over then."""
        if children is not None:
            self.stirred = children.stirred()
            if self.stirred or children.known:
                return False
        if self._left.look(by_test=True):
            return False
        self.number = -1
        return True

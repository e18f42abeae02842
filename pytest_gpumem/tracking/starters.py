"""Who runs, by a number, so that what is started can be laid at his door.

A process that says who started it by its page or its environment is believed; one whose environment
was cleared belongs to who ran when it began, if the tree of processes leads here.
"""

from __future__ import annotations

import bisect
import os
from array import array
from typing import TYPE_CHECKING

from pytest_gpumem.clock import clock
from pytest_gpumem.devices import family

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.devices.book import Book


_forks = 0
"""How often this process was forked off another one that ran tests: asked for with each test."""


def _count_fork() -> None:
    global _forks  # noqa: PLW0603  # of this process
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


class Starters:
    """The tests and wider fixtures of this process.

    Args:
        make_book: makes the book in which children tell what they hold; called again in a forked
            child that runs tests itself.

    """

    def __init__(self, make_book: Callable[[], Book]) -> None:
        self._make_book = make_book
        self.book = make_book()
        self._place = str(self.book.path)
        self._forks = _forks
        self._inherited = os.environ.get(family.VARIABLE)
        self._outer = f"{self._inherited}\n" if self._inherited else ""
        self.names = ["outside of tests"]
        """By number."""
        self.heirs: dict[int, int] = {}
        """Who answers for whom now."""
        self.apart: set[int] = set()
        """Processes that this one started for tests of the run: what they and theirs hold is told
        with these tests."""
        self._since = array("d")
        """When, by the clock of processes, the next one came to run."""
        self._who = array("q")
        """His number. Nothing here is for each test an object that the collector looks at."""
        self.resume(0)

    def begin_anew(self) -> bool:
        """Keep a book of its own in a forked child; return whether this is one."""
        if self._forks == _forks:
            return False
        self._forks, self.book = _forks, self._make_book()
        self._place = str(self.book.path)
        self._since, self._who = array("d"), array("q")
        return True

    def enter(self, name: str) -> int:
        """Let one run that was not known yet; return its number."""
        number = len(self.names)
        self.names.append(name)
        self.resume(number)
        return number

    def resume(self, number: int) -> None:
        """Let what is started from now on be the doing of ``number``."""
        # Before each test: this is written out, a Link takes twice as long.
        name = self.names[number]
        if len(name) > 500 or not name.isprintable():
            name = family.fitting(name)
        os.environ[family.VARIABLE] = f"{self._outer}{number}|{self._place}|{name}"
        since = clock.clock_gettime(family.CLOCK)
        self.book.runs(number, since)
        self._since.append(since)
        self._who.append(number)

    def of(self, pid: int, identity: str) -> int | None:
        """Return who started a process, ``identity`` as ``pid:start``; None: nobody here."""
        for link in family.started_by(pid):
            if link.book == self._place:
                return self.heir(link.owner, identity)
        line = family.lineage(pid)
        if self.book.root not in line:
            return None
        if self.apart and any(int(each.partition(":")[0]) in self.apart for each in line):
            return None
        return self.heir(0, identity)

    def heir(self, number: int, identity: str) -> int:
        """Return who answers for a child that ``number`` started, nobody: who ran as it began.

        Whose environment is a copy that a module made when it was imported says nobody.
        """
        begun = family.begun(identity)
        if number or begun is None:
            return self.heirs.get(number, number)
        at = bisect.bisect(self._since, begun)
        owner = self._who[at - 1] if at else 0
        return self.heirs.get(owner, owner)

    def close(self) -> None:
        """Take the variable out of the environment, and the book off the disk."""
        if self._inherited is None:
            os.environ.pop(family.VARIABLE, None)
        else:
            os.environ[family.VARIABLE] = self._inherited
        self.book.remove()

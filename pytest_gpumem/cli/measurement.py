"""What a command and all that it started took of the cards, and what is said of it."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem.devices import host
from pytest_gpumem.errors import LeaseError
from pytest_gpumem.tracking.ram import RamMeter
from pytest_gpumem.units import format_bytes, printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_gpumem.records import Card, ChildUsage
    from pytest_gpumem.tracking.accounts import Owner
    from pytest_gpumem.tracking.children import Children


class Took(NamedTuple):
    """What the command and all that it started took of a card or main memory, in bytes."""

    card: Card
    asked: int | None
    """None: the whole card."""
    peak: int | None
    """The most that was seen, contexts included; None where the driver does not tell."""

    def __str__(self) -> str:
        """Return it in words."""
        asked = "the whole card" if self.asked is None else format_bytes(self.asked)
        if self.peak is None:
            return f"what it took of {self.card.name} cannot be told; asked for: {asked}"
        if not self.peak and host.is_pool(self.card.uuid):
            return f"ended before its main memory was looked at; asked for: {asked}"
        if not self.peak:
            return f"was not seen on {self.card.name}; asked for: {asked}"
        took = f"took {format_bytes(self.peak)} of {self.card.name}"
        if self.asked is not None and self.peak > self.asked:
            more = format_bytes(self.peak - self.asked)
            return f"{took}, {more} more than the {asked} it asked for"
        return f"{took}, asked for: {asked}"


class Measured:
    """The family of a command, as its children tell and the driver does.

    What cannot be measured is said, and the command runs all the same.

    Args:
        name: of the command.
        cards: those that are looked at.
        context: bytes that a process is taken to cost where the driver does not tell.
        in_ram: whether main memory is looked at as well.

    """

    def __init__(
        self, name: str, cards: Sequence[Card], context: int, *, in_ram: bool = False
    ) -> None:
        self.ram_peak: int | None = None
        """The most bytes of main memory that were seen; None where it is not looked at."""
        self._ram = RamMeter() if in_ram else None
        if self._ram is not None:
            self._ram.begin()
        self._children: Children | None = None
        self._peaks: Mapping[str, int] = {}
        self._silent: set[str] = set()
        try:
            if cards:
                self._begin(name, cards, context)
        except (LeaseError, OSError, RuntimeError) as error:
            self._stop(error)

    def _begin(self, name: str, cards: Sequence[Card], context: int) -> None:
        from pytest_gpumem.devices.book import left_behind
        from pytest_gpumem.leases.family import books, new_book
        from pytest_gpumem.tracking.accounts import Owner
        from pytest_gpumem.tracking.children import Children
        from pytest_gpumem.tracking.starters import Starters

        left_behind(books())  # takes out those of the killed
        children = Children(Starters(lambda: new_book(context)), lambda: cards, context)
        self._owner: Owner = Owner(name)
        self._owner.number = children.enter(name)
        self._children = children

    def _stop(self, error: Exception) -> None:
        self._children = None
        say(f"what it takes is not measured: {error}")

    def look(self) -> None:
        """Take in what is told now."""
        if self._ram is not None and self._ram.worth_a_look():
            self._ram.look()
        if self._children is not None:
            try:
                self._children.look()
            except Exception as error:  # the command goes on, and has to be waited for
                self._stop(error)

    def end(self) -> list[ChildUsage]:
        """Sum up once the command has ended; return who goes on to use the cards."""
        if self._ram is not None:
            self.ram_peak = max(self._ram.end().children_peak, _largest_child())
        children = self._children
        if children is None:
            return []
        try:
            children.settle([self._owner])
            usages = children.report()
            self._peaks = children.held_by([self._owner], living=False)
            children.close()
        except Exception as error:  # the command's status comes first
            self._stop(error)
            return []
        self._silent = {
            usage.card
            for usage in usages
            if usage.used_peak is None and usage.reserved_peak is None
        }
        return [usage for usage in usages if usage.used]

    def peak(self, card: Card) -> int | None:
        """Return the most bytes of a card that were seen; None where nothing tells."""
        if self._children is None or card.uuid in self._silent:
            return None
        return self._peaks.get(card.uuid, 0)


def _largest_child() -> int:
    """Return what the largest process had at its most that ended below this one; 0: not told.

    It is known also of one that nobody saw. A process begins with its parent's mark, see
    ``exec_mmap`` of Linux's fs/exec.c: what is no more than this one's is not its own.
    """
    import resource

    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return largest if largest > host.status().peak else 0


def say(sentence: str) -> None:
    """Write a line to standard error, which may be closed: the command's status comes first."""
    with suppress(OSError, ValueError, AttributeError):  # Python has none where it was closed
        sys.stderr.write(f"gpumem run: {printable(sentence)}\n")
        sys.stderr.flush()

"""The book of a family: what the allocators of a run's children hold, told by themselves.

The process that runs tests makes a file of slots. Each child that uses a card takes one, writes
there what its allocator holds, and the file keeps it when the child is killed. Sums are made when
a child takes more than before, by that child and under the lock, so that the highest sum of what
the children of one test held at the same time is exact.
"""

from __future__ import annotations

import functools
import hashlib
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpumem.clock import clock
from pytest_gpumem.devices import family
from pytest_gpumem.devices.processes import command
from pytest_gpumem.slots import WORD, Slots, pid_namespace
from pytest_gpumem.tuples import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pytest_gpumem.devices.reading import AllocatorReading

_MAGIC = b"gpufam\0\3"
_MOST = 512
"""Children that use a card, of which the book is told at the same time."""
_HEADER = 5
_NOW, _SINCE, _CONTEXT = 1, 2, 3
"""Who runs now, and since when, in nanoseconds; bytes of a context."""
_NAME_WORDS = 30
_CARD = 9
_CARDS = 8
"""Of one process; further ones are not told."""
_COMMAND_WORDS = 10
_PID, _NAMESPACE, _OWNER, _BEGAN, _ENDED, _NAME = range(6)
_COMMAND = _NAME + _NAME_WORDS
_ROOT = -1
"""The owner in the slot of the process that runs the tests."""
NOBODY = 0
"""The owner of what is started outside of tests, or by what was there before them."""
_FIRST_CARD = _COMMAND + _COMMAND_WORDS
_SLOT = _FIRST_CARD + _CARD * _CARDS
(_KEY, _KEY2, _ALLOCATED, _PEAK, _RESERVED, _RESERVED_PEAK, _SUM_PEAK, _NEED, _OOMS) = range(_CARD)


class Figures(NamedTuple):
    """What one child's allocator holds of one card; sizes in bytes."""

    allocated: int
    peak: int
    reserved: int
    reserved_peak: int
    sum_peak: int
    """The most that was allocated at one moment by all that the same test or fixture started, as
    far as this child had a part in it."""
    need: int
    """The same of what was reserved, and of contexts."""
    ooms: int


class ChildFigures(NamedTuple):
    """What one child told."""

    slot: int
    pid: int
    """0 where it has none in the reader's pid namespace, or had one of its own and has ended."""
    owner: int
    name: str
    """Its owner's, as far as there was room."""
    command: str
    began: float
    """When it used a card first, in seconds since the epoch."""
    ended: float
    """When it began to end, as it said itself; 0 for one that runs or was killed."""
    lives: bool
    cards: Mapping[tuple[int, int], Figures]
    """By ``key`` of the card."""


@functools.cache
def key(uuid: str) -> tuple[int, int]:
    """Return the two words by which the book knows a card."""
    digest = hashlib.blake2b(uuid.encode(), digest_size=2 * WORD).digest()
    first, second = struct.unpack("=qq", digest)
    return first, second


class Book:
    """A book, open in this process."""

    def __init__(self, path: Path) -> None:
        """Open the book that lies at ``path``.

        Raises:
            OSError: when it cannot be opened.
            ValueError: when it is no book.

        """
        self.path = path
        self._slots = Slots(path, _MAGIC, header=_HEADER, slot=_SLOT, most=_MOST)
        self._words = self._slots.words

    @classmethod
    def create(cls, directory: Path, context: int) -> Book:
        """Make a book of this process in ``directory``.

        ``context`` is the bytes that a process costs once it uses a card.

        Raises:
            OSError: when it cannot be written.

        """
        directory.mkdir(mode=0o700, exist_ok=True)
        name = f"{family.identity(os.getpid())}-{os.urandom(4).hex()}"
        # Under its name only once this process has its slot: till then it looks left behind.
        aside, path = directory / f".{name}", directory / name
        header = struct.pack("=8sqqqq", _MAGIC, NOBODY, 0, context, 0)
        Slots.create(aside, header, slot=_SLOT, most=_MOST)
        book = cls(aside)
        book.join(_ROOT, "")
        Slots.rename(aside, path)
        book.path = path
        return book

    def remove(self) -> None:
        """Close it and remove its file; children that have it open go on unheard."""
        self._slots.close()
        with suppress(OSError):
            Slots.remove(self.path)
            self.path.parent.rmdir()  # unless there are others

    def close(self) -> None:
        """Close it."""
        self._slots.close()

    @property
    def root(self) -> str:
        """The process that runs the tests, as ``pid:start``."""
        return self.path.name.partition("-")[0]

    @property
    def used(self) -> bool:
        """Whether any child has told something that was not struck; below 1 us."""
        words = self._words
        slots = words[_HEADER - 1]
        return slots > 1 and any(
            words[slot] for slot in range(_HEADER + _SLOT, _HEADER + _SLOT * slots, _SLOT)
        )

    def runs(self, owner: int, since: float) -> None:
        """Write down who runs from now on, ``since`` by ``family.CLOCK``."""
        self._words[_SINCE], self._words[_NOW] = int(since * 1e9), owner

    def _starter(self) -> int:
        """Return who started this process, if that is who runs now; else nobody."""
        owner, since = self._words[_NOW], self._words[_SINCE]
        begun = family.begun(family.identity(os.getpid()))
        return owner if begun is None or begun * 1e9 >= since else NOBODY

    def read(self) -> list[ChildFigures]:
        """Return what each child told that lives, or ended and was not struck."""
        if not self.used:
            return []
        words = self._words
        with self._slots.alone():
            return [
                self._told(slot) for slot in self._slots.taken() if words[slot + _OWNER] != _ROOT
            ]

    def survivors(self) -> list[ChildFigures] | None:
        """Return the children that live; None while the process that runs the tests does."""
        words = self._words
        with self._slots.alone():
            roots = [slot for slot in self._slots.taken() if words[slot + _OWNER] == _ROOT]
            if any(map(self._slots.lives, roots)):
                return None
        return [told for told in self.read() if told.lives]

    def _told(self, slot: int) -> ChildFigures:
        words = self._words
        return ChildFigures(
            slot,
            self._slots.pid(slot, words[slot + _PID], words[slot + _NAMESPACE]),
            words[slot + _OWNER],
            _read_text(words[slot + _NAME : slot + _COMMAND]),
            _read_text(words[slot + _COMMAND : slot + _FIRST_CARD]),
            words[slot + _BEGAN] / 1e9,
            words[slot + _ENDED] / 1e9,
            self._slots.lives(slot),
            {
                (words[at], words[at + _KEY2]): Figures(*words[at + _ALLOCATED : at + _CARD])
                for at in _cards(slot)
                if words[at] or words[at + _KEY2]
            },
        )

    def strike(self, slot: int) -> None:
        """Forget a child that has ended."""
        with self._slots.alone():
            if not self._slots.lives(slot):
                self._words[slot] = 0

    def join(self, owner: int, name: str) -> Page:
        """Let this process tell something, which ``owner`` started: ``NOBODY`` who runs now.

        Unless it was there before him: the process that runs the tests knows then who it was.

        Raises:
            RuntimeError: when the book is full.

        """
        with self._slots.alone():
            slot = self._slots.take()
            words = self._words
            words[slot : slot + _SLOT] = memoryview(bytes(WORD * _SLOT)).cast("q")
            words[slot + _NAMESPACE] = pid_namespace()
            words[slot + _OWNER] = owner or self._starter()
            words[slot + _BEGAN] = clock.time_ns()
            _write_text(words[slot + _NAME : slot + _COMMAND], name)
            _write_text(words[slot + _COMMAND : slot + _FIRST_CARD], command(os.getpid()))
            words[slot + _PID] = os.getpid()
        return Page(self._slots, slot)


class Page:
    """A child's slot in a book."""

    def __init__(self, slots: Slots, slot: int) -> None:
        self._slots = slots
        self._words = slots.words
        self._slot = slot
        self._peaks: dict[int, tuple[int, int]] = {}
        """By device, the highest allocated and reserved that were told last."""

    def tell(self, index: int, uuid: str, now: AllocatorReading) -> None:
        """Write down what the allocator holds of its device ``index``, the card ``uuid``."""
        if index >= _CARDS:
            return
        at, words = self._slot + _FIRST_CARD + _CARD * index, self._words
        allocated, reserved = self._highest(index, now)
        with self._slots.alone():
            words[at], words[at + _KEY2] = key(uuid)
            words[at + _ALLOCATED], words[at + _RESERVED] = now.allocated, now.reserved
            words[at + _PEAK] = max(words[at + _PEAK], now.allocated_peak)
            words[at + _RESERVED_PEAK] = max(words[at + _RESERVED_PEAK], now.reserved_peak)
            words[at + _OOMS] = now.ooms
            context = words[_CONTEXT]
            # The others' first: asking whether they live costs a call of the system each.
            others = list(self._others(key(uuid)))
            for place, own, which, cost in (
                (at + _SUM_PEAK, allocated, _ALLOCATED, 0),
                (at + _NEED, reserved + context, _RESERVED, context),
            ):
                if own + sum(words[each + which] + cost for _, each in others) > words[place]:
                    others = [each for each in others if self._slots.lives(each[0])]
                    total = own + sum(words[each + which] + cost for _, each in others)
                    words[place] = max(words[place], total)

    def end(self) -> None:
        """Write down that this process is about to end."""
        self._words[self._slot + _ENDED] = clock.time_ns()

    def _highest(self, index: int, now: AllocatorReading) -> tuple[int, int]:
        """Return the most that was allocated and reserved since it was told last."""
        before = self._peaks.get(index, (0, 0))
        self._peaks[index] = now.allocated_peak, now.reserved_peak
        return (
            now.allocated_peak if now.allocated_peak > before[0] else now.allocated,
            now.reserved_peak if now.reserved_peak > before[1] else now.reserved,
        )

    def _others(self, card: tuple[int, int]) -> Iterator[tuple[int, int]]:
        """Yield the slots of others that the same owner started, each with its words on a card."""
        words = self._words
        for slot in self._slots.taken():
            if slot != self._slot and words[slot + _OWNER] == words[self._slot + _OWNER]:
                for at in _cards(slot):
                    if (words[at], words[at + _KEY2]) == card:
                        yield slot, at


def _write_text(words: memoryview, text: str) -> None:
    raw = text.encode(errors="replace")[: words.nbytes]
    words[:] = memoryview(raw.ljust(words.nbytes, b"\0")).cast("q")


def _read_text(words: memoryview) -> str:
    return words.tobytes().rstrip(b"\0").decode(errors="ignore")


def _cards(slot: int) -> range:
    first = slot + _FIRST_CARD
    return range(first, first + _CARD * _CARDS, _CARD)


def left_behind(directory: Path) -> list[ChildFigures]:
    """Return the children that live though the process that ran their tests has ended.

    Takes the books out of ``directory`` that nobody has any more.
    """
    found = []
    for path in directory.glob("*-*"):
        if path.name.startswith(".") or path.suffix == ".lock":
            continue
        with suppress(OSError, ValueError):
            book = Book(path)
            alive = book.survivors()
            if alive is not None:
                found += alive
            if alive == []:
                Slots.remove(path)
            book.close()
    return found

"""What earlier runs taught: the peak and duration of each test, and estimates for unseen ones.

The file is JSON with one line per test, those seen longest ago first::

    {
     "schema": 1,
     "tests": {
      "a.py::x": {"peaks": [1048576], "fixtures": 0, "duration": 0.25, "runs": 1, "gpu": true}
     }
    }

Where main memory was measured, a test has its peaks of it as well (``"ram": [...]``), and the file
says what the largest process that ran tests kept, by run (``"worker_ram": [...]``).
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right, insort
from typing import TYPE_CHECKING, Any

from pytest_gpumem import files
from pytest_gpumem.tuples import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from pytest_gpumem.records import CardUsage, RecordedTest

SCHEMA = 1
CAPACITY = 20_000
"""Tests remembered; those seen longest ago are forgotten first."""
PEAKS = 8
"""Peaks remembered per test, the latest ones."""
PERCENTILE = 0.8
"""Share of a test's peaks that its expected peak covers; with fewer than five that is all."""
MARGIN = 1.1
"""What is added to a test's own peaks, which vary from run to run."""
FAMILY_MARGIN = 1.3
"""What is added to the peaks of a test's family when the test itself was never seen."""
LONGEST = 10**9
"""Seconds that no test lasts; a file that says more is not one of ours."""
DURATION = 1.0
"""Seconds expected of a test when nothing at all is known."""


class Learned(NamedTuple):
    """What is known of one test."""

    peak: int
    """Bytes to expect beyond what its process keeps: a high percentile, with a margin."""
    duration: float
    runs: int
    gpu: bool
    fixtures: int = 0
    """Bytes that the wider fixtures it uses hold: a process without them needs these as well."""
    ram: int = 0
    """Bytes of main memory to expect beyond what its process keeps, with a margin; 0: unknown."""


class Expectation(NamedTuple):
    """What a test may be expected to take."""

    peak: int | None
    """Bytes beyond what its process keeps; None when nothing is known."""
    duration: float
    source: str
    """Where the peak comes from: ``mark``, ``learned``, ``family`` or ``guess``."""
    gpu: bool
    fixtures: int = 0
    """Bytes that a process needs on top if the wider fixtures are not set up in it; of a mark,
    which is for all that a test works with, these are a part."""
    ram: int = 0
    """Bytes of main memory beyond what its process keeps; 0 when nothing is known."""
    ram_seen: int = 0
    """The most of these that the test itself was seen to take, without a margin."""


class _Entry(NamedTuple):
    """One test in the file."""

    peaks: tuple[int, ...]
    fixtures: int
    duration: float
    runs: int
    gpu: bool
    ram: tuple[int, ...] = ()

    def learned(self) -> Learned:
        peak, ram = expected_peak(self.peaks), expected_peak(self.ram)
        return Learned(peak, self.duration, self.runs, self.gpu, self.fixtures, ram)

    def plain(self) -> dict[str, object]:
        """Return what the file says of it; of main memory only where that was measured."""
        plain = self._asdict()
        if not self.ram:
            del plain["ram"]
        return plain


def module(nodeid: str) -> str:
    """Return the file part of ``nodeid``."""
    return nodeid.partition("::")[0]


def family(nodeid: str) -> str:
    """Return ``nodeid`` without its parameters: what all parametrisations of a test share."""
    path, colons, name = nodeid.partition("::")
    return path + colons + name.partition("[")[0]


def expected_peak(peaks: Iterable[int]) -> int:
    """Return a high percentile (nearest rank) of ``peaks`` in bytes, with a margin."""
    ordered = sorted(peaks)
    return with_margin(ordered[math.ceil(PERCENTILE * len(ordered)) - 1] if ordered else 0, MARGIN)


def with_margin(size: int, margin: float) -> int:
    """Return ``size`` times ``margin`` in whole bytes, exactly for any size."""
    return size * round(margin * 100) // 100


class _Kin:
    """What the tests of one family or one module took, kept in step as they come and go."""

    __slots__ = ("_expectation", "_fixtures", "_nanoseconds", "_on_card", "_peaks", "_ram")

    def __init__(self) -> None:
        self._peaks: list[int] = []
        """The highest of each test that has any, in order."""
        self._fixtures: list[int] = []
        """What the wider fixtures of each test held, in order."""
        self._ram: list[int] = []
        """The highest of each test whose main memory was measured, in order."""
        self._nanoseconds = 0
        """A sum of seconds would drift while tests come and go."""
        self._on_card = 0
        self._expectation: Expectation | None = None
        """What follows from these, once anybody asked: most tests come without one more."""

    def add(self, entry: _Entry) -> None:
        self._expectation = None
        if entry.peaks:
            insort(self._peaks, max(entry.peaks))
        if entry.ram:
            insort(self._ram, max(entry.ram))
        insort(self._fixtures, entry.fixtures)
        self._nanoseconds += _nanoseconds(entry)
        self._on_card += entry.gpu

    def remove(self, entry: _Entry) -> None:
        self._expectation = None
        # From the right: most values are equal, and what stands behind the last one has to move.
        if entry.peaks:
            del self._peaks[bisect_right(self._peaks, max(entry.peaks)) - 1]
        if entry.ram:
            del self._ram[bisect_right(self._ram, max(entry.ram)) - 1]
        del self._fixtures[bisect_right(self._fixtures, entry.fixtures) - 1]
        self._nanoseconds -= _nanoseconds(entry)
        self._on_card -= entry.gpu

    def __len__(self) -> int:
        return len(self._fixtures)

    def expectation(self) -> Expectation:
        """Return what to expect of a test of the same kind."""
        if self._expectation is None:
            self._expectation = Expectation(
                with_margin(self._peaks[-1], FAMILY_MARGIN) if self._peaks else None,
                self._nanoseconds / len(self) / 1e9,
                "family",
                gpu=self._on_card > 0,
                fixtures=self._fixtures[-1],
                ram=with_margin(self._ram[-1], FAMILY_MARGIN) if self._ram else 0,
            )
        return self._expectation


def _nanoseconds(entry: _Entry) -> int:
    return round(entry.duration * 1e9)


class History:
    """Peaks and durations by node id.

    Args:
        capacity: tests remembered.

    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._entries: dict[str, _Entry] = {}
        """Ordered: the test seen longest ago comes first."""
        self._kin: dict[str, _Kin] | None = None
        """By family and by module; None until somebody asks, and in step from then on."""
        self._worker_ram: tuple[int, ...] = ()
        """What the largest process that ran tests kept of main memory, of the latest runs."""
        self._unknown = Expectation(None, DURATION, "guess", gpu=False)
        self.problem = ""
        """One sentence when the file could not be used."""

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[tuple[str, Learned]]:
        """Yield each node id with what is known of it, seen longest ago first."""
        return ((nodeid, entry.learned()) for nodeid, entry in self._entries.items())

    def __getitem__(self, nodeid: str) -> Learned:
        return self._entries[nodeid].learned()

    def highest(self, nodeid: str) -> int:
        """Return the highest of the peaks that are remembered of a test, without a margin."""
        return max(self._entries[nodeid].peaks, default=0)

    @property
    def peaks_known(self) -> int:
        """The number of tests whose peak on a card is known."""
        return sum(entry.gpu and bool(entry.peaks) for entry in self._entries.values())

    @property
    def worker_ram(self) -> int:
        """The most main memory that a process which runs tests was seen to keep, with a margin.

        Of the latest runs: one of a few tests says nothing of the others. 0 when nothing is known.
        """
        return with_margin(max(self._worker_ram, default=0), MARGIN)

    @classmethod
    def load(cls, path: Path, capacity: int = CAPACITY) -> History:
        """Return the history that ``save`` wrote; an empty one if there is none.

        A file that cannot be used is an empty history too, with ``problem`` saying why.
        """
        try:
            return cls.read(files.read_text(path), capacity)
        except FileNotFoundError:
            return cls(capacity)
        except (OSError, ValueError) as error:
            history = cls(capacity)
            history.problem = f"the learned peaks in {str(path)!r} are ignored: {error}"
            return history

    @classmethod
    def read(cls, text: str, capacity: int = CAPACITY) -> History:
        """Return the history that ``text`` holds.

        Raises:
            ValueError: in one sentence, when it is none.

        """
        history = cls(capacity)
        history._entries, history._worker_ram = _parse(text)
        history._forget()
        return history

    def save(self, path: Path) -> None:
        """Write the history to ``path``, whole or not at all.

        Raises:
            OSError: when the file cannot be written; what stood there before is untouched.

        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replace(path) as file:
            file.write(self.text())

    def text(self) -> str:
        """Return the content of the file."""
        lines = ",\n".join(
            f"  {json.dumps(nodeid)}: {json.dumps(entry.plain())}"
            for nodeid, entry in self._entries.items()
        )
        workers = f' "worker_ram": {json.dumps(self._worker_ram)},\n' if self._worker_ram else ""
        return f'{{\n "schema": {SCHEMA},\n{workers} "tests": {{\n{lines}\n }}\n}}\n'

    def note(
        self,
        nodeid: str,
        peak_own: int,
        duration: float,
        gpu: bool,
        fixtures: int = 0,
        *,
        ram: int | None = None,
    ) -> None:
        """Remember one run of a test.

        Args:
            nodeid: the test.
            peak_own: highest bytes while it ran, less what its process kept before it.
            duration: seconds.
            gpu: whether it used a card.
            fixtures: bytes that the wider fixtures it uses hold.
            ram: highest bytes of main memory less what its process had before it; None where that
                was not measured.

        """
        peaks = (peak_own,) if gpu else ()
        rams = () if ram is None else (ram,)
        self._put(nodeid, _Entry(peaks, fixtures, duration, 1, gpu, rams))

    def learn(self, tests: Iterable[RecordedTest], worker_ram: int = 0) -> None:
        """Remember the tests of a run, by their records, and what their largest process kept.

        Those that did not run to their end tell nothing: skipped ones, attempts that were made
        again, and those that took their worker with them.
        """
        if worker_ram:
            self._worker_ram = (*self._worker_ram, worker_ram)[-PEAKS:]
        for test in tests:
            if test.outcome in ("skipped", "rerun", "crashed"):
                continue
            if test.oom:  # who knows what it wanted
                self._put(test.nodeid, _Entry((), 0, test.duration, 1, gpu=True))
                continue
            ram = None
            if worker_ram:  # it was measured: where nothing is told, it took next to nothing
                ram = 0 if test.ram is None else max(0, test.ram.own_peak)
            self.note_usage(test.nodeid, test.cards, test.duration, ram)

    def note_usage(
        self, nodeid: str, cards: Sequence[CardUsage], duration: float, ram: int | None = None
    ) -> None:
        """Remember one run of a test by what it did to the cards, and to main memory."""
        peak = max((card.extra for card in cards), default=0)
        fixtures = max((card.fixture_bytes for card in cards), default=0)
        # A test that only tears a wider fixture down, which it does not use, has a record too.
        self.note(nodeid, peak, duration, bool(peak or fixtures), fixtures, ram=ram)

    def _put(self, nodeid: str, entry: _Entry) -> None:
        known = self._take(nodeid) if nodeid in self._entries else None
        self._entries[nodeid] = latest = _joined(known, entry) if known else entry
        for kin in self._relatives(nodeid):
            kin.add(latest)
        self._forget()

    def _forget(self) -> None:
        while len(self._entries) > self._capacity:
            self._take(next(iter(self._entries)))

    def _take(self, nodeid: str) -> _Entry:
        entry = self._entries.pop(nodeid)
        for kin in self._relatives(nodeid):
            kin.remove(entry)
        return entry

    def _relatives(self, nodeid: str) -> list[_Kin]:
        """Return what is known of the kinds of a test, once anybody has asked for any."""
        if self._kin is None:
            return []
        return [self._kin.setdefault(kind, _Kin()) for kind in {family(nodeid), module(nodeid)}]

    def expect(self, nodeid: str, mark: int | None = None) -> Expectation:
        """Return what to expect of a test.

        Its peak is what its mark says, else what was learned of it, else of its family (the same
        function with other parameters, else the same module), else unknown.

        Args:
            nodeid: the test.
            mark: bytes that the test's mark asks for, None without such a mark.

        """
        own = self._entries.get(nodeid)
        if own is not None:
            learned = own.learned()
            peak = learned.peak if own.peaks else None
            rams = learned.ram, max(own.ram, default=0)
            found = Expectation(peak, own.duration, "learned", own.gpu, own.fixtures, *rams)
        else:
            found = self._of_kin(nodeid)
        if mark is None:
            return found
        fixtures = 0 if own is None else min(own.fixtures, mark)
        return found._replace(peak=mark, source="mark", gpu=True, fixtures=fixtures)

    def _of_kin(self, nodeid: str) -> Expectation:
        if self._kin is None:
            self._kin = {}
            for known, entry in self._entries.items():
                for kin in self._relatives(known):
                    kin.add(entry)
        for kind in (family(nodeid), module(nodeid)) if self._kin else ():
            if found := self._kin.get(kind):  # one whose tests were all forgotten is empty
                return found.expectation()
        return self._unknown


def _joined(old: _Entry, new: _Entry) -> _Entry:
    """Return what two histories know of one test; the newer half of a duration counts double."""
    return _Entry(
        (old.peaks + new.peaks)[-PEAKS:],
        new.fixtures if new.gpu else old.fixtures,
        (old.duration + new.duration) / 2,
        old.runs + new.runs,
        old.gpu or new.gpu,
        (old.ram + new.ram)[-PEAKS:],
    )


def _parse(text: str) -> tuple[dict[str, _Entry], tuple[int, ...]]:
    """Return the entries that ``text`` holds, and the main memory of processes.

    Raises:
        ValueError: in one sentence, when it is not a history.

    """
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    if not isinstance(plain, dict) or plain.get("schema") != SCHEMA:
        raise ValueError(f"it is not a history of schema {SCHEMA}")
    tests = plain.get("tests")
    if not isinstance(tests, dict):
        raise ValueError("it names no tests")
    workers = plain.get("worker_ram", [])
    if not isinstance(workers, list) or not all(map(_is_count, workers)):
        raise ValueError("its worker_ram is no list of sizes")
    entries = {nodeid: _entry(nodeid, each) for nodeid, each in tests.items()}
    return entries, tuple(workers[-PEAKS:])


def _entry(nodeid: str, plain: Any) -> _Entry:
    values: list[Any] = (
        [plain.get(name, _Entry._field_defaults.get(name)) for name in _Entry._fields]
        if isinstance(plain, dict)
        else []
    )
    match values:
        case [list(peaks), fixtures, duration, runs, bool(gpu), (list() | tuple()) as ram] if all(
            map(_is_count, [*peaks, fixtures, runs, *ram])
        ) and _is_seconds(duration):
            ram = tuple(ram[-PEAKS:])
            return _Entry(tuple(peaks[-PEAKS:]), fixtures, float(duration), runs, gpu, ram)
    raise ValueError(f"its entry for {nodeid!r} is none")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_seconds(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 <= value <= LONGEST

"""What a log shows of a pytest run while it is read: its tests, its failures, its deaths."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pytest_gpumem.forensics.causes import Leftover
    from pytest_gpumem.forensics.grammars import Message

FAILING = ("FAILED", "ERROR")


class Seen(NamedTuple):
    """A message and where it stood."""

    line: int
    message: Message
    worker: str | None = None


class Kill(NamedTuple):
    """A line that tells of a killed process; without a message, SIGKILL is all that is known."""

    line: int
    message: Message | None
    pid: int | None


class Summary(NamedTuple):
    """A line of the short test summary."""

    kind: str
    nodeid: str
    message: str
    line: int
    subtest: bool = False


class Test:
    """One test of a run."""

    __slots__ = ("duration", "nodeid", "outcome", "position", "rank", "torn", "worker")

    def __init__(self, nodeid: str, worker: str | None, position: int, rank: int) -> None:
        self.nodeid = nodeid
        self.worker = worker
        self.position = position
        """1 for the first test of its worker."""
        self.rank = rank
        """0 for the first test of the run."""
        self.outcome: str | None = None
        self.torn = False
        """Whether its teardown failed after it had passed."""
        self.duration = 0.0


class Failure:
    """One failing report: a section of its own, a line of the summary, or a death."""

    def __init__(self, line: int, name: str, kind: str, phase: str) -> None:
        self.line = line
        self.name = name
        """As the header has it: ``TestX.test_y``; empty where there is no header."""
        self.kind = kind
        self.phase = phase
        self.nodeid: str | None = None
        self.worker: str | None = None
        self.file: str | None = None
        self.seen: Seen | None = None
        self.aside: Seen | None = None
        """A message in its captured output, which counts if it has none of its own."""
        self.error = ""
        self.died = False
        self.subtest = False

    def note(self, seen: Seen) -> None:
        """Keep the fullest message, and the line of the first."""
        if self.seen is None:
            self.seen = seen
        elif len(seen.message.sizes) > len(self.seen.message.sizes):
            self.seen = Seen(self.seen.line, seen.message)


class Run:
    """One pytest run, or a log without one."""

    def __init__(self) -> None:
        self.pytest = False
        self.ended = False
        self.end_line = 0
        self.order: list[Test] = []
        self.named: defaultdict[str, list[Test]] = defaultdict(list)
        self.current: Test | None = None
        """The test that runs, where the log shows it before its outcome."""
        self.failures: list[Failure] = []
        self.summary: list[Summary] = []
        self.letters: Counter[tuple[str, str]] = Counter()
        """The dots of a run without -v, by file and letter."""
        self.marked: dict[str, list[int]] = {"F": [], "E": []}
        """The positions of failures among them."""
        self.tally: Counter[str] = Counter()
        self.duration = 0.0
        self.loose: list[tuple[Seen, Test | None]] = []
        """Messages outside of failures, with the test that ran when they were printed."""
        self.kills: list[Kill] = []
        self.down: dict[str, int] = {}
        """The line where each worker's end is told."""
        self.faulted = False
        """Whether a process died of something that is not memory, such as a bad address."""
        self.logged: Counter[str] = Counter()
        """Signatures of errors in lines of logs, and in ``subjects`` what they are about."""
        self.subjects: defaultdict[str, set[str]] = defaultdict(set)
        self.peaks: dict[str, int] = {}
        self.leftovers: list[tuple[str | None, Leftover]] = []
        self._positions: defaultdict[str | None, count[int]] = defaultdict(lambda: count(1))

    def test(self, nodeid: str, worker: str | None = None) -> Test:
        """Return the test of that name, entered as the worker's next if it is new."""
        for test in self.named[nodeid]:
            if test.worker == worker:
                return test
            if worker is not None and test.worker is None and test.outcome is None:
                # xdist names a test when it begins, and its worker when it has ended.
                test.worker, test.position = worker, next(self._positions[worker])
                return test
        test = Test(nodeid, worker, next(self._positions[worker]), len(self.order))
        self.named[nodeid].append(test)
        self.order.append(test)
        return test

    def place(self, nodeid: str | None, worker: str | None, position: int, kind: str) -> None:
        """Enter a test whose position alone is known."""
        test = Test(nodeid or "", worker, position, position - 1)
        test.outcome = kind
        self.named[test.nodeid].append(test)

    def find(self, nodeid: str | None, worker: str | None = None) -> Test | None:
        """Return the test of that name, the worker's own if it ran on several."""
        found = self.named.get(nodeid or "", [])
        return next((test for test in found if test.worker == worker), found[0] if found else None)

    @property
    def distributed(self) -> bool:
        """Whether workers of xdist ran it."""
        return bool(self.down) or bool(self.order and self.order[0].worker)

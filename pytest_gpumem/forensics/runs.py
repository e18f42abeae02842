"""What a log shows of a pytest run while it is read: its tests, its failures, its deaths."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pytest_gpumem.forensics.causes import Leftover
    from pytest_gpumem.forensics.messages import Message

FAILING = ("FAILED", "ERROR")
SUBTESTS = {"SUBFAIL": "FAILED", "SUBFAILED": "FAILED"}
"""What a failing subtest makes of its test."""
WORDS = {
    "PASSED": "passed",
    "FAILED": "failed",
    "ERROR": "error",
    "SKIPPED": "skipped",
    "XFAIL": "xfailed",
    "XPASS": "xpassed",
}
"""Outcomes as pytest prints them, and as it counts them."""
LETTERS = {".": "PASSED", "F": "FAILED", "E": "ERROR", "s": "SKIPPED", "x": "XFAIL", "X": "XPASS"}


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
    once: str = ""
    """The line, where it is one that is printed once for each process."""


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
        self.compares = False
        """Whether the lines that are read now are an assertion's comparison."""

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
        self.end = "the log ends before its summary"
        """How an input ends that holds no whole run."""
        self.root = ""
        self.unshown = 0
        """Tests that failed of which a log shows neither name nor error."""
        self.collected: int | None = None
        """How many tests it was to run, where it says so."""
        self.workers = False
        """Whether it says that workers of xdist run it."""
        self.order: list[Test] = []
        self.ordered = True
        """Whether ``order`` is that in which each worker ran its tests."""
        self.named: defaultdict[str, list[Test]] = defaultdict(list)
        self.current: Test | None = None
        """The test that runs, where the log shows it before its outcome."""
        self.failures: list[Failure] = []
        self.summary: list[Summary] = []
        self.letters: Counter[tuple[str, str]] = Counter()
        """The dots of a run without -v, by file and letter."""
        self.marked: dict[str, list[tuple[int, str]]] = {"F": [], "E": []}
        """The positions of failures among them, and their files."""
        self.tally: Counter[str] = Counter()
        self.duration = 0.0
        self.loose: list[tuple[Seen, Test | None]] = []
        """Messages outside of failures, with the test that ran when they were printed."""
        self.kills: list[Kill] = []
        self.crashed: set[str] = set()
        """Tests whose workers died."""
        self.down: dict[str, int] = {}
        """The line where each worker's end is told."""
        self.faults: dict[str | None, str] = {}
        """By worker, what ended it that is not memory: a bad address, a timeout."""
        self.logged: Counter[str] = Counter()
        """Signatures of errors in lines of logs, and in ``subjects`` what they are about."""
        self.subjects: defaultdict[str, set[str]] = defaultdict(set)
        self.peaks: dict[str, int] = {}
        self.own_peaks: dict[str, int] = {}
        self.kept: dict[str, int] = {}
        self.lines: dict[str, dict[str, int]] = {}
        self.leftovers: defaultdict[str | None, list[Leftover]] = defaultdict(list)
        """By worker."""
        self.leaks: dict[str, int] = {}
        self.recovered: list[str] = []
        """Tests that ran out of memory and passed when they ran again."""
        self._workers: defaultdict[str | None, list[Test]] = defaultdict(list)

    def test(self, nodeid: str, worker: str | None = None) -> Test:
        """Return the test of that name, entered as the worker's next if it is new."""
        for test in self.named[nodeid]:
            if test.worker == worker:
                return test
            if worker is not None and test.worker is None and test.outcome is None:
                # xdist names a test when it begins, and its worker when it has ended.
                return self._enter(test, worker)
        test = Test(nodeid, worker, 0, len(self.order))
        self.named[nodeid].append(test)
        self.order.append(test)
        return self._enter(test, worker)

    def _enter(self, test: Test, worker: str | None) -> Test:
        mine = self._workers[worker]
        mine.append(test)
        test.worker, test.position = worker, len(mine)
        return test

    def of_worker(self, worker: str | None) -> list[Test]:
        """Return the tests of a worker, in the order in which they ended."""
        return self._workers[worker]

    def place(self, nodeid: str | None, worker: str | None, position: int, kind: str) -> None:
        """Enter a test whose position alone is known."""
        test = Test(nodeid or "", worker, position, position - 1)
        test.outcome = kind
        self.named[test.nodeid].append(test)

    def find(self, nodeid: str | None, worker: str | None = None) -> Test | None:
        """Return the test of that name, the worker's own if it ran on several."""
        found = self.named.get(nodeid, []) if nodeid else []
        return next((test for test in found if test.worker == worker), found[0] if found else None)

    @property
    def counts(self) -> Counter[str]:
        """How many tests passed, failed and so on: by pytest's own word if it had the last."""
        if self.tally["tests"]:
            failed = sum(bool(failure.nodeid) for failure in self.failures)
            return Counter(passed=self.tally["tests"] - failed, failed=failed)
        if self.tally:
            return self.tally
        counts = Counter(WORDS[test.outcome] for test in self.order if test.outcome in WORDS)
        for (_, letter), number in self.letters.items() if not counts else ():
            counts[WORDS.get(LETTERS.get(letter, ""), "")] += number
        for failure in self.failures if not counts else ():
            counts[WORDS[failure.kind]] += bool(failure.nodeid)
        return counts

    @property
    def tests(self) -> int:
        """How many tests it tells the end of."""
        return sum(self.counts[name] for name in WORDS.values())

    @property
    def missing(self) -> str:
        """What of a pytest run the input lacks, in words; empty for a whole one."""
        tests = f"{self.tests:,} test{'' if self.tests == 1 else 's'}"
        if self.collected is not None:
            tests = f"{self.tests:,} of {self.collected:,} tests"
        if not self.ended:
            return f"{tests}, {self.end}"
        if self.collected is not None and self.tests < self.collected:
            return f"{tests}, the run stopped early"
        if self.unshown:
            failed = self.counts["failed"] + self.counts["error"]
            return f"{tests}, why {self.unshown:,} of {failed:,} failed is not in the log"
        return ""

    @property
    def distributed(self) -> bool:
        """Whether workers of xdist ran it."""
        return self.workers or bool(self.down) or bool(self.order and self.order[0].worker)

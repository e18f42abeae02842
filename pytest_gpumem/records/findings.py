"""What a log tells: named tuples, the only thing the forensic reports read.

Every size is in bytes, every duration in seconds; None where the log does not say. The JSON form
is described in ``docs/forensics.md``; ``SCHEMA`` changes with it.
"""

from __future__ import annotations

from typing import NamedTuple

SCHEMA = 1
"""Version of the JSON form of a ``Findings``."""

CAUSES = {
    "other_processes": "other processes hold the card",
    "fragmentation": "free memory is in pieces",
    "accumulation": "earlier tests left memory behind",
    "larger_than_card": "one request larger than the card",
    "memory_fraction": "a limit below the card's size was hit",
    "driver": "the driver refused although enough was free (limit or race)",
    "host_ram": "main memory ran out, not the card's",
    "unknown": "no cause found",
}
"""Every cause, and how it is said."""


class GpuProcess(NamedTuple):
    """A process that an error message lists on the card."""

    pid: int | None
    """None where the message says "this process"."""
    bytes: int
    own: bool
    """Whether it is the process that ran out of memory."""


class OomEvent(NamedTuple):
    """Memory ran out once: one failing test, or one death outside of tests."""

    nodeid: str | None
    worker: str | None
    """``gw3`` under xdist, ``rank1`` under torchrun."""
    position: int | None
    """1 for the first test of its worker."""
    backend: str
    device: int | None
    tried_bytes: int | None
    total_bytes: int | None
    free_bytes: int | None
    allocated_bytes: int | None
    reserved_unallocated_bytes: int | None
    allowed_bytes: int | None
    """A limit below the card's size, where one was set."""
    processes: tuple[GpuProcess, ...]
    cause: str
    """A key of ``CAUSES``."""
    confirmed: bool
    """False: probably, because the log shows a death but no message."""
    line: int | None
    """Of the first sign of it, counted from 1."""
    file: str
    phase: str = "call"
    """``setup``, ``call``, ``teardown``, ``collect``; empty outside of tests."""
    evidence: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    printed: dict[str, str] = {}  # noqa: RUF012 - never written to
    """The figures as they stood in the message."""
    message: str = ""
    before: tuple[str, ...] = ()
    """Tests that ran before it in the same worker, the latest last, at most five."""
    growth_bytes: int | None = None
    """How much more was allocated than at the first event of the same worker and run."""
    felled: int = 1
    """Tests that failed by it: a fixture's error is told once."""
    felled_tests: tuple[str, ...] = ()
    """Those besides ``nodeid``."""
    cascade_of: int | None = None
    """Index of the event whose very state this one met again."""
    inferred: bool = False
    """Whether something else may explain the evidence for the cause, too: probably."""
    non_torch_bytes: int | None = None
    """What its process held beyond PyTorch's allocator: the context, and other libraries."""
    run: int = 1


class SequenceTest(NamedTuple):
    """One test as the log shows it."""

    nodeid: str
    position: int | None
    worker: str | None
    outcome: str | None
    """As pytest prints it: ``PASSED``, ``FAILED``, ``ERROR`` ...; None: it never ended."""


class OomSequence(NamedTuple):
    """The tests in the order in which they ran, and what felled some."""

    oom_tests: tuple[OomEvent, ...]
    test_sequence: tuple[SequenceTest, ...]


class Death(NamedTuple):
    """A worker that died of something else than memory, or of what the log does not tell."""

    nodeid: str | None
    worker: str | None
    why: str
    """In the log's words, such as ``Timeout``; empty where it has none."""
    file: str
    line: int


class Signature(NamedTuple):
    """One kind of error, with what varies taken out."""

    signature: str
    times: int
    where: str
    """``test``: errors of tests; ``log``: lines of logs."""
    subjects: tuple[str, ...] = ()
    """What stood where the signature says 'X'."""
    tests: tuple[str, ...] = ()
    """Up to five examples."""


class Source(NamedTuple):
    """One input, and how much of a run it holds."""

    path: str
    kind: str
    """``pytest log``, ``log``, ``JUnit XML``, ``pytest-html``, ``--gpumem-json``, ``torch
    snapshot``."""
    size: int
    """Bytes read, unpacked."""
    tests: int
    """Whose end it tells."""
    complete: bool
    note: str = ""
    """What it lacks, or which other input holds the same run."""


class Totals(NamedTuple):
    """The suite's whole state over all runs read."""

    runs: int
    tests: int
    passed: int
    failed: int
    errors: int
    skipped: int
    xfailed: int
    xpassed: int
    oom: int
    pass_rate: float | None
    """Passed in percent of passed, failed and errors."""
    duration: float


class Place(NamedTuple):
    """One test file or directory."""

    path: str
    tests: int
    passed: int
    failed: int
    errors: int
    oom: int
    duration: float


class Findings(NamedTuple):
    """All that was read."""

    schema: int
    files: tuple[str, ...]
    events: tuple[OomEvent, ...]
    totals: Totals
    signatures: tuple[Signature, ...]
    by_file: tuple[Place, ...]
    by_directory: tuple[Place, ...]
    peaks: dict[str, int] = {}  # noqa: RUF012 - never written to
    """Highest allocated bytes by test, where the input has them."""
    outcomes: dict[str, str] = {}  # noqa: RUF012 - never written to
    notes: tuple[str, ...] = ()
    """What could not be read, and why."""
    sources: tuple[Source, ...] = ()
    complete: bool = True
    """Whether each input holds its runs whole."""
    deaths: tuple[Death, ...] = ()
    own_peaks: dict[str, int] = {}  # noqa: RUF012 - never written to
    """By test, the most that it allocated beyond what was there when it began."""
    kept: dict[str, int] = {}  # noqa: RUF012 - never written to
    """By test, the part of that which was still there at its end: leaked, or for later tests."""
    leaks: dict[str, int] = {}  # noqa: RUF012 - never written to
    """What tests left behind, in bytes, where the input has it."""
    lines: dict[str, dict[str, int]] = {}  # noqa: RUF012 - never written to
    """By test and line, what was alive at its peak, in bytes, where that was recorded."""
    recovered: tuple[str, ...] = ()
    """Tests that ran out of memory and passed when they ran again."""

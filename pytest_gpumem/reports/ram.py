"""What tests took and kept of main memory, where a run measured it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gpumem.reports.counts import place, plural
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pytest_gpumem.records import RamUsage, RecordedTest, RunRecord


_KEEPERS = 3
"""Of a lost worker's tests, those that are named."""


def most(tests: Iterable[RecordedTest]) -> list[tuple[RamUsage, RecordedTest]]:
    """Return who took or kept most first; each test once, by the attempt that did most."""
    found: dict[str, tuple[RamUsage, RecordedTest]] = {}
    for test in tests:
        known = found.get(test.nodeid)
        if test.ram is not None and (known is None or _size(test.ram) > _size(known[0])):
            found[test.nodeid] = test.ram, test
    return sorted(found.values(), key=lambda each: -_size(each[0]))


def _size(usage: RamUsage) -> int:
    return max(usage.own_peak, usage.kept)


def keepers(tests: Iterable[RecordedTest]) -> list[tuple[int, str]]:
    """Return the bytes that tests kept and their nodeids, the most first; those of one together."""
    kept: dict[str, int] = {}
    for test in tests:
        if test.ram is not None:
            kept[test.nodeid] = kept.get(test.nodeid, 0) + test.ram.kept
    found = sorted(((size, nodeid) for nodeid, size in kept.items()), reverse=True)
    return [(size, nodeid) for size, nodeid in found if size > 0]


def who_kept(run: RunRecord, worker: str) -> Iterator[str]:
    """Return in sentences which tests of ``worker`` kept most main memory, as far as was told."""
    tests = [test for test in run.tests if test.worker == worker]
    found = keepers(tests)
    yield from (f"{format_bytes(size)} kept by {nodeid}" for size, nodeid in found[:_KEEPERS])
    if len(found) > _KEEPERS:
        rest = sum(size for size, _ in found[_KEEPERS:])
        yield f"{format_bytes(rest)} kept by {plural(len(found) - _KEEPERS, 'other test')}"
    if not found:
        measured = any(test.ram for test in run.tests) or run.worker_ram
        yield "its tests kept nothing" if measured else "--gpumem-ram tells which tests keep it"


def lines(run: RunRecord, shown: int) -> Iterator[str]:
    """Return the lines of the section; none where main memory was not measured."""
    rows = most(run.tests)
    if rows:
        yield f"{'own peak':>11} {'children':>11} {'kept':>11}  test"
    for usage, test in rows[:shown]:
        children = format_bytes(usage.children_peak) if usage.children_peak else ""
        yield (
            f"{format_bytes(usage.own_peak):>11} {children:>11} {format_bytes(usage.kept):>11}"
            f"  {place(test)}"
        )
    if len(rows) > shown:
        yield f"... {plural(len(rows) - shown, 'more test')}; --gpumem-top=0 shows all"
    if run.worker_ram:
        who = "a worker" if run.workers else "the process"
        yield f"  {who} kept {format_bytes(run.worker_ram)} at most, without the files that it maps"

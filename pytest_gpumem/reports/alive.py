"""What was alive at the peak of a test, or when it ran out of memory, in words and rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem.reports.counts import likewise, plural
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pytest_gpumem.records import Alive, AliveGroup, RecordedTest, RunRecord

_FELLED = ("failed", "error")
_OWN = "this test"
_SAYS_NOTHING = ("other", "unknown")
"""Kinds that are not worth a word."""


class Row(NamedTuple):
    """A line of code, or tensors of one shape: all that was allocated there for one owner."""

    size: int
    what: str
    """The line, or the tensors; empty where neither is known."""
    kinds: str
    """What torch used it for, empty where that is not known."""
    owner: str

    @property
    def text(self) -> str:
        """Return it in words, without its size."""
        owner = "" if self.owner == _OWN and self.what else self.owner
        return ", ".join(filter(None, (self.what, self.kinds, owner)))


def told(run: RunRecord) -> list[tuple[RecordedTest, Alive]]:
    """Return what was alive in each test of which that is to be told, the most first.

    A test that ran again is told of once, by its last attempt that was recorded. What tensors
    still held after a failure is told where nothing was recorded, of tests that it felled.
    """
    found: dict[tuple[str, str], tuple[RecordedTest, Alive]] = {}
    for test in run.tests:
        for alive in test.alive:
            key = test.nodeid, f"{test.host} {alive.card}"
            if alive.recorded or alive.note or (test.outcome in _FELLED and key not in found):
                found[key] = test, alive
    return sorted(found.values(), key=lambda each: -each[1].size)


def head(alive: Alive) -> str:
    """Return in words how much was alive, and when."""
    size = format_bytes(alive.size)
    if alive.moment == "failed":
        return f"{size if alive.size else 'nothing'} still held by tensors when it had failed"
    if alive.moment != "out of memory":
        return f"{size} at its peak" if alive.recorded else "nothing is known of its peak"
    at = f" at {alive.refused_at}" if alive.refused_at else ""
    return f"{size} when it ran out of memory, asking for {format_bytes(alive.refused)}{at}"


def rows(alive: Alive) -> list[Row]:
    """Return the lines or tensors, most bytes first; they sum to what was alive."""
    found: dict[tuple[str, str], list[AliveGroup]] = {}
    for group in alive.groups:
        found.setdefault((_what(group), group.owner), []).append(group)
    made = [
        Row(
            sum(group.size for group in groups),
            what,
            ", ".join(
                dict.fromkeys(group.kind for group in groups if group.kind not in _SAYS_NOTHING)
            ),
            owner,
        )
        for (what, owner), groups in found.items()
    ]
    return sorted(made, key=lambda row: -row.size)


def _kinds(groups: Iterable[AliveGroup]) -> Iterable[str]:
    return dict.fromkeys(each.kind for each in groups if each.kind not in _SAYS_NOTHING)


def _what(group: AliveGroup) -> str:
    if group.where or not group.dtype:
        return group.where
    shape = "x".join(map(str, group.shape)) or "scalar"
    tensors = f"{group.allocations} tensors" if group.allocations > 1 else "tensor"
    return f"{tensors} {group.dtype} {shape}"


def lines(run: RunRecord, shown: int, each: int | None) -> Iterator[str]:
    """Return the lines of the terminal's section.

    Args:
        run: what happened.
        shown: how many tests there are at most.
        each: how many lines of each, None for all.

    """
    every = _alike(told(run))
    for test, alive, found, others in every[:shown]:
        yield f"  {test}: {head(alive)}"
        for row in found[:each]:
            yield f"      {format_bytes(row.size):>11}  {row.text}"
        if each is not None and len(found) > each:
            size = format_bytes(sum(row.size for row in found[each:]))
            yield f"      {size:>11}  in {len(found) - each} more; -v shows all"
        if alive.note:
            yield f"      {alive.note}"
        if alive.snapshot:
            yield f"      snapshot: {alive.snapshot}"
        yield from likewise(plural(len(others), "test"), others, verbose=each is None)
    if more := sum(1 + len(others) for *_, others in every[shown:]):
        yield f"  ... {more} more; --gpumem-top=0 shows all"
    if every and (unseen := _not_looked_at(run)):
        yield (
            f"  not looked at: {plural(unseen, 'further test')} out of memory; "
            "--gpumem-peaks=offenders records all"
        )


def _alike(
    every: Iterable[tuple[RecordedTest, Alive]],
) -> list[tuple[str, Alive, list[Row], list[str]]]:
    """Return each that differs in what it tells: its test, itself, its rows, and who is like it.

    A suite whose tests run out of memory one after the other fails each time beside the same.
    """
    found: dict[object, tuple[str, Alive, list[Row], list[str]]] = {}
    for test, alive in every:
        made = rows(alive)
        like = head(alive), tuple(made), alive.note, alive.snapshot
        if like in found:
            found[like][-1].append(test.nodeid)
        else:
            found[like] = test.nodeid, alive, made, []
    return list(found.values())


def _not_looked_at(run: RunRecord) -> int:
    """Return how many tests that memory felled have nothing to tell."""
    last = {test.nodeid: test for test in run.tests}
    felled = {each for each, test in last.items() if test.oom and test.outcome in _FELLED}
    return len(felled - {test.nodeid for test in run.tests if test.alive})


def table(run: RunRecord, each: int) -> list[tuple[str, ...]]:
    """Return rows of size, line, kind, owner and test; ``each`` at most of one test."""
    return [
        (format_bytes(row.size), row.what, row.kinds, row.owner, test.nodeid)
        for test, alive in told(run)
        for row in rows(alive)[:each]
    ]

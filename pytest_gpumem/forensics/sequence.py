"""Follows a log line by line: which tests ran where and in what order, and what felled them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pytest_gpumem.forensics import lines, memory, progress, sections
from pytest_gpumem.forensics.attribution import resolve
from pytest_gpumem.forensics.cursor import Cursor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pytest_gpumem.forensics.lines import Line, Text
    from pytest_gpumem.forensics.runs import Run, Seen

_UNCARRIED = re.compile(r"=|[.FEsxX]+ *\[|\S+\.py(?:::| )|\[gw\d")
_STEPS: tuple[Callable[[Cursor, Line, Text], bool], ...] = (
    sections.read_banner,
    progress.read_progress,
    sections.read_summary,
    sections.read_header,
    sections.read_detail,
    memory.read_death,
    memory.read_memory,
    memory.read_logged,
)
"""Each takes the line, or leaves it to the next."""


class Follower:
    """Reads the lines of one log in order and keeps its runs."""

    def __init__(self, watch: Callable[[Seen, str | None], None] | None = None) -> None:
        self._at = Cursor()
        self._watch = watch
        """Told of each message when it is read, with its test as far as it is known by then."""
        self._watched = 0

    def follow(self, found: Iterable[Line]) -> list[Run]:
        """Read the lines and return the runs."""
        at = self._at
        for line in found:
            texts = lines.read_all(line.raw, at.carrier)
            first = texts[0]
            if first.body.endswith(("===", "%]")) and not (
                at.run.pytest or _UNCARRIED.match(first.body)
            ):
                at.carrier = lines.carrier(first.whole) or at.carrier
                texts = lines.read_all(line.raw, at.carrier)
            for text in texts:
                any(step(at, line, text) for step in _STEPS)
            if self._watch is not None:
                self._report(self._watch)
        for run in at.runs:
            resolve(run)
            failed = run.counts["failed"] + run.counts["error"]
            run.unshown = max(0, failed - len(run.failures))
        return at.runs

    def _report(self, watch: Callable[[Seen, str | None], None]) -> None:
        """Tell of the messages that came with the last line."""
        run, failure = self._at.run, self._at.failure
        told = [(seen, test.nodeid if test else None) for seen, test in run.loose[-1:]]
        if failure is not None and failure.seen is not None:
            told.append((failure.seen, failure.nodeid or failure.name))
        for seen, test in told:
            if seen.line > self._watched:
                self._watched = seen.line
                watch(seen, test)

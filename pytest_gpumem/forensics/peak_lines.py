"""Sets what was alive at the peaks of two runs side by side, line by line."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    Lines = Mapping[str, int]
    """Bytes by line."""

_LINE = re.compile(r"(?P<file>.+):(?P<line>\d+) (?P<function>.+)")


class LineChange(NamedTuple):
    """A line that had other bytes alive at a test's peak than before."""

    test: str
    where: str
    """``file:line function``, as in the later run where it is there."""
    before: int
    """Bytes; 0 where it had none."""
    after: int


def changed(
    before: Mapping[str, Lines], after: Mapping[str, Lines], names: Mapping[str, str]
) -> tuple[LineChange, ...]:
    """Return the lines that differ, the most grown first, of tests that both runs recorded.

    Args:
        before: of the earlier run, bytes by test and line.
        after: of the later one.
        names: what each test of the earlier run is called in the later one.

    """
    found = [
        LineChange(new, *change)
        for old, new in names.items()
        if old in before and new in after
        for change in _of_test(before[old], after[new])
    ]
    return tuple(sorted(found, key=lambda each: (each.before - each.after, each.test, each.where)))


def _of_test(before: Lines, after: Lines) -> Iterator[tuple[str, int, int]]:
    """Yield the lines of a test that differ."""
    old, new = _by_function(before), _by_function(after)
    for place in dict.fromkeys([*old, *new]):
        here, there = old.get(place, {}), new.get(place, {})
        same = _paired(here, there)
        for was, now in same.items():
            if here[was] != there[now]:
                yield _text(place, now), here[was], there[now]
        yield from ((_text(place, at), here[at], 0) for at in here if at not in same)
        came = there.keys() - same.values()
        yield from ((_text(place, at), 0, there[at]) for at in sorted(came))


def _paired(before: dict[int, int], after: dict[int, int]) -> dict[int, int]:
    """Return which line of a function is which one of the later run.

    Whatever is written above a function moves all of its lines: of all distances the one counts at
    which most lines have the same bytes, and then at which most lines have any. Lines without a
    partner at that distance have been moved within the function, and are paired in their order.
    """
    distances = {now - was for was in before for now in after}

    def score(distance: int) -> tuple[int, int, int]:
        pairs = [was for was in before if was + distance in after]
        equal = sum(before[was] == after[was + distance] for was in pairs)
        return equal, len(pairs), -abs(distance)

    distance = max(distances, key=score, default=0)
    pairs = {was: was + distance for was in before if was + distance in after}
    rest = [sorted(before.keys() - pairs.keys()), sorted(after.keys() - set(pairs.values()))]
    return pairs | dict(zip(*rest, strict=False))


def _text(place: tuple[str, str], line: int) -> str:
    file, function = place
    return f"{file}:{line} {function}" if line else file


def _by_function(lines: Lines) -> dict[tuple[str, str], dict[int, int]]:
    """Return bytes by file and function, and by line; what has no line is a place of its own."""
    found: dict[tuple[str, str], dict[int, int]] = {}
    for where, size in lines.items():
        match = _LINE.fullmatch(where)
        place = (where, "") if match is None else (match["file"], match["function"])
        found.setdefault(place, {})[0 if match is None else int(match["line"])] = size
    return found

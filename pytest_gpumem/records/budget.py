"""Budgets: the own peaks that a repository allows its tests, in a file that is kept in git.

TOML with a line for each test, in order, so that what two branches changed merges line by line::

    [peaks]
    "test_a.py::test_x" = {"NVIDIA L4" = 125_829_120}
    "test_a.py::test_y" = {"NVIDIA L4" = {peak = 125_829_120, left = 8_388_608}, "Tesla T4" = 512}

By card model come the bytes of ``CardUsage.own``, and, where there were any, of ``own_left``: what
the test left behind when the line was written.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpumem import files
from pytest_gpumem.records.run import BudgetVerdict
from pytest_gpumem.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from pytest_gpumem.records.run import RecordedTest, RunRecord

_CONFLICT = re.compile(r"^(?:<{7}|>{7}|\|{7})(?: .*)?$", re.MULTILINE)
_NAME = re.compile(r"""^[ \t]*("(?:[^"\\\n]|\\.)*"|'[^'\n]*')[ \t]*=[ \t]*\{""", re.MULTILINE)
"""The beginning of a test's line."""
_HEAD = (
    "# The most VRAM that each test may take, by card; written by pytest --gpumem-budget-update.\n"
)
_BUILDING = 2
"""Times that what a test left behind may have been there while it was made: a state dict stands
beside the model that it is loaded into."""


class Own(NamedTuple):
    """What a test took of a card, in bytes."""

    peak: int
    """``CardUsage.own``."""
    left: int = 0
    """``CardUsage.own_left``."""


class Tolerance(NamedTuple):
    """By how much a test may be above its budget: the larger of the two."""

    part: float = 0.0
    size: int = 0
    """Bytes."""

    def limit(self, budget: int) -> int:
        """Return the most bytes that a test may take."""
        return budget + max(int(budget * self.part), self.size)


def judge(own: Own, budget: Own, tolerance: Tolerance) -> str:
    """Return ``within``, ``above`` or ``left``.

    Whatever a process keeps, such as a cache or a library's workspace, is taken by the first test
    that needs it, and which one that is depends on their order. So a test that leaves more behind
    than when its budget was written is above it only if it would be without that as well.
    """
    limit = tolerance.limit(budget.peak)
    if own.peak <= limit:
        return "within"
    return "above" if own.peak - _BUILDING * max(0, own.left - budget.left) > limit else "left"


def why_above(own: int, card: str, budget: int) -> str:
    """Return in one sentence by how much a test is above its budget."""
    part = f" ({(own / budget - 1):.1%})" if budget else ""
    return (
        f"took {format_bytes(own)} of {card}, {format_bytes(own - budget)}{part} more than its "
        f"budget of {format_bytes(budget)}"
    )


def name_of(nodeid: str) -> str:
    """Return what a test is called in the file, which is UTF-8 whatever its nodeid is."""
    return nodeid.encode("utf-8", "backslashreplace").decode()


class Budget:
    """The own peaks that tests may have, by node id and card model.

    Args:
        plain: what ``plain`` returned.

    """

    def __init__(self, plain: Mapping[str, Mapping[str, Sequence[int]]] | None = None) -> None:
        self._tests = {
            name: {card: Own(*sizes) for card, sizes in line.items()}
            for name, line in (plain or {}).items()
        }

    def plain(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Return it in builtin types, which xdist carries."""
        return {
            name: {card: tuple(own) for card, own in line.items()}
            for name, line in self._tests.items()
        }

    def __getitem__(self, nodeid: str) -> Mapping[str, Own]:
        return self._tests.get(name_of(nodeid), {})

    def names(self, cards: Collection[str]) -> Iterable[str]:
        """Return the tests that have a budget on one of the card models, by ``name_of``."""
        return (name for name, line in self._tests.items() if not line.keys().isdisjoint(cards))

    @classmethod
    def load(cls, path: Path) -> Budget:
        """Return the budget that a file holds.

        Raises:
            OSError: when it cannot be read.
            ValueError: in one sentence, when it is none, or git could not merge it.

        """
        try:
            plain = files.read_toml(path)
        except ValueError:
            if problem := _of_a_merge(path.read_text(encoding="utf-8", errors="replace")):
                raise ValueError(f"{str(path)!r} has {problem}") from None
            plain = files.read_toml(path, _once)
        try:
            return cls(_parse(plain))
        except ValueError as error:
            raise ValueError(f"{str(path)!r}: {error}") from None

    def text(self) -> str:
        """Return the content of the file."""
        lines = (
            f"{_quoted(name)} = {{{', '.join(_entry(line, card) for card in sorted(line))}}}\n"
            for name, line in sorted(self._tests.items())
        )
        return f"{_HEAD}[peaks]\n{''.join(lines)}"

    def save(self, path: Path) -> None:
        """Write the budget to ``path``, whole or not at all.

        Raises:
            OSError: when the file cannot be written; what stood there before is untouched.

        """
        with files.replace(path) as file:
            file.write(self.text())

    def apply(self, verdict: BudgetVerdict, tolerance: Tolerance) -> bool:
        """Write, lower or take out what ``verdict`` is about; return whether that was new.

        Never raise: a test that grows has its line raised by hand, by whoever means it. Nor lower
        by less than the tolerance: of tests that vary a little, the least ever seen would be kept.
        """
        name = name_of(verdict.nodeid)
        line = self._tests.get(name, {})
        old, new = line.get(verdict.card), Own(verdict.own, verdict.left)
        if verdict.verdict == "gone":
            if old is not None:
                self._take_out(name, verdict.card)
            return old is not None
        if verdict.before:
            self._take_out(verdict.before, verdict.card)
        if verdict.verdict not in ("within", "new", "renamed"):
            return False
        if old is not None and old.peak <= tolerance.limit(new.peak):
            return False
        self._tests.setdefault(name, {})[verdict.card] = new
        return True

    def _take_out(self, name: str, card: str) -> None:
        line = self._tests.get(name, {})
        line.pop(card, None)
        if not line:
            self._tests.pop(name, None)


def verdicts(
    run: RunRecord, budget: Budget, gone: Collection[str], tolerance: Tolerance
) -> tuple[BudgetVerdict, ...]:
    """Return how the tests of a run stand to their budgets, and the budgets without a test.

    Only tests that passed are compared, and those that failed only because of their budget.

    Args:
        run: what happened.
        budget: what is allowed.
        gone: names of budgets whose tests are known to be no more, see ``name_of``.
        tolerance: of tests that are above theirs.

    """
    models = {(card.host, card.uuid): card.name for card in run.cards}
    found: dict[tuple[str, str], BudgetVerdict] = {}
    for test in run.tests:
        for card, own in _took(test, models).items():
            allowed = budget[test.nodeid].get(card)
            word = "new" if allowed is None else judge(own, allowed, tolerance)
            peak = None if allowed is None else allowed.peak
            verdict = BudgetVerdict(test.nodeid, card, word, own.peak, own.left, peak)
            before = found.get((test.nodeid, card), verdict)
            # Of a test that failed by itself nothing else is worth knowing.
            if test.outcome == "passed" or word == "above":
                found[test.nodeid, card] = max(before, verdict, key=lambda each: each.own)
    lost = [
        BudgetVerdict(name, card, "gone", budget=own.peak)
        for name in sorted(gone)
        for card, own in budget[name].items()
        if card in models.values()
    ]
    return _renamed(list(found.values()), lost, tolerance)


def _took(test: RecordedTest, models: Mapping[tuple[str, str], str]) -> dict[str, Own]:
    """Return by card model what a test took, on the card of a model where that is most.

    Nothing where another run of it may well have worked on another device.
    """
    if test.outcome not in ("passed", "error") or test.fell_back or test.step:
        return {}
    found: dict[str, Own] = {}
    for card in test.cards:
        model = models.get((test.host, card.card), card.card)
        if card.own:
            found[model] = max(found.get(model, Own(0)), Own(card.own, card.own_left))
    return found


def _renamed(
    found: list[BudgetVerdict], lost: list[BudgetVerdict], tolerance: Tolerance
) -> tuple[BudgetVerdict, ...]:
    """Take new tests for gone ones where only one of each is alike.

    Alike are tests of one name in two places, and tests of one file with about the same peak.
    """

    def alike(new: BudgetVerdict, old: BudgetVerdict) -> bool:
        if new.card != old.card:
            return False
        (place, name), (before, was) = (_parts(each.nodeid) for each in (new, old))
        peak = old.budget or 0
        near = peak <= tolerance.limit(new.own) and new.own <= tolerance.limit(peak)
        return name == was or (place.partition("::")[0] == before.partition("::")[0] and near)

    fresh = [each for each in found if each.verdict == "new"]
    pairs = [(new, old) for new in fresh for old in lost if alike(new, old)]
    same = {
        new: old
        for new, old in pairs
        if sum(new == each for each, _ in pairs) == 1 == sum(old == each for _, each in pairs)
    }
    found = [
        each._replace(verdict="renamed", budget=same[each].budget, before=same[each].nodeid)
        if each in same
        else each
        for each in found
    ]
    return (*found, *(each for each in lost if each not in same.values()))


def _parts(nodeid: str) -> tuple[str, str]:
    """Return the place of a test and its name, with its parameters."""
    plain, bracket, parameters = nodeid.partition("[")
    place, _, name = plain.rpartition("::")
    return place, name + bracket + parameters


def _quoted(text: str) -> str:
    """Return a basic string of TOML, which is JSON's but for one control character."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _once(text: str) -> str:
    """Return the text without a test's line that is there twice, its place left empty.

    Where two branches added tests, git's ``union`` keeps the lines of both, and with them lines of
    neither that stand between.
    """
    seen: set[str] = set()
    kept = []
    for line in text.split("\n"):
        kept.append("" if line in seen else line)
        if _NAME.match(line):
            seen.add(line)
    return "\n".join(kept)


def _of_a_merge(text: str) -> str:
    """Return in words what is left for the user to decide in a file that git merged."""
    if found := _CONFLICT.search(text):
        line = text.count("\n", 0, found.start()) + 1
        return f"a conflict of git at line {line}: keep one line for each test, without the marker"
    lines: dict[str, int] = {}
    for found in _NAME.finditer(_once(text)):
        line, name = text.count("\n", 0, found.start()) + 1, found[1]
        if first := lines.get(name):
            return f"two lines for {name}, {first} and {line}: keep the one that is meant"
        lines[name] = line
    return ""


def _entry(line: Mapping[str, Own], card: str) -> str:
    peak, left = line[card]
    value = f"{{peak = {peak:_}, left = {left:_}}}" if left else f"{peak:_}"
    return f"{_quoted(card)} = {value}"


def _parse(plain: dict[str, Any]) -> dict[str, dict[str, Own]]:
    tests = plain.get("peaks")
    if set(plain) != {"peaks"} or not isinstance(tests, dict):
        raise ValueError("it is no budget: allowed is one table, [peaks]")
    found = {}
    for name, line in tests.items():
        if not isinstance(line, dict):
            raise ValueError(f"the budget of {name!r} names no card")
        found[name] = {card: _own(name, value) for card, value in line.items()}
    return found


def _own(name: str, value: object) -> Own:
    fields = value if isinstance(value, dict) else {"peak": value}
    if not {"peak"} <= set(fields) <= {"peak", "left"}:
        raise ValueError(f"the budget of {name!r}: allowed are a size, or peak and left")
    try:
        sizes = {key: _size(size) for key, size in fields.items()}
    except ValueError as error:
        raise ValueError(f"the budget of {name!r}: {error}") from None
    return Own(**sizes)


def _size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{value!r} is not a size")
    return parse_bytes(value)

"""How a run's tests stand to the own peaks that are allowed them."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from pytest_gpumem.records import BudgetVerdict

_KINDS = {
    "above": "above their budget",
    "left": "not judged: they left more behind than when their budget was written",
    "new": "new",
    "renamed": "probably renamed",
    "gone": "gone",
}
"""What is told, in this order."""


def lines(
    verdicts: Sequence[BudgetVerdict], shown: int, explained: Collection[str] = ()
) -> Iterator[str]:
    """Return the lines of the section; none where every test is within its budget.

    Args:
        verdicts: how the tests stand.
        shown: how many of each kind there are at most.
        explained: the tests of which it is told elsewhere what was alive at their peak.

    """
    order = list(_KINDS)
    told = [each for each in verdicts if each.verdict in _KINDS]
    told.sort(key=lambda each: (order.index(each.verdict), -each.own, each.nodeid))
    for kind, found in groupby(told, key=lambda each: each.verdict):
        same = list(found)
        yield f"  {len(same)} {_KINDS[kind]}{'' if all(s.written for s in same) else _hint(kind)}"
        for each in same[:shown]:
            yield f"    {_text(each)}"
        if len(same) > shown:
            yield f"    and {len(same) - shown} more"
        if kind == "above" and not any(each.nodeid in explained for each in same):
            yield "    --gpumem-peaks=offenders tells line by line what was alive"
        if kind == "left":
            yield "    --gpumem-leak-warmups=1 judges those that filled a cache"
    written = [each for each in verdicts if each.written]
    if written:
        lowered = sum(each.verdict == "within" for each in written)
        gone = sum(each.verdict == "gone" for each in written)
        yield (
            f"  written: {len(written) - lowered - gone} new, {lowered} lowered, {gone} taken out"
        )


def _hint(kind: str) -> str:
    return " (--gpumem-budget-update writes them)" if kind in ("new", "renamed", "gone") else ""


def _text(verdict: BudgetVerdict) -> str:
    if verdict.verdict == "gone":
        return f"{verdict.nodeid}, {verdict.card}"
    budget = "" if verdict.budget is None else f", budget {format_bytes(verdict.budget)}"
    left = f", left {format_bytes(verdict.left)}" if verdict.left else ""
    before = f", formerly {verdict.before}" if verdict.before else ""
    return f"{verdict.nodeid}{before}: {format_bytes(verdict.own)}{budget}{left}, {verdict.card}"

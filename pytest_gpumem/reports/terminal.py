"""The run in lines for a terminal, what somebody has to act on first.

Each list is bounded, with what was left out counted.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem.records import short
from pytest_gpumem.reports import alive, budgets, children, proofs, ram, timeline
from pytest_gpumem.reports.counts import (
    PEAK_COLUMNS,
    Counted,
    Leak,
    LeftByScope,
    by_cause,
    by_kind,
    count_up,
    instances,
    left_by_scopes,
    likewise,
    likewise_leaks,
    peaks,
    place,
    plural,
)
from pytest_gpumem.reports.fold import fold
from pytest_gpumem.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pytest_gpumem.records import CardUsage, FixtureUsage, Holder, RecordedTest, RunRecord

_HOLDERS_SHOWN = 3
_LEFT_SHOWN = 10
_ALIVE_SHOWN = 5
_STEPS = {
    "alone": "with no other test on the card",
    "released": "after consolidating model state",
    "fresh": "in a fresh process",
    "cpu": "on the CPU",
}
"""Of the ladder."""


class Line(NamedTuple):
    """A line of the section, and the colour that pytest's terminal writer gives it."""

    text: str
    colour: str = ""


def lines(run: RunRecord, top: int, verbosity: int = 0, width: int = 0) -> Iterator[Line]:
    """Return the section's lines; main memory and notes alone when no test touched a card.

    Args:
        run: what happened.
        top: how many entries each list shows, all of them where it is 0 or ``verbosity`` above 1.
        verbosity: pytest's; below 0 come only the first line and one for each kind of leak, above 0
            holders and names are not shortened.
        width: of the terminal, to which lines are broken; 0 for none.

    """
    for line in _lines(run, top, verbosity):
        yield from (line._replace(text=part) for part in fold(line.text, width))


def _lines(run: RunRecord, top: int, verbosity: int) -> Iterator[Line]:
    counted = count_up(run)
    touched, leaks = counted.touched, counted.leaks
    notes = [f"  {note}" for note in run.notes]
    shown = top if top and verbosity < 2 else len(run.tests)
    if not touched:
        if verbosity >= 0:
            told = [
                *_section("main memory", ram.lines(run, shown)),
                *_section("replaced workers", _lost(run, verbosity)),
                *_section("notes", notes),
            ]
            yield from told[1:]  # without an empty line before the first
        return
    yield Line(counted.headline, "red" if counted.felled else "yellow" if leaks else "")
    if verbosity < 0:
        yield from map(Line, _leaked_briefly(by_kind(leaks), shown))
        return
    yield from _table(run, shown, verbosity)
    yield from _fixtures(touched, shown)
    yield from _section("leaked", _leaked(leaks, shown, verbosity), "yellow")
    yield from _section("budgets", budgets.lines(run.budgets, shown, _with_lines(run)))
    yield from _scopes(left_by_scopes(run), shown)
    yield from _section("main memory", ram.lines(run, shown))
    yield from _section("out of memory", _ooms(run, counted, shown, verbosity), "red")
    each = None if verbosity > 0 else _ALIVE_SHOWN
    yield from _section("alive", alive.lines(run, shown, each))
    yield from _section(
        "running out of memory, where it was made to",
        proofs.lines(run.tests, shown),
    )
    yield from _section("set for the whole process and left so", _left(touched, verbosity))
    yield from _section("sharing", _sharing(run, verbosity))
    yield from _section("routing", _routing(run.tests))
    yield from _section("replaced workers", _lost(run, verbosity))
    yield from _section(
        "lost CUDA context, after which tests ran in fresh processes",
        (
            f"  after {test.nodeid}: {test.broke}"
            for test in run.tests
            if not test.worker and test.broke
        ),
    )
    if verbosity > 0:
        yield from _section("not counted as leaked", _notes(touched))
    yield from _section("notes", notes)


def usage_lines(usage: CardUsage, card: str) -> Iterator[str]:
    """Return one test's usage of one card, called ``card``, for the details of a failure."""
    yield f"card      {card}"
    for name in ("baseline", "peak", "leftover", "leaked", "reserved"):
        yield f"{name:<9} {format_bytes(getattr(usage, name))}"
    if usage.children_peak:
        left = f", {format_bytes(usage.orphaned)} left" if usage.orphaned else ""
        yield f"children  {format_bytes(usage.children_peak)} at their peak{left}"
    yield from _holder_lines(usage.holders, None)


def _more(number: int, what: str) -> Iterator[Line]:
    """Say how many entries a list does not show, if any."""
    if number > 0:
        yield Line(f"... {plural(number, f'more {what}')}; --gpumem-top=0 shows all")


def _table(run: RunRecord, shown: int, verbosity: int) -> Iterator[Line]:
    """Show the tests that took most of a card, themselves and by what they started."""
    rows = peaks(run)
    if not rows:
        return
    several = len(run.cards) > 1
    titles = " ".join(f"{column.title:>{column.width}}" for column in PEAK_COLUMNS)
    yield Line("")
    yield Line(f"{titles}  {'card      ' if several else ''}test")
    for row in rows[:shown]:
        figures = " ".join(f"{column.cell(row):>{column.width}}" for column in PEAK_COLUMNS)
        which = f"{short(row.usage.card)}  " if several else ""
        yield Line(f"{figures}  {which}{place(row.test)}")
        if verbosity > 0:
            indent = " " * 33
            largest = children.largest(row.test, row.usage.card)
            yield from (Line(f"{indent}{each}") for each in largest)
    yield from _more(len(rows) - shown, "test")


def _with_lines(run: RunRecord) -> set[str]:
    """Return the tests of which it is told line by line what was alive."""
    return {test.nodeid for test, told in alive.told(run) if told.recorded}


def _fixtures(tests: Sequence[RecordedTest], shown: int) -> Iterator[Line]:
    """Show the wider fixtures, those that took most first; all instances of one in one line."""
    found: dict[tuple[str, str], list[FixtureUsage]] = {}
    for each in instances(tests):
        found.setdefault((each.name, each.scope), []).append(each)
    rows = sorted(found.items(), key=lambda row: -max(each.allocated for each in row[1]))
    if not rows:
        return
    yield Line("")
    yield Line(f"{'took':>11} {'peak':>11} {'released':>11}  fixture")
    for (name, scope), several in rows[:shown]:
        each = max(several, key=lambda instance: instance.allocated)
        released = "" if each.released is None else format_bytes(each.released)
        times = f", largest of {len(several)}" if len(several) > 1 else ""
        yield Line(
            f"{format_bytes(each.allocated):>11} {format_bytes(each.peak):>11} {released:>11}  "
            f"{name} ({scope}{times})"
        )
    yield from _more(len(rows) - shown, "fixture")


def _scopes(rows: Sequence[LeftByScope], shown: int) -> Iterator[Line]:
    """Show what modules left on the cards when their own fixtures were gone, and the run."""
    if not rows:
        return
    modules = [row for row in rows if not row.whole]
    yield Line("")
    yield Line(f"{'left':>11}  by module, its fixtures gone")
    for row in modules[:shown]:
        held = f", held by {row.where}" if row.where else ""
        yield Line(f"{format_bytes(row.size):>11}  {row.name}{held}")
    yield from _more(len(modules) - shown, "module")
    for row in rows:
        if row.whole:
            yield Line(f"{format_bytes(row.size):>11}  {row.name}")


def _section(title: str, found: Iterable[str], colour: str = "") -> Iterator[Line]:
    body = list(found)
    if body:
        yield Line("")
        yield Line(title, colour)
        yield from map(Line, body)


def _leaked_briefly(kinds: Sequence[Sequence[Leak]], shown: int) -> Iterator[str]:
    """Show the largest leak of each kind in a line."""
    for first, *others in kinds[:shown]:
        more = f", likewise {likewise_leaks(others)}" if others else ""
        yield f"{format_bytes(first.size):>12} leaked by {first.by}{more}"
    if left := sum(map(len, kinds[shown:])):
        yield f"... {plural(left, 'more leak')}; --gpumem-top=0 shows all"


def _leaked(leaks: Sequence[Leak], shown: int, verbosity: int) -> Iterator[str]:
    """Show the largest leak of each kind, and who else left something of that kind."""
    groups = by_kind(leaks)
    for first, *others in groups[:shown]:
        yield f"  {format_bytes(first.size):>10} by {first.by}"
        yield from _holder_lines(first.holders, None if verbosity > 0 else _HOLDERS_SHOWN)
        yield from (f"      {sentence}" for sentence in first.orphans)
        each = [f"{format_bytes(leak.size):>10} by {leak.by}" for leak in others]
        yield from likewise(likewise_leaks(others), each, verbose=verbosity > 0)
    left = [leak for group in groups[shown:] for leak in group]
    if left:
        size = format_bytes(sum(leak.size for leak in left))
        yield f"  ... {plural(len(left), 'more leak')}, {size}; --gpumem-top=0 shows all"


def _holder_lines(holders: Sequence[Holder], limit: int | None) -> Iterator[str]:
    for holder in holders[:limit]:
        shape = "x".join(map(str, holder.shape)) or "scalar"
        tensors = f"{holder.tensors} tensors, largest" if holder.tensors > 1 else "tensor"
        yield f"      held by {holder.where}"
        whole = f"of {format_bytes(holder.whole)}" if holder.whole else "in all"
        yield f"          {tensors} {holder.dtype} {shape}, {format_bytes(holder.size)} {whole}"
        yield from (f"          allocated at {frame}" for frame in holder.stack[:_HOLDERS_SHOWN])
    if limit is not None and len(holders) > limit:
        yield f"      ... {plural(len(holders) - limit, 'more holder')}; -v shows all"


def _ooms(run: RunRecord, counted: Counted, shown: int, verbosity: int) -> Iterator[str]:
    """Show the first test felled by each cause, and whom else it felled."""
    groups = by_cause(counted)
    largest = max((card.total for card in run.cards), default=0)
    for culprits, (first, *others) in groups[:shown]:
        yield f"  {place(first)}"
        yield f"      {first.oom}"
        if (size := _ROUNDED.search(first.oom)) and 0 < largest < parse_bytes(size[0]) * 0.99:
            which = "the largest card" if len(run.cards) > 1 else "the card"
            yield f"      more than {which} has, {format_bytes(largest)}"
        for other in first.beside:
            yield f"      beside it: {other.text}"
        yield from (f"      {sentence}" for sentence in culprits)
        asked = [_asked(test) for test in others]
        yield from likewise(plural(len(others), "test"), asked, verbose=verbosity > 0)
    left = sum(len(tests) for _, tests in groups[shown:])
    if left:
        yield f"  ... {plural(left, 'more test')}; --gpumem-top=0 shows all"


_ROUNDED = re.compile(r"\d+(\.\d+)? [KMGT]i?B\b")
"""The size that was asked for; the message has it to within a hundredth."""


def _asked(test: RecordedTest) -> str:
    """Return a test with what it asked for, where that was told: of a cause, sizes differ."""
    found = _ROUNDED.search(test.oom)
    return f"{found[0]:>10} for {place(test)}" if found else place(test)


def _left(tests: Sequence[RecordedTest], verbosity: int) -> Iterator[str]:
    found: dict[str, None] = {}  # each once: a test that ran again left it again
    for test in tests:
        for left in test.left:
            what = f"{left.what} is {left.after or 'empty'}, was {left.before or 'empty'}"
            done = "; set back" if left.put_back else ""
            found[f"  {place(test)}: {what}{done}"] = None
    shown = list(found) if verbosity > 0 else list(found)[:_LEFT_SHOWN]
    yield from shown
    if len(shown) < len(found):
        yield f"  ... {len(found) - len(shown)} more; -v shows all"


def _alone_again(run: RunRecord) -> list[RecordedTest]:
    """Return the tests that ran out of memory and were run again alone on the card, each once."""
    found: dict[str, RecordedTest] = {}
    following: dict[str, str] = {}
    for test in reversed(run.tests):
        if test.outcome == "rerun" and test.oom and following.get(test.nodeid) == "alone":
            found[test.nodeid] = test
        following[test.nodeid] = test.step
    return list(found.values())[::-1]


def _sharing(run: RunRecord, verbosity: int) -> Iterator[str]:
    """Show how the workers shared the cards, if there was more than one or somebody waited."""
    leases = [(test.lease, test) for test in run.tests if test.lease is not None]
    again = _alone_again(run)
    waited = [(lease.waited, test) for lease, test in leases if lease.waited]
    if run.workers < 2 and not again and not waited:
        return
    if run.workers:
        idle, ran = timeline.idle(run), len({test.worker for test in run.tests if test.worker})
        who = plural(run.workers, "worker")
        if ran < run.workers:
            who = f"{ran} of {who} ran tests"
        yield f"  {who}, idle for {idle:.0%} of the time"
    if leases:
        yield f"  {plural(len(leases), 'lease')}, {len(waited)} of them waited for"
    if waited:
        longest, test = max(waited, key=lambda each: each[0])
        total = sum(seconds for seconds, _ in waited)
        yield f"      {total:.1f} s in all, longest {longest:.1f} s: {place(test)}"
    _, end = timeline.window(run.tests)
    found = timeline.levels(run)
    for card in run.cards:
        steps = found.get((card.host, card.uuid))
        if steps and card.total:
            where = f" on {card.host}" if card.host else ""
            used, most = timeline.mean(steps, end), max(step.size for step in steps)
            yield (
                f"  {card.called(run.cards)}{where}: {used / card.total:.0%} used on average, "
                f"{format_bytes(most)} of {format_bytes(card.total)} at most"
            )
    if again:
        # Other programs may have stayed.
        how = f"ran out of memory beside others and ran again {_STEPS['alone']}"
        yield f"  {plural(len(again), 'test')} {how}"
        shown = again if verbosity > 0 else again[:_HOLDERS_SHOWN]
        yield from (f"      {place(test)}" for test in shown)
        if len(shown) < len(again):
            yield f"      ... {len(again) - len(shown)} more; -v shows all"


def _routing(tests: Sequence[RecordedTest]) -> Iterator[str]:
    """Show where tasks were sent and why, and the steps that were taken after an OOM."""
    routes = [route for test in tests for route in test.routes]
    if routes:
        on_cpu = [route for route in routes if route.device == "cpu"]
        yield (
            f"  {plural(len(routes), 'task')}: {len(routes) - len(on_cpu)} to the card, "
            f"{len(on_cpu)} to the CPU"
        )
        reasons = Counter(re.sub(r"\d[\d.]*( [KMG]iB|%)?", "N", each.reason) for each in on_cpu)
        for reason, number in reasons.most_common(_HOLDERS_SHOWN):
            yield f"      {number} x {reason}"
    steps = Counter(test.step for test in tests if test.step)
    for step, text in _STEPS.items():
        if steps[step]:
            good = sum(test.step == step and test.outcome == "passed" for test in tests)
            yield f"  {plural(steps[step], 'attempt')} {text}, {good} passed"


def _lost(run: RunRecord, verbosity: int) -> Iterator[str]:
    """Show the workers that ended before the run did, and who kept the main memory of theirs."""
    for test in run.tests:
        if test.broke and test.worker:
            yield f"  {test.worker} after {test.nodeid}: {test.broke}"
    shown = run.lost if verbosity > 0 else run.lost[:_LEFT_SHOWN]
    for lost in shown:
        when = f" at {lost.nodeid}" if lost.nodeid else ""
        yield f"  {lost.worker}{when}: {lost.why}"
        yield from (f"      {sentence}" for sentence in ram.who_kept(run, lost.worker))
    if len(shown) < len(run.lost):
        yield f"  ... {len(run.lost) - len(shown)} more; -v shows all"


def _notes(tests: Sequence[RecordedTest]) -> Iterator[str]:
    for test in tests:
        for card in test.cards:
            if card.note:
                yield f"  {place(test)}: {card.note}"

"""The run in lines for a terminal: sizes are bare MiB, the unit stands in the column head."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from pytest_gpumem.reports import timeline
from pytest_gpumem.units import format_bytes, format_mib

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pytest_gpumem.records import CardUsage, FixtureUsage, Holder, Left, RecordedTest, RunRecord

_HOLDERS_SHOWN = 3
_LEFT_SHOWN = 10
_STEPS = {
    "alone": "with no other test on the card",
    "released": "after consolidating model state",
    "cpu": "on the CPU",
}
"""Of the ladder."""


def lines(run: RunRecord, top: int, verbosity: int = 0) -> Iterator[str]:
    """Return the section's lines, none when no test touched a card.

    Args:
        run: what happened.
        top: how many tests the table shows; all of them when ``verbosity`` is above 1.
        verbosity: pytest's; below 0 one line says it all, above 0 holders are not shortened.

    """
    touched = [
        test
        for test in run.tests
        if test.cards or test.fixtures or test.oom or test.broke or test.left
    ]
    if not touched:
        return
    yield _summary(run, touched)
    if verbosity < 0:
        return
    shown = len(touched) if verbosity > 1 else top
    yield from _table(touched, shown)
    limit = None if verbosity > 0 else _HOLDERS_SHOWN
    yield from _fixtures(touched, shown)
    yield from _section("leaked", _leaks(touched, limit))
    yield from _section("out of memory", _ooms(touched))
    yield from _section("set for the whole process and left so", _left(touched, verbosity))
    yield from _section("sharing", _sharing(run, verbosity))
    yield from _section("routing", _routing(run.tests))
    yield from _section("replaced workers", _replaced(run.tests))
    if verbosity > 0:
        yield from _section("not counted as leaked", _notes(touched))
    yield from _section("notes", (f"  {note}" for note in run.notes if not _is_header(note)))


def usage_lines(usage: CardUsage) -> Iterator[str]:
    """Return one test's usage of one card, for the detail section of a failure."""
    yield f"card      {usage.card}"
    for name in ("baseline", "peak", "leftover", "leaked", "reserved"):
        yield f"{name:<9} {format_bytes(getattr(usage, name))}"
    yield from _holder_lines(usage.holders, None)


def _summary(run: RunRecord, touched: Sequence[RecordedTest]) -> str:
    peak = max((card.peak for test in touched for card in test.cards), default=0)
    leaks = sum(1 for test in touched if _leaked(test))
    ooms = sum(1 for test in touched if _felled(test))
    # By name: a test that ran again counts once.
    used = {test.nodeid for test in touched if any(card.peak for card in test.cards)}
    known = {test.nodeid for test in run.tests}
    return (
        f"{_count(len(used), 'test')} of {len(known)} used VRAM, "
        f"highest peak {format_bytes(peak)}, "
        f"{_count(leaks, 'leak')}, {_count(ooms, 'failure')} out of memory"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _felled(test: RecordedTest) -> bool:
    """Tell whether a test failed because memory ran out, and was not tried again."""
    return bool(test.oom) and test.outcome in ("failed", "error")


def _leaked(test: RecordedTest) -> int:
    return sum(card.leaked for card in test.cards) + sum(each.leaked for each in test.fixtures)


def _table(tests: Sequence[RecordedTest], top: int) -> Iterator[str]:
    rows = sorted(
        ((card, test) for test in tests for card in test.cards if card.peak),
        key=lambda row: row[0].peak,
        reverse=True,
    )
    if not rows[:top]:
        return
    yield ""
    yield f"{'peak MiB':>10} {'own MiB':>10} {'leftover':>10}  test"
    for card, test in rows[:top]:
        own = card.peak - card.baseline
        sizes = " ".join(f"{format_mib(size):>10}" for size in (card.peak, own, card.leftover))
        yield f"{sizes}  {test.nodeid}{_on(test)}"
    if len(rows) > top:
        yield f"... {len(rows) - top} more; -vv shows all"


def _on(test: RecordedTest) -> str:
    return f" [{test.worker}]" if test.worker else ""


def _fixtures(tests: Sequence[RecordedTest], top: int) -> Iterator[str]:
    """Show the wider fixtures' instances, those that took most first."""
    rows = sorted(_instances(tests), key=lambda row: -row[0].allocated)
    if not rows[:top]:
        return
    yield ""
    yield f"{'took MiB':>10} {'peak MiB':>10} {'released':>10}  fixture"
    for each, test in rows[:top]:
        released = "" if each.released is None else format_mib(each.released)
        yield (
            f"{format_mib(each.allocated):>10} {format_mib(each.peak):>10} {released:>10}  "
            f"{each.name} ({each.scope}){_on(test)}"
        )
    if len(rows) > top:
        yield f"... {len(rows) - top} more; -vv shows all"


def _instances(tests: Sequence[RecordedTest]) -> list[tuple[FixtureUsage, RecordedTest]]:
    """Return each instance of a wider fixture once, with its teardown's figures where it has any.

    A fixture is set up again for other parameters, and in each module.
    """
    rows: list[tuple[FixtureUsage, RecordedTest]] = []
    standing: dict[tuple[str, ...], int] = {}
    for test in tests:
        for each in test.fixtures:
            if each.scope == "function":
                continue
            key = (test.host, test.worker, each.name, each.scope, each.card)
            if each.released is None:
                standing[key] = len(rows)
                rows.append((each, test))
            elif key in standing:
                rows[standing.pop(key)] = each, test
            else:
                rows.append((each, test))
    return rows


def _section(title: str, found: Iterable[str]) -> Iterator[str]:
    body = list(found)
    if body:
        yield ""
        yield title
        yield from body


def _leaks(tests: Sequence[RecordedTest], limit: int | None) -> Iterator[str]:
    for test in tests:
        for card in test.cards:
            if card.leaked:
                yield f"  {format_bytes(card.leaked):>10} by {test.nodeid}{_on(test)}"
                yield from _holder_lines(card.holders, limit)
        for fixture in test.fixtures:
            if fixture.leaked:
                yield (
                    f"  {format_bytes(fixture.leaked):>10} by fixture {fixture.name} "
                    f"({fixture.scope}), torn down after {test.nodeid}{_on(test)}"
                )
                yield from _holder_lines(fixture.holders, limit)


def _holder_lines(holders: Sequence[Holder], limit: int | None) -> Iterator[str]:
    for holder in holders[:limit]:
        shape = "x".join(map(str, holder.shape)) or "scalar"
        tensors = f"{holder.tensors} tensors, largest" if holder.tensors > 1 else "tensor"
        yield f"      held by {holder.where}"
        whole = f"of {format_bytes(holder.whole)}" if holder.whole else "in all"
        yield f"          {tensors} {holder.dtype} {shape}, {format_bytes(holder.size)} {whole}"
        yield from (f"          allocated at {frame}" for frame in holder.stack[:_HOLDERS_SHOWN])
    if limit is not None and len(holders) > limit:
        yield f"      ... {len(holders) - limit} more holders; -v shows all"


def _ooms(tests: Sequence[RecordedTest]) -> Iterator[str]:
    limits: dict[tuple[str, str], dict[str, tuple[Left, RecordedTest]]] = {}
    """By process: the limits that earlier tests left."""
    for test in tests:
        standing = limits.setdefault((test.host, test.worker), {})
        if _felled(test):
            yield f"  {test.nodeid}{_on(test)}"
            yield f"      {test.oom}"
            for other in test.beside:
                yield f"      beside it: {other.text}"
            if test.oom.endswith(" allowed)"):
                for left, culprit in standing.values():
                    yield f"      {left.what} is {left.after}: {culprit.nodeid} left it so"
        for left in test.left:
            if left.what.startswith("memory fraction") and not left.put_back:
                standing[left.what] = left, test


def _left(tests: Sequence[RecordedTest], verbosity: int) -> Iterator[str]:
    found: dict[str, None] = {}  # each once: a test that ran again left it again
    for test in tests:
        for left in test.left:
            what = f"{left.what} is {left.after or 'empty'}, was {left.before or 'empty'}"
            done = "; set back" if left.put_back else ""
            found[f"  {test.nodeid}{_on(test)}: {what}{done}"] = None
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
        who = _count(run.workers, "worker")
        if ran < run.workers:
            who = f"{ran} of {who} ran tests"
        yield f"  {who}, without a test for {idle:.0%} of the time"
    yield f"  {_count(len(leases), 'lease')}, {len(waited)} of them waited for"
    if waited:
        longest, test = max(waited, key=lambda each: each[0])
        total = sum(seconds for seconds, _ in waited)
        yield f"      {total:.1f} s in all, longest {longest:.1f} s: {test.nodeid}{_on(test)}"
    _, end = timeline.window(run.tests)
    found = timeline.levels(run)
    for card in run.cards:
        steps = found.get((card.host, card.uuid))
        if steps and card.total:
            where = f" on {card.host}" if card.host else ""
            used, most = timeline.mean(steps, end), max(step.size for step in steps)
            yield (
                f"  {card.name}{where}: {used / card.total:.0%} used on average, "
                f"{format_bytes(most)} of {format_bytes(card.total)} at most"
            )
    if again:
        # Other programs may have stayed.
        how = f"ran out of memory beside others and ran again {_STEPS['alone']}"
        yield f"  {_count(len(again), 'test')} {how}"
        shown = again if verbosity > 0 else again[:_HOLDERS_SHOWN]
        yield from (f"      {test.nodeid}{_on(test)}" for test in shown)
        if len(shown) < len(again):
            yield f"      ... {len(again) - len(shown)} more; -v shows all"


def _routing(tests: Sequence[RecordedTest]) -> Iterator[str]:
    """Show where tasks were sent and why, and the steps that were taken after an OOM."""
    routes = [route for test in tests for route in test.routes]
    if routes:
        on_cpu = [route for route in routes if route.device == "cpu"]
        yield (
            f"  {_count(len(routes), 'task')}: {len(routes) - len(on_cpu)} to the card, "
            f"{len(on_cpu)} to the CPU"
        )
        reasons = Counter(re.sub(r"\d[\d.]*( [KMG]iB|%)?", "N", each.reason) for each in on_cpu)
        for reason, number in reasons.most_common(_HOLDERS_SHOWN):
            yield f"      {number} x {reason}"
    steps = Counter(test.step for test in tests if test.step)
    for step, text in _STEPS.items():
        if steps[step]:
            good = sum(test.step == step and test.outcome == "passed" for test in tests)
            yield f"  {_count(steps[step], 'attempt')} {text}, {good} passed"


def _replaced(tests: Sequence[RecordedTest]) -> Iterator[str]:
    for test in tests:
        if test.broke:
            yield f"  {test.worker} after {test.nodeid}: {test.broke}"


def _is_header(note: str) -> bool:
    return note.startswith("not simulated:")


def _notes(tests: Sequence[RecordedTest]) -> Iterator[str]:
    for test in tests:
        for card in test.cards:
            if card.note:
                yield f"  {test.nodeid}{_on(test)}: {card.note}"

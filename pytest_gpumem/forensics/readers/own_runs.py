"""Runs that this plugin recorded."""

from __future__ import annotations

from collections import Counter
from typing import IO

from pytest_gpumem import records
from pytest_gpumem.forensics import messages
from pytest_gpumem.forensics.causes import Leftover
from pytest_gpumem.forensics.readers.streams import whole
from pytest_gpumem.forensics.runs import Failure, Run, Seen


def read_record(stream: IO[bytes]) -> list[Run]:
    """Return the run of a file of ``--gpumem-json``; ``ValueError`` if it is none."""
    return [of_record(records.parse(whole(stream)))]


def _lines(test: records.RecordedTest) -> dict[str, int]:
    """Return by line what was alive on the card where that was most, if it was recorded."""
    recorded = [each for each in test.alive if each.recorded]
    found: Counter[str] = Counter()
    for group in max(recorded, key=lambda each: each.size).groups if recorded else ():
        if group.where:
            found[group.where] += group.size
    return dict(found)


_ENDED_WELL = {"passed", "skipped", "xfailed", "xpassed"}


def of_record(recorded: records.RunRecord) -> Run:
    """Return what a log of the recorded run would tell."""
    run = Run()
    run.pytest = run.ended = True
    run.collected = recorded.collected or None
    totals = {card.uuid: card.total for card in recorded.cards}
    words = {
        "failed": "FAILED",
        "error": "ERROR",
        "passed": "PASSED",
        "skipped": "SKIPPED",
        "xfailed": "XFAIL",
        "xpassed": "XPASS",
        "crashed": "FAILED",
    }
    again: set[str] = set()
    for number, each in enumerate(recorded.tests, 1):
        if each.outcome == "rerun":
            again.update([each.nodeid] if each.oom else [])
            continue  # it was made again alone, and that attempt counts
        worker = "/".join(filter(None, (each.host, each.worker))) or None
        test = run.test(each.nodeid, worker)
        test.outcome = words.get(each.outcome, "FAILED")
        test.duration += each.duration
        if each.cards:
            run.peaks[each.nodeid] = max(card.peak for card in each.cards)
            # What others left there before it, or a wider fixture holds, is not its own.
            own, kept = max((card.peak - card.baseline, card.leftover) for card in each.cards)
            if own >= run.own_peaks.get(each.nodeid, 0):
                run.own_peaks[each.nodeid], run.kept[each.nodeid] = own, kept
        if lines := _lines(each):
            run.lines[each.nodeid] = lines
        leaked = sum(card.leaked for card in each.cards) + sum(f.leaked for f in each.fixtures)
        if leaked:
            run.leftovers[worker].append(Leftover(each.nodeid, leaked))
            run.leaks[each.nodeid] = leaked
        if each.nodeid in again and each.outcome == "passed":
            run.recovered.append(each.nodeid)
        if not (each.oom or each.outcome == "crashed") or each.outcome in _ENDED_WELL:
            continue
        kind = "ERROR" if each.outcome == "error" else "FAILED"
        failure = Failure(number, each.nodeid, kind, "call" if kind == "FAILED" else "setup")
        failure.nodeid, failure.worker = each.nodeid, worker
        failure.died = each.outcome == "crashed"
        found = messages.parse(each.oom, raised=True) if each.oom else None
        if found is not None:
            sizes = dict(found.sizes)
            if each.cards:
                usage = max(each.cards, key=lambda card: card.peak)
                sizes.setdefault("allocated", usage.peak)
                sizes.setdefault("total", totals.get(usage.card, 0))
            failure.seen = Seen(number, found._replace(sizes=sizes))
        run.failures.append(failure)
    for left in run.leftovers.values():
        left.sort(key=lambda each: -each.size)
    return run

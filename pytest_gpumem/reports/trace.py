"""The run as a trace: a lane per worker, a counter of VRAM per card.

The format is Chrome's "Trace Event Format" (JSON object form): ``X`` is a stretch of time, ``C`` a
counter, ``M`` a name; ``ts`` and ``dur`` are microseconds. Perfetto and chrome://tracing open it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_gpumem import records
from pytest_gpumem.reports import timeline

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_gpumem.records import RecordedTest, RunRecord

_CARDS = 1
"""Number of the trace's process that carries the counters; the hosts' follow."""


def save(run: RunRecord, path: Path) -> None:
    """Write the trace of ``run`` to ``path``, whole or not at all.

    Raises:
        OSError: when the file cannot be written; what stood there before is untouched.

    """
    records.write_json({"traceEvents": list(events(run)), "displayTimeUnit": "ms"}, path)


def events(run: RunRecord) -> Iterator[dict[str, Any]]:
    """Yield the trace's events; times count from the beginning of the first test."""
    tests = [test for test in run.tests if test.start]
    begin, _ = timeline.window(tests)
    hosts = {host: _CARDS + 1 + at for at, host in enumerate(sorted({t.host for t in tests}))}
    lanes = {lane: at for at, lane in enumerate(sorted({(t.host, t.worker) for t in tests}), 1)}
    yield _name("process", _CARDS, 0, "cards")
    for host, number in hosts.items():
        yield _name("process", number, 0, f"workers on {host}" if host else "workers")
    for (host, worker), lane in lanes.items():
        yield _name("thread", hosts[host], lane, worker or "pytest")
    yield from _children(run, hosts, begin, len(lanes))
    for test in tests:
        place = {"pid": hosts[test.host], "tid": lanes[test.host, test.worker]}
        if test.lease is not None and test.lease.waited > 0:
            waited = test.lease.waited
            yield _stretch("wait for a lease", test.start - waited - begin, waited, place)
        yield _stretch(test.nodeid, test.start - begin, test.duration, place) | {
            "cat": test.outcome,
            "args": _facts(test),
        }
    names = {(card.host, card.uuid): card.name for card in run.cards}
    for key, steps in timeline.levels(run).items():
        host, uuid = key
        title = f"{names.get(key, 'card')} {uuid}{' on ' + host if host else ''}, MiB"
        for step in steps:
            yield {
                "name": title,
                "ph": "C",
                "ts": _us(step.time - begin),
                "pid": _CARDS,
                "args": {"used": round(step.size / 2**20, 1)},
            }


def _children(
    run: RunRecord, hosts: dict[str, int], begin: float, lane: int
) -> Iterator[dict[str, Any]]:
    """Yield a lane behind those of the workers for each process that a test started."""
    _, end = timeline.window(run.tests)
    for (host, pid, start, _), child in timeline.children(run).items():
        if host not in hosts:
            continue  # of tests without a time
        lane += 1
        yield _name("thread", hosts[host], lane, f"process {pid} of {child.started_by}")
        place = {"pid": hosts[host], "tid": lane}
        until = max(start, child.end or end)
        yield _stretch(child.command or f"process {pid}", start - begin, until - start, place) | {
            "cat": "child",
            "args": {
                "started by": child.started_by,
                "peak": child.peak,
                "used": child.used_peak,
                "leaked": child.leaked,
            },
        }


def _facts(test: RecordedTest) -> dict[str, Any]:
    """Return what is shown of a test when it is selected; sizes in bytes."""
    facts: dict[str, Any] = {"outcome": test.outcome}
    if test.cards:
        facts["peak"] = max(card.peak for card in test.cards)
        facts["leaked"] = sum(card.leaked for card in test.cards)
    if test.lease is not None:
        facts["lease"] = test.lease.size
        facts["alone"] = test.lease.alone
    if test.oom:
        facts["out of memory"] = test.oom
    return facts


def _stretch(name: str, start: float, duration: float, place: dict[str, int]) -> dict[str, Any]:
    return {"name": name, "ph": "X", "ts": _us(start), "dur": _us(duration), **place}


def _name(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": f"{what}_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _us(seconds: float) -> int:
    return round(seconds * 1e6)

"""A failing test that a report has in a field of its own: read as a log would be."""

from __future__ import annotations

from pytest_gpumem.forensics import lines, messages
from pytest_gpumem.forensics.runs import Failure, Run, Seen
from pytest_gpumem.forensics.sequence import Follower


def enter(run: Run, nodeid: str, kind: str, phase: str, *, text: str, message: str = "") -> None:
    """Enter a failing report that a structured file holds; its line is its test's number."""
    line = len(run.order)
    failure = Failure(line, nodeid, kind, phase)
    failure.nodeid = nodeid
    section = f"=== FAILURES ===\n___ {nodeid.partition('[')[0]} ___\n"
    found = Follower().follow(
        lines.scan([section.encode(), text.encode("utf-8", "replace"), b"\n"])
    )
    for each in (each for one in found for each in one.failures):
        failure.seen = failure.seen or (each.seen and Seen(line, each.seen.message))
        failure.aside = failure.aside or (each.aside and Seen(line, each.aside.message))
        failure.error = each.error or failure.error
        failure.died = failure.died or each.died
        failure.worker = failure.worker or each.worker
    known = messages.parse(message, raised=True)
    if known is not None and known.named and failure.seen is None and not failure.died:
        failure.seen = Seen(line, known)
    failure.error = failure.error or message.partition("\n")[0]
    run.failures.append(failure)

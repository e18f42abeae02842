"""How tests fared whose allocations were made to fail."""

from __future__ import annotations

import shlex
from collections import Counter
from typing import TYPE_CHECKING

from pytest_gpumem.reports.counts import plural
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_gpumem.records import Card, RecordedTest, Refusal

VERDICTS = {
    "recovered": "recovered",
    "leaked": "leaked",
    "other error": "ended in another error",
    "out of memory": "ran out of memory",
    "endless": "tried again and again",
    "skipped": "was skipped or expected to fail",
    "not reached": "made fewer allocations this time",
}


def lines(tests: Sequence[RecordedTest], shown: int) -> Iterator[str]:
    """Return the lines of the section; none where no allocation was made to fail."""
    proofs = [(test.nodeid, test.proof) for test in tests if test.proof is not None]
    if not proofs:
        return
    tried = [(nodeid, proof, each) for nodeid, proof in proofs for each in proof.tried]
    counts = Counter(each.verdict for *_, each in tried)
    told = ", ".join(
        f"{counts[verdict]} {VERDICTS[verdict]}" for verdict in VERDICTS if counts[verdict]
    )
    some = sum(bool(proof.tried) for _, proof in proofs)
    failed = f"{plural(len(tried), 'allocation')} of {plural(some, 'test')}"
    yield f"  {failed} failed{f': {told}' if told else ''}"
    cut = [
        f"  {len(proof.tried)} of {proof.allocations} allocations of {nodeid} were tried"
        f"{f': {proof.why}' if proof.why else ''}"
        for nodeid, proof in proofs
        if len(proof.tried) < proof.allocations
    ]
    bad = [one for one in tried if is_bad(one[-1])]
    for nodeid, proof, each in bad[:shown]:
        yield f"  {text(each)}"
        yield f"      {repeat(nodeid, each, proof.simulated)}"
    if len(bad) > shown:
        yield f"  and {len(bad) - shown} more"
    yield from cut[:shown]
    if len(cut) > shown:
        yield f"  and so of {plural(len(cut) - shown, 'more test')}"


def is_bad(refusal: Refusal) -> bool:
    """Return whether a test did not recover."""
    return refusal.verdict not in ("recovered", "skipped", "not reached")


def text(refusal: Refusal) -> str:
    """Return in words what became of a test."""
    leaked = f" {format_bytes(refusal.leaked)}" if refusal.leaked else ""
    also = f", and leaked{leaked}" if leaked and refusal.verdict != "leaked" else ""
    error = f": {refusal.text}" if refusal.text else ""
    verdict = VERDICTS[refusal.verdict] + (leaked if refusal.verdict == "leaked" else "")
    return f"at allocation {refusal.at} it {verdict}{also}{error}"


def repeat(nodeid: str, refusal: Refusal, simulated: str) -> str:
    """Return the line that does it again; ``simulated`` as in ``Proof``."""
    simulate = f"{simulated} " * bool(simulated)
    return f"pytest -p gpumem {simulate}--gpumem-oom-at {refusal.at} {shlex.quote(nodeid)}"


def simulating(cards: Sequence[Card], context: int | None, *, compiled: bool) -> str:
    """Return the options that give such simulated cards; ``context`` None is what is assumed."""
    options = f"--gpumem-simulate {','.join(_size(card.total) for card in cards)}"
    if context is not None:
        options += f" --gpumem-simulate-context {_size(context)}"
    return options + " --gpumem-simulate-compiled" * compiled


def _size(size: int) -> str:
    whole, rest = divmod(size, 2**20)
    return str(size) if rest else f"{whole}MiB"

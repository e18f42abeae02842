"""The log of 4,479 tests, 188 out of memory, tells the same through every carrier.

25 carriers, each with and without pytest's colours, as it is and wrapped at 80 and at 132 columns:
totals, positions, workers, causes, the first ten events and the counts of each file are compared
with those of the bare log.
"""

from __future__ import annotations

import functools
import json
import random
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import forensics as bench

from pytest_gpumem.forensics import analysis, lines
from pytest_gpumem.forensics.sequence import Follower

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STAMP = "2025-03-04T10:20:30.1234567Z"
CARRIERS: dict[str, Callable[[str], str]] = {
    "bare": lambda line: line,
    "CRLF": lambda line: f"{line}\r",
    "GitHub": lambda line: f"{STAMP} {line}",
    "GitHub's archive": lambda line: f"gpu tests\tRun pytest\t{STAMP} {line}",
    "GitLab": lambda line: f"{STAMP} 01O {line}",
    "Jenkins": lambda line: f"[{STAMP}] {line}",
    "Jenkins, short": lambda line: f"10:20:30  {line}",
    "Buildkite": lambda line: f"\x1b_bk;t=1741083630123\x07{line}",
    "Azure": lambda line: f"{STAMP} ##[section]{line}",
    "compose": lambda line: f"tests-1  | {line}",
    "kubectl": lambda line: f"[pod/tests-x7k2p/main] {line}",
    "docker": lambda line: json.dumps({"log": f"{line}\n", "stream": "stdout", "time": STAMP}),
    "JSON": lambda line: json.dumps({"level": "info", "message": line}),
    "JSON, nested": lambda line: json.dumps({"ts": STAMP, "fields": {"message": line}}),
    "syslog": lambda line: f"Mar  4 10:20:30 host-1 pytest[4711]: {line}",
    "journal": lambda line: f"2025-03-04T10:20:30+0000 host-1 pytest[4711]: {line}",
    "loguru": lambda line: f"2025-03-04 10:20:30.123 | INFO     | app.ci:run:31 - {line}",
    "logging": lambda line: f"2025-03-04 10:20:30,123 - app.ci - INFO - {line}",
    "Slurm": lambda line: f"0: {line}",
    "torchrun": lambda line: f"[default0]:{line}",
    "Ray": lambda line: f"(pytest pid=4711) {line}",
    "quoted": lambda line: f"> {line}",
    "indented": lambda line: f"    {line}",
    "a clock": lambda line: f"[   12.345678] {line}",
    "an unknown one": lambda line: f"<<ci:7>> {line}",
}
_COLOURS = (
    (re.compile(r"\b(PASSED|\d+ passed)\b"), "32"),
    (re.compile(r"\b(FAILED|ERROR|\d+ failed|\d+ errors?)\b(?! at)"), "31"),
    (re.compile(r"^(E {2,}.*|=+ .* =+)$"), "1m\x1b[31"),
)


def coloured(line: str) -> str:
    """Return a line as pytest colours it."""
    for pattern, code in _COLOURS:
        line = pattern.sub(lambda match, code=code: f"\x1b[{code}m{match[1]}\x1b[0m", line)
    return line


def wrapped(line: str, width: int) -> Iterator[str]:
    """Return a line as a terminal of that width breaks it."""
    yield line[:width]
    for at in range(width, len(line), width):
        yield line[at : at + width]


def carried(carrier: str, width: int, *, colour: bool) -> bytes:
    """Return the log as the carrier gives it."""
    draw = random.Random(7)  # noqa: S311 - made-up logs need no secrets
    give = CARRIERS[carrier]
    log = "".join(bench.lines_of(draw, lambda: "INFO     app:run.py:1 ready\n"))
    pieces = (
        piece for line in log.split("\n") for piece in (wrapped(line, width) if width else [line])
    )
    return "\n".join(give(coloured(piece) if colour else piece) for piece in pieces).encode()


def told(log: bytes) -> dict[str, object]:
    """Return what is compared."""
    found = analysis.findings([("log", Follower().follow(lines.scan([log])))])
    totals = found.totals._replace(duration=round(found.totals.duration))
    shown = [
        (event.nodeid, event.worker, event.position, event.cause, event.tried_bytes)
        for event in found.events
    ]
    return {
        "totals": totals,
        "positions": {(name, place) for name, _, place, _, _ in shown},
        "workers": {(name, worker) for name, worker, _, _, _ in shown},
        "causes": sorted(cause for _, _, _, cause, _ in shown),
        "the first ten": shown[:10],
        "files": found.by_file,
        "complete": found.complete,
    }


@functools.cache
def _expected() -> dict[str, object]:
    """Return what the bare log tells, once in each process."""
    return told(carried("bare", 0, colour=False))


def differs(case: tuple[str, int, bool]) -> str:
    """Return a case's name and what it tells differently, empty if nothing."""
    carrier, width, colour = case
    expected, found = _expected(), told(carried(carrier, width, colour=colour))
    wrong = [name for name in expected if expected[name] != found[name]]
    what = f"{carrier}{', coloured' if colour else ''}{f', wrapped at {width}' if width else ''}"
    return f"{what}: {', '.join(wrong)}" if wrong else ""


def main() -> None:
    """Try every case and exit with 1 when one tells something else."""
    expected = _expected()["totals"]
    assert (expected.tests, expected.oom) == (bench.TESTS, bench.OOMS), expected
    cases = [
        (carrier, width, colour)
        for carrier in CARRIERS
        for width in (0, 80, 132)
        for colour in (False, True)
    ]
    with ProcessPoolExecutor(2) as pool:
        wrong = [each for each in pool.map(differs, cases) if each]
    print(*wrong, f"{len(cases) - len(wrong)} of {len(cases)} tell the same", sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

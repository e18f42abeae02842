"""How fast a log is read: against ripgrep, and against the loop of two regexes one writes first.

Makes a log like that of 4,479 tests on four workers and a card of 3.81 GiB, of which 188 ran out
of memory, with captured output up to the size asked for. Each reader runs in a process of its own,
interleaved; the best of the rounds counts. ripgrep counts the lines with the same strings; the
loop decodes each line and searches two expressions in it.

    python scripts/bench/forensics.py --size 1GiB --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpumem.units import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TESTS, OOMS, ERRORS, FAILED, SKIPPED = 4_479, 188, 116, 87, 87
STRINGS = ("out of memory", "OutOfMemoryError", "Tried to allocate", ".py::", "Killed", "crashed")
_TEXT = """
loading tensor layer attention forward cache request model embedding memory allocated cuda device
batch token shape step value index result module agent state query worker ready connected retrying
failed slow warning frame pool size free bytes
"""


def main() -> None:
    """Make the log, run the readers, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=parse_bytes, default=2**30, help="of the log")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--log", type=Path, help="an existing log instead")
    parser.add_argument("--reader", choices=("loop",), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.reader:
        _loop(chosen.log)
        return
    with tempfile.TemporaryDirectory() as directory:
        log = chosen.log or Path(directory) / "run.log"
        if chosen.log is None:
            _make(log, chosen.size)
        _measure(log, chosen.rounds)


def _measure(log: Path, rounds: int) -> None:
    size = log.stat().st_size
    gpumem = [
        sys.executable,
        "-m",
        "pytest_gpumem.cli.main",
        "forensics",
        str(log),
        "--format",
        "json",
    ]
    readers: dict[str, list[str]] = {"gpumem forensics": gpumem}
    if ripgrep := shutil.which("rg"):
        patterns = [argument for text in STRINGS for argument in ("-e", text)]
        readers["ripgrep -c, same strings"] = [ripgrep, "-c", "-a", "-F", *patterns, str(log)]
    readers["two regexes a line"] = [
        sys.executable, __file__, "--reader", "loop", "--log", str(log),
    ]  # fmt: skip
    best: dict[str, tuple[float, float, int]] = {}
    for _ in range(rounds):
        for name, command in readers.items():
            ran = _run(command)
            best[name] = min(best.get(name, ran), ran)
    print(f"log of {size / 1e6:,.0f} MB, best of {rounds}\n")
    print(f"{'reader':<26} {'seconds':>8} {'MB/s':>7} {'CPU s':>7} {'peak RSS MiB':>13}")
    for name, (seconds, processor, memory) in best.items():
        speed = size / 1e6 / seconds
        row = f"{name:<26} {seconds:>8.2f} {speed:>7,.0f} {processor:>7.2f}"
        print(f"{row} {memory / 2**20:>13.0f}")
    found = json.loads(subprocess.run(gpumem, capture_output=True, check=True).stdout)
    print(f"\nevents told: {found['totals']['oom']} of {OOMS}")


def _run(command: list[str]) -> tuple[float, float, int]:
    """Return wall seconds, those of processors, and peak resident bytes of a process."""
    started = time.perf_counter()
    child = os.posix_spawn(
        command[0],
        command,
        os.environ,
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit(f"{command} ended with {status}")
    seconds = time.perf_counter() - started
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def _loop(log: Path) -> None:
    """Do what the first script for the purpose does: every line, two expressions."""
    test = re.compile(r"(tests/\S+\.py::\S+)")
    oom = re.compile(r"CUDA out of memory|OutOfMemoryError")
    sequence, found = [], []
    with log.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if match := test.search(line):
                sequence.append(match[1])
            if oom.search(line):
                found.append((len(sequence), line))
    print(len(sequence), len(found))


def _make(log: Path, size: int) -> None:
    draw = random.Random(7)  # noqa: S311 - made-up logs need no secrets
    noise = [_noise(draw) for _ in range(256)]
    per_section = max(1, (size - 3_000_000) // (OOMS + ERRORS + FAILED))
    with log.open("w", encoding="utf-8") as file:
        for line in lines_of(draw, lambda: _captured(draw, noise, per_section)):
            file.write(line)


def _noise(draw: random.Random) -> str:
    lines = []
    words = _TEXT.split()
    for _ in range(100):
        level = draw.choice(("DEBUG   ", "INFO    ", "INFO    ", "WARNING "))
        module = draw.choice(words)
        text = " ".join(draw.choices(words, k=draw.randint(4, 18)))
        lines.append(f"{level} app.{module}:{module}.py:{draw.randint(1, 900)} {text}\n")
    return "".join(lines)


def _captured(draw: random.Random, noise: list[str], size: int) -> str:
    pieces = []
    while size > 0:
        pieces.append(draw.choice(noise))
        size -= len(pieces[-1])
    return "".join(pieces)


def lines_of(draw: random.Random, captured: Callable[[], str]) -> Iterator[str]:
    """Return the lines of the log; ``captured`` returns what each failure printed."""
    names = [
        f"tests/area{number % 40}/test_part{number % 211}.py::TestPart::test_case[{number}]"
        for number in range(TESTS)
    ]
    outcomes = ["FAILED"] * (OOMS + FAILED) + ["ERROR"] * ERRORS + ["SKIPPED"] * SKIPPED
    outcomes += ["PASSED"] * (TESTS - len(outcomes))
    kinds = ["oom"] * OOMS + ["assert"] * FAILED + ["attribute"] * ERRORS
    kinds += [""] * (TESTS - len(kinds))
    tests = list(zip(names, outcomes, kinds, strict=True))
    draw.shuffle(tests)
    yield f"{' test session starts ':=^80}\nplatform linux -- Python 3.11.7, pytest-9.2.0\n\n"
    workers = {}
    for number, (name, outcome, _) in enumerate(tests):
        workers[name] = f"gw{draw.randrange(4)}"
        percent = number * 100 // TESTS
        yield f"{name} \n[{workers[name]}] [{percent:3d}%] {outcome} {name} \n"
    for title, wanted in (("ERRORS", {"attribute"}), ("FAILURES", {"oom", "assert"})):
        yield f"\n{f' {title} ':=^80}\n"
        for name, _, kind in tests:
            if kind in wanted:
                yield _section(draw, name, workers[name], kind)
                yield f"{' Captured log call ':-^80}\n"
                yield captured()
    yield f"{' short test summary info ':=^80}\n"
    for name, outcome, kind in tests:
        if kind:
            yield f"{outcome} {name} - {_error(draw, kind)[:60]}...\n"
    passed = TESTS - OOMS - ERRORS - FAILED - SKIPPED
    yield (
        f"= {OOMS + FAILED} failed, {passed} passed, {SKIPPED} skipped, {ERRORS} errors in "
        "5490.00s (1:31:30) =\n"
    )


def _section(draw: random.Random, name: str, worker: str, kind: str) -> str:
    header = name.partition("::")[2].replace("::", ".")
    if kind == "attribute":
        header = f"ERROR at setup of {header}"
    return (
        f"{f' {header} ':_^80}\n[{worker}] linux -- Python 3.11.7 /usr/bin/python3\n\n"
        "    def test_case(self, model):\n>       model.encode(['a'])\n\n"
        f"E       {_error(draw, kind)}\n\n{name.partition('::')[0]}:31: Error\n"
    )


def _error(draw: random.Random, kind: str) -> str:
    if kind == "assert":
        return f"AssertionError: assert {draw.randint(1, 99)} == 0"
    if kind == "attribute":
        return "AttributeError: 'OrchestratorAgent' object has no attribute '_embedding_model'"
    processes = "".join(f"Process {pid} has 384.00 MiB memory in use. " for pid in (71, 72, 73))
    return (
        f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {draw.randint(2, 80)}.00 "
        f"MiB. GPU 0 has a total capacity of 3.81 GiB of which {draw.randint(1, 20)}.19 MiB is "
        f"free. {processes}Including non-PyTorch memory, this process has 2.20 GiB memory in use. "
        f"Of the allocated memory 1.69 GiB is allocated by PyTorch, and {draw.randint(130, 162)}"
        ".07 MiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is "
        "large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
    )


if __name__ == "__main__":
    main()

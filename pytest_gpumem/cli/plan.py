"""``gpumem plan``: what a suite would do on other cards, with more or fewer workers, in shards."""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem import files, records
from pytest_gpumem.cli.arguments import read_count, read_size
from pytest_gpumem.cli.history import ask_where, load_history
from pytest_gpumem.devices.models import find_model
from pytest_gpumem.reports.fold import columns, fold
from pytest_gpumem.scheduling.estimates import planned_tests
from pytest_gpumem.scheduling.history import History, module
from pytest_gpumem.scheduling.simulation import Actual, Machine, Result, simulate
from pytest_gpumem.tracking.meter import kept_cache
from pytest_gpumem.units import format_bytes, parse_bytes, printable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator, Sequence

_CONTEXT, _HEADROOM = "512MiB", "64MiB"
_GAP = 0.05
"""Most seconds that a worker is without a test for no other reason than to get the next one."""
_AS_GOOD = 1.02
"""Times the shortest run that is as good, if it takes fewer workers."""
_TRIES, _TRIED_TESTS = 15, 10_000
"""Most simulations of a run, and most tests in all of them."""
_VARIES = 0.02
"""Part by which a test's duration varies from run to run."""
_PIECES = 8
"""Pieces of a shard into which a module may be cut, so that shards end at the same time."""


class Suite(NamedTuple):
    """The tests of a suite, as they were seen."""

    tests: list[Actual]
    needs: list[tuple[int, int | None, int, bool]]
    """What marks say: index, bytes, cards, alone."""
    history: History
    cards: tuple[records.Card, ...] = ()
    """Where they were seen."""
    context: int = 0
    """What a process was taken to cost there; 0 where nobody knows."""
    unknown: int = 0
    """Tests that ran out of memory, of which nobody knows how much they need."""
    gap: float = 0.0
    """Seconds that passed between two tests of a worker."""


class Plan(NamedTuple):
    """What the suite would do on one card, by number of workers."""

    name: str
    size: int
    runs: dict[int, Result]

    @property
    def best(self) -> int:
        """The fewest workers that are as fast as any, where most tests fit."""
        fewest = min(len(_unfit(run)) for run in self.runs.values())
        able = {count: run for count, run in self.runs.items() if len(_unfit(run)) == fewest}
        shortest = min(run.seconds for run in able.values())
        return min(count for count, run in able.items() if run.seconds <= _AS_GOOD * shortest)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Enter ``gpumem plan``."""
    parser = commands.add_parser(
        "plan",
        help="Say what a suite would do on other cards, with other numbers of workers, in shards.",
        epilog="Times are those of the tests, without the start of pytest and of its workers.",
    )
    ask_where(parser)
    parser.add_argument(
        "--card", action="append", default=[], metavar="CARD", dest="cards",
        help="Name or size, such as L4, 'H100 1g.10gb', 18GB; may be given several times. "
        "Default: those of the run.",
    )  # fmt: skip
    parser.add_argument(
        "--workers", default="1,2,4", metavar="N,...", help="Numbers of workers. Default: 1,2,4."
    )
    parser.add_argument(
        "--context", type=read_size, metavar="SIZE",
        help=f"What a process costs once it uses a card. Default: as in the run, or {_CONTEXT}.",
    )  # fmt: skip
    parser.add_argument(
        "--headroom", type=read_size, default=_HEADROOM, metavar="SIZE",
        help=f"What is never given out of a card. Default: {_HEADROOM}.",
    )  # fmt: skip
    parser.add_argument(
        "--top", type=read_count, default=10, metavar="N", help="Tests named for each card; 0: all."
    )
    parser.add_argument("--json", action="store_true", help="Print the plan as JSON.")
    parser.add_argument(
        "--shards", type=int, metavar="N",
        help="Write files of node ids for 'pytest @FILE' that take equal time.",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path(), metavar="DIR", help="Where. Default: here."
    )
    parser.set_defaults(run_command=_plan)


def _plan(chosen: argparse.Namespace) -> int:
    suite = _of_run(records.load_run(chosen.run)) if chosen.run else _of_history(chosen.history)
    if not suite.tests:
        raise ValueError(f"{str(chosen.run or chosen.history)!r} has no test that ran to its end")
    if chosen.shards is not None:
        lines = _shards(suite, chosen.shards, chosen.output, _context(suite, chosen))
    else:
        plans = _plans(suite, chosen)
        table = _table(suite, plans, chosen.top)
        folded = (part for line in table for part in fold(line, columns()))
        lines = iter([_json(suite, plans)]) if chosen.json else folded
    for line in lines:
        sys.stdout.write(f"{printable(line)}\n")
    return 0


def _plans(suite: Suite, chosen: argparse.Namespace) -> list[Plan]:
    cards = dict(map(find_model, chosen.cards)) or {card.name: card.total for card in suite.cards}
    if not cards:
        raise ValueError("which card? --card takes a name or a size, such as L4 or 18GB")
    context, headroom = _context(suite, chosen), chosen.headroom
    plans = []
    for name, size in cards.items():
        if size <= context + headroom:
            raise ValueError(
                f"--card: {format_bytes(size)} has no room beside a context of "
                f"{format_bytes(context)} and a headroom of {format_bytes(headroom)}"
            )
        machines = {
            count: Machine(
                size, context, count, headroom, kept_cache(size, shared=count > 1), suite.gap
            )
            for count in _counts(chosen.workers)
        }
        runs = {count: _run(suite, machine) for count, machine in machines.items()}
        plans.append(Plan(name, size, runs))
    return plans


def _run(suite: Suite, machine: Machine) -> Result:
    """Return the run of the suite, with the mean of the seconds of several.

    Which of two tests ends first decides what runs next, and that may be the packing of all that
    follows: of a small suite one run tells as little as one throw of dice. So it is run again with
    durations that differ as they do between two runs of a suite.
    """
    planned = planned_tests(
        [test.nodeid for test in suite.tests],
        suite.needs,
        suite.history.expect,
        most=machine.card - machine.context - machine.headroom,
        any_card=True,
    )
    run = simulate(planned, suite.tests, machine)
    rng = random.Random(0)  # noqa: S311  # the same plan every time
    seconds = [run.seconds]
    for _ in range(_tries(len(suite.tests)) - 1 if machine.workers > 1 else 0):
        varied = [
            test._replace(duration=test.duration * rng.lognormvariate(0, _VARIES))
            for test in suite.tests
        ]
        seconds.append(simulate(planned, varied, machine).seconds)
    return run._replace(seconds=statistics.fmean(seconds))


def _tries(tests: int) -> int:
    """Return how often a suite is run: the fewer tests, the more depends on their order."""
    return max(1, min(_TRIES, _TRIED_TESTS // tests))


def _context(suite: Suite, chosen: argparse.Namespace) -> int:
    given: int | None = chosen.context
    return suite.context or parse_bytes(_CONTEXT) if given is None else given


def _counts(text: str) -> list[int]:
    counts = text.split(",")
    if not all(each.strip().isdecimal() and 0 < int(each) <= 256 for each in counts):
        raise ValueError(f"--workers: {text!r}; allowed are numbers from 1 to 256, as in 1,2,4")
    return sorted({int(each) for each in counts})


# The suite


def _of_run(run: records.RunRecord) -> Suite:
    """Return the tests of a run in the order of its collection, by which the planner goes."""
    history = History()
    history.learn(run.tests)
    tests = sorted(run.tests, key=lambda test: test.start)
    ordered = sorted(tests, key=lambda test: test.place)
    last = {each.nodeid: each for each in ordered if each.outcome not in ("skipped", "rerun")}
    actual, needs = [], []
    lasting = _lasting(tests)
    for index, (nodeid, test) in enumerate(last.items()):
        peak = max((card.extra for card in test.cards), default=0)
        fixtures = max((card.fixture_bytes for card in test.cards), default=0)
        gpu = bool(peak or fixtures or test.oom)
        lasts = sum_of_largest(lasting[test.host, test.worker], within=fixtures)
        actual.append(Actual(nodeid, module(nodeid), gpu, test.duration, peak, fixtures, lasts))
        need = None if test.lease is None else _need(test.lease, run.cards)
        if need is not None:
            needs.append((index, *need))
    ooms = sum(bool(test.oom) for test in last.values())
    return Suite(actual, needs, history, run.cards, run.context, ooms, _gap(tests))


def _need(
    lease: records.LeaseUsage, cards: Sequence[records.Card]
) -> tuple[int | None, int, bool] | None:
    """Return what a test's mark says, as far as its lease tells: bytes, cards, alone.

    None where it says none of that. A test of unknown peak has the whole card to itself, and one
    that may use it or not has a lease too, without having asked for that.
    """
    totals = [card.total for card in cards if card.uuid in lease.cards]
    alone = lease.alone and lease.size < min(totals, default=0)
    asked = lease.marked is not None or len(lease.cards) > 1 or alone
    return (lease.marked, len(lease.cards), alone) if asked else None


def _lasting(tests: Iterable[records.RecordedTest]) -> dict[tuple[str, str], list[int]]:
    """Return by process what each fixture of it held that outlives its module."""
    found: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for test in tests:
        for fixture in test.fixtures:
            if fixture.scope in ("session", "package"):
                sizes = found[test.host, test.worker]
                sizes[fixture.name] = max(sizes.get(fixture.name, 0), fixture.allocated)
    return defaultdict(list, {place: [*sizes.values()] for place, sizes in found.items()})


def sum_of_largest(sizes: Iterable[int], *, within: int) -> int:
    """Return the sum of as many of ``sizes`` as fit, the largest first.

    What a test's wider fixtures hold is recorded as one number. Which of the session's are among
    them is inferred from it.
    """
    left = within
    for size in sorted(sizes, reverse=True):
        left -= size if size <= left else 0
    return within - left


def _gap(tests: Iterable[records.RecordedTest]) -> float:
    """Return the seconds that usually pass between two tests of a worker."""
    ends: dict[tuple[str, str], float] = {}
    gaps = []
    for test in tests:
        place = test.host, test.worker
        if place in ends and test.start:
            gaps.append(test.start - ends[place])
        ends[place] = test.start + test.duration
    return min(_GAP, max(0.0, statistics.median(gaps))) if gaps else 0.0


def _of_history(path: Path) -> Suite:
    history = load_history(path)
    tests = [
        Actual(
            nodeid,
            module(nodeid),
            known.gpu,
            known.duration,
            history.highest(nodeid),
            known.fixtures,
        )
        for nodeid, known in history
        if Path(module(nodeid)).exists()  # it remembers tests that are gone
    ]
    return Suite(tests, [], history)


# What it would do


def _unfit(run: Result) -> list[int]:
    return sorted({*run.felled, *(test for test, _ in run.refused)})


def _table(suite: Suite, plans: Sequence[Plan], top: int) -> Iterator[str]:
    tests = suite.tests
    on_card = [test for test in tests if test.gpu]
    alone = sum(test.duration for test in tests)
    yield (
        f"{len(tests)} tests, {len(on_card)} of them on a card, {_time(alone)} one after another"
    )
    if suite.unknown:
        yield f"{suite.unknown} of them ran out of memory: what they need is not known"
    counts = list(plans[0].runs)
    names = [f"{count} worker{'s' * (count > 1)}" for count in counts]
    wide = max(4, *(len(plan.name) for plan in plans))
    heads = "".join(f"{name:>13}" for name in names)
    yield ""
    yield f"{'card':<{wide}} {'memory':>11}{heads}  best  do not fit"
    for plan in plans:
        times = "".join(f"{_time(run.seconds):>13}" for run in plan.runs.values())
        unfit = len(_unfit(plan.runs[plan.best]))
        size = format_bytes(plan.size)
        yield f"{plan.name:<{wide}} {size:>11}{times}  {plan.best:>4}  {unfit or 'none':>10}"
    for plan in plans:
        yield from _named(suite, plan, top)


def _named(suite: Suite, plan: Plan, top: int) -> Iterator[str]:
    """Name the tests that do not fit on a card, and with how many workers, if not with all."""
    where: dict[int, list[int]] = defaultdict(list)
    for count, run in plan.runs.items():
        for test in _unfit(run):
            where[test].append(count)
    if not where:
        return
    reasons = dict(plan.runs[min(where[min(where)])].refused)
    order = sorted(where, key=lambda test: -_whole(suite.tests[test]))
    yield ""
    yield f"do not fit on {plan.name}"
    for test in order[: top or None]:
        counts = where[test]
        partly = "" if len(counts) == len(plan.runs) else f" with {_list(counts)} workers"
        yield f"  {_why(suite, test, reasons)}{partly}"
    if top and len(order) > top:
        yield f"  and {len(order) - top} more"


def _why(suite: Suite, test: int, reasons: dict[int, str]) -> str:
    if test in reasons:
        return reasons[test]
    actual = suite.tests[test]
    return f"{actual.nodeid} takes {format_bytes(_whole(actual))} beside its context"


def _whole(test: Actual) -> int:
    return test.peak + test.fixtures


def _list(counts: Sequence[int]) -> str:
    return ", ".join(map(str, counts))


def _json(suite: Suite, plans: Sequence[Plan]) -> str:
    """Return the plans as JSON: sizes in bytes, times in seconds."""
    plain = [
        {
            "card": plan.name,
            "total": plan.size,
            "best": plan.best,
            "workers": {
                str(count): {
                    "seconds": run.seconds,
                    "retried": run.ooms - len(run.felled),
                    "unfit": [suite.tests[test].nodeid for test in _unfit(run)],
                }
                for count, run in plan.runs.items()
            },
        }
        for plan in plans
    ]
    return json.dumps({"tests": len(suite.tests), "cards": plain}, indent=1)


def _time(seconds: float) -> str:
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:.1f} s"
    if whole < 6000:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


# Shards


def _shards(suite: Suite, count: int, output: Path, context: int) -> Iterator[str]:
    """Write the shards of equal time."""
    if count < 1:
        raise ValueError(f"--shards: {count} is not a number of shards; allowed is 1 or more")
    shards = shards_of(suite.tests, count)
    if empty := shards.count([]):  # pytest, given an empty file, runs all tests
        raise ValueError(f"--shards: of {count}, {empty} would have no test; ask for fewer")
    output.mkdir(parents=True, exist_ok=True)
    yield f"{'shard':<16} {'tests':>6} {'time':>12} {'VRAM':>11}"
    for number, shard in enumerate(shards, 1):
        path = output / f"shard-{number}.txt"
        with files.replace(path) as file:
            file.writelines(f"{test.nodeid}\n" for test in shard)
        seconds = sum(test.duration for test in shard)
        most = max((_whole(test) + context for test in shard if test.gpu), default=0)
        yield f"{path.name:<16} {len(shard):>6} {_time(seconds):>12} {format_bytes(most):>11}"


def shards_of(tests: Sequence[Actual], count: int) -> list[list[Actual]]:
    """Return the tests in so many shards that take about the same time.

    Modules stay together, so that their fixtures are set up once, but for long ones, which are
    cut into pieces. The longest piece goes to the shard that has least, and so on.
    """
    most = sum(test.duration for test in tests) / count / _PIECES
    pieces: list[list[Actual]] = []
    modules: dict[str, list[Actual]] = defaultdict(list)
    for test in tests:
        modules[test.module].append(test)
    for each in modules.values():
        filled = 0.0
        pieces.append([])
        for test in each:
            if pieces[-1] and filled + test.duration > most:
                pieces.append([])
                filled = 0.0
            pieces[-1].append(test)
            filled += test.duration
    shards: list[list[Actual]] = [[] for _ in range(count)]
    times = [0.0] * count
    for piece in sorted(pieces, key=lambda piece: -sum(test.duration for test in piece)):
        least = min(range(count), key=lambda shard: (times[shard], len(shards[shard])))
        shards[least] += piece
        times[least] += sum(test.duration for test in piece)
    place = {test.nodeid: number for number, test in enumerate(tests)}
    return [sorted(shard, key=lambda test: place[test.nodeid]) for shard in shards]

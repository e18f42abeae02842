"""Makes events of failures, deaths and messages: each told once, with its figures and cause."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem.forensics import causes
from pytest_gpumem.forensics.grammars.cuda import STICKY
from pytest_gpumem.forensics.runs import FAILING
from pytest_gpumem.records.findings import GpuProcess, OomEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_gpumem.forensics.messages import Message
    from pytest_gpumem.forensics.runs import Failure, Run, Seen, Test

_NEAR = 60
_FAR = 5000
"""Lines within which messages that do not contradict one another tell of one event: of any
framework, and of the same one. TensorFlow prints its allocator's state in between."""
_NEXT = 3
_NEXT_KILL = 20
_FIGURE = re.compile(r"\d[\d.,]*[KMGT]?")
_RECENT = 20
_TREND = 3
_SHOWN = 20
_BEFORE_SHOWN = 5
_STICKY_BACKENDS = {"cuda", "hip"}


@dataclass
class Draft:
    """An event in the making."""

    file: str
    number: int
    run: Run
    line: int
    nodeid: str | None = None
    worker: str | None = None
    phase: str = ""
    message: Message | None = None
    confirmed: bool = True
    killed: bool = False
    also: list[str] = field(default_factory=list)
    """Tests that the same failure felled besides."""
    last: int = 0
    """The last line that tells of it."""
    pids: set[int] = field(default_factory=set)
    once: str = ""
    """The last line of its kill that is printed once for each process."""
    sticky: bool = False
    """Whether it may be the echo of an earlier error of its worker: it has no figures."""

    @property
    def text(self) -> str:
        """The message as it stood there."""
        return self.message.text if self.message else ""

    @property
    def test(self) -> Test | None:
        """The test that it felled, where the log shows it in order."""
        return self.run.find(self.nodeid, self.worker)


class FileEvents(NamedTuple):
    """What one file tells of memory."""

    drafts: list[Draft]
    kills: list[Draft]
    """Processes that were killed, their victims unknown."""
    deaths: list[Draft]
    """Workers that died, why unknown."""


def draft(path: str, runs: Sequence[Run], first: int) -> FileEvents:
    """Return what one file tells of memory.

    Args:
        path: the file.
        runs: what it holds.
        first: number of the first run.

    """
    told = FileEvents([], [], [])
    number = first - 1
    named: set[str | None] = set()
    for run in runs:
        number += run.pytest
        drafts, deaths = _failures(path, max(number, 1), run)
        named.update(each.nodeid for each in drafts)
        told.drafts.extend(drafts)
        told.deaths.extend(deaths)
        loose = _loose(path, max(number, 1), run, named)
        named.update(each.nodeid for each in loose)
        told.drafts.extend(loose)
        told.kills.extend(
            kill
            for kill in _kills(path, max(number, 1), run)
            # Who has said why it ends may be killed by whoever started it.
            if kill.confirmed or not any(0 <= kill.line - each.last <= _NEXT_KILL for each in loose)
        )
    _running(runs, told)
    return told


def explain_deaths(deaths: Sequence[Draft], kills: list[Draft]) -> list[Draft]:
    """Return the workers that died of what the host says, in whatever file it says so."""
    unknown = [kill for kill in kills if kill.nodeid is None]
    explained = []
    for dead, kill in zip(deaths, unknown, strict=False):
        dead.killed = True
        dead.confirmed, dead.message = kill.confirmed, kill.message
        explained.append(dead)
    used = {id(kill) for kill in unknown[: len(explained)]}
    kills[:] = [kill for kill in kills if id(kill) not in used]
    return explained


def _failures(path: str, number: int, run: Run) -> tuple[list[Draft], list[Draft]]:
    """Return the failures of memory, and the workers that died without a word."""
    drafts: list[Draft] = []
    deaths: list[Draft] = []
    kept: dict[tuple[str | None, str, str], Draft] = {}
    last: dict[str | None, Draft] = {}
    broken: set[str | None] = set()
    for failure in sorted(run.failures, key=_ran(run)):
        seen = failure.seen or failure.aside
        if seen is None:
            if failure.died and not run.faults.get(failure.worker):
                deaths.append(_failed(path, number, run, failure, None))
            if STICKY.search(failure.error):
                broken.add(failure.worker)
            continue
        # A wider fixture's error is kept and raised again for each test that needs it.
        # Where the text has little to be known by, fixtures of other files may fail alike.
        telling = len(seen.message.printed) > 1
        place = "" if telling else (failure.nodeid or "").partition("::")[0]
        key = (failure.worker, place, _state(seen.message))
        if failure.phase == "setup" and key in kept:
            kept[key].also.append(failure.nodeid or failure.name)
            continue
        # What a broken card answers is no word of its memory, and is the same to every test.
        echo = not seen.message.figures and seen.message.backend in _STICKY_BACKENDS
        if echo and failure.worker in broken:
            continue
        before = last.get(failure.worker)
        if echo and before is not None and before.sticky and before.text == seen.message.text:
            before.also.append(failure.nodeid or failure.name)
            continue
        new = _failed(path, number, run, failure, seen)
        new.sticky = echo
        drafts.append(new)
        last[failure.worker] = new
        if failure.phase == "setup":
            kept[key] = new
    return drafts, deaths


def _ran(run: Run) -> Callable[[Failure], tuple[int, int]]:
    """Return what sorts failures as their tests ran, where that is known."""

    def key(failure: Failure) -> tuple[int, int]:
        test = run.find(failure.nodeid, failure.worker)
        return (test.rank if test else len(run.order), failure.line)

    return key


def _state(message: Message) -> str:
    """Return what two tellings of one error have in common, wherever they were cut."""
    if len(message.printed) < 2:
        return message.text.strip()
    return f"{message.backend} {message.device} {sorted(message.printed.items())}"


def _failed(path: str, number: int, run: Run, failure: Failure, seen: Seen | None) -> Draft:
    return Draft(
        path,
        number,
        run,
        seen.line if seen else failure.line,
        failure.nodeid,
        failure.worker,
        failure.phase,
        seen.message if seen else None,
        confirmed=seen is not None and seen.message.kind != "weak",
    )


def _loose(path: str, number: int, run: Run, told: set[str | None]) -> list[Draft]:
    """Return the events whose messages stand outside of failures."""
    drafts: list[Draft] = []
    for seen, test in run.loose:
        nodeid = test.nodeid if test else None
        if (nodeid and nodeid in told) or not _fatal(run, seen, test):
            continue
        phase = "call" if nodeid else ""
        new = Draft(path, number, run, seen.line, nodeid, seen.worker, phase, seen.message)
        new.confirmed = seen.message.kind != "weak"
        new.last = new.line
        same = (each for each in reversed(drafts[-_RECENT:]) if _one_event(each, new))
        before = next(same, None)
        if before is None:
            drafts.append(new)
        else:
            before.last = new.line
            before.message = _fuller(before.message, seen.message)
    return drafts


def _fatal(run: Run, seen: Seen, test: Test | None) -> bool:
    """Tell whether a message outside of failures was somebody's end, rather than survived."""
    if not run.pytest:
        return seen.message.kind != "weak" or seen.message.backend in causes.HOST
    if test is None:
        return not run.ended or seen.line > run.end_line
    if test.outcome is None:
        # It went on to another test, or was running when the log ended.
        return test is run.order[-1] and not run.ended
    return test.outcome in FAILING


def _one_event(before: Draft, after: Draft) -> bool:
    """Tell whether two messages outside of tests are about the same failure."""
    one, two = before.message, after.message
    if before.nodeid != after.nodeid or one is None or two is None:
        return False
    if before.worker != after.worker and before.worker and after.worker:
        return False
    host = one.backend in causes.HOST, two.backend in causes.HOST
    if "unsaid" not in {one.kind, two.kind} and host[0] != host[1]:
        return False
    if after.line - before.last > (_FAR if one.backend == two.backend else _NEAR):
        return False
    if None not in {one.device, two.device} and one.device != two.device:
        return False
    # Figures are printed with two or three digits, and rounded up by some.
    common = set(one.sizes) & set(two.sizes)
    return all(
        abs(one.sizes[name] - two.sizes[name]) <= max(one.sizes[name], two.sizes[name]) // 100
        for name in common
    ) or (common == {"tried"} and _asks_again(one, two, after.line - before.last))


def _asks_again(one: Message, two: Message, apart: int) -> bool:
    """Tell whether a program that was refused goes on to ask for another size."""
    if one.backend == two.backend == "tensorflow":
        return True
    # The later one may have been read with the line that follows it, and tell of another tensor.
    said = (_FIGURE.sub("#", each.text[each.start :]) for each in (two, one))
    return apart <= _NEXT and next(said).startswith(next(said))


def _fuller(one: Message | None, two: Message) -> Message:
    if one is None:
        return two
    if len(two.sizes) > len(one.sizes) or two.backend == "jax" or one.kind == "unsaid":
        # XLA's allocator prints TensorFlow's words before JAX's own.
        one, two = two, one
    return one._replace(
        sizes={**two.sizes, **one.sizes},
        printed={**two.printed, **one.printed},
        device=one.device if one.device is not None else two.device,
    )


def _kills(path: str, number: int, run: Run) -> list[Draft]:
    """Return the processes that the host killed; several lines tell of each."""
    killed: list[Draft] = []
    for line, message, pid, once in run.kills:
        last = killed[-1] if killed else None
        if (
            last is None
            or line - last.last > _FAR
            or (pid and last.pids and pid not in last.pids)
            or (message is None and last.message is None and line - last.last > _NEAR)
            or (not pid and _asked_otherwise(last.message, message))
            or (once and last.once and once != last.once)
        ):
            last = Draft(path, number, run, line, confirmed=False, killed=True)
            killed.append(last)
        last.last = line
        last.pids |= {pid} if pid else set()
        last.once = once or last.once
        if message is not None:
            last.confirmed = True
            last.message = _fuller(last.message, message)
    return killed


def _asked_otherwise(one: Message | None, two: Message | None) -> bool:
    """Tell whether two messages of processes without a number are of requests that differ."""
    return (
        one is not None
        and two is not None
        and one.sizes.get("tried", 0) != two.sizes.get("tried", 0)
        and {"tried"} <= set(one.sizes) & set(two.sizes)
    )


def _running(runs: Sequence[Run], told: FileEvents) -> None:
    """Give a kill the test that was running: the shell may tell of it before pytest's output."""
    named = {each.nodeid for each in (*told.drafts, *told.deaths)}
    dead = {id(each.run) for each in told.deaths}
    cut = [run for run in runs if run.pytest and not run.ended and id(run) not in dead]
    for kill in told.kills:
        if not cut:
            return
        run = kill.run if kill.run in cut else cut[0]
        cut.remove(run)
        unfinished = [test for test in run.order if test.outcome is None]
        if unfinished and unfinished[-1].nodeid not in named:
            kill.run, kill.phase = run, "call"
            kill.nodeid, kill.worker = unfinished[-1].nodeid, unfinished[-1].worker


def when(each: Draft) -> tuple[int, int]:
    """Return what sorts the events of one run: the order of its tests, or of the lines."""
    test = each.test
    known = each.run.order or each.run.letters
    last = len(each.run.order) + each.run.letters.total()
    return (test.rank if test else last if known else 0, each.line)


class _Trend:
    """Whether what a worker's failures found allocated only rises."""

    def __init__(self, first: int) -> None:
        self.first = first
        self._last = -1
        self._steps = 0
        self._rising = True

    def goes_on(self, size: int) -> bool:
        """Enter the next failure; two are no trend: the second may just be the larger test."""
        self._rising = self._rising and size > self._last
        self._last = size
        self._steps += 1
        return self._rising and self._steps >= _TREND


def finish(drafts: Sequence[Draft]) -> tuple[OomEvent, ...]:
    """Return the events, in the order of ``drafts``, with what compares them to earlier ones."""
    events: list[OomEvent] = []
    trends: dict[tuple[str, int, str | None], _Trend] = {}
    texts: dict[tuple[str, int, str | None, str], int] = {}
    for each in drafts:
        event, message = _event(each), each.message
        grew = False
        held = event.allocated_bytes
        if held is not None:
            trend = trends.setdefault((each.file, each.number, each.worker), _Trend(held))
            event = event._replace(growth_bytes=held - trend.first)
            grew = trend.goes_on(held)
        # What was asked for alone is no state.
        if message is not None and len(message.printed) > 1 and each.nodeid:
            key = (each.file, each.number, each.worker, _state(message))
            same = texts.setdefault(key, len(events))
            event = event._replace(cascade_of=same if same < len(events) else None)
        limit = message is not None and message.limit
        past = causes.Past(_leftovers(each), grew)
        events.append(causes.assess(event, limit=limit, past=past))
    return tuple(events)


def _event(each: Draft) -> OomEvent:
    message, test = each.message, each.test
    sizes = message.sizes if message else {}
    return OomEvent(
        nodeid=each.nodeid,
        worker=each.worker or (test.worker if test else None),
        position=test.position if test and each.run.ordered else None,
        backend=message.backend if message else "host",
        device=message.device if message else None,
        tried_bytes=sizes.get("tried"),
        total_bytes=sizes.get("total"),
        free_bytes=sizes.get("free"),
        allocated_bytes=sizes.get("allocated"),
        reserved_unallocated_bytes=sizes.get("reserved_unallocated"),
        allowed_bytes=sizes.get("allowed"),
        processes=_processes(message) if message else (),
        cause="host_ram" if each.killed else "unknown",
        confirmed=each.confirmed,
        line=each.line,
        file=each.file,
        phase=each.phase,
        printed=message.printed if message else {},
        message=message.text if message else "",
        before=_before(each.run, test) if test and each.run.ordered else (),
        non_torch_bytes=_outside(message) if message else None,
        felled=1 + len(each.also),
        felled_tests=tuple(each.also),
        run=each.number,
    )


def _processes(message: Message) -> tuple[GpuProcess, ...]:
    """Return the processes listed, with the one that ran out of memory marked.

    In a container the driver knows it by a number of the host's, so that the message lists it
    among the others: it is the one that holds what the allocator reserved, and little more.
    """
    listed = message.processes
    if "other" in message.sizes:
        return (*listed, GpuProcess(None, message.sizes["other"], False))
    if any(each.own for each in listed) or "allocated" not in message.sizes:
        return listed
    reserved = message.sizes["allocated"] + message.sizes.get("reserved_unallocated", 0)
    # The figures are rounded to hundredths.
    fitting = [each for each in listed if each.bytes >= reserved * 0.98]
    own = min(fitting, key=lambda each: each.bytes, default=None)
    return tuple(each._replace(own=each is own) for each in listed)


def _outside(message: Message) -> int | None:
    """Return what the process holds that is not PyTorch's: its context and other libraries."""
    own = next((each.bytes for each in _processes(message) if each.own), None)
    reserved = message.sizes.get("allocated", 0) + message.sizes.get("reserved_unallocated", 0)
    if own is None or "allocated" not in message.sizes or own < reserved:
        return None
    return own - reserved


def _before(run: Run, test: Test) -> tuple[str, ...]:
    """Return the tests that the same worker ran before, the latest last."""
    mine = run.of_worker(test.worker)
    end = min(test.position - 1, len(mine))
    return tuple(other.nodeid for other in mine[max(0, end - _BEFORE_SHOWN) : end])


def _leftovers(each: Draft) -> list[causes.Leftover]:
    """Return what earlier tests of the same worker left; ``leftovers`` has the largest first."""
    test = each.test
    if test is None:
        return []
    found = (
        left
        for left in each.run.leftovers.get(each.worker, ())
        if (other := each.run.find(left.nodeid, each.worker)) is not None and other.rank < test.rank
    )
    return list(islice(found, _SHOWN))

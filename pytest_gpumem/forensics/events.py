"""Makes events of failures, deaths and messages: each told once, with its figures and cause."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pytest_gpumem.forensics import causes
from pytest_gpumem.forensics.records import GpuProcess, OomEvent
from pytest_gpumem.forensics.runs import FAILING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_gpumem.forensics.grammars import Message
    from pytest_gpumem.forensics.runs import Failure, Run, Seen, Test

_NEAR = 60
_FAR = 5000
"""Lines within which messages that do not contradict one another tell of one event: of any
framework, and of the same one. TensorFlow prints its allocator's state in between."""
_RECENT = 20
_BEFORE_SHOWN = 5


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
    felled: int = 1
    last: int = 0
    """The last line that tells of it."""
    pids: set[int] = field(default_factory=set)

    @property
    def test(self) -> Test | None:
        """The test that it felled, where the log shows it in order."""
        return self.run.find(self.nodeid, self.worker)


def draft(path: str, runs: Sequence[Run], first: int) -> tuple[list[Draft], list[Draft]]:
    """Return the events of one file, and its kills whose victim is not known.

    Args:
        path: the file.
        runs: what it holds.
        first: number of the first run.

    """
    drafts: list[Draft] = []
    kills: list[Draft] = []
    number = first - 1
    for run in runs:
        number += run.pytest
        drafts += _failures(path, max(number, 1), run)
        drafts += _loose(path, max(number, 1), run, {each.nodeid for each in drafts})
        kills += _kills(path, max(number, 1), run)
    _running(runs, drafts, kills)
    return drafts, kills


def explain_deaths(drafts: Sequence[Draft], kills: list[Draft]) -> None:
    """Let the host's word, from whatever file, explain the workers that died without one."""
    for dead in drafts:
        if dead.message is None and not dead.killed:
            kill = next((each for each in kills if each.nodeid is None), None)
            if kill is None:
                return
            kills.remove(kill)
            dead.killed = True
            dead.confirmed, dead.message = kill.confirmed, kill.message


def _failures(path: str, number: int, run: Run) -> list[Draft]:
    drafts: list[Draft] = []
    kept: dict[tuple[str | None, str, str], Draft] = {}
    for failure in run.failures:
        seen = failure.seen or failure.aside
        if seen is None and (not failure.died or run.faulted):
            continue
        # A wider fixture's error is kept and raised again for each test that needs it.
        # Where the text has little to be known by, fixtures of other files may fail alike.
        telling = seen is not None and len(seen.message.printed) > 1
        place = "" if telling else (failure.nodeid or "").partition("::")[0]
        key = (failure.worker, place, _state(seen.message) if seen else "")
        if failure.phase == "setup" and key in kept:
            kept[key].felled += 1
            continue
        drafts.append(_failed(path, number, run, failure, seen))
        if failure.phase == "setup":
            kept[key] = drafts[-1]
    return drafts


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
        return seen.message.kind != "weak"
    if test is None:
        return not run.ended or seen.line > run.end_line
    return test.outcome is None or test.outcome in FAILING


def _one_event(before: Draft, after: Draft) -> bool:
    """Tell whether two messages outside of tests are about the same failure."""
    one, two = before.message, after.message
    if before.nodeid != after.nodeid or one is None or two is None:
        return False
    if before.worker != after.worker and before.worker and after.worker:
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
    ) or (common == {"tried"} and one.backend == two.backend == "tensorflow")


def _fuller(one: Message | None, two: Message) -> Message:
    if one is None:
        return two
    if len(two.sizes) > len(one.sizes) or two.backend == "jax":
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
    for line, message, pid in run.kills:
        last = killed[-1] if killed else None
        if (
            last is None
            or line - last.last > _FAR
            or (pid and last.pids and pid not in last.pids)
            or (message is None and last.message is None and line - last.last > _NEAR)
        ):
            last = Draft(path, number, run, line, confirmed=False, killed=True)
            killed.append(last)
        last.last = line
        last.pids |= {pid} if pid else set()
        if message is not None:
            last.confirmed = True
            last.message = _fuller(last.message, message)
    return killed


def _running(runs: Sequence[Run], drafts: Sequence[Draft], kills: list[Draft]) -> None:
    """Give a kill the test that was running: the shell may tell of it before pytest's output."""
    told = {each.nodeid for each in drafts}
    cut = [run for run in runs if run.pytest and not run.ended]
    for kill in kills:
        if not cut:
            return
        run = kill.run if kill.run in cut else cut[0]
        cut.remove(run)
        unfinished = [test for test in run.order if test.outcome is None]
        dead = any(each.run is run and each.message is None for each in drafts)
        if unfinished and not dead and unfinished[-1].nodeid not in told:
            kill.run, kill.phase = run, "call"
            kill.nodeid, kill.worker = unfinished[-1].nodeid, unfinished[-1].worker


def when(each: Draft) -> tuple[int, int]:
    """Return what sorts the events of one run: the order of its tests, or of the lines."""
    test = each.test
    known = each.run.order or each.run.letters
    last = len(each.run.order) + each.run.letters.total()
    return (test.rank if test else last if known else 0, each.line)


def finish(drafts: Sequence[Draft]) -> tuple[OomEvent, ...]:
    """Return the events, in the order of ``drafts``, with what compares them to earlier ones."""
    events: list[OomEvent] = []
    held: dict[tuple[str, int, str | None], int] = {}
    texts: dict[tuple[str, int, str | None, str], int] = {}
    for each in drafts:
        event, message = _event(each), each.message
        if event.allocated_bytes is not None:
            first = held.setdefault((each.file, each.number, each.worker), event.allocated_bytes)
            event = event._replace(growth_bytes=event.allocated_bytes - first)
        # What was asked for alone is no state.
        if message is not None and len(message.printed) > 1 and each.nodeid:
            key = (each.file, each.number, each.worker, _state(message))
            same = texts.setdefault(key, len(events))
            event = event._replace(cascade_of=same if same < len(events) else None)
        limit = message is not None and message.limit
        events.append(causes.assess(event, limit=limit, leftovers=_leftovers(each)))
    return tuple(events)


def _event(each: Draft) -> OomEvent:
    message, test = each.message, each.test
    sizes = message.sizes if message else {}
    return OomEvent(
        nodeid=each.nodeid,
        worker=each.worker or (test.worker if test else None),
        position=test.position if test else None,
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
        before=_before(each.run, test) if test else (),
        felled=each.felled,
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


def _before(run: Run, test: Test) -> tuple[str, ...]:
    """Return the tests that the same worker ran before, the latest last."""
    found: list[str] = []
    for other in reversed(run.order[: test.rank]):
        if other.worker == test.worker:
            found.append(other.nodeid)
        if len(found) == _BEFORE_SHOWN:
            break
    return tuple(reversed(found))


def _leftovers(each: Draft) -> list[causes.Leftover]:
    """Return what earlier tests of the same worker left, the largest first."""
    test = each.test
    if test is None:
        return []
    found = (
        left
        for worker, left in each.run.leftovers
        if worker == each.worker
        and (other := each.run.find(left.nodeid, worker)) is not None
        and other.rank < test.rank
    )
    return sorted(found, key=lambda left: -left.size)

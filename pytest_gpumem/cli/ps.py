"""``gpumem ps``: who holds and who waits for the cards, with their families."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from pytest_gpumem.cli.holdings import CardState, Holding, in_main_memory, look
from pytest_gpumem.devices import host
from pytest_gpumem.devices.family import lineage
from pytest_gpumem.devices.processes import command
from pytest_gpumem.units import format_bytes, printable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Enter ``gpumem ps``."""
    parser = commands.add_parser(
        "ps",
        help="Say who holds and who waits for cards and main memory: tests, commands, families.",
    )
    parser.add_argument("--json", action="store_true", help="Say it as JSON.")
    parser.set_defaults(run_command=_ps)


def _ps(chosen: argparse.Namespace) -> int:
    from pytest_gpumem.leases.ledger import Ledger
    from pytest_gpumem.leases.place import run_directory

    ledger = Ledger(run_directory())
    states = [*look(ledger), *in_main_memory(ledger)]
    if chosen.json:
        sys.stdout.write(f"{json.dumps([_plain(state) for state in states], indent=1)}\n")
        return 0
    lines = [line for state in states for line in _lines(state)]
    for line in lines or ["nobody holds or waits for a card or main memory"]:
        sys.stdout.write(f"{printable(line)}\n")
    return 0


def _lines(state: CardState) -> Iterator[str]:
    sizes = f"{format_bytes(state.used)} of {format_bytes(state.total)} used"
    yield f"{state.name if host.is_pool(state.uuid) else f'{state.name} {state.uuid}'}: {sizes}"
    for row in _heads(state):
        yield f"  {_head(row)}"
        yield from (f"    {_member(each)}" for each in _family(state, row))


def _heads(state: CardState) -> list[Holding]:
    """Return leases and requests in the order of the queue, then processes that have none."""
    rows = [row for row in state.holdings if row.state or not row.starter]
    return sorted(rows, key=lambda row: ("held", "alone", "waiting", "").index(row.state))


def _family(state: CardState, head: Holding) -> list[Holding]:
    """Return the processes on the card that the one of ``head`` started, and have no lease."""
    first = next(row for row in state.holdings if row.pid == head.pid)
    if head is not first or not head.state:  # of several leases of a process, below the first
        return []
    return [row for row in state.holdings if row.starter == head.pid and not row.state]


def _head(row: Holding) -> str:
    if not row.state:
        return f"no lease  {_member(row)}"
    size = "the whole card" if row.state == "alone" and not row.lease else _size(row.lease)
    return f"{row.state:<8}  {size}  {_who(row)}: {row.test}{_parent(row)}"


def _who(row: Holding) -> str:
    words = [f"pid {row.pid}" if row.here else f"pid {row.pid}, not seen here"]
    if row.worker:
        words.append(f"{row.worker} of run {_run_of(row)}")
    if row.used:
        words.append(f"uses {format_bytes(row.used)}")
    return ", ".join(words)


def _parent(row: Holding) -> str:
    return f" (within the lease of pid {row.starter})" if row.starter else ""


def _member(row: Holding) -> str:
    return f"pid {row.pid}, {_uses(row)}: {command(row.pid) or 'of another container'}"


def _uses(row: Holding) -> str:
    return "uses an unknown size" if row.used is None else f"uses {format_bytes(row.used)}"


def _size(size: int | None) -> str:
    return format_bytes(size or 0)


def _run_of(row: Holding) -> int:
    """Return the process that controls the run of a worker, which is its parent; 0 if not seen."""
    line: Sequence[str] = lineage(row.pid) if row.here else ()
    return int(line[1].partition(":")[0]) if len(line) > 1 else 0


def _plain(state: CardState) -> dict[str, Any]:
    what = "ram" if host.is_pool(state.uuid) else "vram"
    return {
        "uuid": state.uuid,
        "name": state.name,
        "used": state.used,
        "total": state.total,
        "holders": [
            {
                "state": row.state or None,
                "kind": None if not row.state else "program" if row.program else "test",
                "what": row.test if row.state else command(row.pid),
                what: None if row.state == "alone" and not row.lease else row.lease,
                "exclusive": row.state == "alone",
                "pid": row.pid,
                "seen_here": row.here,
                "worker": row.worker or None,
                "run": (_run_of(row) or None) if row.worker else None,
                "used": row.used,
                "within": row.starter or None,
                "family": [
                    {"pid": each.pid, "command": command(each.pid), "used": each.used}
                    for each in _family(state, row)
                ],
            }
            for row in _heads(state)
        ],
    }

"""``gpumem monitor``: what is on the cards and who has leases, seen from outside the tests."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pytest_gpumem.cli.holdings import Holding, look
from pytest_gpumem.records import short
from pytest_gpumem.units import format_bytes, format_mib

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from rich.table import Table

    from pytest_gpumem.cli.holdings import CardState


_COLUMNS = 9
"""Fields of ``Holding`` that the CSV has."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Enter ``gpumem monitor``."""
    parser = commands.add_parser(
        "monitor",
        help="Show cards, processes, leases and current tests while a suite runs.",
        epilog="Exit status: that of COMMAND (128 + N where signal N ended it); 0 without one; "
        "2 when an option cannot be used.",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="Write every look there too.")
    parser.add_argument(
        "--interval", type=_interval, default=0.5, metavar="S", help="Seconds. Default: 0.5."
    )
    parser.add_argument(
        "command_line", nargs="*", metavar="COMMAND", help="After --: run it, and end with it."
    )
    parser.set_defaults(run_command=_monitor)


def _interval(text: str) -> float:
    import argparse

    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.05 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not an interval; allowed is 0.05 to 3600")
    return seconds


def _monitor(chosen: argparse.Namespace) -> int:
    with ExitStack() as stack:
        writer = None
        if chosen.csv is not None:
            file = stack.enter_context(chosen.csv.open("w", encoding="utf-8", newline=""))
            writer = csv.writer(file)
            writer.writerow(
                ("time", "card", "card_used", "card_free", "card_total", "pid", "process_used",
                 "lease", "state", "test", "worker", "phase", "allocated", "reserved")
            )  # fmt: skip
        view = _View(stack, writer)
        return _live(chosen, view) if sys.stdout.isatty() else _plain(chosen, view)


class _View:
    """Looks, and keeps what it saw."""

    def __init__(self, stack: ExitStack, writer: Any) -> None:
        """Begin; ``stack`` lets the tests know when nobody looks any more.

        Raises:
            LeaseError: when the directory of the leases is not to be known.

        """
        from pytest_gpumem.errors import LeaseError
        from pytest_gpumem.leases.glimpses import Watcher
        from pytest_gpumem.leases.ledger import Ledger
        from pytest_gpumem.leases.place import run_directory

        directory = run_directory()
        self._ledger = Ledger(directory)
        self._writer = writer
        self._watcher = None
        try:
            self._watcher = stack.enter_context(Watcher(directory))
        except LeaseError as error:
            sys.stderr.write(f"gpumem monitor: tests without a lease are not shown: {error}\n")

    def look(self) -> list[CardState]:
        """Return what is on the cards now."""
        states = [
            card._replace(holdings=tuple(sorted(card.holdings, key=lambda row: row.pid)))
            for card in look(self._ledger, self._watcher)
        ]
        now = datetime.now().astimezone().isoformat(timespec="milliseconds")
        for card in states if self._writer is not None else ():
            sizes = (card.used, card.free, card.total) if card.uuid else (None, None, None)
            for row in card.holdings or (Holding(0),):
                own = (row.pid or "", *row[1:_COLUMNS])
                self._writer.writerow((now, card.uuid, *sizes, *own))
        return states


def _start(command: Sequence[str], **streams: Any) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(command, text=True, errors="replace", **streams)  # noqa: S603  # the user's own
    except OSError as error:
        raise ValueError(f"cannot run {command[0]!r}: {error.strerror}") from None


def _plain(chosen: argparse.Namespace, view: _View) -> int:
    """Print a line whenever something changed; the command prints as it likes."""
    process = _start(chosen.command_line) if chosen.command_line else None
    begun, last = time.monotonic(), ""
    status = None
    try:
        while status is None:
            states = view.look()
            several = len(states) > 1
            told = "; ".join(_line(each, several) for each in states) or "no card in use"
            if told != last:
                sys.stderr.write(f"gpumem monitor: {time.monotonic() - begun:.1f} s, {told}\n")
                sys.stderr.flush()
            last = told
            status = _wait(process, chosen.interval)
    except KeyboardInterrupt:
        status = _interrupted(process)
    return status


def _live(chosen: argparse.Namespace, view: _View) -> int:
    """Show a table that stays at the bottom; what the command prints scrolls above it."""
    from rich.live import Live
    from rich.text import Text

    process = None
    with Live(refresh_per_second=4, transient=False) as live:
        if chosen.command_line:
            process = _start(
                chosen.command_line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=1
            )

            def pass_on(stream: IO[str]) -> None:
                for line in stream:
                    live.console.print(Text.from_ansi(line.rstrip("\n")))

            assert process.stdout is not None  # noqa: S101  # it is a pipe
            reader = threading.Thread(target=pass_on, args=(process.stdout,), daemon=True)
            reader.start()
        status = None
        try:
            while status is None:
                live.update(_table(view.look()))
                status = _wait(process, chosen.interval)
        except KeyboardInterrupt:
            status = _interrupted(process)
        if process is not None:
            reader.join(timeout=5)
    return status


def _wait(process: subprocess.Popen[str] | None, seconds: float) -> int | None:
    """Wait for the next look; return the exit status once the command has ended."""
    if process is None:
        time.sleep(seconds)
        return None
    try:
        return _status(process.wait(timeout=seconds))
    except subprocess.TimeoutExpired:
        return None


def _interrupted(process: subprocess.Popen[str] | None) -> int:
    """Let a command that got the same Ctrl-C come to its end."""
    if process is None:
        return 0
    try:
        return _status(process.wait())
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)
        return _status(process.wait())


def _status(code: int) -> int:
    return code if code >= 0 else 128 - code


def _line(card: CardState, several: bool) -> str:
    tests = [_told(row) for row in card.holdings if row.state or row.phase]
    count = len(card.holdings)
    shown = f", {count} process{'es' if count > 1 else ''}" if count else ""
    told = f": {', '.join(tests)}" if tests else ""
    sizes = f" {format_bytes(card.used)} of {format_bytes(card.total)}" if card.uuid else ""
    which = f" {short(card.uuid)}" if several and card.uuid else ""
    return f"{card.name}{which}{sizes}{shown}{told}"


def _told(row: Holding) -> str:
    parts = [row.state, format_bytes(row.lease or 0)] if row.state else []
    parts += [row.phase] if row.phase else []
    if row.allocated is not None and row.reserved is not None:
        parts.append(f"{format_bytes(row.allocated)} allocated")
        parts.append(f"{format_bytes(row.reserved)} reserved")
    return f"{row.worker} {row.test} ({', '.join(parts)})".lstrip()


def _table(states: Sequence[CardState]) -> Table:
    from rich.table import Table
    from rich.text import Text

    def shown(*sizes: int | None) -> list[str]:
        return ["" if size is None else format_mib(size) for size in sizes]

    table = Table(box=None, header_style="dim", expand=True)
    for name in ("used", "free", "total", "allocated", "reserved", "lease"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("card, process, test")
    for card in states:
        sizes = shown(card.used, card.free, card.total) if card.uuid else [""] * 3
        title = Text(f"{card.name} {short(card.uuid)}".rstrip())
        table.add_row(*sizes, "", "", "", title, style="bold")
        for row in card.holdings:
            used = "?" if row.used is None and card.uuid else shown(row.used)[0]
            words = filter(None, (row.worker or str(row.pid), row.state, row.phase, row.test))
            torch = shown(row.allocated, row.reserved, row.lease)
            table.add_row(used, "", "", *torch, Text(f"  {' '.join(words)}"))
    if not states:
        table.add_row(*[""] * 6, "no card in use")
    table.caption = f"MiB at {datetime.now().astimezone():%H:%M:%S}, by process {os.getpid()}"
    return table

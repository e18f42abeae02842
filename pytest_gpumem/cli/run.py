"""``gpumem run``: a command that waits its turn for a card, or main memory, among others."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpumem import devices, files
from pytest_gpumem.cli import simulated_cards
from pytest_gpumem.cli.arguments import read_size
from pytest_gpumem.cli.measurement import Measured, Took, say
from pytest_gpumem.devices import host
from pytest_gpumem.devices.processes import command
from pytest_gpumem.errors import LeaseError
from pytest_gpumem.records import Card
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_gpumem.leases.store import Lease, LeaseStore
    from pytest_gpumem.records import ChildUsage

FAILED = 125
"""Exit status for what kept the command from being tried, as of env(1) and nohup(1)."""
INTERVAL = 0.05
"""Seconds between two looks at what the driver says of the family, as in pytest's runs."""
CONTEXT = 512 * 2**20
"""Bytes that a process is taken to cost where the driver does not tell, as in pytest's runs."""
_EVERY = 10.0
"""Seconds between two lines about what is waited for."""

_LARGE = 64 * 2**20
"""Bytes of main memory for which somebody who is left behind keeps a lease of it: not for a daemon
that waits for work."""
_LABEL = 100
"""Characters of a command that others see."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Enter ``gpumem run``."""
    parser = commands.add_parser(
        "run",
        help="Run a command with a lease of VRAM, of main memory, or both: it waits its turn among "
        "tests and commands.",
        epilog="Exit status: that of COMMAND (128 + N where signal N ended it); 127 when there is "
        "no such command, 126 when it cannot be run, 125 when there is no lease to be had, 2 when "
        "an option cannot be used.",
    )
    parser.add_argument(
        "--vram",
        type=_size_or_all,
        default=0,
        metavar="SIZE",
        help="What the command and all that it starts use at their peak, contexts included; all: "
        "the whole card.",
    )
    parser.add_argument(
        "--ram",
        type=read_size,
        metavar="SIZE",
        help="What they use of main memory at their peak. One of --vram and --ram is needed.",
    )
    parser.add_argument(
        "--card",
        metavar="CARD",
        help="Index or UUID, or several with commas, of which each is to have so much; the "
        "command sees these only. Default: CUDA's first card.",
    )
    parser.add_argument(
        "--priority",
        choices=("normal", "low"),
        default="normal",
        help="low: let many who come later go first.",
    )
    parser.add_argument(
        "--timeout", type=_seconds, metavar="S", help="Seconds to wait at most. Default: no limit."
    )
    parser.add_argument(
        "--simulate",
        type=read_size,
        metavar="SIZE",
        help="Give the command a simulated card, where it has none from who started it.",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="Write what it took there, as JSON."
    )
    parser.add_argument("command_line", nargs="*", metavar="COMMAND", help="After --.")
    parser.set_defaults(run_command=_run)


def _size_or_all(text: str) -> int | None:
    if text == "all":
        return None
    try:
        return read_size(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or all") from None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= 1e9:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no time; allowed are 0 or more seconds")
    return seconds


def _run(chosen: argparse.Namespace) -> int:
    if not chosen.command_line:
        raise ValueError(
            "there is no command; it comes after --, as in gpumem run --vram 2GiB -- python x.py"
        )
    if chosen.vram == 0 and not chosen.ram:
        raise ValueError("there is nothing to lease: --vram, --ram or both say how much it takes")
    if chosen.vram == 0 and chosen.card is not None:
        raise ValueError("--card: nothing is leased of a card without --vram")
    if sys.platform != "linux":
        raise ValueError(f"{sys.platform} has no sigtimedwait(2), by which signals are passed on")
    from pytest_gpumem.cli.foreground import CannotStartError, check, leave_on_signals

    try:
        check(chosen.command_line[0])
        leave_on_signals()
        with ExitStack() as stack:
            context = simulated_cards.use(chosen.simulate, stack) or CONTEXT
            cards = [] if chosen.vram == 0 else _cards(chosen.card)
            return _Run(chosen, cards, _pools(chosen.ram), context).through()
    except CannotStartError as error:
        say(f"error: {error}")
        return error.status
    except (LeaseError, ValueError) as error:
        say(f"error: {error}")
        return FAILED


def _cards(text: str | None) -> list[Card]:
    """Return the cards that are asked for.

    Raises:
        ValueError: when there is none, or none of that name.

    """
    found = devices.find_cards()
    if not found.cards:
        raise ValueError(f"there is no card to lease: {found.why_none}")
    if text is None:
        return [found.cards[0]]
    chosen: dict[str, Card] = {}
    for each in map(str.strip, text.split(",")):
        named = [
            card
            for index, card in enumerate(found.cards)
            if each == str(index) or (len(each) > 3 and _is_named(card, each))
        ]
        if len(named) != 1:
            there = ", ".join(f"{index} ({c.uuid})" for index, c in enumerate(found.cards))
            raise ValueError(f"--card: {each!r} is no card that is visible; there are {there}")
        chosen[named[0].uuid] = named[0]
    return list(chosen.values())


def _pools(size: int | None) -> list[Card]:
    """Return what main memory is asked for of: the machine's, and what control groups allow.

    Raises:
        ValueError: when the system does not tell what there is.

    """
    if size is None:
        return []
    found = [Card(pool.name, "main memory", pool.total) for pool in host.pools()]
    if not found:
        raise ValueError("--ram: the system does not tell how much main memory there is")
    return found


def _is_named(card: Card, text: str) -> bool:
    """Return whether ``text`` is the beginning of a card's UUID, with or without its GPU-."""
    uuid, text = card.uuid.lower(), text.lower()
    return uuid.startswith(text) or uuid.partition("-")[2].startswith(text)


class _Run:
    """One command, from its request to its end."""

    def __init__(
        self,
        chosen: argparse.Namespace,
        cards: Sequence[Card],
        pools: Sequence[Card],
        context: int,
    ) -> None:
        self._chosen = chosen
        self._cards = cards
        self._pools = pools
        self._context = context
        self._command: list[str] = chosen.command_line
        self._label = _label(self._command)
        self._said = -_EVERY

    def through(self) -> int:
        """Wait, run it, and say what it took; return its status."""
        from pytest_gpumem.cli.foreground import CannotStartError, Foreground
        from pytest_gpumem.leases.api import store

        leases = store()
        lease = self._acquire(leases)
        if lease.short:
            say(f"starts though other programs use {format_bytes(lease.short)} of what it needs")
        if self._chosen.card is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(card.uuid for card in self._cards)
        measured = Measured(self._label, self._cards, self._context, in_ram=bool(self._pools))
        begun = time.monotonic()
        foreground = Foreground(self._command)
        # Should this process be killed, its lease is the command's, and of whom that starts.
        try:
            with leases.ledger.standing.alive.inherited():
                foreground.start()
        except CannotStartError:
            measured.end()
            leases.close()
            raise
        status = foreground.attend(measured.look, INTERVAL)
        seconds = time.monotonic() - begun
        left = measured.end()
        self._give_back(leases, lease, left)
        took = [Took(card, self._chosen.vram, measured.peak(card)) for card in self._cards]
        took += [Took(pool, self._chosen.ram, measured.ram_peak) for pool in self._pools[-1:]]
        told = "; ".join(map(str, took))
        say(f"{told}; waited {lease.waited:.1f} s, ran {seconds:.1f} s")
        if self._chosen.json is not None:
            self._save(took, lease.waited, seconds, status)
        return status

    def _acquire(self, leases: LeaseStore) -> Lease:
        from pytest_gpumem.leases.request import Want

        chosen = self._chosen
        wants = {card.uuid: Want(chosen.vram) for card in self._cards}
        wants |= {pool.uuid: Want(chosen.ram) for pool in self._pools}
        return leases.acquire(  # both at once: nobody has the one and waits for the other
            wants,
            {each.uuid: each.total for each in (*self._cards, *self._pools)},
            self._label,
            chosen.timeout,
            self._waits,
            low=chosen.priority == "low",
        )

    def _waits(self, text: str) -> None:
        """Say what is waited for: at once, but not often."""
        now = time.monotonic()
        if now - self._said >= _EVERY:
            self._said = now
            say(f"waits for {text}")

    def _give_back(self, leases: LeaseStore, lease: Lease, left: Sequence[ChildUsage]) -> None:
        """End the lease, unless somebody who uses the card has it still."""
        heirs = {pid: host.family_of(pid, ()) for pid in leases.ledger.alive.heirs()}
        for usage in left:
            keeps = "keeps the lease" if usage.pid in heirs else "has no lease"
            say(
                f"pid {usage.pid} ({usage.command}) goes on, {keeps} and uses "
                f"{format_bytes(usage.used)}"
            )
        named = {usage.pid for usage in left}
        large = {pid for pid, size in heirs.items() if self._pools and size >= _LARGE} - named
        for pid in sorted(large):
            size = format_bytes(heirs[pid])
            say(f"pid {pid} ({command(pid)}) goes on, keeps the lease and has {size}")
        if not large | (named & heirs.keys()):
            lease.release()
            leases.close()

    def _save(self, took: Sequence[Took], waited: float, seconds: float, status: int) -> None:
        told = {
            "command": self._command,
            "status": status,
            "waited": waited,
            "seconds": seconds,
            "cards": [
                {
                    "uuid": each.card.uuid,
                    "name": each.card.name,
                    "total": each.card.total,
                    "asked": each.asked,
                    "peak": each.peak,
                }
                for each in took
                if each.card in self._cards
            ],
        }
        if self._pools:
            told["ram"] = {"asked": took[-1].asked, "peak": took[-1].peak}
        try:
            with files.replace(self._chosen.json) as file:
                json.dump(told, file, indent=1)
                file.write("\n")
        except OSError as error:
            say(f"error: --json: {error.filename!r}: {error.strerror}")


def _label(command: Sequence[str]) -> str:
    """Return what others see of a command: one line of it."""
    text = " ".join(shlex.join(command).split())
    return text if len(text) <= _LABEL else f"{text[:_LABEL]}..."

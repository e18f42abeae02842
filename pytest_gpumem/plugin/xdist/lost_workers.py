"""Workers that end before their run does: replaced when they have grown, killed by the kernel."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpumem.devices import host
from pytest_gpumem.plugin.state import STATE
from pytest_gpumem.plugin.xdist import nodes
from pytest_gpumem.records import LostWorker
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_gpumem.plugin.state import State

_AT_ONCE = 5.0
"""Seconds in which xdist sees the ends of workers that were killed together."""


def replace(config: pytest.Config, worker: nodes.Worker, collection: Sequence[str]) -> None:
    """Let another worker begin in the place of one that had grown too large, and tell so.

    Only where it ended as it was told to; one that crashed on the way out xdist replaces.
    """
    if nodes.ended_well(worker.node) and nodes.replace(config, worker.node):
        last = "" if worker.last is None else collection[worker.last]
        why = f"it had grown to {format_bytes(worker.too_large)} of main memory, and was replaced"
        config.stash[STATE].lost.append(LostWorker(worker.name, why, last))


class LostWorkers:
    """Looks at workers that ended by a signal which nobody can catch."""

    NAME = "gpumem-lost"

    def __init__(self, state: State) -> None:
        self._state = state
        self._killed = self._told = host.killed()
        """What was counted, and what of it is explained: two may be killed at once."""
        self._looked = 0.0
        self._why: dict[str, str] = {}
        """By worker, until it is known what it ran."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Find out what ended a worker that crashed."""
        if nodes.ended_well(node) or nodes.exit_status(node) != -signal.SIGKILL:
            return
        looked, self._looked = self._looked, time.monotonic()
        before = self._told if self._looked - looked < _AT_ONCE else self._killed
        sure = before == self._killed
        self._killed = now = host.killed()
        self._told = host.Killed(
            min(before.here + 1, now.here), min(before.anywhere + 1, now.anywhere)
        )
        self._why[node.gateway.id] = _why(before, now, sure=sure)

    @pytest.hookimpl(tryfirst=True)
    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport) -> None:
        """Say so beside the failure of the test that it ran."""
        worker = vars(report)["node"].gateway.id
        if why := self._why.pop(worker, ""):
            self._state.lost.append(LostWorker(worker, why, crashitem))
            report.longrepr = f"{report.longrepr}\n{why}"


def _why(before: host.Killed, now: host.Killed, *, sure: bool = True) -> str:
    """Return in words what is known of why a process was killed."""
    here, anywhere = now.here - before.here, now.anywhere - before.anywhere
    count = here or anywhere
    if count <= 0:
        return "SIGKILL ended it; nothing says that main memory ran out"
    of_whom = "its control group" if here > 0 else "the machine"
    allowed = host.limit() if here > 0 else None
    limit = "" if allowed is None else f" of {format_bytes(allowed)}"
    processes = f"{count} process{'es' * (count > 1)}"
    return (
        f"SIGKILL ended it, and because main memory{limit} ran out the kernel has killed "
        f"{processes} of {of_whom} meanwhile: {'' if here == 1 and sure else 'probably '}this one"
    )

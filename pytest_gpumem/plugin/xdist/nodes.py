"""The workers of a run, as the controller knows them, and how long they have been silent."""

from __future__ import annotations

import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pytest_gpumem.plugin.xdist.messages import NOTHING_TAKEN, Taken
from pytest_gpumem.scheduling.commands import STALL

if TYPE_CHECKING:
    from collections.abc import Collection

    import pytest

    from pytest_gpumem.scheduling.commands import CardKey

LONGEST_STALL = 10.0
"""Most seconds after which a silent test may wait for what an idle worker keeps: ``STALL``, or as
many as that worker's slowest set-up took, so that giving back at most doubles a wait."""
_SOON = 0.01
"""Seconds between two looks, at least."""
_GONE = 0.5
"""Seconds that a process has to be gone whose pipe has ended."""
LOOK_AGAIN: Mapping[str, Any] = {}
"""A message of nobody's: by it the clock's thread has the controller look for such tests."""


class Node(Protocol):
    """What is used of xdist's ``WorkerController``."""

    gateway: Any
    workerinput: dict[str, Any]

    @property
    def shutting_down(self) -> bool: ...  # noqa: D102  # xdist's

    def send_runtest_some(self, indices: Sequence[int]) -> None: ...  # noqa: D102

    def shutdown(self) -> None: ...  # noqa: D102

    def notify_inproc(self, eventname: str, **kwargs: object) -> None: ...  # noqa: D102


@dataclass
class Worker:
    """What the scheduler knows of one worker."""

    node: Node
    hello: Mapping[str, Any] | None = None
    collection: list[str] | None = None
    sent: deque[int] = field(default_factory=deque)
    """Indexes sent and not complete, sentinels among them, in the order they run."""
    last: int | None = None
    """The test that it completed last."""
    left: int | None = None
    """The test after which it ended itself, with all of it reported."""
    holding: dict[str, tuple[int, dict[str, int]]] = field(default_factory=dict)
    """What it keeps, by card, and how much of that its wider fixtures hold."""
    taken: Taken = NOTHING_TAKEN
    """What the running test took."""
    returned: set[int] = field(default_factory=set)
    """Of those sent, the tests that it passes over."""
    oom: bool = False
    """Whether the running test shall be tried again because it shared the card."""
    too_large: int = 0
    """Bytes of main memory that it has, where that is too much."""
    replaced: bool = False
    """Whether it was told to end because it had grown, so that another one begins."""
    moved: float = 0.0
    """When it was last heard or told to do something."""
    setup: float = 0.0
    """Seconds of its slowest set-up, without what it may have waited for an idle worker."""

    @property
    def name(self) -> str:
        """That of its gateway."""
        gateway: str = self.node.gateway.id
        return gateway

    @property
    def host(self) -> str:
        """Where it runs; "" is here."""
        return str(self.hello.get("host", "")) if self.hello else ""

    @property
    def cards(self) -> list[CardKey]:
        """Those that it sees, in CUDA's order."""
        told = self.hello["cards"] if self.hello else ()
        return [(self.host, str(card[0])) for card in told]

    def running(self, tests: int) -> int | None:
        """Return the one of so many ``tests`` that it runs, or whose late teardown it runs."""
        if not self.sent or self.sent[0] < tests:
            return self.sent[0] if self.sent else None
        released = len(self.sent) > 1 or self.node.shutting_down
        return self.last if released else None

    @property
    def busy(self) -> bool:
        """Whether it has more to do than to wait behind a sentinel."""
        return len(self.sent) > 1


# What follows rests on xdist 3.8's and execnet 2.1's own affairs; without them nothing is told or
# done, and a test names the versions.


def ended_well(node: Node) -> bool:
    """Return whether a worker that is gone came to its end: only then it leaves its output."""
    return hasattr(node, "workeroutput")


def replace(config: pytest.Config, node: Node) -> bool:
    """Let another worker begin in the place of one that ended as it was told; return if it does.

    xdist replaces a worker that crashed by the same function, which counts it as a failure of the
    run: after four for each worker the run would end.
    """
    session: Any = config.pluginmanager.get_plugin("dsession")
    clone = getattr(session, "_clone_node", None)
    if clone is None or getattr(session, "shuttingdown", True):
        return False
    clone(node)
    return True


def exit_status(node: Node) -> int | None:
    """Return how the process of a worker that is gone ended, as ``Popen.returncode`` says it.

    None where that is not known, as of one on another machine.
    """
    popen: Any = getattr(getattr(node.gateway, "_io", None), "popen", None)
    try:
        return None if popen is None else int(popen.wait(timeout=_GONE))
    except subprocess.TimeoutExpired:
        return None


class StallClock:
    """Finds idle workers beside which a test does not go on: only silence tells of them."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None
        self._strikes = 0.0
        """When the timer will have the controller look, of ``time.monotonic``."""
        self.gave_way = 0.0
        """When an idle worker was last told to give its fixtures back for such a test."""

    def start(self, node: Node, workers: Collection[Worker], keeping: Collection[str]) -> None:
        """Have the controller look when the first of those ``keeping`` fixtures may have to yield.

        It is told so by a message in the name of ``node``.
        """
        now = time.monotonic()
        due = max(now + _SOON, min(_due(workers, keeping, now).values()))
        if self._timer is not None:
            if self._strikes <= due:
                return  # then it begins anew, if a test went on meanwhile
            self._timer.cancel()
        self._strikes = due
        message = {"node": node, "indices": LOOK_AGAIN}
        self._timer = threading.Timer(due - now, node.notify_inproc, ("unscheduled",), message)
        self._timer.daemon = True
        self._timer.start()

    def strike(self, workers: Collection[Worker], keeping: Collection[str]) -> list[str]:
        """Return those ``keeping`` fixtures beside which a test has been silent for too long."""
        if self._timer is not None:
            self._timer.cancel()  # one that was replaced may have struck all the same
        self._timer, now = None, time.monotonic()
        found = [name for name, due in _due(workers, keeping, now).items() if due <= now]
        self.gave_way = now if found else self.gave_way
        return found


def _due(workers: Collection[Worker], keeping: Collection[str], now: float) -> dict[str, float]:
    """Return when each of those ``keeping`` fixtures has to yield if nothing is heard till then."""
    silent = min((each.moved for each in workers if each.busy), default=now)
    return {
        each.name: max(silent, each.moved) + min(LONGEST_STALL, max(STALL, each.setup))
        for each in workers
        if each.name in keeping
    }

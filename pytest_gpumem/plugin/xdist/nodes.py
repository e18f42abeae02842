"""The workers of a run, as the controller knows them, and how long they have been silent."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pytest_gpumem.plugin.xdist.messages import Taken

if TYPE_CHECKING:
    from collections.abc import Collection

    from pytest_gpumem.scheduling.commands import CardKey

STALL = 0.1
"""Seconds after which a test of which nothing was heard may wait for what an idle worker keeps; or
as many as that worker's slowest set-up took, so that giving back at most doubles a wait..."""
LONGEST_STALL = 10.0
"""... but no more than these."""
_LOOK = 0.05
"""Seconds between two looks, at first: then a quarter of the silence so far..."""
_LONGEST_LOOK = 1.0
"""... up to here."""
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
    holding: dict[str, tuple[int, int]] = field(default_factory=dict)
    """What it keeps, by card, and how much of that its wider fixtures hold."""
    taken: Taken = Taken()  # noqa: RUF009  # a named tuple
    """What the running test took."""
    returned: set[int] = field(default_factory=set)
    """Of those sent, the tests that it passes over."""
    oom: bool = False
    """Whether the running test shall be tried again because it shared the card."""
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

    @property
    def busy(self) -> bool:
        """Whether it has more to do than to wait behind a sentinel."""
        return len(self.sent) > 1


class StallClock:
    """Finds idle workers beside which a test does not go on: only silence tells of them."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None
        self._silence = 0.0
        """Seconds for which nothing was heard of a test when it was looked last."""
        self.gave_way = 0.0
        """When an idle worker was last told to give its fixtures back for such a test."""

    @property
    def runs(self) -> bool:
        """Whether it will strike."""
        return self._timer is not None

    def start(self, node: Node) -> None:
        """Have the controller look for stalls in a while, by a message in the name of ``node``."""
        message = {"node": node, "indices": LOOK_AGAIN}
        pause = min(_LONGEST_LOOK, max(_LOOK, self._silence / 4))
        self._timer = threading.Timer(pause, node.notify_inproc, ("unscheduled",), message)
        self._timer.daemon = True
        self._timer.start()

    def strike(self, workers: Collection[Worker], keeping: Collection[str]) -> list[str]:
        """Return those ``keeping`` fixtures beside which a test has been silent for too long."""
        self._timer, now = None, time.monotonic()
        silent = min((each.moved for each in workers if each.busy), default=now)
        self._silence = now - silent
        found = [
            each.name
            for each in workers
            if each.name in keeping
            and now - max(silent, each.moved) >= min(LONGEST_STALL, max(STALL, each.setup))
        ]
        self.gave_way = now if found else self.gave_way
        return found

"""What a run does in the Python processes that its tests start.

A line in the package's ``.pth`` file imports this module as an interpreter starts, if a run's
variable is in its environment. It gives a child of a simulated run the simulated card, and lets
each child tell the run what its allocator holds. Until torch is imported it does nothing but wait
for that, and nothing that goes wrong here reaches the child: the run then knows less of it.
"""

from __future__ import annotations

import os
import sys

from pytest_gpumem.on_import import when_imported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pytest_gpumem.devices.allocator import Allocator
    from pytest_gpumem.devices.book import Page

FAMILY = "GPUMEM_FAMILY"
"""``family.VARIABLE``, whose module takes longer to import than this one may."""
CARD = "GPUMEM_SIMULATE_CARD"
"""The file of the simulated card."""
EVERY = 0.01
"""Seconds between two looks at the allocator: so much may be missed of what is taken by a child
that is killed. What it took before an end of its own is told."""


_begun: list[int] = []


def begin() -> None:
    """Prepare this interpreter as it starts, or what it forks; once more is harmless."""
    if _begun:
        return
    _begun.append(os.getpid())
    if os.environ.get(CARD):
        when_imported("pynvml", _simulate_nvml)
        when_imported("torch", _simulate)
    when_imported("torch", watch)
    os.register_at_fork(after_in_child=_forked)


def _simulate_nvml() -> None:
    # torch imports pynvml, and is not to be waited for while it does: it has its own turn.
    if "torch" not in sys.modules:
        _simulate()


def _simulate() -> None:
    """Let torch and pynvml answer for the simulated card."""
    from contextlib import suppress

    with suppress(Exception):  # the run is over, and took its card away
        from pytest_gpumem.simulator import Simulation

        if Simulation.installed is None:
            Simulation.attach(os.environ[CARD]).install()


def watch() -> None:
    """Tell what the allocator holds, from torch's initialisation of CUDA on."""
    from contextlib import suppress

    with suppress(Exception):
        from pytest_gpumem.devices.torch_private import when_initialised

        when_initialised(_join)


class _Telling:
    """Tells the books of the runs around this process what its allocator holds."""

    current: _Telling | None = None

    def __init__(self, pages: list[Page]) -> None:
        from pytest_gpumem.devices.allocator import allocators

        self.pages = pages
        self.pid = os.getpid()
        self._allocators = allocators
        self._told: dict[int, Any] = {}

    def tell(self) -> None:
        """Write down what has changed."""
        for allocator in self._allocators() if self.pid == os.getpid() else ():
            if allocator.name == "torch.cuda":
                self._tell_of(allocator)

    def _tell_of(self, allocator: Allocator) -> None:
        for index, now in enumerate(allocator.read()):
            if now != self._told.get(index) and (now.reserved_peak or now.ooms or not index):
                self._told[index] = now
                for page in self.pages:
                    page.tell(index, allocator.card(index).uuid, now)

    def go_on(self) -> None:
        """Tell from now on, whatever ends this process but a kill."""
        import _thread
        import atexit

        self.tell()
        simulator = sys.modules.get("pytest_gpumem.simulator")
        if simulator is not None and simulator.Simulation.installed is not None:
            # The simulated card tells at once, so that a kill loses nothing.
            for card in simulator.Simulation.installed.cards:
                card.grown = self._tell_now
        atexit.register(self._tell_last)
        _before_exit(self._tell_last)
        # Not one of ``threading``'s: the program may count its threads.
        _thread.start_new_thread(self._go_on, ())

    def _go_on(self) -> None:
        from pytest_gpumem.clock import clock

        while self.current is self and self.pid == os.getpid():
            clock.sleep(EVERY)
            try:
                self.tell()
            except Exception:  # CUDA may be broken, the interpreter may end
                return

    def _tell_now(self) -> None:
        from contextlib import suppress

        with suppress(Exception):
            self.tell()

    def _tell_last(self) -> None:
        self._tell_now()
        for page in self.pages if self.pid == os.getpid() else ():
            page.end()


def _before_exit(act: Callable[[], None]) -> None:
    """Call ``act`` before ``os._exit``, by which forked children end."""
    leave = os._exit

    def _exit(status: int) -> None:
        act()
        leave(status)

    os._exit = _exit  # type: ignore[assignment]


def _join() -> None:
    """Take a page in the book of each run around this process."""
    try:
        from pathlib import Path

        from pytest_gpumem.devices import family
        from pytest_gpumem.devices.book import NOBODY, Book

        pages = []
        for link in family.links(os.environ.get(FAMILY, "")):
            if link.root == family.identity(os.getpid()):
                continue  # this process runs these tests, and measures itself
            try:
                owner, name = (NOBODY, "") if _serves_all() else (link.owner, link.name)
                pages.append(Book(Path(link.book)).join(owner, name))
            except (OSError, ValueError, RuntimeError):  # that run is over, or its book is full
                continue
        if pages:
            _Telling.current = _Telling(pages)
            _Telling.current.go_on()
    except Exception:  # within torch's own initialisation, which must not fail of it
        _Telling.current = None


def _serves_all() -> bool:
    """Tell whether this is a child of multiprocessing's fork server.

    Which began with who needed it first, and serves all that come later.
    """
    return any("multiprocessing.forkserver" in each for each in sys.orig_argv)


def _forked() -> None:
    """Begin anew in a forked child: what the parent told is not the child's."""
    _Telling.current = None

"""What wide fixtures hold of the cards, leases included, told as soon as anybody knows of it.

A test ends long after its fixture began to start an engine. The scheduler is told at once, so that
it sends other workers no test that uses the same fixture before it knows what that will hold.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

from pytest_gpumem.archive.shared import registered
from pytest_gpumem.plugin.wide_fixtures import identity

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    import pytest

    from pytest_gpumem.tracking.tracker import Tracker

Held = dict[str, tuple[int, dict[str, int]]]
"""By card, the bytes that this process keeps, and of these what wide fixtures hold, by identity."""


class Standing:
    """Knows the leases of fixtures, and tells what those of a wider scope hold.

    Args:
        tracker: knows what fixtures and their processes use.

    """

    def __init__(self, tracker: Tracker | None) -> None:
        self._tracker = tracker
        self._thread = threading.get_ident()
        """The one that runs tests: what others lease is no fixture's."""
        self.tell: Callable[[dict[str, bool]], None] | None = None
        """Tells the scheduler what is held, and of which fixtures that is all, and whether by a
        lease; None where there is none."""
        self.tell_begun: Callable[[str], None] = lambda _: None
        """Tells the scheduler of a fixture whose process begins to use a card. From any thread."""
        self.awaited: Collection[str] = ()
        """The fixtures of which the scheduler waits to hear."""
        self.fixtures: dict[str, str] = {}
        """The names of the fixtures that took leases, by lease."""
        self.setting_up: pytest.FixtureDef[Any] | None = None
        """The fixture that is set up, the innermost."""
        self._leased: dict[str, tuple[str, Counter[str]]] = {}
        """By lease of a wide fixture: its identity, and the bytes by card."""
        self._asked: dict[str, Counter[str]] = {}
        """What wide fixtures that are set up asked for, by identity and card."""
        self.new: list[str] = []
        """Wide fixtures that stand since this was told last."""
        self.noted = 0
        """What ``since`` was when it was told last, at the end of a test, what is kept."""
        self._begun = ""
        """The fixture of which was told last that its process uses a card."""

    def asks(self, uuid: str, size: int) -> None:
        """Take note that the program asks for a lease."""
        fixture, here = self.setting_up, threading.get_ident() == self._thread
        if self.tell is not None and here and fixture is not None and fixture.scope != "function":
            name = identity(fixture)
            self._asked.setdefault(name, Counter())[uuid] += size
            self.tell({name: True})

    def look(self) -> None:
        """Tell of an engine that a fixture is about to start. Another thread calls this."""
        tracker = self._tracker
        fixture = None if tracker is None else tracker.setting_up()
        if fixture is None or fixture.identity == self._begun or tracker is None:
            return
        if tracker.children is not None and tracker.children.held_by((fixture,)):
            self._begun = fixture.identity
            self.tell_begun(fixture.identity)

    def set_up(self, fixture: pytest.FixtureDef[Any], leases: Collection[str]) -> None:
        """Take note that the set-up of ``fixture`` ended, and of the leases that it took."""
        own = [lease for lease in leases if lease not in self.fixtures]  # of none that it uses
        self.fixtures.update(dict.fromkeys(own, fixture.argname))
        if self.tell is None or fixture.scope == "function":
            return
        name = identity(fixture)
        asked = self._asked.pop(name, None)
        if asked is not None and own:
            self._leased[own[0]] = name, asked  # as a rule it is one; all end with the fixture
        self.new.append(name)
        self._begun = ""

    def test_begins(self, held: Callable[[], Held]) -> None:
        """Tell, as the set-up of a test is over, what its wide fixtures hold that came to stand."""
        if self.tell is None:
            return
        new, self.new = self.new, []
        stand = {name for _, fixtures in held().values() for name in fixtures}
        by_lease = {name for name, _ in self._leased.values()}
        told = {name: name in by_lease for name in new if name in stand or name in self.awaited}
        if told:
            self.tell(told)

    def since(self) -> int:
        """Return what stays the same while this process keeps what it kept; -1: unknown."""
        unknown = self._leased or self._asked or registered() is not None
        return -1 if unknown or self._tracker is None else self._tracker.kept_since()

    def leased(self, held: Callable[[], Collection[str]]) -> dict[str, Counter[str]]:
        """Return by card, and by identity, what wide fixtures have leased, or wait for.

        ``held`` returns the leases that this thread has.
        """
        if not (self._leased or self._asked):
            return {}
        now, found = held(), dict[str, Counter[str]]()
        self._leased = {name: each for name, each in self._leased.items() if name in now}
        for name, sizes in (*self._leased.values(), *self._asked.items()):
            for uuid, size in sizes.items():
                found.setdefault(uuid, Counter())[name] += size
        return found


def with_leases(held: Held, leased: Mapping[str, Mapping[str, int]]) -> Held:
    """Return ``held`` with what fixtures have ``leased`` and do not use: it is no room."""
    found = dict(held)
    for uuid, sizes in leased.items():
        kept, fixtures = held.get(uuid, (0, {}))
        wider = {name: max(size, fixtures.get(name, 0)) for name, size in sizes.items()}
        short = sum(wider.values()) - sum(fixtures.get(name, 0) for name in wider)
        found[uuid] = kept + short, fixtures | wider
    return found

"""What test processes tell a monitor: small files beside the ledger, written while one looks.

Each monitor keeps a locked file in one directory, each process that tells something one in
another, with what it tells beside it. A file whose lock is gone is void, so that a monitor or a
process that is killed leaves nothing that counts.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpumem.files import own_directory, read_own
from pytest_gpumem.leases.locks import FileLock, is_held
from pytest_gpumem.leases.place import is_plain, make_own, unusable
from pytest_gpumem.tuples import NamedTuple

if TYPE_CHECKING:
    from typing_extensions import Self


_listdir = os.listdir
"""Its own: a suite may replace that of ``os``, and see who asks."""
_MOST = 2**16
"""Bytes that a process tells at most."""
_OURS = re.compile(r"[0-9]{1,10}-[0-9a-f]{8}(\.json|\.new)?")


class Glimpse(NamedTuple):
    """What one process was at when its test's phase began."""

    pid: int
    worker: str
    """``gw0`` and so on; empty without xdist."""
    test: str
    phase: str
    """``setup``, ``call``, ``teardown``; empty once the test is over."""
    cards: dict[str, tuple[int, int]]
    """Bytes allocated and reserved by the card's UUID."""


def is_watched(directory: Path) -> bool:
    """Return whether a monitor that lives looks at the run directory; 3 us where none ever did."""
    place = f"{directory}/monitors"
    try:
        names = _listdir(place)  # before every test: a Path takes longer
    except OSError:
        return False
    return any(is_held(f"{place}/{name}") for name in names)


class Teller:
    """Writes down what this process is at."""

    def __init__(self, directory: Path) -> None:
        make_own(directory)
        self._life = _Life(directory / "seen")
        self._told = self._life.path.with_suffix(".json")

    def tell(self, glimpse: Glimpse) -> None:
        """Let ``glimpse`` be what monitors see.

        Raises:
            OSError: when it cannot be written.

        """
        new = self._told.with_suffix(".new")
        new.write_text(json.dumps(glimpse), encoding="utf-8")
        new.replace(self._told)

    def close(self) -> None:
        """Leave nothing behind."""
        self._told.unlink(missing_ok=True)
        self._life.end()


class Watcher:
    """A monitor's side: test processes tell what they are at until it is closed."""

    def __init__(self, directory: Path) -> None:
        """Begin to look.

        Raises:
            LeaseError: when the run directory cannot be used.

        """
        self._seen = directory / "seen"
        try:
            make_own(directory)
            self._life = _Life(directory / "monitors")
        except OSError as error:
            raise unusable(directory, error) from error

    def glimpses(self) -> list[Glimpse]:
        """Return what each process that lives told last."""
        found = []
        for path in self._seen.glob("*.json"):
            if not is_held(path.with_suffix("")):
                continue
            # Its process may take it away just now.
            with suppress(OSError, ValueError, TypeError):
                found.append(Glimpse(*json.loads(read_own(path, _MOST))))
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        _remove_dead(self._seen)
        self._life.end()


class _Life:
    """A locked file that shows that this process lives."""

    def __init__(self, place: Path) -> None:
        own_directory(place)
        _remove_dead(place)
        while True:
            self.path = place / f"{os.getpid()}-{os.urandom(4).hex()}"
            self._lock = FileLock(self.path)
            self._lock.acquire()
            if not self._lock.is_gone:  # removed as a dead one's, before it was locked
                return
            self._lock.close()

    def end(self) -> None:
        self._lock.close()
        self.path.unlink(missing_ok=True)


def _remove_dead(place: Path) -> None:
    """Take out what processes left that were killed, and nothing else that lies there."""
    for path in place.glob("*"):
        ours = _OURS.fullmatch(path.name) is not None and is_plain(str(path))
        if ours and not is_held(path.with_suffix("")):
            path.unlink(missing_ok=True)

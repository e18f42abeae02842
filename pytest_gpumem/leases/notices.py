"""Says in the terminal what is waited for: at once, but not often, and past whatever captures.

pytest and xdist replace a process's standard error. So the file behind it is kept, as pytest
found it, and a line is written there; a process below another one that did so writes to that
one's too: its own output goes nowhere as long as its parent waits for it.
"""

from __future__ import annotations

import os
import stat
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from pytest_gpumem.clock import clock

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from typing_extensions import Self

AFTER = 0.5
"""Seconds of waiting that need no words."""
EVERY = 10.0
"""Seconds between two lines of a process."""
observers: list[Callable[[str, int], None]] = []
"""Told of each lease that ``gpu_lease`` is about to ask for: the card's UUID, bytes."""


class _Terminal:
    """The file to which this process's lines go."""

    file: int | None = None
    said = -EVERY
    """When the last line was written."""


def keep(error: int = 2) -> bool:
    """Let lines go where standard error leads now; False if they already go somewhere."""
    if _Terminal.file is not None:
        return False
    with suppress(OSError):
        _Terminal.file = os.dup(error)
        return True
    return False


def drop() -> None:
    """Write no more lines."""
    file, _Terminal.file = _Terminal.file, None
    if file is not None:
        os.close(file)


def terminal() -> int | None:
    """Return the number of the file that was kept."""
    return _Terminal.file


class Waiting:
    """Says once, when a wait has lasted a while, what ``who`` waits for.

    Args:
        who: the subject of the sentence.
        ancestors: returns, outermost first, the processes that started this one, as ``pid:start``,
            each with the file that it kept.

    """

    def __init__(self, who: str, ancestors: Callable[[], Mapping[str, int | None]]) -> None:
        self._who = who
        self._ancestors = ancestors
        self._timer: threading.Timer | None = None
        self.what = ""
        """What is waited for; empty if nothing was."""

    def note(self, what: str) -> None:
        """Take note of what is waited for and who has it."""
        self.what = what
        if self._timer is None:
            rest = _Terminal.said + EVERY - clock.monotonic()
            self._timer = threading.Timer(max(AFTER, rest), self._say)
            self._timer.daemon = True
            self._timer.start()

    def _say(self) -> None:
        _Terminal.said = clock.monotonic()
        line = f"\ngpumem: {self._who} waits for {self.what}\n".encode()
        own = _Terminal.file
        if own is not None:
            with suppress(OSError):
                os.write(own, line)
        with suppress(OSError):
            for process, file in self._ancestors().items():
                if file is not None:
                    _write_to(f"/proc/{process.partition(':')[0]}/fd/{file}", own, line)
                    return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()


def _write_to(path: str, own: int | None, line: bytes) -> None:
    """Write to another process's terminal or pipe, unless it is ``own``.

    Not to a file: that process goes on to write where it left off, over the line.
    """
    about = os.stat(path)  # noqa: PTH116  # beside fstat
    if own is not None and os.path.samestat(about, os.fstat(own)):
        return
    if stat.S_ISCHR(about.st_mode) or stat.S_ISFIFO(about.st_mode):
        file = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            os.write(file, line)
        finally:
            os.close(file)

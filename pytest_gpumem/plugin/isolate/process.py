"""A fresh process for one test, as the process sees it that wants the test run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from pytest_gpumem.clock import clock

if TYPE_CHECKING:
    from pytest_gpumem.plugin.isolate.coverage_lines import Wish

GRACE = 10.0
"""Seconds that a process may take to end after its test, by what is registered for its exit; after
an interrupt, for its teardown; and after a limit of its test's time, to heed it."""
_LOOK = 0.25
"""Seconds between two looks whether a silent process still lives: whatever its test forked may hold
the other end of the connection open."""
_SOON = 0.02
_MOST = 2**16
"""Bytes of its last words that a report shows."""
_START = "import sys; from pytest_gpumem.plugin.isolate.child import main; main(int(sys.argv[1]))"

Message = tuple[Any, ...]
"""What is said, by its first part, and what belongs to it: builtin values alone."""


class Blueprint(NamedTuple):
    """What a fresh process is to be like: as this one was when the tests began."""

    arguments: list[str]
    """pytest's."""
    directory: str
    environment: dict[str, str]
    path: list[str]
    """Of ``sys.path``."""
    argv: list[str]
    workerinput: dict[str, Any]
    """As for a worker of xdist, by which plugins know that they are not to write results."""
    basetemp: str | None
    """For ``tmp_path``."""
    shows: bool
    """Whether what it prints is to be seen at once, as with ``-s``."""
    coverage: Wish | None
    """What it counts of what it runs."""


class Process:
    """A process that is collecting, waits for its test, or runs it.

    Args:
        blueprint: what it is to be like.
        file: what it collects at once, before it is told its test.

    Raises:
        OSError: when the system starts none.

    """

    def __init__(self, blueprint: Blueprint, file: str) -> None:
        self.file = file
        self._connection, theirs = Pipe()
        self._words: IO[bytes] | None = None
        if not blueprint.shows:
            self._words = tempfile.TemporaryFile()  # noqa: SIM115  # until ``close``
        self._kills = _kernels_kills()
        self._limit: float | None = None
        """Seconds that its test may take from ``_since`` on, as pytest-timeout says."""
        self._since = 0.0
        self._overdue = False
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing starts its own
        with theirs:
            self._popen = subprocess.Popen(  # noqa: S603  # this very interpreter
                [sys.executable, *flags, "-c", _START, str(theirs.fileno())],
                cwd=blueprint.directory,
                env=blueprint.environment,
                stdin=None if blueprint.shows else subprocess.DEVNULL,
                stdout=self._words,
                stderr=self._words,
                pass_fds=(theirs.fileno(),),
                # Ctrl-C reaches it once, by us; what its test does to its group is not done to us.
                start_new_session=True,
            )
        self.pid = self._popen.pid
        with suppress(OSError):  # it has ended already, which ``receive`` finds out
            self._connection.send((blueprint, file, os.getpid()))

    def send(self, *message: Any) -> None:
        """Tell it something, unless it has ended."""
        with suppress(OSError):
            self._connection.send(message)

    def said(self) -> bool:
        """Return whether it has said something, or ended, that nobody has heard yet."""
        return self._connection.poll() or self._popen.poll() is not None

    def receive(self) -> Message | None:
        """Return what it says next, when it does; None once it has ended, or will say no more.

        One that goes on for ``GRACE`` after the limit of its test is ended.
        """
        while True:
            while not self._connection.poll(_LOOK):
                if self._popen.poll() is not None and not self._connection.poll():
                    return None
                end = None if self._limit is None else self._since + self._limit + GRACE
                if end is not None and clock.monotonic() > end:
                    self._overdue = True
                    self.kill()
                    return None
            try:
                message: Message = self._connection.recv()
            except (EOFError, OSError):
                return None
            if message[0] != "limit":
                return message
            self._limit, self._since = message[1], clock.monotonic()

    def end(self, grace: float = GRACE) -> str:
        """Let it end, or end it; return in words how it ended otherwise than in peace."""
        self._connection.close()
        try:
            status = self._popen.wait(grace)
        except subprocess.TimeoutExpired:
            self.kill()
            return f"it did not end within {grace:g} s, and was killed"
        return how_ended(status, killed=_kernels_kills() > self._kills) if status else ""

    def broke_off(self) -> str:
        """Return in words how it ended, when it has ended without a word."""
        if self._overdue:
            return f"it did not heed its limit of {self._limit:g} s for {GRACE:g} s, and was killed"
        try:
            status = self._popen.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.kill()
            return "it closed its connection to the run, and was killed"
        return how_ended(status, killed=_kernels_kills() > self._kills)

    def interrupt(self) -> None:
        """End it, and what it started, as Ctrl-C would: it may tear its fixtures down."""
        self._signal(signal.SIGINT)
        until = clock.monotonic() + GRACE
        while not self._has_ended() and clock.monotonic() < until:
            if self._connection.poll(_SOON):
                with suppress(EOFError, OSError):
                    self._connection.recv()  # or it would wait to be heard
        self.kill()

    def kill(self) -> None:
        """End it, and what it started, at once."""
        self._signal(signal.SIGKILL)
        self._popen.wait()
        self._connection.close()

    def _signal(self, number: int) -> None:
        # Its group is its own: it began a session. Once it was waited for, the number may be
        # another's.
        if self._popen.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def _has_ended(self) -> bool:
        """Return whether it has ended, without waiting for it: its group keeps its number."""
        if self._popen.returncode is not None:
            return True
        try:
            look = os.WEXITED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self.pid, look) is not None
        except ChildProcessError:  # a test waited for any child
            return True

    def last_words(self) -> str:
        """Return what it wrote past its own capture: a dump of its stacks, say."""
        if self._words is None or self._words.closed:
            return ""
        size = self._words.seek(0, os.SEEK_END)
        self._words.seek(max(0, size - _MOST))
        return self._words.read().decode(errors="replace").strip()

    def close(self) -> None:
        """End it if it runs, and forget its last words."""
        self.kill()
        if self._words is not None:
            self._words.close()


def how_ended(status: int, *, killed: bool = False) -> str:
    """Return in words what an exit status of ``subprocess`` says.

    ``killed`` says that the kernel ended a process meanwhile because memory ran out.
    """
    if status >= 0:
        return f"exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:  # a real-time one
        return f"signal {-status}"
    told = f"signal {-status} ({name})"
    if killed and -status == signal.SIGKILL:
        return f"{told}, probably by the kernel, which killed a process for want of memory"
    return told


def _kernels_kills() -> int:
    """Return how many processes the kernel has ended for want of memory; 0 where it says nothing.

    Of all control groups: ``oom_kill`` of /proc/vmstat counts those, too.
    """
    with suppress(OSError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0

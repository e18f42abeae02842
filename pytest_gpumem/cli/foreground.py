"""A command in the place of this process: it gets its streams and signals, and gives its status.

The command stays in this process's group, as without us: what a terminal sends (Ctrl-C, Ctrl-Z, a
hang-up) reaches both from the kernel, and is not passed on. What a program sends to this process
alone is. The kernel says which it was, see sigaction(2), ``si_code``.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CANNOT_RUN, NOT_FOUND = 126, 127
"""Exit statuses for a command that cannot be run or is not there, as of env(1) and nohup(1)."""
_BY_SIGNAL = 128
_STOPS = {signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU} if hasattr(signal, "SIGTSTP") else set()
_PASSED = "HUP INT QUIT TERM USR1 USR2 ALRM CONT WINCH TSTP TTIN TTOU"
_HEARD = {getattr(signal, f"SIG{name}", signal.SIGTERM) for name in [*_PASSED.split(), "CHLD"]}
_SI_KERNEL = 0x80
"""``si_code`` of what the kernel sent, as for a terminal: include/uapi/asm-generic/siginfo.h."""


class CannotStartError(Exception):
    """The command cannot be started; says why."""

    def __init__(self, command: str, error: OSError) -> None:
        super().__init__(f"cannot run {command!r}: {error.strerror}")
        missing = isinstance(error, FileNotFoundError)
        self.status = NOT_FOUND if missing else CANNOT_RUN


def check(program: str) -> None:
    """Make sure that there is such a program, before anything is waited for.

    Raises:
        CannotStartError: when there is none, or it may not be run.

    """
    if shutil.which(program) is not None:
        return
    if os.sep not in program:
        raise CannotStartError(program, FileNotFoundError(0, "No such file or directory"))
    try:
        os.stat(program)  # noqa: PTH116  # a Path makes another one of "./x"
    except OSError as error:
        raise CannotStartError(program, error) from None
    raise CannotStartError(program, PermissionError(0, "Permission denied"))


def leave_on_signals() -> None:
    """End by SystemExit, which tidies up, when this process is asked to before its command runs."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(each) != signal.SIG_IGN:  # as nohup(1) sets it
            signal.signal(each, lambda number, _: sys.exit(_BY_SIGNAL + number))


class Foreground:
    """A command that runs; ``start`` it, then ``attend`` to it.

    Args:
        command: the program and its arguments; no shell reads them.

    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._stopped = self._stopping = False
        """Whether the command is stopped, and whether this process was asked to be."""
        self.pid = 0

    def start(self) -> None:
        """Start it; from now on signals come to ``attend``.

        Raises:
            CannotStartError: when it cannot be.

        """
        # Of children that nobody cares about the kernel keeps no status.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
        try:
            self.pid = os.posix_spawnp(
                self._command[0],
                self._command,
                os.environ,
                setsigmask=before,
                setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # which Python ignores
            )
        except OSError as error:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            raise CannotStartError(self._command[0], error) from None

    def attend(self, look: Callable[[], None], interval: float) -> int:
        """Pass signals on until it has ended; return its status, 128 + N if signal N ended it.

        ``look`` is called every ``interval`` seconds while it runs.
        """
        while True:
            info = signal.sigtimedwait(_HEARD, interval)
            if info is None:
                look()
            elif info.si_signo != signal.SIGCHLD:
                self._pass_on(info)
            if (status := self._status()) is not None:
                return status
            go_on = signal.SIGCONT in signal.sigpending()  # which to stop would lose
            if self._stopped and self._stopping and not go_on:
                # Whoever watches this process, such as a shell, sees it stop as its command did.
                self._stopping = False
                os.kill(os.getpid(), signal.SIGSTOP)

    def _pass_on(self, info: signal.struct_siginfo) -> None:
        number = info.si_signo
        if number == signal.SIGCONT:
            self._stopping = False
        elif number in _STOPS:
            self._stopping = True
        if info.si_code != _SI_KERNEL and info.si_pid != self.pid:
            os.kill(self.pid, number)  # not waited for yet, so the number is still its own

    def _status(self) -> int | None:
        """Return the exit status once it has ended."""
        pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
        if not pid:
            return None
        if os.WIFSTOPPED(status) or os.WIFCONTINUED(status):
            self._stopped = os.WIFSTOPPED(status)
            return None
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else _BY_SIGNAL - code

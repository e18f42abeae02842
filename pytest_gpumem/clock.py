"""The machine's time, whatever a suite puts in the place of ``time``'s functions.

Suites freeze the clock, give ``time.monotonic`` a list of answers that runs out, or let nobody
sleep. What this package looks at meanwhile must neither use up an answer nor wait for ever.
"""

from __future__ import annotations

import time


class clock:  # noqa: N801  # reads as the module in whose place it stands
    """Functions of ``time`` as they were when the run began.

    In a class, because freezegun replaces those that any module has by name.
    """

    monotonic = staticmethod(time.monotonic)
    sleep = staticmethod(time.sleep)
    thread_time = staticmethod(time.thread_time)
    if hasattr(time, "clock_gettime"):  # not on Windows
        clock_gettime = staticmethod(time.clock_gettime)
    time_ns = staticmethod(time.time_ns)
    time = staticmethod(time.time)

"""A pytest plugin for outer runs: tests end after a while, and a sample of them can be run.

A plugin of its own and not pytest-timeout: the suites that run under it test that one too.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType

import psutil
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bounded-seconds", type=float, default=0.0, help="0 means without a bound")
    parser.addoption("--bounded-every", type=int, default=1, help="run one test of so many")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = items[:: config.getoption("--bounded-every")]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    seconds = item.config.getoption("--bounded-seconds")
    before = signal.signal(signal.SIGALRM, _end)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # again where the first is swallowed
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _end(_signal: int, _frame: FrameType | None) -> None:
    """End the test and what it started: nobody else would."""
    for child in psutil.Process().children(recursive=True):
        child.kill()
    raise TimeoutError("the test did not end")

"""Where a reader of a log is: in which run, in which section of it, at which failing test."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pytest_gpumem.forensics.runs import Failure, Run

if TYPE_CHECKING:
    from pytest_gpumem.forensics.lines import Line

FILE = r"[^\s:=]\S*?\.(?:py|md|rst|txt|ya?ml|json|ipynb)"
BEGUN = re.compile(rf"({FILE}::\w[^\s\[]*(?:\[.*?\](?=\s|$))?)(?: (.*))?$")
"""A test's name alone, or before what the test prints."""


class Cursor:
    """What the lines read so far say of the next one."""

    def __init__(self) -> None:
        self.runs = [Run()]
        self.section = ""
        """``progress``, ``failures``, ``errors``, ``short`` (the summary), ``other``, or none."""
        self.failure: Failure | None = None
        self.captured = False
        """Whether the lines are what the failing test printed."""
        self.fault = ""
        """What ended a process since the last worker went down."""
        self.width = 0
        """Of pytest's banners, where one was read."""
        self.carrier: re.Pattern[str] | None = None
        """What stands before each line, where a banner has shown it."""

    @property
    def run(self) -> Run:
        """The run that is told of."""
        return self.runs[-1]

    def resume(self) -> None:
        """Make sure that what comes belongs to a pytest run that has not ended."""
        if self.run.ended:
            self.runs.append(Run())
        self.run.pytest = True

    def fail(self, line: Line, name: str, kind: str = "FAILED", phase: str = "call") -> Failure:
        """Enter a failing report that begins here."""
        self.failure = Failure(line.number, name, kind, phase)
        self.captured = False
        self.run.failures.append(self.failure)
        return self.failure

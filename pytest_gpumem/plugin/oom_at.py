"""Runs each test again with one of its allocations made to fail; only where that is asked for.

A test runs undisturbed first, twice: what it leaks the second time is no handler's doing, and one
that does not pass both times is not tried. Then comes an attempt for each allocation of its call.
Fixtures are left alone: one that is set up for several tests would fail them all. The test has one
outcome, which is reported when all attempts are over: passed if it recovered from all.
"""

from __future__ import annotations

import importlib.util
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpumem import records
from pytest_gpumem.plugin.settings import Settings
from pytest_gpumem.plugin.state import USAGE, State, marks_of, stashed
from pytest_gpumem.plugin.xdist.worker import run_unreported
from pytest_gpumem.records import properties
from pytest_gpumem.reports import proofs
from pytest_gpumem.simulator.allocator import CachingAllocator
from pytest_gpumem.simulator.exhaustion import Refusing
from pytest_gpumem.tracking import release

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from contextlib import AbstractContextManager

    from pytest_gpumem.simulator.operations import Operation

_LENGTH = 200
"""Characters of an error that are kept."""


class _Attempt:
    """One run of a test, in which the allocation ``at`` fails; 0: none does."""

    def __init__(self, at: int = 0, foreseen: Operation | None = None) -> None:
        self.refusing = Refusing(at)
        self.foreseen = foreseen
        """On a real card, what is to fail."""
        self.operations: list[Operation] = []
        """On a real card, what allocated."""
        self.error = ""
        """What ended it."""
        self.oom = False
        """Whether that was the lack of memory itself."""
        self.leaked = 0
        self.holders: list[str] = []
        self.reports: list[pytest.TestReport] = []
        """Of its phases."""

    @property
    def passed(self) -> bool:
        """Whether all of it simply passed: nothing was skipped or expected to fail."""
        simply = all(each.passed and not hasattr(each, "wasxfail") for each in self.reports)
        return simply and any(each.when == "call" for each in self.reports)

    def end(self, item: pytest.Item) -> None:
        """Take over what it left; what its reports tell is not to change with further attempts."""
        for report in self.reports:
            report.user_properties = list(report.user_properties)
        usage = stashed(item, USAGE)
        for card in usage.cards if usage is not None else ():
            self.leaked += card.leaked
            self.holders += [each.where for each in card.holders]

    def judge(self, leaked_before: int) -> records.Refusal:
        """Return what became of the test, which leaks so many bytes undisturbed."""
        at, leaked = self.refusing.at, max(0, self.leaked - leaked_before)
        if not self.refusing.refused:
            verdict = "not reached"
        elif self.refusing.endless:
            verdict = "endless"
        elif any(each.failed for each in self.reports):
            verdict = "out of memory" if self.oom else "other error"
        elif not self.passed:
            verdict = "skipped"
        else:
            verdict = "leaked" if leaked else "recovered"
        held = f"held by {self.holders[0]}" if leaked and self.holders else ""
        return records.Refusal(at, verdict, self.error or held, leaked)


class Proving:
    """Makes allocations fail, and reports what became of the tests."""

    NAME = "gpumem-oom-at"

    def __init__(self, state: State) -> None:
        self._wanted = state.settings.oom_at
        self._most = state.settings.oom_tries
        self.simulated = bool(state.settings.simulated)
        """Whether the card's allocator can be asked; a real one's operations are watched."""
        self._simulating = _simulating(state) if self.simulated else ""
        """For the line to repeat an attempt."""
        self._attempt: _Attempt | None = None

    # Within the ladder, which holds a lease for all attempts, and in the place of plugins that
    # run a failed test again.
    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> bool | None:
        """Run a test undisturbed, and then once for each allocation that is to fail."""
        if marks_of(item).off:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        plain, again, tried = _Attempt(), _Attempt(), list[_Attempt]()
        try:
            self._run(item, nextitem, plain)
            if plain.passed and plain.refusing.counted:
                self._run(item, nextitem, again)
                for at in self._numbers(again.refusing.counted) if again.passed else ():
                    attempt = _Attempt(at, None if self.simulated else again.operations[at - 1])
                    self._run(item, nextitem, attempt)
                    tried.append(attempt)
        finally:  # also where all of the run is interrupted
            if again.reports:
                self._conclude(item, (plain, again), tried)
            for report in plain.reports:
                item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _run(self, item: pytest.Item, nextitem: pytest.Item | None, attempt: _Attempt) -> None:
        self._attempt = attempt
        try:
            attempt.reports = run_unreported(item, nextitem)
        finally:
            self._attempt = None
        attempt.end(item)

    def _numbers(self, counted: int) -> range:
        """Return the allocations that are to fail."""
        if self._wanted == "every":
            return range(1, (min(counted, self._most) if self._most else counted) + 1)
        at = 1 if self._wanted == "first" else int(self._wanted or 0)
        return range(at, at + 1) if at <= counted else range(0)

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_call(self) -> Generator[None, object, object]:
        """Count the allocations of the call, and make one fail."""
        if self._attempt is None:
            return (yield)
        with self._watched(self._attempt):
            return (yield)

    def _watched(self, attempt: _Attempt) -> AbstractContextManager[object]:
        """Have an attempt asked for each allocation of this process, or of this thread."""
        if self.simulated:
            return _asked(attempt.refusing)
        if importlib.util.find_spec("torch") is None:
            return nullcontext()
        # Before the test may import it: each run of it is to see the same.
        from pytest_gpumem.simulator.operations import Operations

        operations = Operations(attempt.refusing, attempt.foreseen)
        attempt.operations = operations.seen
        return operations

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_fixture_setup(self) -> Generator[None, object, object]:
        """Leave fixtures alone that a test asks for as late as it runs."""
        if self._attempt is None:
            return (yield)
        with self._attempt.refusing.paused():
            return (yield)

    def pytest_runtest_makereport(self, call: pytest.CallInfo[Any]) -> None:
        """Keep in words what ended an attempt."""
        attempt = self._attempt
        if attempt is not None and call.excinfo is not None and not attempt.error:
            error = call.excinfo.value
            attempt.oom = release.says_oom(error)
            # An error of the suite's own may have no words, or such as no terminal shows.
            said = call.excinfo.exconly().strip().partition("\n")[0]
            if attempt.oom:
                said = f"{type(error).__name__}: {release.oom_sentence(error)}"
            shown = (each if each.isprintable() else " " for each in said[:_LENGTH])
            attempt.error = "".join(shown)

    def _conclude(
        self, item: pytest.Item, undisturbed: tuple[_Attempt, _Attempt], tried: list[_Attempt]
    ) -> None:
        """Let the reports of the first attempt tell the outcome of all."""
        plain, again = undisturbed
        found = tuple(each.judge(again.leaked) for each in tried)
        call = next(each for each in plain.reports if each.when == "call")
        if bad := [each for each in found if proofs.is_bad(each)]:
            failed = [each for one in tried for each in one.reports if each.failed]
            text = "\n".join(self._told(item, each) for each in bad)
            call.outcome = "failed"
            call.longrepr = failed[0].longrepr if failed else text
            if failed:
                call.sections.append(("GPU memory: it was made to run out", text))
        why = "" if again.passed else f"it did not pass again: {again.error}"
        proof = records.Proof(again.refusing.counted, found, why, self._simulating)
        properties.tell_proof(plain.reports[-1].user_properties, proof)

    def _told(self, item: pytest.Item, refusal: records.Refusal) -> str:
        line = proofs.repeat(item.nodeid, refusal, self._simulating)
        return f"{proofs.text(refusal)}\n    {line}"


def _simulating(state: State) -> str:
    """Return the options by which a run has the simulated cards of this one."""
    settings = state.settings
    context = settings.simulate_context
    given = None if context == Settings().simulate_context else context
    return proofs.simulating(state.found.cards, given, compiled=settings.simulate_compiled)


@contextmanager
def _asked(refusing: Refusing) -> Iterator[None]:
    """Have the simulated card ask ``refusing`` for every allocation of this process."""
    CachingAllocator.refusing = refusing
    try:
        yield
    finally:
        CachingAllocator.refusing = None

"""Holds tests to the own peaks that the repository allows them, and keeps these up to date."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpumem import files
from pytest_gpumem.plugin.resolve import why_not_written
from pytest_gpumem.plugin.state import BUDGET, GONE, USAGE, State, is_worker, stashed
from pytest_gpumem.records.budget import (
    Budget,
    Own,
    Tolerance,
    judge,
    name_of,
    verdicts,
    why_above,
)

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from pytest_gpumem.records import BudgetVerdict, RunRecord


def begin(config: pytest.Config, state: State) -> None:
    """Read the budgets, and have whoever collects, runs and reports the tests mind them.

    Raises:
        pytest.UsageError: in one sentence, when there are none.

    """
    settings = state.settings
    if settings.budget is None:
        raise pytest.UsageError("--gpumem-budget-update: which file? --gpumem-budget names it")
    # In an ini file it is meant from where that lies; a worker of xdist is told what it holds.
    here = config.invocation_params.dir / settings.budget
    there = config.rootpath / settings.budget
    path = there if there.exists() and not here.exists() else here
    try:
        if is_worker(config):
            budget = Budget(config.workerinput[BUDGET])  # type: ignore[attr-defined]
        else:
            budget = _load(path, new=settings.budget_update)
    except OSError as error:
        raise pytest.UsageError(f"--gpumem-budget: {str(path)!r}: {error.strerror}") from None
    except ValueError as error:
        raise pytest.UsageError(f"--gpumem-budget: {error}") from None
    config.pluginmanager.register(Budgets(config, state, path, budget), Budgets.NAME)


def of(config: pytest.Config) -> Budgets | None:
    """Return the budgets of this run, if it has any."""
    found: Budgets | None = config.pluginmanager.getplugin(Budgets.NAME)
    return found


def judge_tests(config: pytest.Config) -> None:
    """Fail the tests of this process, which are measured, that are above their budgets."""
    budgets = of(config)
    if budgets is not None:
        config.pluginmanager.register(Judging(budgets), Judging.NAME)


def _load(path: Path, *, new: bool) -> Budget:
    problem = why_not_written(path) if new else ""
    if problem:
        raise ValueError(problem)
    try:
        return Budget.load(path)
    except FileNotFoundError:
        if new:
            return Budget()
        raise ValueError(f"there is no {str(path)!r}; --gpumem-budget-update writes it") from None


class Budgets:
    """The budgets of a run: finds those without a test, compares, and writes them."""

    NAME = "gpumem-budget"

    def __init__(self, config: pytest.Config, state: State, path: Path, budget: Budget) -> None:
        self._config = config
        self._state = state
        self._path = path
        self._budget = budget
        self._tolerance = Tolerance(*state.settings.budget_tolerance)
        self._partial = False
        """Whether tests were left out of the collection, or could not be collected."""
        self._gone: set[str] | None = None
        """Budgets whose tests are known to be no more; None where nobody could tell."""
        self._written: set[tuple[str, str]] = set()
        """Test and card model of what was changed in the file."""

    # Where tests are collected

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Take note of a file whose tests are not known."""
        self._partial |= report.failed

    def pytest_deselected(self) -> None:
        """Take note that tests are left out."""
        self._partial = True

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_modifyitems(
        self, items: list[pytest.Item]
    ) -> Generator[None, object, object]:
        """Take note of tests that a plugin leaves out without a word, as some do for shards."""
        before = set(items)
        result = yield
        self._partial |= not before <= set(items)
        return result

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Find the budgets whose tests are no more: their file has none of that name.

        Only in a run that left nothing out; of files that it did not collect nothing is said.
        """
        config = self._config
        if self._partial or config.getoption("lf", False):
            return
        names = {name_of(item.nodeid) for item in session.items}
        here = config.invocation_params.dir
        parts = {(here / _file(each)).resolve() for each in config.args if "::" in each}
        whole = {_file(name) for name in names}
        models = {card.name for card in self._state.found.cards}
        self._gone = {
            name
            for name in self._budget.names(models)
            if name not in names
            and (file := config.rootpath / _file(name)).resolve() not in parts
            and (_file(name) in whole or not file.exists())
        }

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Tell the controller of what is gone."""
        output = getattr(session.config, "workeroutput", None)
        if output is not None and self._gone is not None:
            output[GONE] = sorted(self._gone)

    # Where tests are handed to workers

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell a worker, which may be on another machine, what the file holds."""
        node.workerinput[BUDGET] = self._budget.plain()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take for gone what all workers do."""
        gone = getattr(node, "workeroutput", {}).get(GONE)
        if gone is not None:
            self._gone = set(gone) if self._gone is None else self._gone & set(gone)

    # Where tests run

    def why_failed(self, item: pytest.Item) -> str:
        """Return in one sentence why a test that passed is above its budget, "" if it is not."""
        usage, line = stashed(item, USAGE), self._budget[item.nodeid]
        models = {card.uuid: card.name for card in self._state.found.cards}
        for card in usage.cards if usage is not None and line else ():
            model = models.get(card.card, card.card)
            budget, own = line.get(model), Own(card.own, card.own_left)
            if budget is not None and judge(own, budget, self._tolerance) == "above":
                why = why_above(own.peak, model, budget.peak)
                return f"{why} in {self._path.name}; if that is meant, raise it there"
        return ""

    # Where the run is reported

    def compared(self, run: RunRecord) -> RunRecord:
        """Return what is known of a run, with how its tests stand to their budgets."""
        if not run.cards:
            note = "there is no card: no test was held to its budget (--gpumem-budget)"
            return run._replace(notes=(*run.notes, note))
        return run._replace(budgets=self._verdicts(run))

    def _verdicts(self, run: RunRecord) -> tuple[BudgetVerdict, ...]:
        found = verdicts(run, self._budget, self._gone or (), self._tolerance)
        return tuple(
            each._replace(written=(each.nodeid, each.card) in self._written) for each in found
        )

    def update(self, run: RunRecord) -> None:
        """Write what the run taught, if the user asked for that; the rest of the file stays.

        Read again and not kept from the beginning: another shard may have ended meanwhile.

        Raises:
            OSError: when the file cannot be written.
            ValueError: in one sentence, when it holds no budgets any more.

        """
        if not self._state.settings.budget_update:
            return
        with files.undisturbed(self._path):
            budget = _load(self._path, new=True)
            for each in self._verdicts(run):
                if budget.apply(each, self._tolerance):
                    self._written.add((each.nodeid, each.card))
            if self._written:
                budget.save(self._path)


class Judging:
    """Fails tests that are above their budgets; in a process that runs some."""

    NAME = "gpumem-budget-judging"

    def __init__(self, budgets: Budgets) -> None:
        self._budgets = budgets
        self._passed = True
        """Whether the phases of the running test so far did."""

    def pytest_runtest_makereport(self, call: pytest.CallInfo[Any]) -> None:
        """Take note of how a test's phases end."""
        self._passed = call.excinfo is None and (self._passed or call.when == "setup")

    # After the measuring, which stands within: what was left behind is known then.
    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        """Fail a test that passed and took more than its budget."""
        result = yield
        why = self._budgets.why_failed(item) if self._passed else ""
        if why:
            pytest.fail(why, pytrace=False)
        return result


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]

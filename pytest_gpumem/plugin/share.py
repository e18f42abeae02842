"""Puts the sharing of cards into a process that runs tests: its leases, and what it tells."""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

from pytest_gpumem.leases import notices
from pytest_gpumem.plugin.ladder import Ladder, tell_why
from pytest_gpumem.plugin.learned import load_history
from pytest_gpumem.plugin.measure import Measuring
from pytest_gpumem.plugin.state import HISTORY, ITEM_MARKS, State, is_apart, is_isolated
from pytest_gpumem.plugin.wide_fixtures import wide_fixtures
from pytest_gpumem.scheduling import workers
from pytest_gpumem.scheduling.history import History

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    import pytest

    from pytest_gpumem.leases.ask import Need
    from pytest_gpumem.plugin.worker_exit import Replacing
    from pytest_gpumem.plugin.xdist import worker as xdist_worker
    from pytest_gpumem.tracking.tracker import Tracker


def share(config: pytest.Config, state: State) -> None:
    """Let this process, which runs tests, share the cards with others."""
    given = getattr(config, "workerinput", None)
    from pytest_gpumem.plugin.worker_exit import Replacing

    measuring: Measuring | None = config.pluginmanager.getplugin(Measuring.NAME)
    tracker = None if measuring is None else measuring.tracker
    if is_apart(config):  # who started this process has the lease, and decides what comes next
        if measuring is not None:
            lost = Replacing(ends=False)
            measuring.noting = partial(_note_apart, lost, tracker)
        return
    if given is None:
        # Only where tests can go on in fresh processes is it of use to know that this one is lost.
        looks = Replacing(ends=False) if state.settings.isolate == "failed" else None
        ladder = Ladder(config, state, load_history(config, state), tracker, replacing=looks)
    else:
        ladder = _in_worker(config, state, tracker, given)
    if measuring is not None:
        measuring.beginning, measuring.noting = ladder.begin, ladder.note
    elif state.settings.ram:
        from pytest_gpumem.plugin.ram import MeasuringRam

        in_ram: MeasuringRam | None = config.pluginmanager.getplugin(MeasuringRam.NAME)
        if in_ram is not None:
            in_ram.beginning, in_ram.noting = ladder.begin, ladder.uncount
    config.pluginmanager.register(ladder, Ladder.NAME)


def _note_apart(
    lost: Replacing,
    tracker: Tracker | None,
    item: pytest.Item,
    call: pytest.CallInfo[Any],
) -> None:
    if call.excinfo is not None:
        tell_why(item, call, lost, tracker)


def _in_worker(
    config: pytest.Config, state: State, tracker: Tracker | None, given: dict[str, Any]
) -> Ladder:
    from pytest_gpumem.plugin.worker_exit import Replacing
    from pytest_gpumem.plugin.xdist.worker import ASKED

    if ASKED in given:
        return _scheduled(config, state, tracker)
    known = given.get(HISTORY)
    history = History.read(known) if known else History()
    return Ladder(config, state, history, tracker, replacing=Replacing())


class _Scheduler:
    """What xdist's controller grants the tests of this worker, and is told of them."""

    worker: xdist_worker.Worker

    def __init__(self, tracker: Tracker | None) -> None:
        self._tracker = tracker

    @property
    def hears_all(self) -> bool:
        """Whether main memory is watched."""
        return self.worker.ram is not None

    def granted(self) -> Need | None:
        """Return what was set aside for the test that begins, None if nothing was."""
        grant = self.worker.granted()
        if grant is None:
            return None
        from pytest_gpumem.leases.ask import Need  # many a worker is granted nothing

        if self._tracker is not None and self.worker.again:  # say what fills the card
            self._tracker.recordings.record_next(self.worker.again)
        size, cards, alone, ram = grant
        return Need(size, cards, alone, ram=ram)

    def undecided(self, *, spoiled: bool) -> None:
        """Keep nothing set up behind a test whose set-up failed and may be made again."""
        self.worker.spoiled = spoiled

    def test_ended(self) -> None:
        """Tell what this process keeps."""
        self.worker.test_ended()

    def used_card(self) -> None:
        """Return what was handed out ahead.

        Behind a test for which the card was set aside nothing waits. This one was taken for a CPU
        test, as were those behind it: its relatives, as a rule.
        """
        self.worker.return_queue()

    def leave(self) -> None:
        """Tell that this process ends."""
        self.worker.leave()


def _scheduled(config: pytest.Config, state: State, tracker: Tracker | None) -> Ladder:
    from pytest_gpumem.plugin.worker_exit import Replacing
    from pytest_gpumem.plugin.xdist.worker import Worker

    scheduler = _Scheduler(tracker)
    ladder = Ladder(
        config,
        state,
        History(),
        tracker,
        scheduler=scheduler,
        replacing=Replacing(scheduler.leave),
    )
    measuring: Measuring | None = config.pluginmanager.getplugin(Measuring.NAME)

    def hello(items: Sequence[pytest.Item]) -> dict[str, Any]:
        worker.ram, told = _hello(state, items)
        ladder.leases.standing.awaited = told["leasing"]
        return told

    scheduler.worker = worker = Worker(
        config,
        hello=hello,
        holding=ladder.leases.keep,
        used=workers.CardUse(lambda: state.found.cards),
        release=_give_back,
        late=lambda nodeid: (
            nullcontext() if measuring is None else measuring.late_teardowns(nodeid)
        ),
    )
    config.pluginmanager.register(worker, "gpumem-worker")
    standing = ladder.leases.standing
    standing.tell = lambda fixtures: worker.tell(stand=fixtures)
    standing.tell_begun = lambda fixture: worker.send(begun=fixture)
    notices.observers.append(standing.asks)
    if measuring is not None and measuring.sampler is not None:
        measuring.sampler.then = standing.look
    return ladder


def _hello(
    state: State, items: Sequence[pytest.Item]
) -> tuple[workers.RamUse | None, dict[str, Any]]:
    """Return what a worker says of itself and its tests, and who watches its main memory."""
    settings, use = state.settings, None
    *wide, leasing = wide_fixtures(items)
    own = [(i, item.stash) for i, item in enumerate(items) if ITEM_MARKS in item.stash]
    marked = [(i, stash[ITEM_MARKS]) for i, stash in own]
    needs = [(i, *marks.need[:3]) for i, marks in marked if marks.need is not None]
    in_ram = [(i, marks.ram) for i, marks in marked if marks.ram is not None]
    isolated = enumerate(items) if state.isolates else ()
    apart = [i for i, item in isolated if is_isolated(item, settings.isolate)]
    told: dict[str, Any] = {
        "host": workers.host_name(),
        "cards": workers.tell_cards(state.found.cards),
        "leasing": leasing,
        # As text: execnet writes and reads values one by one.
        "tests": json.dumps({"needs": needs, "wide": wide, "apart": apart, "rams": in_ram}),
    }
    if settings.ram or in_ram:
        from pytest_gpumem.devices import host

        told["ram"] = host.host().ram
    if settings.ram or in_ram or settings.worker_ram is not None:
        use = workers.RamUse(settings.worker_ram)
        state.notes += [use.problem] * bool(use.problem)
    return use, told


def _give_back() -> None:
    """Free what nobody uses now: models that are registered, and what fixtures left behind."""
    from pytest_gpumem.archive.shared import get_gpu_consolidator

    consolidator = get_gpu_consolidator()
    if not consolidator.idle:
        consolidator.consolidate_gpu_memory(process_context="wanted by another worker")
    workers.give_back()

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


def _scheduled(config: pytest.Config, state: State, tracker: Tracker | None) -> Ladder:
    from pytest_gpumem.plugin.worker_exit import Replacing
    from pytest_gpumem.plugin.xdist import worker as xdist_worker

    def granted() -> Need | None:
        grant = worker.granted()
        if grant is None:
            return None
        from pytest_gpumem.leases.ask import Need  # many a worker is granted nothing

        if tracker is not None and worker.again:  # say what fills the card
            tracker.recordings.record_next(worker.again)
        size, cards, alone, ram = grant
        return Need(size, cards, alone, ram=ram)

    def used_card() -> None:
        # Behind a test for which the card was set aside nothing waits. This one was taken for a
        # CPU test, as were those behind it: its relatives, as a rule.
        worker.return_queue()

    def leave() -> None:
        worker.leave()

    ladder = Ladder(
        config,
        state,
        History(),
        tracker,
        granted=granted,
        used_card=used_card,
        replacing=Replacing(leave),
    )
    measuring: Measuring | None = config.pluginmanager.getplugin(Measuring.NAME)

    def hello(items: Sequence[pytest.Item]) -> dict[str, Any]:
        worker.ram, told = _hello(state, items)
        ladder.leases.standing.awaited = told["leasing"]
        return told

    worker = xdist_worker.Worker(
        config,
        hello=hello,
        holding=ladder.leases.keep,
        since=ladder.leases.standing.since,
        used=workers.CardUse(lambda: state.found.cards),
        release=_give_back,
        spoiled=lambda: ladder.undecided and ladder.spoiled,
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

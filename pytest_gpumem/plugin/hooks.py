"""pytest's hooks and fixtures: wires the rooms together, computes nothing itself."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpumem.archive.shared import registered
from pytest_gpumem.on_import import collecting_later
from pytest_gpumem.plugin import consolidate, marks, route
from pytest_gpumem.plugin.option import GROUPS
from pytest_gpumem.plugin.resolve import BadSettingError, check_files, resolve
from pytest_gpumem.plugin.settings import OPTIONS
from pytest_gpumem.plugin.state import ITEM_MARKS, STATE, USAGE_ERROR, ItemMarks, State, is_worker
from pytest_gpumem.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from pytest_gpumem.devices import CardsFound
    from pytest_gpumem.tracking.memory import GpuMemory


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register every option with its ini twin."""
    groups = {key: parser.getgroup(f"gpumem-{key}", title) for key, title in GROUPS.items()}
    for option in OPTIONS:
        group = groups[option.group]
        text = option.help.replace("%", "%%")  # argparse formats it
        # Defaults are None, so that the environment and the ini file can be told from "not given".
        if option.metavar is None:
            group.addoption(
                option.flag, dest=option.dest, action="store_true", default=None, help=text
            )
        else:
            group.addoption(
                option.flag,
                dest=option.dest,
                default=None,
                metavar=option.metavar,
                help=text,
            )
        parser.addini(option.dest, f"Twin of {option.flag} and {option.env}.", default="")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Simulate the card before the first conftest can import torch."""
    with collecting_later():
        _begin(early_config, vars(early_config.known_args_namespace))


def pytest_configure(config: pytest.Config) -> None:
    """Register the marks, and what measures and reports where there is something to measure."""
    with collecting_later():
        _configure(config)


def _configure(config: pytest.Config) -> None:
    for name in marks.MARKS:
        config.addinivalue_line("markers", marks.describe(name))
    if STATE not in config.stash:  # loaded by a conftest, after the initial hook
        _begin(config, vars(config.option))
    state = config.stash[STATE]
    consolidate.configure(config)
    route.configure(config)
    settings, controller = state.settings, _is_controller(config)
    if settings.mode == "off":
        return
    if not is_worker(config):
        if settings.oom_at is not None and not state.found.cards:
            raise pytest.UsageError(
                "--gpumem-oom-at: there is no card to run out of memory; add --gpumem-simulate 4GiB"
            )
        try:
            check_files(settings)
        except BadSettingError as error:
            raise pytest.UsageError(str(error)) from None
    if settings.budget is not None or settings.budget_update:
        from pytest_gpumem.plugin import budget

        budget.begin(config, state)
    if state.found.cards and not controller:
        _measure(config)
    if settings.ram:
        from pytest_gpumem.plugin import ram

        ram.begin(config, state, runs_tests=not controller)
    alone = not (controller or is_worker(config))
    if settings.worker_ram is not None and settings.mode == "on" and alone:
        state.notes.append("--gpumem-worker-ram does nothing without xdist's workers")
    files = settings.json or settings.trace or settings.html
    asked = files or settings.budget or settings.ram
    to_tell = state.found.cards or asked or controller or state.notes
    if not is_worker(config) and to_tell:
        _report(config)
    if controller:
        from pytest_gpumem.plugin.xdist.lost_workers import LostWorkers

        config.pluginmanager.register(LostWorkers(state), LostWorkers.NAME)
    if settings.mode == "on" and _shares(config):
        _share(config)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Measure other makers' cards too: that there is one shows when the suite has loaded torch."""
    route.tests_begin()
    config = session.config
    state = config.stash[STATE]
    if state.settings.mode == "off" or _is_controller(config):
        return
    if state.isolates:
        from pytest_gpumem.plugin import isolate

        isolate.begin(session, state)
    if state.found.cards:
        return
    from pytest_gpumem import devices

    if devices.other_maker():
        _measure(config)
        if not is_worker(config):
            _report(config)


def _measure(config: pytest.Config) -> None:
    from pytest_gpumem.plugin import scopes
    from pytest_gpumem.plugin.measure import Measuring

    state = config.stash[STATE]
    measuring = Measuring(config, state)
    config.pluginmanager.register(measuring, Measuring.NAME)
    if state.settings.oom_at is not None:
        from pytest_gpumem.plugin.oom_at import Proving

        config.pluginmanager.register(Proving(state), Proving.NAME)
    if state.settings.budget is not None:
        from pytest_gpumem.plugin import budget

        budget.judge_tests(config)
    if state.settings.peaks is not None:
        from pytest_gpumem.plugin.peaks import Peaks

        peaks = Peaks(config, state, measuring.tracker)
        config.pluginmanager.register(peaks, Peaks.NAME)
    if scopes.wanted(config):
        judging = scopes.Judging(measuring.tracker.scopes.begin, measuring.end_scope)
        measuring.judging = judging
        scopes.register(config.pluginmanager, judging)


def _share(config: pytest.Config) -> None:
    state = config.stash[STATE]
    if _is_controller(config):
        from pytest_gpumem.plugin.xdist.controller import share as share_as_controller

        share_as_controller(config, state)
    else:
        from pytest_gpumem.plugin.share import share

        share(config, state)
    if state.settings.fraction is not None and not _is_controller(config):
        from pytest_gpumem.plugin.memory_fraction import Capping

        config.pluginmanager.register(Capping(state), Capping.NAME)


def _shares(config: pytest.Config) -> bool:
    """Return whether this process shares anything: cards, or main memory."""
    if config.getoption("setupplan", False):
        return False  # which sets nothing up and runs nothing: no test can lack room
    state, controller = config.stash[STATE], _is_controller(config)
    settings = state.settings
    distributed = controller or is_worker(config)
    if settings.ram or (distributed and settings.worker_ram is not None):
        return True
    return _may_meet_cards(config) if controller else bool(state.found.cards)


def _may_meet_cards(config: pytest.Config) -> bool:
    """Return whether a worker of xdist may have a card: here, or on another machine."""
    gateways = config.getoption("tx", None) or ()
    elsewhere = any(each.rpartition("*")[2] != "popen" for each in gateways)
    return elsewhere or bool(config.stash[STATE].found.cards)


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> Generator[None, int, int]:
    """Let VRAM and main memory limit the workers of ``-n auto``, as far as they are known."""
    wanted = yield
    state = config.stash[STATE]
    asked_for = "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ
    to_reckon_with = state.found.cards or state.settings.ram
    if state.settings.mode != "on" or asked_for or not to_reckon_with:
        return wanted
    from pytest_gpumem.plugin.xdist.controller import worker_count

    return worker_count(config, state, wanted)


def _report(config: pytest.Config) -> None:
    from pytest_gpumem.plugin.report import Reporting

    if not config.pluginmanager.hasplugin(Reporting.NAME):
        config.pluginmanager.register(Reporting(config, config.stash[STATE]), Reporting.NAME)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: Sequence[Any]) -> None:
    """Let the workers on each other machine share one simulated card."""
    if config.stash[STATE].simulation is not None:
        from pytest_gpumem.plugin import simulate

        name = os.urandom(16).hex()
        for spec in specs:
            spec.env.setdefault(simulate.SIMULATED_AS, name)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave nothing of this run to the next one in this process."""
    route.unconfigure(config)
    consolidate.unconfigure()
    state = config.stash.get(STATE, None)
    if state is not None:
        state.restore_environ()
    if state is not None and state.simulation is not None and not state.borrowed:
        if state.exported:
            from pytest_gpumem.plugin import simulate

            os.environ.pop(simulate.CARD_VARIABLE, None)
        state.simulation.close()


def _begin(config: pytest.Config, options: dict[str, Any]) -> None:
    """Read the settings, start the simulated card if one is asked for, find the cards."""
    from pytest_gpumem import devices

    asked = bool({"gpumem", "pytest_gpumem.plugin"} & set(options.get("plugins") or ()))
    try:
        settings = resolve(options, os.environ, config.getini, asked=asked)
        if settings.mode == "off":
            state = State(settings, devices.CardsFound((), "switched off"))
        else:
            found = devices.find_cards()
            if settings.simulated:
                from pytest_gpumem.plugin import simulate

                state = simulate.begin(settings, found)
            else:
                state = State(settings, found)
            if settings.mode == "on" and state.found.cards:
                state.found = _place(state.found)
            state.notes += [
                f"{place} does nothing with --gpumem={settings.mode}: it needs --gpumem=on"
                for place in settings.without_effect
            ]
    except BadSettingError as error:
        raise pytest.UsageError(str(error)) from None
    if settings.jax_preallocate == "off" and settings.mode != "off":
        _keep_jax_from_preallocating(state)
    state.visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    config.stash[STATE] = state


def _keep_jax_from_preallocating(state: State) -> None:
    """Let JAX take what it needs, in this process and in what it starts."""
    from pytest_gpumem.devices.frameworks import jax

    state.set_environ(jax.PREALLOCATE, "false")
    if jax.ALLOCATOR.active():
        state.notes.append(
            "--gpumem-jax-preallocate=off came too late: JAX had started before pytest read it"
        )


def _place(found: CardsFound) -> CardsFound:
    """Let a worker of xdist use another card first than its neighbour."""
    from pytest_gpumem.scheduling import workers

    return found._replace(cards=tuple(workers.place(found.cards)))


def _is_controller(config: pytest.Config) -> bool:
    """Return whether this process hands its tests to xdist's workers."""
    distributes = config.getoption("dist", "no") != "no" and config.getoption("tx", None)
    return bool(distributes) and not is_worker(config)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say in one line which card there is, and in a second one what a simulated card lacks."""
    state = config.stash[STATE]
    if state.settings.mode == "off":
        return ["gpumem: off"]
    found = state.found.cards
    shown = [f"{card.called(found)} of {format_bytes(card.total)}" for card in found]
    cards = ", ".join(shown) or f"no card: {state.found.why_none}"
    asked_for = not shown and state.settings.mode == "on"
    hint = "; --gpumem-simulate 4GiB gives the suite one" if asked_for else ""
    lines = [f"gpumem: {state.settings.mode}, {cards}{hint}"]
    if state.simulation is not None:
        if "torch" not in sys.modules and importlib.util.find_spec("torch") is None:
            lines.append("gpumem: torch is not installed: no test can use the simulated card")
        if config.get_verbosity() > 0:
            lines.append(f"gpumem: {state.simulation.not_simulated}")
    if state.found.note and not _is_controller(config):  # workers choose their cards by UUID
        lines.append(f"gpumem: {state.found.note}")
    return lines


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Read the marks of every test now: a bad one must not surface in the middle of the run."""
    if config.stash[STATE].settings.mode == "off":
        return
    found: dict[pytest.Collector, list[pytest.Mark]] = {}
    try:
        for item in items:
            for mark in _marks_of(item, found):
                _read_mark(item, mark)
    except BadSettingError as error:
        if not is_worker(config):
            raise pytest.UsageError(str(error)) from None
        # xdist answers a worker's UsageError with an INTERNALERROR: the controller raises it.
        config.workeroutput[USAGE_ERROR] = str(error)  # type: ignore[attr-defined]
        items.clear()


def _marks_of(
    node: pytest.Item | pytest.Collector, found: dict[pytest.Collector, list[pytest.Mark]]
) -> list[pytest.Mark]:
    """Return our marks on ``node``, from the session inwards: the last one is the closest.

    ``found`` remembers those of collectors, which ``Node.iter_markers`` would walk again for
    each of thousands of tests.
    """
    own = [mark for mark in reversed(node.own_markers) if mark.name in marks.MARKS]
    parent = node.parent
    if parent is None:
        return own
    if parent not in found:
        found[parent] = _marks_of(parent, found)
    return found[parent] + own


def _read_mark(item: pytest.Item, mark: pytest.Mark) -> None:
    try:
        meaning = marks.read(mark.name, mark.args, mark.kwargs)
    except ValueError as error:
        if mark.name in ("gpu", "ram") and item.config.stash[STATE].settings.mode != "on":
            return  # common names: they may be the suite's own, which were there before us
        path, line, _ = item.location
        raise BadSettingError(f"{path}:{(line or 0) + 1}: {item.nodeid}: {error}") from None
    found = item.stash.setdefault(ITEM_MARKS, ItemMarks())
    if mark.name == "gpu":
        found.need = meaning
        if meaning.ram is not None:
            found.ram = meaning.ram
        state = item.config.stash[STATE]
        state.isolates |= meaning.isolated and state.settings.isolate != "off"
    elif mark.name == "gpumem_off":
        found.off = True
    else:
        setattr(found, mark.name, meaning)


# One hook for what each test's teardown ends with: a hook of each part would cost every test.
@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """End the routing of a test, and consolidate when needed, after its own teardown."""
    if route.MANAGER in sys.modules:
        route.test_ended(item)
    if registered() is not None and item.config.stash[STATE].settings.mode == "on":
        consolidate.consolidate_if_needed(item)


# After the fixtures that have models, and before the card is left.
@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    """Let go of the models that tests shared."""
    route.session_ended()


@pytest.fixture
def gpumem(request: pytest.FixtureRequest) -> GpuMemory:
    """Return this test's VRAM in bytes: ``allocated`` now, its ``peak``, ``usage()`` by card."""
    from pytest_gpumem.plugin.measure import Measuring
    from pytest_gpumem.tracking.memory import GpuMemory

    measuring: Measuring | None = request.config.pluginmanager.get_plugin(Measuring.NAME)
    if measuring is None:
        return GpuMemory(None)
    measuring.attend()
    return GpuMemory(measuring.tracker)

"""Tests of every kind, in each of the four ways to run them, on the simulated card."""

from __future__ import annotations

import pytest
from harness import MODES, ON_WORKERS, SIMULATE, SUITES, Run, run_pytest, write_suite

UNIT = 16 * 2**10  # as in the suite
SHOWN = 512 / UNIT
"""pytest shows a tensor, of which torch joins the first and the last elements, on the card."""


@pytest.fixture(scope="module", params=ON_WORKERS)
def run(request, tmp_path_factory) -> Run:
    directory = tmp_path_factory.mktemp(request.param)
    write_suite(directory, test_kinds=(SUITES / "kinds.py").read_text())
    return run_pytest(
        directory,
        *SIMULATE,
        *MODES[request.param],
        "--gpumem-json=run.json",
        "--junit-xml=junit.xml",
        "--doctest-modules",
        beside=("xdist", "asyncio", "anyio"),
    )


def test_outcomes_are_those_of_the_tests_and_their_limits(run):
    subtests = pytest.version_tuple >= (9,)
    outcomes = run.outcomes
    outcomes.pop("subtests passed", None)
    assert outcomes["failed"] == 5, run.output
    assert outcomes["error"] == 3
    assert outcomes["xfailed"] == 2
    assert outcomes["skipped"] == 3 + (not subtests)
    assert run.status == 1


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("test_function", 5),
        ("test_wider_fixtures", 5),
        ("test_resets_the_peak", 40),
        ("test_parametrised[4]", 4),
        ("test_parametrised[6]", 6),
        ("test_method", 7),
        ("test_case", 9),
        ("test_failing_case", 11),
        ("test_asyncio", 12),
        ("test_failing_asyncio", 14 + SHOWN),
        ("test_anyio", 12),
        ("test_kinds.doctested", 18),
        ("test_skips_itself", 18),
        ("test_xfailed", 20 + SHOWN),
        ("test_fails_with_a_chain", 62 + SHOWN),
        ("test_setup_error", 22),
        ("test_teardown_error", 24),
        ("test_leak", 24),
        ("test_cycle", 26),
        ("test_fixture_readings", 30),
        ("test_within_the_limit", 30),
        ("test_over_the_limit", 32),
    ],
)
def test_the_peak_is_what_the_test_took_above_its_baseline(run, name, own):
    card = run.card(name)
    assert card.peak - card.baseline == own * UNIT


@pytest.mark.parametrize("name", ["test_nothing", "test_skipped", "test_off"])
def test_a_test_that_took_nothing_has_no_usage(run, name):
    assert run.test(name).cards == ()


@pytest.mark.parametrize(
    "name",
    [
        "test_function",
        "test_wider_fixtures",
        "test_caught_oom",
        "test_case",
        "test_failing_case",
        "test_asyncio",
        "test_failing_asyncio",
        "test_anyio",
        "test_kinds.doctested",
        "test_skips_itself",
        "test_xfailed",
        "test_fails_with_a_chain",
        "test_setup_error",
        "test_teardown_error",
        "test_cycle",
        "test_fixture_readings",
        "test_over_the_limit",
    ],
)
def test_nothing_is_left_behind(run, name):
    assert run.card(name).leftover == 0


@pytest.mark.parametrize(
    ("name", "units"),
    [("test_leak", 24), ("test_failing_leak", 26), ("test_over_the_leak_limit", 32)],
)
def test_a_leak_is_confirmed_and_its_holder_named(run, name, units):
    card = run.card(name)
    assert (card.leftover, card.leaked) == (units * UNIT, units * UNIT)
    (holder,) = card.holders
    assert holder.where.startswith("test_kinds.py: module global KEPT[")
    assert (holder.size, holder.shape, holder.dtype) == (units * UNIT, (units * UNIT,), "uint8")


def test_what_the_test_instance_keeps_is_a_leak_because_pytest_keeps_the_instance(run):
    card = run.card("test_method")
    assert card.leaked == 7 * UNIT
    assert card.holders[0].where == ("pytest's TestClass instance: self.kept_by_the_instance")


def test_what_a_wider_fixture_holds_is_not_the_tests_leak(run):
    card = run.card("test_fills_a_wider_fixture")
    assert (card.leftover, card.leaked) == (28 * UNIT, 0)
    assert "session_model" in card.note


def test_wider_fixtures_are_measured_by_themselves(run):
    taken = {
        each.name: (each.scope, each.allocated, each.peak >= each.allocated)
        for test in run.record.tests
        for each in test.fixtures
    }
    assert taken["session_model"] == ("session", 32 * UNIT, True)
    assert taken["module_model"] == ("module", 16 * UNIT, True)
    assert taken["batch"] == ("function", 2 * UNIT, True)


def test_a_fixture_gives_its_memory_back_at_its_teardown(run):
    torn_down = [
        each
        for test in run.record.tests
        for each in test.fixtures
        if each.name == "module_model" and each.released is not None
    ]
    assert torn_down
    assert {each.released for each in torn_down} == {16 * UNIT}
    assert {each.leaked for each in torn_down} == {0}


def test_an_out_of_memory_error_that_was_caught_is_counted_but_fails_nothing(run):
    assert run.card("test_caught_oom").ooms == 1
    assert run.test("test_caught_oom").outcome == "passed"
    assert run.test("test_caught_oom").oom == ""


def test_a_limit_fails_with_one_sentence_and_a_section(run):
    assert "\nallowed 480.00 KiB, took 512.00 KiB at its peak\n" in run.output
    assert "- Failed: allowed 480.00 KiB, took 512.00 KiB at its peak" in run.output
    assert "Captured GPU memory call" in run.output
    assert run.test("test_over_the_limit").outcome == "failed"


def test_a_leak_limit_fails_with_one_sentence_that_names_the_holder(run):
    assert "\nallowed to leak 16.00 KiB, leaked 512.00 KiB\n" in run.output
    assert run.test("test_over_the_leak_limit").outcome == "error"


def test_the_section_shows_peaks_leaks_and_holders(run):
    assert "leaked" in run.section
    assert "held by test_kinds.py: module global KEPT[" in run.section
    assert (
        run.section.count("test_kinds.py::test_leak\n")
        + run.section.count("test_kinds.py::test_leak [")
        >= 1
    )


def test_junit_has_the_numbers(run):
    junit = (run.directory / "junit.xml").read_text()
    assert '<property name="gpumem_peak" value="' in junit
    assert f'<property name="gpumem_leaked" value="{24 * UNIT}"' in junit


def test_every_test_is_in_the_json_once(run):
    nodeids = [each.nodeid for each in run.record.tests]
    assert len(nodeids) == len(set(nodeids))
    assert all(each.duration >= 0 for each in run.record.tests)
    assert run.record.collected == len(nodeids)
    assert run.record.simulated
    assert [card.kind for card in run.record.cards] == ["cuda"]

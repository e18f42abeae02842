"""Handlers of out-of-memory errors are proved by making each allocation fail in turn."""

from __future__ import annotations

import random

import pytest
from harness import COMPILED, MODES, run_pytest, write_suite
from oom_handlers import handlers, suite

CARD = ("-p", "gpumem", "--gpumem-simulate", "1GiB")
MORE = """

def test_takes_nothing():
    pass

def test_fails():
    take(8)
    assert False

@pytest.mark.xfail(strict=True)
def test_is_expected_to_fail():
    take(8)
    assert False

def test_is_skipped():
    take(8)
    pytest.skip("later")

@pytest.fixture(scope="module")
def table():
    return take(64)

def test_has_fixtures(request):
    table = request.getfixturevalue("table")
    with pytest.raises(torch.OutOfMemoryError if full() else ZeroDivisionError):
        take(8)
        1 / 0

def full():
    from pytest_gpumem.simulator.allocator import CachingAllocator
    return CachingAllocator.refusing.at == 1

ONCE = []

def test_passes_once():
    take(8)
    ONCE.append(None)
    assert len(ONCE) == 1

def test_leaks_anyhow():
    KEPT.append(take(8))

@pytest.mark.gpumem_off
def test_is_let_alone():
    take(8)
"""


FEW = ("right_halves_0", "wrong_keeps_the_error_0", "wrong_tries_for_ever_0", "wrong_frees_0")
"""Enough to see that each way of running pytest does the same."""


@pytest.mark.parametrize("mode", ["plain", pytest.param("n2", marks=pytest.mark.slow)])
def test_every_wrong_handler_is_found_and_no_right_one(tmp_path, mode):
    known = handlers(random.Random(mode), 1)  # noqa: S311  # sizes are no secrets
    if mode != "plain":
        known = {name: known[name] for name in FEW}
    write_suite(tmp_path, test_it=suite(known) + MORE)
    run = run_pytest(
        tmp_path, *CARD, "--gpumem-json=run.json", "--gpumem-oom-at=every", *MODES[mode]
    )

    tests = {each.nodeid.partition("::test_")[2]: each for each in run.record.tests}
    assert len(tests) == len(run.record.tests) == len(known) + 8
    found = {name: tests[name].proof for name in known}
    assert {name: tuple(each.verdict for each in proof.tried) for name, proof in found.items()} == {
        name: each.wanted for name, each in known.items()
    }
    assert {name: tests[name].outcome for name in known} == {
        name: "passed" if name.startswith("right") else "failed" for name in known
    }
    assert [each.leaked for name in known for each in found[name].tried if "keeps" not in name] == [
        0 for name in known for _ in found[name].tried if "keeps" not in name
    ]
    rest = {name: (each.outcome, each.proof) for name, each in tests.items() if name not in known}
    assert {name: outcome for name, (outcome, _) in rest.items()} == {
        "takes_nothing": "passed",
        "fails": "failed",
        "is_expected_to_fail": "xfailed",
        "is_skipped": "skipped",
        "has_fixtures": "passed",
        "passes_once": "passed",
        "leaks_anyhow": "failed",
        "is_let_alone": "passed",
    }
    for name in ("takes_nothing", "fails", "is_expected_to_fail", "is_skipped", "is_let_alone"):
        assert rest[name][1] is None
    assert [each.verdict for each in rest["has_fixtures"][1].tried] == ["recovered"]
    assert rest["passes_once"][1].tried == ()
    assert rest["passes_once"][1].why.startswith("it did not pass again: AssertionError")
    # It leaks as much undisturbed; it has no handler.
    (leaky,) = rest["leaks_anyhow"][1].tried
    assert (leaky.verdict, leaky.leaked) == ("out of memory", 0)
    assert "rerun" not in run.outcomes
    card = "--gpumem-simulate 1024MiB" + " --gpumem-simulate-compiled" * COMPILED
    line = f"pytest -p gpumem {card} --gpumem-oom-at 2 test_it.py::"
    assert f"{line}test_wrong_keeps_the_error_0" in run.output
    assert "INTERNALERROR" not in run.output


TWO = """
def test_two():
    a = take(64)
    b = take(64)
"""


@pytest.mark.parametrize(
    ("mode", "asked", "tried"),
    [("no-xdist", ("--gpumem-oom-at=2",), [2]), ("n0", ("--gpumem-oom-tries=1",), [1])],
)
def test_one_allocation_and_a_limit(tmp_path, mode, asked, tried):
    every = ("--gpumem-oom-at=every", "--gpumem-json=run.json")
    write_suite(tmp_path, test_it=suite({}) + TWO)
    run = run_pytest(tmp_path, *CARD, *every, *asked, *MODES[mode])

    assert [each.at for each in run.test("test_two").proof.tried] == tried
    assert "1 of 2 allocations of test_it.py::test_two were tried" in run.section


def test_it_needs_a_card(tmp_path):
    write_suite(tmp_path, test_it="def test(): pass")
    none = run_pytest(tmp_path, "-p", "gpumem", "--gpumem-oom-at", "first")
    assert none.status == 4
    assert "--gpumem-oom-at: there is no card to run out of memory" in none.output

"""Calls before the one whose leak counts."""

from __future__ import annotations

import json

from harness import SIMULATE, TAKE, run_pytest, write_suite

SUITE = (
    TAKE
    + """
import functools, unittest
CALLS = {}

def called(name):
    CALLS[name] = CALLS.get(name, 0) + 1
    with open("calls.json", "w") as file:
        import json
        json.dump(CALLS, file)

@functools.cache
def table():
    return take(512)

@pytest.fixture
def batch():
    return take(256)

def test_fills_a_cache(batch):
    called("cache")
    table()

def test_leaks_each_time(batch):
    called("leak")
    KEPT.append(take(128))

def test_leaves_garbage_and_leaks():
    called("garbage")
    loop = [take(1024)]
    loop.append(loop)
    KEPT.append(take(64))

def test_fails_at_first():
    called("fails")
    assert False

class Case(unittest.TestCase):
    def test_method(self):
        called("unittest")
"""
)


def test_what_stays_of_earlier_calls_does_not_count(tmp_path):
    write_suite(tmp_path, test_it=SUITE)
    (tmp_path / "budgets.toml").write_text(
        '[peaks]\n"test_it.py::test_fills_a_cache" = {"Simulated CUDA card" = "250KiB"}\n'
    )
    options = ("--gpumem-leak-warmups=2", "--gpumem-json=run.json", "--gpumem-budget=budgets.toml")
    run = run_pytest(tmp_path, *SIMULATE, *options)
    leaked = {
        test.nodeid.split("::")[-1]: test.cards[0].leaked // 1024
        for test in run.record.tests
        if test.cards and "::Case::" not in test.nodeid
    }

    assert run.outcomes == {"failed": 1, "passed": 4, "error": 1}, run.output
    # Without the cache, which the earlier calls filled: what the test itself took is judged.
    assert "took 256.00 KiB of Simulated CUDA card, 6.00 KiB (2.4%) more" in run.output
    assert leaked == {
        "test_fills_a_cache": 0,
        "test_leaks_each_time": 128,
        "test_leaves_garbage_and_leaks": 64,
    }
    assert json.loads((tmp_path / "calls.json").read_text()) == {
        "cache": 3, "leak": 3, "garbage": 3, "fails": 1, "unittest": 1,
    }  # fmt: skip

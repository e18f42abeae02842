"""What a test costs that touches no card, in calls: unlike seconds, these are always the same."""

from __future__ import annotations

import itertools
import json

from harness import SIMULATE, run_pytest, write_suite

COUNTING = """
import json, sys
import pytest

calls, ends = 0, []

def count(frame, event, _):
    global calls
    calls += event == "call" and "pytest_gpumem" in frame.f_code.co_filename

def slow_tuples():
    for name, module in list(sys.modules.items()):
        for kind in vars(module).values() if name.startswith("pytest_gpumem.") else ():
            if isinstance(kind, type) and issubclass(kind, tuple) and kind.__module__ == name:
                if hasattr(kind, "__orig_bases__"):  # made by typing
                    yield f"{name}.{kind.__name__}"

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop():
    sys.setprofile(count)
    try:
        return (yield)
    finally:
        sys.setprofile(None)
        with open("calls.json", "w") as file:
            json.dump([ends, sorted(slow_tuples())], file)

def pytest_runtest_logfinish():
    ends.append(calls)
"""
MOST = 70
"""Calls of functions of the plugin, returns to its generators counted."""


def test_what_a_test_costs_is_little_and_does_not_grow(tmp_path):
    body = "\n".join(f"def test_{number}():\n    pass\n" for number in range(200))
    write_suite(tmp_path, conftest=COUNTING, test_it=body)
    run = run_pytest(tmp_path, *SIMULATE, "--gpumem=on")
    ends, slow = json.loads((tmp_path / "calls.json").read_text())
    each = [after - before for before, after in itertools.pairwise(ends)]

    assert run.outcomes == {"passed": 200}
    assert slow == []  # see pytest_gpumem.tuples: each takes 60 us more of every start
    # The first ones teach what is learned of all; now and then a look is taken for a monitor.
    assert sorted(each)[len(each) * 9 // 10] <= MOST
    # The last one tears down what is wider than a test.
    assert sum(each[-51:-1]) <= sum(each[20:70]) + 50

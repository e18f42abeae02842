"""What a test costs that touches no card, in calls: unlike seconds, these are always the same."""

from __future__ import annotations

import itertools
import json

import pytest
from harness import SIMULATE, run_pytest, write_suite

COUNTING = """
import json, os, sys
import pytest

calls, ends = 0, []

def count(frame, event, _):
    global calls
    name = frame.f_code.co_filename
    # No hook counts: one of a suite's between two tests would have more be read.
    if event == "return" and frame.f_code.co_name in ("runtestprotocol", "worker_logfinish"):
        ends.append(calls)
    calls += event == "call" and "pytest_gpumem" in name and "simulator" not in name

def slow_tuples():
    for name, module in list(sys.modules.items()):
        ours = name.startswith("pytest_gpumem.") and "simulator" not in name
        for kind in vars(module).values() if ours else ():
            if isinstance(kind, type) and issubclass(kind, tuple) and kind.__module__ == name:
                if hasattr(kind, "__orig_bases__"):  # made by typing
                    yield f"{name}.{kind.__name__}"

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop():
    if "pytest_gpumem.tracking.offspring" in sys.modules:
        # How often it is looked for children depends on the time that tests take.
        sys.modules["pytest_gpumem.tracking.offspring"].SOON = 3600
    sys.setprofile(count)
    try:
        return (yield)
    finally:
        sys.setprofile(None)
        process = os.environ.get("PYTEST_XDIST_WORKER", "main")
        with open(f"{process}.json", "w") as file:
            json.dump([ends, sorted(slow_tuples())], file)
"""
WITH_TORCH = """
import torch
torch.ones(1, device="cuda")
"""


@pytest.mark.parametrize(
    ("process", "most", "conftest", "args"),
    [
        pytest.param("main", 49, COUNTING, (), id="one process"),
        pytest.param("main", 84, COUNTING + WITH_TORCH, (), id="torch has a card"),
        pytest.param("gw0", 54, COUNTING, ("-n1",), id="a worker"),
        pytest.param("main", 34, COUNTING, ("-n1",), id="the controller"),
    ],
)
def test_what_a_test_costs_is_little_and_does_not_grow(tmp_path, process, most, conftest, args):
    """``most`` are calls of functions of the plugin, returns to its generators counted."""
    body = "\n".join(f"def test_{number}():\n    pass\n" for number in range(200))
    write_suite(tmp_path, conftest=conftest, test_it=body)
    run = run_pytest(tmp_path, *SIMULATE, "--gpumem=on", *args)
    ends, slow = json.loads((tmp_path / f"{process}.json").read_text())
    each = [after - before for before, after in itertools.pairwise(ends)]

    assert run.outcomes == {"passed": 200}
    assert slow == []  # see pytest_gpumem.tuples: each takes 60 us more of every start
    # The first ones teach what is learned of all, the last one tears down what is wider.
    begin, end = each[20:70], each[-51:-1]
    assert sum(each[20:-1]) / len(each[20:-1]) <= most
    if not args:  # a worker is handed many tests at once
        assert sum(end) <= sum(begin) + 100  # now and then a look is taken for a monitor


ALL = """
import os, sys

calls = 0

def count(frame, event, _):
    global calls
    name = frame.f_code.co_filename
    calls += event == "call" and "pytest_gpumem" in name and "simulator" not in name

sys.setprofile(count)

def pytest_unconfigure():
    sys.setprofile(None)
    with open(os.environ.get("PYTEST_XDIST_WORKER", "main"), "w") as file:
        file.write(str(calls))
"""


@pytest.mark.parametrize(("process", "most"), [("gw0", 80), ("main", 52)])
def test_what_a_test_costs_from_the_start_to_the_end_is_little(tmp_path, process, most):
    """Also what is asked of each test when it is collected and planned, and when the run ends."""
    calls = []
    for tests in (100, 300):
        suite = tmp_path / str(tests)
        suite.mkdir()
        body = "\n".join(f"def test_{number}():\n    pass\n" for number in range(tests))
        write_suite(suite, conftest=ALL, test_it=body)
        assert run_pytest(suite, *SIMULATE, "--gpumem=on", "-n1").outcomes == {"passed": tests}
        calls.append(int((suite / process).read_text()))

    assert (calls[1] - calls[0]) / 200 <= most


LOOKS = """
import gc, json, sys
import pytest, torch

looks = {"get_objects": 0, "get_referrers": 0, "collect": 0}

def counted(name, is_full):
    plain = getattr(gc, name)
    def wrapper(*args, **kwargs):
        asks = sys._getframe(1).f_globals.get("__name__", "")
        looks[name] += asks.startswith("pytest_gpumem.") and is_full(*args, **kwargs)
        return plain(*args, **kwargs)
    setattr(gc, name, wrapper)

counted("get_objects", lambda generation=None: generation in (None, 2))
counted("get_referrers", lambda *_: True)
counted("collect", lambda generation=2: generation == 2)

def pytest_unconfigure():
    with open("looks.json", "w") as file:
        json.dump(looks, file)
"""
WIDE = """
import gc
import pytest, torch

class Base:
    @pytest.fixture(scope="class", autouse=True)
    def kept(self):
        yield torch.zeros(256, device="cuda")

    def test_one(self, kept):
        gc.collect(1)

    def test_two(self, kept):
        gc.collect()

for number in range(20):
    globals()[f"TestClass{number}"] = type(f"TestClass{number}", (Base,), {})
del Base
"""
TRAINED = """
import pytest, torch

@pytest.fixture(scope="session")
def model():
    return torch.nn.Linear(64, 64, device="cuda")

@pytest.fixture(scope="class", params=range(20))
def kept(request):
    yield torch.zeros(256, device="cuda")

class TestIt:
    def test_it(self, model, kept):
        model.zero_grad()
        model(torch.ones(1, 64, device="cuda")).sum().backward()
"""
FAILS = """
import pytest, torch

@pytest.mark.parametrize("number", range(20))
def test_it(number):
    value = torch.zeros(256, device="cuda")
    assert number < 0
"""
LEAKS = """
import pytest, torch

KEPT = []

@pytest.mark.parametrize("number", range(20))
def test_it(number):
    KEPT.append(torch.zeros(256, device="cuda"))
"""


@pytest.mark.parametrize(
    ("suite", "most"),
    [
        pytest.param(WIDE, (1, 0, 0), id="wide fixtures"),
        pytest.param(TRAINED, (3, 0, 1), id="a model that is trained"),
        pytest.param(FAILS, (0, 0, 0), id="failures"),
        # The first is searched upwards, one step from it to a name; the others below that.
        pytest.param(LEAKS, (2, 2, 1), id="leaks"),
    ],
)
def test_all_objects_are_looked_at_seldom(tmp_path, suite, most):
    """``most`` are passes over all objects, questions who refers to some, and full collections."""
    write_suite(tmp_path, conftest=LOOKS, test_it=suite)
    run_pytest(tmp_path, *SIMULATE, "--gpumem=on")
    looks = json.loads((tmp_path / "looks.json").read_text())

    assert all(each <= limit for each, limit in zip(looks.values(), most, strict=True)), looks


POOL = """
class Pool:
    def __init__(self):
        self.models = {}

@pytest.fixture(scope="session")
def pool():
    return Pool()
"""
LOADS = """
import torch

def test_loads(pool):
    pool.models[__name__] = [torch.zeros(1024, device="cuda")]

def test_uses(pool):
    assert pool.models[__name__]
"""


def test_what_a_wider_fixture_keeps_is_searched_once(tmp_path):
    """And what comes to it later is found there, as its test ends and as its module ends."""
    asked = []
    for modules in (2, 6):
        suite = tmp_path / str(modules)
        suite.mkdir()
        names = {f"test_{number}": LOADS for number in range(modules)}
        write_suite(suite, conftest=LOOKS + POOL, **names)
        assert "0 leaks" in run_pytest(suite, *SIMULATE, "--gpumem=on").section
        asked.append(json.loads((suite / "looks.json").read_text())["get_referrers"])

    assert asked[0] == asked[1]

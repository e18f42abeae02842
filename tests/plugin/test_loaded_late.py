"""A test that loads the framework itself is told of as one of a suite that loads it at once."""

from __future__ import annotations

import shutil

import pytest
from harness import SIMULATE, WITHOUT_TORCH, run_pytest, write_suite

SUITE = """
import importlib, sys
import pytest

KEPT = []
NAME = "{framework}"

def test_1_before():
    assert (NAME in sys.modules) == {at_once}

class Taken:
    def __init__(self, size):
        self.size, self.allocator = size, importlib.import_module(NAME).ALLOCATOR
        self.allocator.take(size)

    def __del__(self):
        if self.allocator.shared.joined:
            self.allocator.give(self.size)

def take(kib):
    if NAME != "torch":
        return Taken(kib * 1024)
    torch = importlib.import_module(NAME)
    return torch.zeros(kib * 1024, dtype=torch.uint8, device="cuda")

{body}
"""
AFTER = """
def test_3_after():
    held = take(512)
"""
BODIES = {
    "in the test": """
def test_2():
    large = take(4096)
    del large
    KEPT.append(take(256))
""",
    "in a test that fails": """
def test_2():
    KEPT.append(take(256))
    assert not take(4096)
""",
    "in a fixture": """
@pytest.fixture
def model():
    yield take(256)

def test_2(model):
    take(1024)
""",
    "in a fixture that keeps it": """
@pytest.fixture
def model():
    KEPT.append(take(256))

def test_2(model):
    take(1024)
""",
    "in a fixture that fails": """
@pytest.fixture
def model():
    KEPT.append(take(256))
    raise ValueError

def test_2(model):
    pass
""",
    "in a fixture of the module": """
@pytest.fixture(scope="module")
def model():
    yield take(256)

def test_2(model):
    take(1024)
""",
    "in a fixture within another": """
@pytest.fixture
def small():
    return take(64)

@pytest.fixture
def large(request):
    return [request.getfixturevalue("small"), take(2048)]

def test_2(large):
    take(1024)
""",
    "in the teardown of a fixture": """
@pytest.fixture
def late():
    yield
    take(1024)
    KEPT.append(take(256))

def test_2(late):
    pass
""",
    "in the teardown of a module's fixture": """
@pytest.fixture(scope="module")
def late():
    yield
    take(1024)
    KEPT.append(take(256))

class TestIt:
    def test_2(self, late):
        pass
""",
    "in a set-up function": """
def setup_function(function):
    if function.__name__ == "test_2":
        KEPT.append(take(256))

def test_2():
    take(1024)
""",
    "in a fixture that asks for a wider one then": """
@pytest.fixture(scope="module")
def wide():
    yield take(128)

@pytest.fixture
def model(request):
    own = take(256)
    return own, request.getfixturevalue("wide"), take(64)

def test_2(model):
    take(1024)
""",
    "in a fixture after one that took nothing": """
@pytest.fixture
def nothing():
    yield

@pytest.fixture
def model(nothing):
    KEPT.append(take(256))
    yield

def test_2(model, request):
    request.getfixturevalue("late")

@pytest.fixture
def late():
    return take(64)
""",
    "in the set-up of a class": """
class TestIt:
    @classmethod
    def setup_class(cls):
        cls.model = take(256)

    @classmethod
    def teardown_class(cls):
        del cls.model
        KEPT.append(take(32))

    def test_2(self):
        take(1024)
""",
    "in a method that keeps it": """
class TestIt:
    def test_2(self):
        self.model = take(256)
""",
    "in the set-up of a unittest": """
import unittest

class TestIt(unittest.TestCase):
    def setUp(self):
        self.model = take(256)

    def tearDown(self):
        KEPT.append(take(32))

    def test_2(self):
        with self.subTest():
            take(1024)
""",
    "in a thread": """
import threading

def test_2():
    thread = threading.Thread(target=lambda: KEPT.append(take(256)))
    thread.start()
    thread.join()
""",
    "in a test that is not measured": """
@pytest.mark.gpumem_off
def test_2():
    KEPT.append(take(256))
""",
    "in a teardown that fails": """
@pytest.fixture
def late():
    yield
    KEPT.append(take(256))
    raise ValueError

def test_2(late):
    pass
""",
    "and asks what it took": """
def test_2(gpumem):
    take(1024)
    assert gpumem.peak == 1024 * 1024
    held = take(2048)
    assert gpumem.allocated == 2048 * 1024
""",
}
LATER = """
from test_it import take

def test_4():
    held = take(512)
"""
LAST = {
    "in the last teardown of a module": """
@pytest.fixture
def late():
    box = []
    yield box
    box.append(take(256))
    KEPT.append(take(128))

def test_2(late):
    pass
""",
    "in the teardown of the module": """
def teardown_module():
    KEPT.append(take(256))

def test_2():
    pass
""",
}
CASES = [
    *(pytest.param("without_torch", text + AFTER, (), id=name) for name, text in BODIES.items()),
    *(pytest.param("without_torch", text, (), id=name) for name, text in LAST.items()),
    pytest.param("without_torch", BODIES["in a fixture"] + AFTER, ("-n1",), id="in a worker"),
    pytest.param("torch", BODIES["in a fixture that keeps it"] + AFTER, (), id="torch"),
]


@pytest.mark.parametrize(("framework", "body", "arguments"), CASES)
def test_it_is_told_of_as_if_it_had_been_loaded_before(tmp_path, framework, body, arguments):
    told = []
    for at_once in (True, False):
        directory = tmp_path / f"at-once-{at_once}"
        directory.mkdir()
        shutil.copy(WITHOUT_TORCH, directory)
        suite = SUITE.format(framework=framework, at_once=at_once, body=body)
        write_suite(directory, conftest=f"import {framework}" * at_once, test_it=suite)
        (directory / "test_later.py").write_text("def test_4(): pass" if AFTER in body else LATER)
        asked = *SIMULATE, "--gpumem=on", "--gpumem-json=run.json", *arguments
        told.append(run_pytest(directory, *asked))
    one, other = told

    assert one.outcomes == other.outcomes
    assert any(test.cards for test in one.record.tests)
    for before, after in zip(one.record.tests, other.record.tests, strict=True):
        assert before.nodeid == after.nodeid
        assert bool(before.oom) == bool(after.oom)
        assert of_some_card(before.cards) == of_some_card(after.cards)
        assert of_some_card(before.fixtures) == of_some_card(after.fixtures)
        assert of_some_card(before.scopes) == of_some_card(after.scopes)


def of_some_card(usages):
    """Return usages without the name of the card, which each run makes anew."""
    return [usage._replace(card="") for usage in usages]


SETTINGS = """
import os
import pytest

def test_1():
    pass

def test_2_sets():
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"

@pytest.mark.xfail
def test_3_fails():
    raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

def test_4():
    pass
"""


def test_without_a_framework_each_is_told_of_what_happened_in_it(tmp_path):
    write_suite(tmp_path, test_it=SETTINGS)
    run = run_pytest(tmp_path, *SIMULATE, "--gpumem=track", "--gpumem-json=run.json")

    left = {test.nodeid[17:]: [each.what for each in test.left] for test in run.record.tests}
    assert left == {"1": [], "2_sets": ["CUDA_VISIBLE_DEVICES"], "3_fails": [], "4": []}
    assert [bool(test.oom) for test in run.record.tests] == [False, False, True, False]


FORGOTTEN = """
import sys, threading

def test_outer(pytester):
    pytester.makepyfile("def test_inner(): import torch; torch.ones(9, device='cuda')")
    pytester.runpytest_inprocess("-p", "no:gpumem").assert_outcomes(passed=1)
    assert "torch" not in sys.modules

def test_thread():
    ran = []
    thread = threading.Thread(target=lambda: ran.append("torch" in sys.modules))
    thread.start()
    thread.join()
    assert ran == [False]
"""


def test_a_thread_starts_after_a_run_within_a_test_that_was_the_first_to_load_torch(tmp_path):
    # pytester takes what such a run imported out of sys.modules; torch cannot be loaded twice.
    write_suite(tmp_path, conftest='pytest_plugins = "pytester"', test_it=FORGOTTEN)
    finished = run_pytest(tmp_path, *SIMULATE)

    assert finished.outcomes == {"passed": 2}, finished.output
    assert finished.status == 0, finished.output

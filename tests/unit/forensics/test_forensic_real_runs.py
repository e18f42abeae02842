"""What pytest really prints, in every verbosity and style of traceback."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pytest_gpumem.forensics import analysis

SUITE = """
import logging, unittest
import pytest

class OutOfMemoryError(RuntimeError):
    __module__ = "torch"

MESSAGE = (
    "CUDA out of memory. Tried to allocate 46.00 MiB. GPU 0 has a total capacity of 3.81 GiB of "
    "which 16.19 MiB is free. Process 101 has 384.00 MiB memory in use. Including non-PyTorch "
    "memory, this process has 2.19 GiB memory in use. Of the allocated memory 1.69 GiB is "
    "allocated by PyTorch, and 30.07 MiB is reserved by PyTorch but unallocated. If reserved but "
    "unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
)

def run_out():
    raise OutOfMemoryError(MESSAGE)

class TestClass:
    @pytest.mark.parametrize("case", ["fits", "x::y-[1]", "q.r"])
    def test_case(self, case):
        if case != "fits":
            run_out()

    def test_chained(self):
        try:
            run_out()
        except RuntimeError as error:
            raise ValueError(f"wrapped: {error}") from error

def test_handled():
    try:
        run_out()
    except RuntimeError as error:
        print("caught:", error)
        logging.warning("%s, retrying", error)

def test_expected():
    with pytest.raises(OutOfMemoryError, match="CUDA out of memory"):
        run_out()

def test_expected_otherwise():
    with pytest.raises(OutOfMemoryError, match="CUDA out of memory. Tried to allocate 99"):
        run_out()

def test_did_not_come():
    with pytest.raises(OutOfMemoryError):
        pass

def test_quotes():
    assert "CUDA out of memory" == MESSAGE

@pytest.fixture(scope="module")
def model():
    run_out()

def test_first_with_model(model): ...

def test_second_with_model(model): ...

@pytest.fixture
def late():
    yield
    run_out()

def test_late(late): ...

class TestUnit(unittest.TestCase):
    def test_unit(self):
        run_out()

@pytest.mark.xfail
def test_hopeless():
    run_out()

def test_skipped():
    pytest.skip("CUDA out of memory")
"""

EVENTS = [
    ("TestClass::test_case[x::y-[1]]", "call", 2, 1),
    ("TestClass::test_case[q.r]", "call", 3, 1),
    ("TestClass::test_chained", "call", 4, 1),
    ("test_first_with_model", "setup", 10, 2),
    ("test_late", "teardown", 12, 1),
    ("TestUnit::test_unit", "call", 13, 1),
]
# Summaries cut to 80 columns: neither what was wrapped nor what was the same error can be seen.
CUT = [
    *EVENTS[:2],
    ("test_first_with_model", "setup", 10, 1),
    ("test_second_with_model", "setup", 11, 1),
    *EVENTS[4:],
]


# Reports have their rows in the order in which workers reported.
UNORDERED = [(name, phase, None, felled) for name, phase, _, felled in EVENTS]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", EVENTS),
        ("-q", EVENTS),
        ("-v", EVENTS),
        ("-v --color=yes", EVENTS),
        ("-s -v --tb=short", EVENTS),
        ("--tb=line", EVENTS),
        ("--tb=native -rA", EVENTS),
        ("-v --tb=no", CUT),
        ("--junitxml=told.xml", UNORDERED),
        ("--html=told.html --self-contained-html", UNORDERED),
    ],
)
def test_a_real_run_is_told_right(options, expected, tmp_path):
    (tmp_path / "test_suite.py").write_text(SUITE)
    log = tmp_path / "run.log"
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    with log.open("wb") as file:
        subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:gpumem",
             *options.split(), "test_suite.py"],
            cwd=tmp_path,
            env=environment | {"COLUMNS": "80"},
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )  # fmt: skip
    structured = [*tmp_path.glob("told.*")]

    found = analysis.analyse([str(path) for path in structured or [log]]).events

    assert [
        (event.nodeid.removeprefix("test_suite.py::"), event.phase, event.position, event.felled)
        for event in found
    ] == expected
    assert {event.tried_bytes for event in found} <= {46 << 20, None}

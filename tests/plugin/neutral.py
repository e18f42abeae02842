"""Compares a suite's outcomes with and without the plugin, test by test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

from harness import SIMULATE, Run, run_pytest

TRACK = {"track": ()}
OURS = {
    "on": ("-p", "gpumem"),
    "on, simulated card": SIMULATE,
    "on, simulated card, -n 2": (*SIMULATE, "-n", "2"),
}
"""How the plugin is used where the suite knows nothing of it."""

NEIGHBOURS = {
    "rerunfailures": ("-p", "rerunfailures", "--reruns", "1"),
    "timeout": ("-p", "timeout", "--timeout", "60"),
    "asyncio": ("-p", "asyncio"),
    "html": ("-p", "metadata", "-p", "html", "--html", "report.html"),
    "randomly": ("-p", "randomly", "--randomly-seed", "7"),
    "cov": ("-p", "pytest_cov", "--cov", "."),
    "sugar": ("-p", "sugar", "--force-sugar"),
    "benchmark": ("-p", "benchmark"),
    "memray": ("-p", "memray", "--memray"),
    "anyio": ("-p", "anyio"),
    "hypothesis": ("-p", "hypothesispytest"),
}
"""Other plugins by name, and how each is used."""

RUNNERS = {
    "flaky": ("-p", "flaky", "--force-flaky"),
    "retry": ("-p", "pytest-retry", "--retries", "1"),
    "repeat": ("-p", "repeat", "--count", "2"),
    "split": ("-p", "pytest-split", "--splits", "2", "--group", "1"),
}
"""Those that run tests in a way of their own, or others, and do not go together."""

ON_PYTEST8 = {
    "forked": ("-p", "pytest_forked", "--forked"),
    "isolate": ("-p", "pytest_isolate", "--isolate"),
}
"""Those that run tests in a child; on pytest 9.2 both fail, with us and without."""

NO_AUTOLOAD = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

HABITS = """
import asyncio, pathlib, unittest, warnings
import pytest

SEEN = []

class OutOfMemoryError(RuntimeError):  # as torch words it; more than any card has
    def __init__(self):
        super().__init__("CUDA out of memory. Tried to allocate 9000.00 GiB. GPU 0 is full.")

@pytest.fixture
def full(): raise OutOfMemoryError

@pytest.fixture(scope="module")
def wide_and_full(): raise OutOfMemoryError

@pytest.fixture
def full_at_last():
    yield
    raise OutOfMemoryError

def test_runs_out(): raise OutOfMemoryError
def test_runs_out_in_set_up(full): pass
def test_runs_out_in_a_wide_fixture(wide_and_full): pass
def test_runs_out_again_in_a_wide_fixture(wide_and_full): pass
def test_runs_out_in_teardown(full_at_last): pass

@pytest.mark.xfail
def test_runs_out_as_expected(): raise OutOfMemoryError

def test_catches_it():
    with pytest.raises(OutOfMemoryError): raise OutOfMemoryError

def test_runs_out_in_a_subtest(subtests):
    with subtests.test(): raise OutOfMemoryError

def test_passes(tmp_path): (tmp_path / "a").write_text("a")
def test_fails(): assert [1, 2] == [1, 3]
def test_skips(): pytest.skip("not here")

@pytest.mark.xfail
def test_fails_as_expected(): assert False

@pytest.mark.xfail(strict=True)
def test_passes_unexpectedly(): pass

@pytest.mark.parametrize("number", range(8))
def test_numbers(number): assert number != 5

@pytest.fixture
def broken(): raise ValueError("set-up")

@pytest.fixture
def untidy():
    yield
    raise ValueError("teardown")

@pytest.fixture(scope="module", params=["a", "b"])
def letter(request): return request.param

def test_error(broken): pass
def test_error_after(untidy): pass
def test_failure_and_error(untidy): assert False
def test_letter(letter): assert letter == "a"

def test_flaky():  # passes when it is run again
    SEEN.append(1)
    assert len(SEEN) > 1

@pytest.mark.asyncio
async def test_async():
    await asyncio.sleep(0)

@pytest.mark.timeout(0.2)
def test_slow():
    import time
    time.sleep(0.5)

def test_measured(benchmark): assert benchmark(lambda: 1) == 1

@pytest.mark.limit_memory("1 MB")
def test_large(): assert len(bytearray(20_000_000))

def test_subtests(subtests):
    for i in range(3):
        with subtests.test(i=i):
            assert i != 1

def test_warns():
    with pytest.warns(UserWarning):
        warnings.warn("here")

def test_output(capsys, caplog, recwarn, monkeypatch, request, record_property):
    print("x")
    record_property("mine", 1)
    assert capsys.readouterr().out == "x\\n"
    monkeypatch.setenv("HERE", "1")

class TestClass:
    @pytest.fixture(autouse=True, scope="class")
    def wide(self): yield
    @classmethod
    def setup_class(cls): cls.kept = 1
    def test_first(self): assert self.kept
    def test_second(self): assert not self.kept

class TestUnit(unittest.TestCase):
    def setUp(self): self.x = 1
    def test_equal(self): self.assertEqual(self.x, 2)
    def test_sub(self):
        for i in range(2):
            with self.subTest(i=i): self.assertEqual(i, 0)
    @unittest.skip("never")
    def test_skipped(self): pass
    @unittest.expectedFailure
    def test_expected(self): self.assertEqual(1, 2)
"""
"""A suite with every outcome. Where a plugin is missing its test fails, with and without us."""

INI = """
[pytest]
asyncio_default_fixture_loop_scope = function
markers =
    asyncio
    timeout
    limit_memory
filterwarnings = ignore
"""


@dataclass(frozen=True)
class Difference:
    """What one way of using the plugin changed."""

    way: str
    tests: dict[str, tuple[str, str]]
    """Outcomes without and with the plugin, by test."""
    compared: int
    output: str


def write_habits(directory: Path) -> None:
    (directory / "test_habits.py").write_text(HABITS)
    (directory / "pytest.ini").write_text(INI)


def differences(
    directory: Path,
    arguments: Sequence[str],
    ways: Mapping[str, Sequence[str]],
    env: Mapping[str, str] | None = None,
) -> Iterator[Difference]:
    """Run the suite without the plugin and in each of the ways, and yield what differs."""
    bare: dict[tuple[str, ...], Counter[tuple[str, str]]] = {}
    for way, options in ways.items():
        workers = tuple(options[options.index("-n") :]) if "-n" in options else ()
        without = ("-p", "no:gpumem", *workers, *arguments)
        if workers not in bare:
            bare[workers] = run_outcomes(directory, without, env)[1]
        finished, ours = run_outcomes(directory, (*options, *arguments), env)
        differ = differing(bare[workers], ours)
        if differ:
            again = run_outcomes(directory, without, env)[1]
            unstable = differing(bare[workers], again)
            differ = {test: pair for test, pair in differ.items() if test not in unstable}
        yield Difference(way, differ, sum(ours.values()), finished.output)


def run_outcomes(
    directory: Path, arguments: Sequence[str], env: Mapping[str, str] | None
) -> tuple[Run, Counter[tuple[str, str]]]:
    """Run a suite and return how often each test ended how, and the exit status among them."""
    xml = directory / "junit.xml"
    xml.unlink(missing_ok=True)
    finished = run_pytest(
        directory,
        "-q",
        "--tb=no",
        "--junitxml",
        str(xml),
        *arguments,
        beside=None,
        env=dict(env or {}),
        timeout=1800,
    )
    if not xml.exists():
        raise RuntimeError(f"the suite did not run:\n{finished.output}")
    status = Counter([("exit status", str(int(finished.status)))])
    return finished, status + read_outcomes(xml)


def read_outcomes(junit: Path) -> Counter[tuple[str, str]]:
    """Return how often each test ended how, from pytest's JUnit XML."""
    found: Counter[tuple[str, str]] = Counter()
    for case in ET.parse(junit).iter("testcase"):  # noqa: S314  # pytest wrote it a moment ago
        kinds = [f"{each.tag} {each.get('type', '')}".strip() for each in case]
        kinds = sorted(each for each in kinds if not each.startswith(("properties", "system-")))
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name, " and ".join(kinds) or "passed"] += 1
    return found


def differing(
    one: Counter[tuple[str, str]], other: Counter[tuple[str, str]]
) -> dict[str, tuple[str, str]]:
    """Return the tests that ended otherwise, each with its outcomes in ``one`` and ``other``."""
    tests = {test for test, _ in ((one - other) + (other - one))}
    return {test: (outcomes(one, test), outcomes(other, test)) for test in tests}


def outcomes(counts: Counter[tuple[str, str]], test: str) -> str:
    """Return in words how a test ended, ``not run`` if it is missing."""
    found = (f"{n} x {how}" for (name, how), n in counts.items() if name == test)
    return ", ".join(found) or "not run"

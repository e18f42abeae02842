"""Runs on real xdist workers under the scheduler, compared with plain ``--dist load``.

The card is the simulated one without torch: a fixture takes bytes of it and raises what torch
would raise.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import pytest
from _pytest.runner import SetupState
from harness import WITHOUT_TORCH, run_pytest, write_suite
from xdist.remote import WorkerInteractor

from pytest_gpumem.plugin.xdist import worker as xdist_worker
from pytest_gpumem.plugin.xdist.messages import Taken, cards_of, taken
from pytest_gpumem.records import CardUsage, properties
from pytest_gpumem.scheduling.estimates import planned_tests
from pytest_gpumem.scheduling.history import History
from pytest_gpumem.simulator.card import SharedCard
from pytest_gpumem.units import parse_bytes

MIB = 2**20
CARD = parse_bytes("3.81GiB")
CONTEXT = 384 * MIB

CONFTEST = """
import os
from pathlib import Path

import pytest
from without_torch import ALLOCATOR

MIB = 2**20
HERE = Path(__file__).parent


def log(*words):
    with (HERE / "log").open("a") as file:
        file.write(" ".join(map(str, (os.environ.get("PYTEST_XDIST_WORKER"), *words))) + "\\n")


def take(mib):
    ALLOCATOR.take(mib * MIB)


def give(mib):
    ALLOCATOR.give(mib * MIB)


ALLOCATOR.release_cached = lambda: log("release")


@pytest.fixture
def vram():
    import time

    taken = []

    def _take(mib, seconds=0.0):
        take(mib)
        taken.append(mib)
        time.sleep(seconds)

    yield _take
    for mib in taken:
        give(mib)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    result = yield
    # All was reported. End this worker, as one whose CUDA context is broken does, or just so.
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if os.path.exists("leave-" + worker):
        item.config.pluginmanager.get_plugin("gpumem-worker").leave()
    if os.path.exists("leave-" + worker) or os.path.exists("die-" + worker):
        os._exit(1)
    return result


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    # In a worker xdist has sent it by now.
    if report.outcome != "passed":
        (HERE / "reported").touch()


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    if os.environ.get("NO_WORKER_PLUGIN"):
        config.pluginmanager.unregister(name="gpumem-worker")
"""

# Starting every installed plugin in every worker would be most of the time.
PLUGINS = ("xdist", "rerunfailures")
OURS = ("-p", "gpumem", "--gpumem-headroom=0B")
NO_OTHERS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
IMPORTS = "import os, signal, sys, time\nimport pytest\nfrom conftest import give, log, take\n"


@pytest.fixture
def run(tmp_path):
    """Run a suite of one or more files on workers; the card is new for each run."""

    def _run(source, *arguments, workers=2, plain=False, env=None, **files):
        modules = {"test_it": source} if isinstance(source, str) else source
        write_suite(tmp_path, **{name: IMPORTS + text for name, text in modules.items()}, **files)
        (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\nmarkers = gpu\n")
        shutil.copy(WITHOUT_TORCH, tmp_path)
        if not (tmp_path / "conftest.py").exists():
            (tmp_path / "conftest.py").write_text(CONFTEST)
        for name in ("card", "card.lock", "log", "reported", "taken"):
            (tmp_path / name).unlink(missing_ok=True)
        SharedCard.create(tmp_path / "card", total=CARD, context=CONTEXT).close()
        (tmp_path / "log").touch()
        environment = {"GPUMEM_SIMULATE_CARD": str(tmp_path / "card")} | (env or {})
        arguments = (*(("-p", "no:gpumem") if plain else OURS), f"-n{workers}", *arguments)
        return run_pytest(tmp_path, *arguments, beside=PLUGINS, env=environment)

    return _run


def said(finished):
    """Return what the tests logged, as (worker, words)."""
    lines = (finished.directory / "log").read_text().splitlines()
    return [tuple(line.split(" ", 1)) for line in lines]


def words(finished):
    return [each[1] for each in said(finished)]


def results(finished):
    """Return each test's outcomes as the terminal shows them with -v."""
    found = re.findall(r"^(?:\[gw\d+\] \[ *\d+%\] )([A-Z]+) (\S+)", finished.output, re.MULTILINE)
    return sorted((nodeid, outcome) for outcome, nodeid in found)


MIXED = {
    "test_a": """
@pytest.fixture(scope="module")
def model():
    yield log("set up a")
    print("said while tearing a down")
    raise ValueError("a cannot be torn down")

@pytest.mark.parametrize("i", range(4))
def test_good(model, i): pass

def test_bad(model): assert 0
@pytest.mark.skip
def test_skip(): pass
""",
    "test_b": """
class TestMany:
    @classmethod
    def setup_class(cls): cls.ready = True
    @pytest.mark.parametrize("i", range(10))
    def test_ready(self, i): assert self.ready

@pytest.fixture
def broken(): raise ValueError("never set up")
def test_error(broken): pass

@pytest.fixture
def torn(): yield; raise ValueError("own teardown")
def test_torn(torn): pass
TRIES = []
@pytest.mark.flaky(reruns=2)
def test_flaky():
    TRIES.append(1)
    assert len(TRIES) == 2
""",
    "test_c": """
import unittest
class Case(unittest.TestCase):
    def test_one(self): pass
    @unittest.skip("no")
    def test_two(self): pass
@pytest.mark.xfail(strict=True)
def test_xfail(): assert 0
def test_gpu(vram): vram(100)
""",
}


@pytest.mark.parametrize("workers", [1, 3])
def test_outcomes_are_those_of_plain_xdist_and_a_late_error_is_the_last_tests(run, workers):
    # How many workers meet module a, and so its failing teardown, is the scheduler's choice.
    ours = run(MIXED, "-v", workers=workers)
    plain = run(MIXED, "-v", plain=True, workers=workers)

    def own(finished):
        return [each for each in results(finished) if each[1] != "ERROR" or "test_a" not in each[0]]

    assert "xdist schedules" not in ours.output
    assert own(ours) == own(plain)
    assert ours.status == plain.status == 1
    if workers == 1:
        errors = [nodeid for nodeid, outcome in results(ours) if outcome == "ERROR"]
        assert errors == ["test_a.py::test_skip", "test_b.py::test_error", "test_b.py::test_torn"]
        assert "a cannot be torn down" in ours.output
        (after,) = re.findall("Captured stdout teardown -+\\n(.*)", ours.output)
        assert after == "said while tearing a down"


def test_a_late_teardown_error_of_an_expected_failure_is_expected(run):
    source = """
@pytest.fixture(scope="module")
def model(): yield; raise ValueError("late")
@pytest.mark.xfail
def test_a(model): pass
"""
    finished = run({"test_a": source, "test_b": "def test_b(): pass"}, workers=1)

    assert finished.outcomes == {"passed": 1, "xpassed": 1, "xfailed": 1}, finished.output


def test_a_test_that_closes_the_output_costs_what_it_costs_under_xdist(run):
    source = """
import sys
def test_closes(): sys.stdout.close(); sys.stderr.close()
def test_b(): pass
def test_c(): assert False
"""
    ours, plain = (run({"test_a": source}, "-v", plain=each, workers=1) for each in (False, True))

    assert results(ours) == results(plain)
    assert ours.outcomes == plain.outcomes, ours.output
    assert ours.status == plain.status == 1


def test_a_warning_of_a_late_teardown_meets_the_modules_filters(run):
    source = """
import warnings
pytestmark = pytest.mark.filterwarnings("ignore:known")
@pytest.fixture(scope="module")
def model(): yield; warnings.warn("known"); log("torn down")
def test_a(model): pass
"""
    finished = run({"test_a": source, "test_b": "def test_b(): pass"}, workers=1)

    assert finished.outcomes == {"passed": 2}, finished.output
    assert words(finished) == ["torn down"]


HEAVY = """
@pytest.mark.gpu(vram="2GiB")
@pytest.mark.parametrize("i", range(4))
def test_heavy(vram, i): vram(2000, 0.3)
@pytest.mark.parametrize("i", range(8))
def test_cpu(i): time.sleep(0.05)
"""


def test_marked_tests_never_ask_for_more_than_the_card_has(run):
    ours, plain = run(HEAVY, workers=4), run(HEAVY, plain=True, workers=4)

    assert ours.outcomes == {"passed": 12}, ours.output
    assert plain.outcomes["failed"] >= 1


def test_a_waiting_worker_keeps_its_module_fixtures(run):
    source = """
@pytest.fixture(scope="module")
def model():
    yield log("set up")
    log("torn down")

@pytest.mark.gpu(vram="3GiB")
@pytest.mark.parametrize("i", range(4))
def test_heavy(model, vram, i):
    vram(3000, 0.05)
"""
    finished = run({"test_a": source, "test_b": source}, workers=2)

    assert finished.outcomes == {"passed": 8}, finished.output
    assert 2 <= words(finished).count("set up") <= 4
    assert words(finished).count("set up") == words(finished).count("torn down")


EXCLUSIVE = """
import fcntl
@pytest.fixture(scope="{scope}")
def engine():
    with open("engine.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
{mark}
@pytest.mark.parametrize("i", range(2))
def test_engine(engine, i): time.sleep(0.01)
"""


@pytest.mark.parametrize("mark", ["", '@pytest.mark.gpu(vram="3GiB")'])
@pytest.mark.parametrize(("scope", "files"), [("session", "a"), ("module", "abc")])
def test_wide_fixtures_that_exclude_one_another_end(run, scope, files, mark):
    source = EXCLUSIVE.format(scope=scope, mark=mark)
    # One that needs no card runs beside, and waits for the lock.
    beside = "def test_beside(engine): time.sleep(0.01)\n"
    suite = {f"test_{name}": source + beside for name in files}
    finished = run(suite, workers=3)

    assert finished.outcomes == {"passed": 3 * len(files)}, finished.output


OPPOSITE = """
import fcntl

@pytest.fixture(scope="session")
def first():
    with open("first.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

@pytest.fixture(scope="session")
def second():
    with open("second.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
"""


def test_workers_set_session_fixtures_up_in_one_order(run):
    # In the order in which the scheduler likes to hand these out, one worker has the first lock
    # and waits for the second one, the other has the second one and waits for the first.
    one = """
@pytest.mark.gpu(vram="2.6GiB")
def test_large(first): time.sleep(0.05)
@pytest.mark.gpu(vram="700MiB")
def test_small(first): time.sleep(0.05)
"""
    two = """
@pytest.mark.gpu(vram="700MiB")
def test_slow(second): time.sleep(0.3)
def test_cpu(second): time.sleep(0.3)
"""
    finished = run({"test_a": one, "test_b": two}, conftest=CONFTEST + OPPOSITE)

    assert finished.outcomes == {"passed": 4}, finished.output


LEASING = """
import fcntl
from pytest_gpumem import gpu_lease

@pytest.fixture(scope="module")
def lock():
    with open("the.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        open("locked", "w").close()
        yield

def wait_for(name):
    while not os.path.exists(name):
        time.sleep(0.01)

@pytest.fixture(scope="module")
def model(lock):
    wait_for("leased")
    with gpu_lease("3GiB"):
        yield

@pytest.fixture(scope="module")
def leased():
    wait_for("locked")
    open("leased", "w").close()
"""


@pytest.mark.parametrize("more", [(), ("--gpumem-schedule=off",)])
def test_a_test_whose_set_up_waits_for_a_lock_keeps_nobody_from_the_card(run, more):
    suite = {
        "test_a": LEASING + "def test_model(model): pass\n",
        "test_b": LEASING + '@pytest.mark.gpu(vram="3GiB")\ndef test_marked(leased, lock): pass\n',
    }
    finished = run(suite, *more)

    assert finished.outcomes == {"passed": 2}, finished.output


TWO_LIARS = """
def wait_for(name):
    deadline = time.monotonic() + 10
    while not os.path.exists(name) and time.monotonic() < deadline:
        time.sleep(0.01)

def first(size):
    size(3000)
    open("taken", "w").close()
    wait_for("reported")
    time.sleep(0.2)

def second(size):
    wait_for("taken")
    size(1000)

@pytest.mark.gpu(vram="100MiB")
def test_first(vram): first(vram)
"""


def test_a_wrong_estimate_ends_no_run_under_x(run):
    source = """
@pytest.mark.gpu(vram="100MiB")
def test_second(vram): second(vram)
"""
    finished = run(TWO_LIARS + source, "-v", "-x")

    assert finished.outcomes == {"passed": 2, "rerun": 1}, finished.output
    assert results(finished) == [
        ("test_it.py::test_first", "PASSED"),
        ("test_it.py::test_second", "PASSED"),
        ("test_it.py::test_second", "RERUN"),
    ]


UNMARKED = """
@pytest.mark.parametrize("i", range(3))
def test_{name}(vram, i): vram(2000, 0.2)
"""


def test_without_a_single_mark_sharing_costs_retries_and_no_failure(run):
    source = "".join(UNMARKED.format(name=name) for name in "abcdef")
    source += """
@pytest.mark.parametrize("i", range(20))
def test_cpu(i): time.sleep(0.02)
"""
    finished = run(source, workers=4)

    assert set(finished.outcomes) == {"passed", "rerun"}, finished.output
    assert finished.outcomes["passed"] == 38


def test_short_tests_wait_at_a_worker_and_are_returned_when_one_of_them_uses_a_card(run):
    source = """
@pytest.mark.parametrize("i", range(120))
def test_cpu(i): pass

@pytest.mark.parametrize("i", range(20))
def test_heavy(vram, request, i):
    from pytest_gpumem.plugin.state import GRANT
    vram(300)
    log("granted", GRANT in request.node.stash)
"""
    finished = run({"test_a": source, "test_b": source}, workers=2)

    assert finished.outcomes == {"passed": 280}, finished.output
    # Of each family one at each worker, before anything is known of it.
    assert words(finished).count("granted False") <= 4
    assert words(finished).count("granted True") >= 36


def test_a_fixture_that_ran_out_of_memory_is_set_up_again(run):
    source = """
@pytest.fixture(scope="session")
def model():
    second(take)
    yield
    give(1000)

@pytest.mark.gpu(vram="100MiB")
def test_second(model): pass
"""
    finished = run(TWO_LIARS + source)

    assert finished.outcomes == {"passed": 2, "rerun": 1}, finished.output


def test_what_no_card_has_room_for_is_a_failure_at_once(run):
    source = """
@pytest.mark.gpu(exclusive=True)
def test_greedy(vram): vram(5000)
@pytest.mark.gpu(vram="100MiB")
@pytest.mark.parametrize("i", range(2))
def test_limited(vram, i):
    vram(50, 0.5)
    raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. 1.00 GiB allowed; Of the")
def test_b(): pass
"""
    finished = run(source)

    assert finished.outcomes == {"passed": 1, "failed": 3}, finished.output
    assert "beside others" not in finished.section


def test_under_x_no_more_tests_larger_than_the_card_are_reported_than_end_the_run(run):
    source = """
@pytest.mark.gpu(vram="5GiB")
@pytest.mark.parametrize("i", range(3))
def test_too_large(i): pass
"""
    finished = run(source, "--maxfail=2")

    assert finished.outcomes == {"error": 2}, finished.output


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_workers_cost_only_the_tests_they_ran(run, workers):
    source = """
@pytest.mark.parametrize("i", range(10))
def test_good(i): log("ran", i)
@pytest.mark.gpu(vram="3GiB")
@pytest.mark.parametrize("i", range(2))
def test_killer(vram, i):
    vram(3000)
    os.kill(os.getpid(), signal.SIGKILL)
@pytest.mark.gpu(vram="3GiB")
@pytest.mark.parametrize("i", range(2))
def test_heavy(vram, i): vram(3000)
"""
    finished = run(source, workers=workers)

    assert finished.outcomes == {"passed": 12, "failed": 2}, finished.output
    assert sorted(words(finished)) == sorted(f"ran {i}" for i in range(10))


LEAVING = """
def leave():
    open("leave-" + os.environ["PYTEST_XDIST_WORKER"], "w").close()
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_leaves_after_its_report_costs_no_test(run, workers):
    source = (
        LEAVING
        + """
@pytest.mark.parametrize("i", range(20))
def test_good(i): log("ran", i)
@pytest.mark.gpu(vram="3GiB")
@pytest.mark.parametrize("i", range(2))
def test_broken(vram, i):
    vram(3000)
    leave()
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
@pytest.mark.gpu(vram="3GiB")
@pytest.mark.parametrize("i", range(2))
def test_heavy(vram, i): vram(3000)
"""
    )
    finished = run(source, workers=workers)

    assert finished.outcomes == {"passed": 22, "failed": 2}, finished.output
    assert finished.output.count("illegal memory access") >= 2
    assert "crashed while running" not in finished.output
    assert sorted(words(finished)) == sorted(f"ran {i}" for i in range(20))


def test_a_worker_that_leaves_after_a_test_out_of_memory_leaves_its_retry_to_others(run):
    source = (
        LEAVING
        + """
@pytest.mark.gpu(vram="100MiB")
def test_second(vram):
    try:
        second(vram)
    except BaseException:
        leave()
        raise
"""
    )
    finished = run(TWO_LIARS + source)

    assert finished.outcomes == {"passed": 2, "rerun": 1}, finished.output


def test_a_worker_that_dies_between_reports_costs_what_it_costs_under_xdist(run):
    # Neither the first attempt's report nor the last one's says that the test is over.
    source = """
@pytest.mark.flaky(reruns=1)
def test_second_attempt():
    if os.path.exists("tried"):
        os._exit(3)
    open("tried", "w").close()
    assert 0
def test_reported(): open("die-" + os.environ["PYTEST_XDIST_WORKER"], "w").close()
"""
    ours = run(source, "-v", workers=1)
    (ours.directory / "tried").unlink()
    for path in ours.directory.glob("die-*"):
        path.unlink()
    plain = run(source, "-v", workers=1, plain=True)

    assert results(ours) == results(plain), ours.output
    assert ours.status == plain.status == pytest.ExitCode.TESTS_FAILED


def test_a_retry_that_does_not_come_is_a_failure(run):
    source = """
@pytest.mark.gpu(vram="100MiB")
def test_second(vram): second(vram)
"""
    liars = TWO_LIARS.replace("first(vram)\n", "first(vram); assert 0\n")
    arguments = ("-x", "--gpumem-json=run.json")
    finished = run(liars + source, *arguments)

    assert finished.outcomes == {"failed": 2, "rerun": 1}, finished.output
    assert finished.status == pytest.ExitCode.INTERRUPTED  # as under plain xdist
    ended = [each.outcome for each in finished.record.tests if "test_second" in each.nodeid]
    assert ended == ["failed"]
    assert "1 failure out of memory" in finished.section
    assert "ran again" not in finished.section
    cache = finished.directory.with_name(f"{finished.directory.name}-cache")
    failed = json.loads((cache / "v" / "cache" / "lastfailed").read_text())
    assert set(failed) == {"test_it.py::test_first", "test_it.py::test_second"}


def test_a_crashed_test_is_run_again_when_rerunfailures_asks(run):
    source = """
def test_killer():
    if not os.path.exists("killed"):
        open("killed", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
def test_b(): pass
"""
    finished = run(source, "--reruns=1")

    assert finished.outcomes == {"passed": 2, "rerun": 1}, finished.output


def test_a_crash_in_a_late_teardown_is_the_last_tests_and_the_next_one_runs(run):
    source = """
@pytest.fixture(scope="module")
def model():
    yield
    os.kill(os.getpid(), signal.SIGKILL)
def test_a(model): pass
"""
    finished = run({"test_a": source, "test_b": "def test_b(): log('ran')"}, workers=1)

    assert finished.outcomes == {"passed": 2, "failed": 1}, finished.output
    assert "crashed while running 'test_a.py::test_a'" in finished.output
    assert words(finished) == ["ran"]


def test_session_fixtures_of_an_idle_worker_give_way_to_a_test_that_needs_their_room(run):
    source = """
@pytest.fixture(scope="session")
def model():
    take(2500)
    yield
    give(2500)
    log("gave back")

@pytest.mark.gpu(vram="2600MiB")
def test_large(model): log("ran")
"""
    finished = run({"test_a": source, "test_b": source})

    assert finished.outcomes == {"passed": 2}, finished.output
    second = [at for at, word in enumerate(words(finished)) if word == "ran"][1]
    assert "gave back" in words(finished)[:second]
    assert "release" in words(finished)[:second]


def test_without_replacements_the_run_ends_at_the_first_crash(run):
    source = """
def test_killer(): os.kill(os.getpid(), signal.SIGKILL)
@pytest.mark.parametrize("i", range(4))
def test_good(i): time.sleep(0.5)
"""
    finished = run(source, "--max-worker-restart=0", workers=1)

    assert finished.outcomes == {"failed": 1}
    assert "worker gw0 crashed and worker restarting disabled" in finished.output


def test_the_first_failure_ends_the_run_under_x(run):
    source = """
def test_0_bad(): assert 0
@pytest.mark.parametrize("i", range(40))
def test_good(i): time.sleep(0.1)
"""
    finished = run(source, "-x")

    assert finished.status == 2
    assert finished.outcomes["failed"] == 1
    assert finished.outcomes.get("passed", 0) < 40
    assert "stopping after 1 failures" in finished.output


def test_last_failed_runs_what_failed_and_failed_first_runs_all(run):
    source = """
@pytest.mark.parametrize("i", range(6))
def test_a(i): assert i != 3
"""
    assert run(source).outcomes == {"failed": 1, "passed": 5}
    assert run(source, "--ff").outcomes == {"failed": 1, "passed": 5}
    assert run(source, "--lf").outcomes == {"failed": 1}


def test_deselected_tests_do_not_run(run):
    finished = run(MIXED, "-k", "test_ready or test_gpu")

    assert finished.outcomes == {"passed": 11}


def test_workers_that_collect_different_tests_are_reported(run):
    source = """
import uuid
@pytest.mark.parametrize("i", [uuid.uuid4().hex])
def test_a(i): pass
"""
    finished = run(source)

    # Whichever was ready first.
    assert re.search("Different tests were collected between gw[01] and gw[01]", finished.output)
    assert finished.status == run(source, plain=True).status == 1


def test_nothing_to_run_ends_at_once(run):
    assert run("", workers=2).status == pytest.ExitCode.NO_TESTS_COLLECTED


def test_more_workers_than_tests_is_no_problem(run):
    assert run("def test_a(): pass", workers=3).outcomes == {"passed": 1}


@pytest.mark.parametrize(
    ("arguments", "why_not"),
    [
        (("--dist", "loadfile"), "--dist loadfile has its own order"),
        (("--dist", "worksteal"), "--dist worksteal has its own order"),
        (("-p", "own"), "own brings its own scheduler"),
    ],
)
def test_it_steps_aside_for_other_schedulers(run, arguments, why_not):
    own = """
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScheduling
    return LoadScheduling(config, log)
"""
    finished = run(
        MIXED["test_b"] + "def test_gpu(vram): vram(100)",
        *arguments,
        own=own,
        env={"PYTHONPATH": os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])},
    )

    assert f"xdist schedules, tests wait for leases: {why_not}" in finished.output
    assert finished.outcomes == {"passed": 13, "error": 2, "rerun": 1}


def test_a_worker_without_the_plugin_is_named(run):
    finished = run("def test_a(): pass", env={"NO_WORKER_PLUGIN": "1"})

    assert "worker gw" in finished.output
    assert "runs without pytest-gpumem" in finished.output
    assert finished.status == pytest.ExitCode.USAGE_ERROR


def test_ctrl_c_ends_the_run_at_once(run, tmp_path):
    source = """
@pytest.mark.gpu(vram="3GiB")
@pytest.mark.parametrize("i", range(2))
def test_heavy(vram, i):
    vram(3000)
    log("started")
    time.sleep(60)
"""
    run(source, "--collect-only")
    # Ignored in background jobs of a shell, and by what these start.
    heeds = "import signal, sys, pytest; signal.signal(signal.SIGINT, signal.default_int_handler)"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{heeds}; sys.exit(pytest.main())", "-p", "xdist", *OURS, "-n2"],
        cwd=tmp_path,
        env=os.environ | NO_OTHERS | {"GPUMEM_SIMULATE_CARD": str(tmp_path / "card")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "log").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # nobody is in the middle of a message
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=40)

    assert process.returncode == pytest.ExitCode.INTERRUPTED
    assert "KeyboardInterrupt" in output


def test_a_replacement_has_the_place_of_its_predecessor(run, tmp_path):
    source = """
@pytest.mark.parametrize("i", range(8))
def test_place(i):
    log(i, os.environ["CUDA_VISIBLE_DEVICES"].partition(",")[0])
    if os.environ["PYTEST_XDIST_WORKER"] == "gw2":
        open("there", "w").close()
    if i == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    deadline = time.monotonic() + 20
    while not os.path.exists("there") and time.monotonic() < deadline:
        time.sleep(0.01)
"""
    SharedCard.create(tmp_path / "card.1", total=CARD, context=CONTEXT).close()
    finished = run(source, workers=2)
    told = [(worker, *word.split()) for worker, word in said(finished)]
    places = {worker: first for worker, _, first in told}
    (killed,) = (worker for worker, number, _ in told if number == "0")

    assert finished.outcomes == {"passed": 7, "failed": 1}, finished.output
    assert places["gw0"] != places["gw1"]
    assert places["gw2"] == places[killed]


FAKE_DRIVER = """
import sys, types
from types import SimpleNamespace

GIB = 2**30
UUIDS, TOTALS = ("GPU-small", "GPU-large"), (8 * GIB, 80 * GIB)
fake = types.ModuleType("pynvml")
fake.nvmlInit = lambda: None
fake.nvmlDeviceGetCount = lambda: 2
fake.nvmlDeviceGetHandleByIndex = lambda index: f"handle {index}"
fake.nvmlDeviceGetUUID = lambda handle: UUIDS[int(handle[-1])]
fake.nvmlDeviceGetName = fake.nvmlDeviceGetUUID
fake.nvmlDeviceGetComputeRunningProcesses = lambda handle: []
fake.nvmlDeviceGetMemoryInfo = lambda handle, version: SimpleNamespace(
    total=TOTALS[int(handle[-1])], free=TOTALS[int(handle[-1])], used=0
)
sys.modules["pynvml"] = fake
"""
ON_UNLIKE_CARDS = """
import os
import pytest

@pytest.mark.gpu(vram="12GiB")
@pytest.mark.parametrize("i", range(4))
def test_a(i, record_property):
    record_property("seen", os.environ["CUDA_VISIBLE_DEVICES"])
    assert os.environ["CUDA_VISIBLE_DEVICES"].startswith("GPU-large")
"""
GIVEN_THE_SMALL_ONE = "popen//env:CUDA_VISIBLE_DEVICES=GPU-small"


CHOSEN = """
import os
if (worker := os.environ.get("PYTEST_XDIST_WORKER")):
    seen = {"gw0": "GPU-small", "gw1": "GPU-large,GPU-small"}[worker]
    os.environ["CUDA_VISIBLE_DEVICES"] = seen
"""


@pytest.mark.parametrize(
    ("arguments", "conftest"),
    [
        (("-n", "1"), ""),
        (("-n", "2"), ""),
        ((f"--tx={GIVEN_THE_SMALL_ONE}", "--tx=popen", "--dist=load"), ""),
        (("-n", "2"), CHOSEN),
    ],
    ids=["one worker", "two", "one of them given a card", "chosen by a conftest"],
)
def test_a_large_test_runs_at_a_worker_whose_first_card_is_large(tmp_path, arguments, conftest):
    (tmp_path / "conftest.py").write_text(conftest)
    (tmp_path / "test_it.py").write_text(ON_UNLIKE_CARDS)
    (tmp_path / "fake_driver.py").write_text(FAKE_DRIVER)
    finished = run_pytest(
        tmp_path,
        *("-p", "fake_driver", "-p", "gpumem"),
        *arguments,
        env={"PYTHONPATH": str(tmp_path)},
    )

    assert finished.outcomes == {"passed": 4}, finished.output


@pytest.mark.newest
def test_it_knows_the_pytest_and_xdist_it_was_written_for():
    assert re.match(r"(8\.4|9\.2)\.", version("pytest")), "try the scheduler, then name it here"
    assert re.match(r"3\.8\.", version("pytest-xdist")), "try the scheduler, then name it here"
    assert xdist_worker.why_not() == ""


def why_not_with(target, name, value):
    # Undone before the test ends: pytest itself needs what is replaced.
    with pytest.MonkeyPatch.context() as patch:
        if value is None:
            patch.delattr(target, name)
        else:
            patch.setattr(target, name, value)
        return xdist_worker.why_not()


def test_another_teardown_order_of_pytest_is_noticed():
    def tear_all_down(self, _):
        while self.stack:
            _, (finalizers, _) = self.stack.popitem()
            finalizers[0]()

    assert re.fullmatch(
        r"pytest [\d.]+ and xdist [\d.]+ are not as this scheduler knows them .*teardown_exact.*",
        why_not_with(SetupState, "teardown_exact", tear_all_down),
    )


def test_another_worker_of_xdist_is_noticed():
    other = why_not_with(WorkerInteractor, "run_one_test", lambda self: self.item_index)

    assert "does not use items, nextitem_index, sendevent" in other


def test_what_pytest_does_not_offer_any_more_is_named():
    assert "no attribute 'teardown_exact'" in why_not_with(SetupState, "teardown_exact", None)


WIDE = """
import functools
from unittest.mock import call

import pytest
from pytest_gpumem import gpu_lease
from pytest_gpumem.plugin.wide_fixtures import wide_fixtures

@pytest.fixture(scope="session")
def database(tmp_path_factory): return call.anything(1)

def helper(): return gpu_lease("1GiB")

def decorated(function):
    @functools.wraps(function)
    def inner(): yield from function()
    return inner

@pytest.fixture(scope="package")
@decorated
def server():
    with helper():
        yield 2

@pytest.fixture
def narrow(database): return 3

def pytest_collection_finish(session):
    sets, places, leasing = wide_fixtures(session.items)
    lines = [f"{item.nodeid}: {sets[place]}" for item, place in zip(session.items, places)]
    lines.append(f"with a lease: {leasing}")
    session.config.rootpath.joinpath("wide").write_text("\\n".join(lines))
"""
USERS = """
import pytest

@pytest.fixture(scope="module")
def server(server): return server + 1

@pytest.fixture(scope="module", params="xy")
def drive(request): return request.param

@pytest.fixture(scope="class")
def room(): return 5

def test_overriding(server): pass
def test_param(drive): pass
def test_alone(room): pass
@pytest.mark.usefixtures("narrow")
class TestIn:
    def test_nothing(self): pass
    def test_room(self, room): pass
def test_none(tmp_path): pass
"""


def test_workers_tell_which_wide_fixtures_tests_use_and_where_they_end(tmp_path):
    package = tmp_path / "p"
    package.mkdir()
    (package / "__init__.py").touch()
    write_suite(package, conftest=WIDE, test_it=USERS)
    run_pytest(tmp_path, "-p", "no:gpumem", "-n0", "--collect-only", "--rootdir=.")

    it, inside = "p/test_it.py", "p/test_it.py::TestIn"
    database, room = ("", "p::database", None), f"{it}::room"
    # The versions of pytest differ in what they put first.
    assert sorted((tmp_path / "wide").read_text().splitlines()) == [
        f"{inside}::test_nothing: {(database,)}",
        f"{inside}::test_room: {(database, (inside, room, None))}",
        f"{it}::test_alone: {((it, room, None),)}",
        f"{it}::test_none: ()",
        f"{it}::test_overriding: {((it, it + '::server', None), ('p', 'p::server', None))}",
        f"{it}::test_param[x]: {((it, it + '::drive', 0),)}",
        f"{it}::test_param[y]: {((it, it + '::drive', 1),)}",
        "with a lease: ['p::server']",
    ]


def test_each_card_of_each_host_is_told_of_once():
    hellos = [
        {"cards": [("GPU-a", 100, 30), ("GPU-b", 50, 0)]},
        {"cards": [("GPU-a", 100, 25)]},
        {"cards": [("GPU-a", 80, 7)], "host": "other"},
        {"cards": []},
    ]

    totals, used = cards_of(hellos)

    assert totals == {("", "GPU-a"): 100, ("", "GPU-b"): 50, ("other", "GPU-a"): 80}
    assert used == {("", "GPU-a"): 30, ("", "GPU-b"): 0, ("other", "GPU-a"): 7}


def test_without_any_card_marked_tests_are_tests_like_others():
    expected = History().expect
    needs = [(0, 5, 1, True)]

    (test,) = planned_tests(["a.py::test_a"], needs, expected, most=0, any_card=False)
    (on_card,) = planned_tests(["a.py::test_a"], needs, expected, most=9, any_card=True)

    assert not test.gpu
    assert (on_card.gpu, on_card.peak, on_card.group) == (True, 5, "a.py")


def test_only_a_mark_may_ask_for_more_than_there_is():
    history = History()
    history.note("a.py::test_a", 95, 1.0, gpu=True)
    arguments = {"most": 100, "any_card": True}

    (learned,) = planned_tests(["a.py::test_a"], [], history.expect, **arguments)
    (marked,) = planned_tests(["a.py::test_a"], [(0, 200, 1, False)], history.expect, **arguments)

    assert learned.peak == 100  # 95 and the margin are more
    assert marked.peak == 200


def test_a_test_that_never_ran_may_use_a_card_unexpectedly():
    history = History()
    history.note("a.py::test_a[1]", 0, 1.0, gpu=False)
    names = ["a.py::test_a[1]", "a.py::test_a[2]"]

    known, unknown = planned_tests(names, [], history.expect, most=9, any_card=True)

    assert known.seen
    assert not unknown.seen


def test_what_a_test_took_is_read_from_its_report():
    usage = CardUsage("GPU-1", *(0,) * 7, process=None, extra=7, fixture_bytes=1)
    told: list[tuple[str, object]] = []
    properties.tell_usage(
        told, properties.OwnProperties((usage, usage._replace(extra=2, fixture_bytes=4)))
    )

    assert taken(told) == Taken(7, 4, oom=False)
    properties.tell_usage(told, properties.OwnProperties(oom="CUDA out of memory"))
    assert taken(told) == Taken(0, 0, oom=True)
    assert taken([("other", 1)]) == Taken(0, 0)

"""Tests in processes of their own: they end and are told as in the run's own, and break alone."""

from __future__ import annotations

import json
import re

import pytest
from harness import run_pytest, write_suite

OUTCOMES = """
import os, unittest, warnings
import pytest

@pytest.fixture(scope="session")
def wide(): return os.getpid()

@pytest.fixture
def broken(): raise ValueError("set-up")

@pytest.fixture
def untidy():
    print("before")
    yield
    print("after")
    raise ValueError("teardown")

def test_passes(wide, tmp_path, record_property):
    record_property("mine", 1)
    (tmp_path / "a").write_text("a")
    print("printed")
    os.write(2, b"written")
    warnings.warn("mind this")
    assert wide == os.getpid()
def test_fails(untidy): assert [1, 2] == [1, 3]
def test_skips(): pytest.skip("not here")
@pytest.mark.xfail
def test_xfails(): assert 0
@pytest.mark.xfail
def test_xpasses(): pass
def test_breaks(broken): pass
def test_knows_no_fixture(no_such): pass
class TestUnit(unittest.TestCase):
    def test_unit(self): self.assertEqual(1, 2)
@pytest.mark.skipif(pytest.version_tuple < (9,), reason="pytest 9 brought subtests")
def test_subtests(request):
    subtests = request.getfixturevalue("subtests")
    for i in range(2):
        with subtests.test(i=i): assert i
"""
WATCHING = """
import json

SEEN = []

def pytest_runtest_logreport(report):
    SEEN.append([
        report.nodeid, report.when, report.outcome, getattr(report, "wasxfail", None),
        str(report.longrepr), report.sections, report.user_properties,
        sorted(report.keywords), report.location,
    ])

def pytest_warning_recorded(warning_message, when, nodeid, location):
    SEEN.append([str(warning_message.message), when, nodeid, warning_message.lineno])

def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput"):
        with open("seen.json", "w") as file: json.dump(sorted(SEEN, key=str), file)
"""


def seen(directory):
    text = (directory / "seen.json").read_text()
    return json.loads(re.sub(r"0x[0-9a-f]+", "0x", text))


def test_each_report_is_that_of_the_runs_own_process(tmp_path):
    write_suite(tmp_path, test_it=OUTCOMES, conftest=WATCHING)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    told = []
    for arguments in (("--gpumem-isolate=off",), ("--gpumem-isolate=all", "-n", "2")):
        run = run_pytest(tmp_path, "-p", "gpumem", *arguments)
        told.append((run.outcomes, run.status, seen(tmp_path)))

    assert told[0] == told[1], run.output
    assert len(told[0][2]) >= 25


BREAKS = """
import os, signal, time
import pytest

@pytest.fixture(scope="module")
def process():
    yield os.getpid()

@pytest.fixture
def aborts(): os.abort()

@pytest.fixture
def killed():
    yield
    os.kill(os.getpid(), signal.SIGKILL)

isolated = pytest.mark.gpu(isolated=True)

def test_first(process): assert process == os.getpid() == int(os.environ["RUN"])
@isolated
def test_segfaults(process): os.kill(os.getpid(), signal.SIGSEGV)
@isolated
def test_aborts(aborts): pass
@isolated
def test_is_killed(killed): pass
@isolated
def test_closes_all():
    os.closerange(3, 4096)
    os._exit(0)
def test_middle(process): assert process == os.getpid()
@isolated
def test_leaves_a_fork():
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
    os._exit(7)
@isolated
def test_ends_late():
    import atexit
    atexit.register(os._exit, 5)
@isolated
def test_ends_the_run(): pytest.exit("enough")
def test_never(): pass
"""


def test_a_test_that_ends_its_process_is_felled_alone(tmp_path):
    run_of = "import os\nos.environ.setdefault('RUN', str(os.getpid()))\n"
    write_suite(tmp_path, test_it=BREAKS, conftest=run_of)
    run = run_pytest(tmp_path, "-p", "gpumem", "--gpumem-json=run.json")

    ends = {test.nodeid.split("::")[1]: test.outcome for test in run.record.tests}
    assert ends == {
        "test_first": "passed",
        "test_segfaults": "crashed",
        "test_aborts": "crashed",
        "test_is_killed": "crashed",
        "test_closes_all": "crashed",
        "test_middle": "passed",
        "test_leaves_a_fork": "crashed",
        "test_ends_late": "passed",
    }, run.output
    for name, end in (
        ("segfaults", ": signal 11 (SIGSEGV)"),
        ("aborts", " in its set-up: signal 6 (SIGABRT)"),
        ("is_killed", " in its teardown: signal 9 (SIGKILL)"),
        ("closes_all", ": exit status 0"),
        ("leaves_a_fork", ": exit status 7"),
    ):
        assert f"\ntest_it.py::test_{name} ended its process{end}\n" in run.output
    assert "Fatal Python error: Segmentation fault" in run.output
    assert "test_ends_late: its process ended after it was over: exit status 5" in run.output
    assert run.status == pytest.ExitCode.INTERRUPTED
    assert "!! _pytest.outcomes.Exit: enough !!" in run.output


HANGS = """
import signal, time
import pytest

@pytest.mark.gpu(isolated=True)
@pytest.mark.timeout(0.5)
def test_hangs(tmp_path):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])  # as within a call of C
    time.sleep(60)

@pytest.mark.gpu(isolated=True)
@pytest.mark.timeout(0.5)
def test_hangs_where_it_can_be_reached():
    try:
        time.sleep(60)
    finally:
        time.sleep(1.5)  # its limit is over

def test_after(): pass
"""
SOON = "from pytest_gpumem.plugin.isolate import process\nprocess.GRACE = 0.7\n"


def test_a_limit_that_nothing_within_can_hold_ends_the_process(tmp_path):
    write_suite(tmp_path, test_it=HANGS, conftest=SOON)
    run = run_pytest(tmp_path, "-p", "gpumem", beside=("pytest_timeout",))

    assert run.outcomes == {"failed": 2, "passed": 1}, run.output
    why = "it did not heed its limit of 0.5 s for 0.7 s, and was killed"
    assert f"\ntest_it.py::test_hangs ended its process: {why}\n" in run.output
    assert "Timeout (>0.5s) from pytest-timeout" in run.output


COVERED = """
import os
import pytest

isolated = pytest.mark.gpu(isolated=True)

def one(way):
    if way:
        return 1
    return 2

@isolated
def test_one_way(): assert one(True) == 1
def test_here():
    assert os
@isolated
def test_tells_nothing():
    os._exit(0)
"""


def test_what_isolated_tests_cover_is_counted_by_a_coverage_around_pytest(tmp_path):
    coverage = pytest.importorskip("coverage")
    write_suite(tmp_path, test_it=COVERED)
    around = ("-m", "coverage", "run", "--branch", "--source=.", "-m", "pytest")
    run = run_pytest(tmp_path, "-p", "gpumem", within=around)

    assert run.outcomes == {"failed": 1, "passed": 2}, run.output
    found = coverage.Coverage(data_file=str(tmp_path / ".coverage"), branch=True)
    found.load()
    (file,) = (each for each in found.get_data().measured_files() if each.endswith("test_it.py"))
    assert found.analysis2(file)[3] == [10, 18]
    assert not list(tmp_path.glob(".coverage.*"))


LOST = """
@pytest.fixture(scope="module")
def model(): yield take(256)

def first_time(name):
    try:
        open(name, "x").close()
    except FileExistsError:
        return False
    return True

def test_before(model): take()
def test_loses(model):
    if first_time("lost"):
        torch._assert_async(torch.zeros(1, device="cuda"))
    take(512)
def test_after(model): assert take().sum() == 0
"""


def test_after_a_lost_context_the_run_goes_on_in_fresh_processes(run):
    finished = run(LOST, "--gpumem-isolate=failed")

    assert finished.outcomes == {"passed": 3, "rerun": 1}, finished.output
    first, again = [test for test in finished.record.tests if test.nodeid.endswith("loses")]
    assert (first.outcome, again.outcome, again.step) == ("rerun", "passed", "fresh")
    assert again.lease.alone
    card = again.cards[0]
    assert (card.peak - card.baseline, card.leftover) == (512 * 1024, 0)
    assert "1 attempt in a fresh process, 1 passed" in finished.section
    assert "after test_it.py::test_loses: CUDA error: device-side assert" in finished.section


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("--pdb",),
            "a process of its own is for test_it.py::test_a; add --gpumem-isolate=off",
        ),
        (
            ("--gpumem-isolate=some",),
            "'some' is not a choice of tests to isolate; allowed are off, marked, failed, all",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(tmp_path, arguments, sentence):
    write_suite(
        tmp_path,
        test_it="import pytest\n@pytest.mark.gpu(isolated=True)\ndef test_a(): pass",
    )
    run = run_pytest(tmp_path, "-p", "gpumem", *arguments)

    assert sum(sentence in line for line in run.output.splitlines()) == 1
    assert run.status == pytest.ExitCode.USAGE_ERROR
    assert "INTERNALERROR" not in run.output


ON_CARD = """
KEPT = []

@pytest.mark.gpu(vram="100MiB", isolated=True)
def test_apart():
    KEPT.append(take(1024))
    assert len(KEPT) == 1

@pytest.mark.gpu(vram="100MiB")
def test_in_its_worker(): take(1024)
"""


@pytest.mark.parametrize("arguments", [("-n", "2"), ("-p", "no:xdist")])
def test_a_process_of_its_own_costs_a_context_and_leaves_nothing(run_without_torch, arguments):
    finished = run_without_torch(ON_CARD, *arguments)

    assert finished.outcomes == {"passed": 2}, finished.output
    test, card = finished.test("test_apart"), finished.card("test_apart")
    assert test.lease.size == (100 + 384) * 2**20
    assert (card.peak - card.baseline, card.leftover, card.leaked) == (2**20, 0, 0)
    assert test.children == ()

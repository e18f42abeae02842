"""Several processes on one simulated card: leases, retries, what is learned and told."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
from harness import CARD, MODES, SIMULATE, WITHOUT_TORCH, run_pytest, write_suite
from harness import TAKE_WITHOUT_TORCH as TAKE

from pytest_gpumem.leases.request import HOPE
from pytest_gpumem.scheduling.history import History
from pytest_gpumem.simulator.card import SharedCard

MIB = 2**20
HEAVY = """
import time

@pytest.mark.gpu(vram="2GiB")
@pytest.mark.parametrize("i", range(2))
def test_heavy(i):
    x = take(2000 * 1024)
    time.sleep(0.3)
"""
BY_FILE = ("-n", "2", "--dist", "loadfile")


@pytest.fixture
def run(run_without_torch):
    return run_without_torch


HEAD = """
import pytest, torch

def take(kib=64): return torch.zeros(kib * 1024, dtype=torch.uint8, device='cuda')
"""


@pytest.fixture
def run_torch(tmp_path):
    """Run a suite that uses torch on the simulated card."""

    def _run(source, *arguments, head=HEAD):
        write_suite(tmp_path, test_it=head + source)
        return run_pytest(
            tmp_path,
            *(*SIMULATE, "--gpumem-json=run.json", *arguments),
            beside=("xdist", "rerunfailures"),
        )

    return _run


def grants(finished):
    return [test.lease for test in finished.record.tests if test.lease is not None]


@pytest.mark.parametrize("mode", list(MODES))
def test_a_test_that_uses_the_card_holds_a_lease(run, mode):
    finished = run(HEAVY + "\ndef test_cpu(): pass\n", *MODES[mode])

    assert finished.outcomes == {"passed": 3}, finished.output
    for i in range(2):
        grant = finished.test(f"test_heavy[{i}]").lease
        assert grant.size >= 2048 * MIB
        assert not grant.alone


def test_only_the_first_test_of_a_process_asks_for_a_context(run):
    finished = run(HEAVY)

    first, second = (grant.size for grant in grants(finished))
    assert first > second == 2048 * MIB


def test_what_a_fixture_holds_counts_once_while_its_first_test_runs(run):
    finished = run(
        """
from pytest_gpumem.leases.api import store

@pytest.fixture(scope="module")
def model():
    return take(1000 * 1024)

@pytest.mark.gpu(vram="2GiB")
def test_a(model):
    own = [entry for entry in store().ledger.read().taken if entry.pid == os.getpid()]
    claims = [claim for entry in own for claim in entry.claims.values()]
    assert sum(claim.resident + claim.extra for claim in claims) < 2500 * 2**20, own
""",
        "-n",
        "1",
    )

    assert finished.outcomes == {"passed": 1}, finished.output


@pytest.mark.parametrize("arguments", [("-n", "2"), BY_FILE], ids=["scheduled", "by file"])
def test_what_does_not_fit_together_does_not_run_together(run, arguments):
    other = "import os\nimport pytest\nfrom test_it import take\n" + HEAVY
    finished = run(HEAVY, *arguments, test_other=other)

    assert finished.outcomes == {"passed": 4}, finished.output
    spans = sorted((test.start, test.start + test.duration) for test in finished.record.tests)
    # A lease is given back a moment before its test's time is over; each sleeps for 0.3 s.
    assert all(end - 0.1 <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert "out of memory" not in finished.section.replace("0 failures out of memory", "")


def test_two_runs_share_a_card(tmp_path):
    card = SharedCard.create(tmp_path / "card", total=CARD, context=384 * MIB)
    body = """
        @pytest.mark.gpu(vram="2GiB")
        @pytest.mark.parametrize("i", range(5))
        def test_heavy(i):
            x = take(2000 * 1024)
            time.sleep(0.2)
    """
    write_suite(tmp_path, test_it=TAKE + textwrap.dedent(body))
    shutil.copy(WITHOUT_TORCH, tmp_path)
    command = [sys.executable, "-m", "pytest", "-p", "gpumem", "-p", "no:cacheprovider"]
    command += [f"--gpumem-simulate-card={tmp_path / 'card'}"]
    running = [
        subprocess.Popen(
            [*command, f"--gpumem-json={name}.json"],
            cwd=tmp_path,
            env=os.environ
            | {
                "GPUMEM_SIMULATE_CARD": str(tmp_path / "card"),
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in "ab"
    ]
    outputs = [each.communicate(timeout=120)[0] for each in running]
    card.close()

    assert [each.returncode for each in running] == [0, 0], outputs


LIARS = """
import time

def wait_for(name):
    deadline = time.monotonic() + 30
    while not os.path.exists(name) and time.monotonic() < deadline:
        time.sleep(0.01)

def first():
    x = take(2000 * 1024)
    open("taken", "w").close()
    wait_for("failed")

def second():
    wait_for("taken")
    x = take(2000 * 1024)
"""
SECOND = {
    "call": """
@pytest.mark.gpu(vram="100MiB")
def test_second(): second()
""",
    "set-up": """
@pytest.fixture(scope="module")
def model(): second()

@pytest.mark.gpu(vram="100MiB")
def test_second(model): pass
""",
    "unittest": """
import unittest

class Test(unittest.TestCase):
    @pytest.mark.gpu(vram="100MiB")
    def test_second(self): second()
""",
}


REPORT = """
import time
import pytest

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call):
    report = yield
    if call.excinfo is not None:
        open("failed", "w").close()  # by now who was beside it was looked at, however busy
        time.sleep({seconds})
    return report
"""


@pytest.mark.parametrize("where", list(SECOND))
@pytest.mark.parametrize("arguments", [("-n", "2"), (*BY_FILE, "-x")], ids=["scheduled", "by file"])
def test_a_wrong_estimate_costs_a_retry_and_not_a_failure(run, where, arguments):
    liar = '@pytest.mark.gpu(vram="100MiB")\ndef test_first(): first()\n'
    other = "import os\nimport pytest\nfrom test_it import first, second\n" + SECOND[where]
    # Meanwhile the test beside it ends, and its worker.
    report = REPORT.format(seconds=2 if where == "unittest" else 0)
    finished = run(LIARS + liar, *arguments, test_other=other, conftest=report)

    assert finished.outcomes == {"passed": 2, "rerun": 1}, finished.output
    attempts = [t for t in finished.record.tests if t.nodeid.endswith("test_second")]
    assert [(each.outcome, each.step) for each in attempts] == [("rerun", ""), ("passed", "alone")]
    assert attempts[1].lease.alone
    used = 1 if where == "set-up" else 2  # a fixture's peak is the fixture's
    assert f"{used} of 2 tests used VRAM" in finished.section
    told = "1 test ran out of memory beside others and ran again with no other test on the card"
    assert told in finished.section


@pytest.mark.parametrize("arguments", [("-n", "2"), BY_FILE], ids=["scheduled", "by file"])
def test_who_wants_failures_gets_failures(run, arguments):
    liar = '@pytest.mark.gpu(vram="100MiB")\ndef test_first(): first()\n'
    other = "import os\nimport pytest\nfrom test_it import second\n" + SECOND["call"]
    fail, report = "--gpumem-oom=fail", REPORT.format(seconds=0)
    finished = run(LIARS + liar, fail, *arguments, test_other=other, conftest=report)

    assert finished.outcomes == {"passed": 1, "failed": 1}, finished.output


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("mode", ["plain", "n2", "by file"])
def test_a_test_larger_than_the_card_is_told_and_not_awaited(run, skip, mode):
    source = """
@pytest.mark.gpu(vram="5GiB")
def test_vast(): raise SystemError("ran")

@pytest.mark.gpu(count=2)
def test_wide(): raise SystemError("ran")

@pytest.mark.gpu(vram="1GiB")
def test_fits(): take(1000 * 1024)
"""
    arguments = MODES.get(mode, BY_FILE)
    finished = run(source, f"--gpumem-too-large={'skip' if skip else 'fail'}", "-rs", *arguments)

    assert finished.outcomes == {"passed": 1, "skipped" if skip else "error": 2}, finished.output
    assert "5.00 GiB" in finished.output
    assert "3.81 GiB" in finished.output
    assert "(s)" not in finished.output
    assert "SystemError" not in finished.output


@pytest.fixture
def neighbour(tmp_path):
    """Start a process that has something of a card of its own; returns the card's file."""
    with contextlib.ExitStack() as stack:

        def start(code):
            path = tmp_path / "card"
            card = stack.enter_context(
                contextlib.closing(SharedCard.create(path, total=CARD, context=384 * MIB))
            )
            head = "import sys\nfrom pytest_gpumem.leases.request import Want\n"
            head += "from pytest_gpumem.leases.store import LeaseStore\n"
            process = subprocess.Popen(
                [sys.executable, "-c", head + textwrap.dedent(code), card.uuid, str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.communicate)
            assert process.stdout.readline() == "there\n"
            return path

        yield start


@pytest.fixture
def held_card(neighbour):
    """A card of which another process holds everything; its file."""
    return neighbour("""
        with LeaseStore().acquire({sys.argv[1]: Want()}, {sys.argv[1]: 2**32}, "the neighbour"):
            print("there", flush=True)
            sys.stdin.read()
    """)


WAITS = "import pytest\n\n@pytest.mark.gpu(vram='1GiB')\ndef test_a(): pass\n"


def test_a_test_that_waits_too_long_names_the_holder(tmp_path, held_card):
    write_suite(tmp_path, test_it=WAITS)
    arguments = (f"--gpumem-simulate-card={held_card}", "--gpumem-lease-timeout=0.3")
    finished = run_pytest(tmp_path, "-p", "gpumem", *arguments)

    assert finished.outcomes == {"error": 1}, finished.output
    assert "no lease within 0.3 s" in finished.output
    assert "(the neighbour)" in finished.output


@pytest.mark.parametrize("arguments", [(), ("-n", "1")], ids=["one process", "scheduled"])
@pytest.mark.parametrize("timeout", [(), ("--gpumem-lease-timeout=0.5",)], ids=["none", "set"])
def test_memory_of_another_program_is_waited_for_alike_with_and_without_a_scheduler(
    tmp_path, neighbour, timeout, arguments
):
    # Beside the run: what an ancestor of it uses would be its own family's.
    card = neighbour("""
        from pathlib import Path
        from pytest_gpumem.simulator.card import SharedCard
        card = SharedCard.open(Path(sys.argv[2]))
        print("there" if card.join() and card.reserve(2500 * 2**20) else "full", flush=True)
        sys.stdin.read()
    """)
    write_suite(
        tmp_path,
        test_it=WAITS,
        conftest="import pynvml\nfrom pytest_gpumem.leases import request as r\nr.PATIENCE = 1.0\n",
    )
    finished = run_pytest(
        tmp_path,
        *("-p", "gpumem", "--gpumem-json=run.json", f"--gpumem-simulate-card={card}"),
        *timeout,
        *arguments,
    )

    if timeout:
        assert finished.outcomes == {"error": 1}, finished.output
        told = r"used by other programs \(pid \d+: 2\.82 GiB\)"
        assert re.search(rf"no lease within 0\.5 s: .*{told}", finished.output), finished.output
    else:
        assert finished.outcomes == {"passed": 1}, finished.output
        assert finished.test("test_a").lease.waited == pytest.approx(1, abs=0.7)


def test_what_a_fixture_waits_for_its_lease_is_not_its_tests_time(tmp_path, neighbour):
    card = neighbour("""
        import os, time
        with LeaseStore().acquire({sys.argv[1]: Want()}, {sys.argv[1]: 2**32}, "the neighbour"):
            print("there", flush=True)
            while not os.path.exists(sys.argv[2] + "-asked"):
                time.sleep(0.01)
            time.sleep(2)
    """)
    source = f"""
import pytest
from pytest_gpumem import gpu_lease

@pytest.fixture(scope="module")
def model():
    open("{card}-asked", "w").close()
    with gpu_lease("1GiB"):
        yield

@pytest.fixture(scope="module")
def around(model): pass

def test_a(around): pass
"""
    write_suite(tmp_path, test_it=source)
    arguments = ("-p", "gpumem", "--gpumem-json=run.json", f"--gpumem-simulate-card={card}")
    finished = run_pytest(tmp_path, *arguments)

    assert finished.outcomes == {"passed": 1}, finished.output
    assert finished.test("test_a").duration < 1.5


@pytest.mark.parametrize("mode", list(MODES))
def test_foreign_files_among_the_leases_are_named_and_end_no_run(run, tmp_path, monkeypatch, mode):
    queue = tmp_path / "leases" / f"gpumem-{os.getuid()}" / "queue"
    queue.mkdir(parents=True)
    os.mkfifo(queue / "h-foo")
    monkeypatch.setenv("GPUMEM_RUN_DIR", str(tmp_path / "leases"))
    finished = run(WAITS, *MODES[mode])

    assert finished.outcomes == {"passed": 1}, finished.output
    assert f"left alone, for they are no leases: {queue}/h-foo" in finished.section


LEASES = """
import subprocess, sys, pytest
from pytest_gpumem import LeaseTimeout, gpu_lease

@pytest.fixture(scope="module")
def reserved():
    with pytest.raises(LeaseTimeout), gpu_lease("1GiB", timeout=1):
        pass

def test_fixture(reserved): pass
"""
NESTED = """
import subprocess, sys

def test_outer(request, tmp_path):
    (tmp_path / "test_inner.py").write_text(
        "import pytest\\n@pytest.mark.gpu(vram='1GiB')\\ndef test_inner(): pass\\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "gpumem", "--gpumem-lease-timeout=1.5"]
    done = subprocess.run([*command, "test_inner.py"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 1
"""


@pytest.mark.parametrize("arguments", [(), ("-n", "1", "--gpumem-schedule=off")])
@pytest.mark.parametrize(
    ("source", "who"),
    [
        (WAITS, "test_it.py::test_a"),
        (LEASES, "gpu_lease of test_it.py::test_fixture (setup)"),
        (NESTED, "test_inner.py::test_inner"),
    ],
    ids=["test", "fixture", "nested"],
)
def test_what_is_waited_for_is_told_at_once(tmp_path, held_card, source, who, arguments):
    write_suite(tmp_path, test_it=source)
    card = (f"--gpumem-simulate-card={held_card}", "--gpumem-lease-timeout=1.5")
    finished = run_pytest(tmp_path, "-p", "gpumem", *card, *arguments, "--show-capture=no")

    told = [line for line in finished.output.splitlines() if f"gpumem: {who} waits for" in line]
    assert len(told) == 1, finished.output
    assert "1.00 GiB" in told[0] or "1.38 GiB" in told[0]
    assert "(the neighbour)" in told[0]


@pytest.mark.parametrize("method", ["signal", "thread"])
def test_pytest_timeout_ends_a_wait(tmp_path, held_card, method):
    write_suite(tmp_path, test_it=WAITS + "\ndef test_b(): pass\n")
    arguments = (f"--gpumem-simulate-card={held_card}", "--timeout=1", f"--timeout-method={method}")
    finished = run_pytest(tmp_path, "-p", "gpumem", *arguments, beside=["timeout"])

    assert "gpumem: test_it.py::test_a waits for 1.38 GiB" in finished.output
    if method == "signal":  # the other one ends the process
        assert finished.outcomes == {"passed": 1, "error": 1}, finished.output
        assert "waited for 1.38 GiB" in finished.output
    assert finished.status == 1


ENGINE = """
import os, subprocess, sys, pytest

CHILD = "import sys; from without_torch import ALLOCATOR; ALLOCATOR.take(2000 * 2**20); print()"

@pytest.fixture(scope="module")
def engine():
    command = [sys.executable, "-c", CHILD + "; sys.stdin.read()"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as child:
        child.stdout.readline()
        yield

@pytest.mark.gpu(vram="2500MiB")
@pytest.mark.parametrize("i", range(2))
def test_engine(engine, i): pass
"""
STANDING = """
import pytest_gpumem

def reserved():
    return pytest_gpumem.gpu_lease("2500MiB")

@pytest.fixture(scope="{scope}")
def engine():
    with {lease}:
        with open("set-ups", "a") as file:
            print("set up", file=file)
        time.sleep(0.2)
        yield
"""
SERVED = """
import time, pytest

@pytest.mark.parametrize("i", range(3))
def test_served(engine, i): time.sleep(0.02)

def test_on_cpu(): time.sleep(0.05)
"""
RESERVED = """
import pytest
from pytest_gpumem import gpu_lease

@pytest.fixture(scope="module")
def reserved():
    with gpu_lease("2500MiB"):
        yield

@pytest.mark.gpu(vram="2500MiB")
@pytest.mark.parametrize("i", range(2))
def test_uses(reserved, i): pass

@pytest.mark.gpu(vram="2600MiB")
def test_does_not(): pass

@pytest.mark.gpu(vram="2500MiB")
def test_inside():
    with gpu_lease("2500MiB"):
        pass
"""
NESTED_WITHIN = """
import subprocess, sys, pytest

INNER = '''
import pytest
@pytest.mark.gpu(vram="2500MiB")
@pytest.mark.parametrize("i", range(2))
def test_inner(i): pass
'''

def inner(tmp_path, *arguments):
    (tmp_path / "test_inner.py").write_text(INNER)
    command = [sys.executable, "-m", "pytest", "-p", "xdist", "-p", "gpumem", *arguments]
    done = subprocess.run(
        [*command, "--gpumem-simulate-context=64MiB"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr

@pytest.mark.gpu(vram="2500MiB")
@pytest.mark.parametrize("arguments", [(), ("-n", "2")])
def test_sized(tmp_path, arguments): inner(tmp_path, *arguments)

@pytest.mark.gpu(exclusive=True)
def test_exclusive(tmp_path): inner(tmp_path)

def test_without_a_lease(tmp_path): inner(tmp_path)
"""


@pytest.mark.parametrize("arguments", [(), ("-n", "2"), BY_FILE], ids=["plain", "n2", "by file"])
@pytest.mark.parametrize(
    "source", [ENGINE, RESERVED, NESTED_WITHIN], ids=["engine", "lease", "run"]
)
def test_nobody_waits_for_what_its_own_family_has(run, source, arguments):
    finished = run(source, *arguments, "--gpumem-lease-timeout=30")

    assert set(finished.outcomes) == {"passed"}, finished.output
    assert all(grant.waited < 3 for grant in grants(finished)), grants(finished)


@pytest.mark.parametrize(
    ("scope", "lease", "set_ups"),
    [
        ("session", 'pytest_gpumem.gpu_lease("2500MiB")', 1),
        ("module", "reserved()", 3),
    ],
)
def test_a_fixture_with_a_lease_is_set_up_once_for_each_use_in_a_first_run(
    run, tmp_path, scope, lease, set_ups
):
    conftest = TAKE + STANDING.format(scope=scope, lease=lease)
    finished = run(SERVED, "-n", "3", conftest=conftest, test_a=SERVED, test_b=SERVED)

    assert finished.outcomes == {"passed": 12}, finished.output
    assert (tmp_path / "set-ups").read_text().count("set up") == set_ups


@pytest.mark.parametrize(("schedule", "waited"), [("on", 0), ("off", HOPE)])
def test_only_without_a_scheduler_is_it_hoped_that_others_spare_what_they_keep(
    tmp_path, neighbour, schedule, waited
):
    card = neighbour("""
        LeaseStore().set_resident(sys.argv[1], 2877 * 2**20, spare=True)
        print("there", flush=True)
        sys.stdin.read()
    """)
    write_suite(tmp_path, test_it=WAITS)
    arguments = (f"--gpumem-simulate-card={card}", f"--gpumem-schedule={schedule}")
    finished = run_pytest(tmp_path, "-p", "gpumem", "--gpumem-json=run.json", "-n", "1", *arguments)

    assert finished.outcomes == {"passed": 1}, finished.output
    assert finished.test("test_a").lease.waited == pytest.approx(waited, abs=1)


def test_a_test_within_a_lease_of_the_suites_own_takes_none(run):
    source = """
from pytest_gpumem import gpu_lease

@pytest.fixture(scope="module")
def reserved():
    with gpu_lease("1GiB"):
        yield

@pytest.mark.gpu(vram="1GiB")
@pytest.mark.parametrize("i", range(2))
def test_a(reserved, i): take(1000 * 1024)
"""
    finished = run(source)

    assert finished.outcomes == {"passed": 2}, finished.output
    assert len(grants(finished)) == 1  # the first one's set-up took the suite's own


@pytest.mark.parametrize("mode", list(MODES))
def test_a_run_teaches_the_next_one(run, tmp_path, mode):
    source = """
@pytest.fixture(scope="module")
def model(): return take(300 * 1024)

@pytest.mark.parametrize("i", range(2))
def test_a(model, i): x = take(100 * 1024)

def test_cpu(): pass
"""
    first = run(source, f"--gpumem-history={tmp_path / 'h.json'}", *MODES[mode])
    history = History.load(tmp_path / "h.json")
    second = run(source, f"--gpumem-history={tmp_path / 'h.json'}", *MODES[mode])

    assert first.outcomes == second.outcomes == {"passed": 3}, first.output + second.output
    assert len(history) == 3
    for i in range(2):
        assert 100 * MIB <= history[f"test_it.py::test_a[{i}]"].peak < 150 * MIB
        assert history[f"test_it.py::test_a[{i}]"].fixtures == 300 * MIB
    assert not history["test_it.py::test_cpu"].gpu
    header = [f"gpumem: {known} peaks known from earlier runs\n" for known in ("no", 2)]
    assert [header[0] in first.output, header[1] in second.output] == [mode == "n2"] * 2
    assert len(grants(second)) == 2
    assert History.load(tmp_path / "h.json")["test_it.py::test_cpu"].runs == 2


@pytest.mark.parametrize("arguments", [(), ("-n", "1")], ids=["plain", "scheduled"])
def test_what_leaked_is_not_taken_for_fixtures(run, tmp_path, arguments):
    # The longest test goes first once that is known.
    leaks = "KEPT = []\ndef test_a(): KEPT.append(take(500 * 1024)); time.sleep(0.2)\n"
    other = """
import pytest
from test_it import take

@pytest.fixture(scope="module")
def model(): return take(300 * 1024)

@pytest.mark.parametrize("i", range(2))
def test_b(model, i): x = take(100 * 1024)
"""
    for _ in range(2):
        history = f"--gpumem-history={tmp_path / 'h.json'}"
        finished = run(leaks, history, *arguments, test_other=other)
        assert finished.outcomes == {"passed": 3}, finished.output
    sizes = {test.nodeid.split("::")[1]: test.lease.size // MIB for test in finished.record.tests}

    assert 400 <= sizes["test_b[0]"] < 500
    assert 100 <= sizes["test_b[1]"] < 200


def test_peaks_are_kept_in_pytests_cache_and_a_broken_file_is_told(run, tmp_path):
    run("def test_a(): take()\n")
    kept = tmp_path.with_name(f"{tmp_path.name}-cache") / "d" / "gpumem" / "history.json"
    assert dict(History.load(kept))["test_it.py::test_a"].runs == 1
    kept.write_text("{}")
    finished = run("def test_a(): take()\n")

    assert finished.outcomes == {"passed": 1}
    assert "history.json' are ignored: it is not a history of schema 1" in finished.section


def test_measuring_alone_writes_no_history(run, tmp_path):
    run("def test_a(): take()\n", "--gpumem=track")

    assert not (tmp_path.with_name(f"{tmp_path.name}-cache") / "d" / "gpumem").exists()


def test_auto_says_how_many_workers_and_why(run):
    source = "@pytest.mark.parametrize('i', range(2))\ndef test_a(i): take(1500 * 1024)\n"
    run(source)
    finished = run(source, "-n", "auto", "--maxprocesses=8")

    assert "gpumem: 1 worker: " in finished.output or "gpumem: 2 workers: " in finished.output


def test_the_trace_has_a_lane_for_each_worker_and_a_counter_for_the_card(run, tmp_path):
    finished = run(HEAVY, "-n", "2", "--gpumem-trace=trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]

    stretches = [each for each in trace if each["ph"] == "X" and each.get("cat") == "passed"]
    assert sorted(each["name"] for each in stretches) == [
        "test_it.py::test_heavy[0]",
        "test_it.py::test_heavy[1]",
    ]
    assert all(each["dur"] >= 300_000 for each in stretches)
    lanes = {each["args"]["name"] for each in trace if each["name"] == "thread_name"}
    assert lanes <= {"gw0", "gw1"}
    counts = [each["args"]["used"] for each in trace if each["ph"] == "C"]
    assert 2384 <= max(counts) < 3900
    assert finished.status == 0


BREAK = """
def lost(): raise RuntimeError("CUDA error: device-side assert triggered")

def test_0_passes():
    raise RuntimeError("CUDA error: an error that the context survives")

@pytest.mark.gpu(vram="1MiB")
def test_1_breaks():
    take()
    torch.cuda.synchronize = lost
    raise RuntimeError("CUDA error: device-side assert triggered\\nCompile with TORCH_USE_CUDA_DSA")

@pytest.mark.parametrize("i", range(4))
def test_good(i):
    torch.cuda.synchronize()
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("-n", "1"),
        pytest.param(("-n", "2", "--reruns=1"), marks=pytest.mark.slow),
        ("-n", "1", "--gpumem-schedule=off"),
    ],
)
def test_a_worker_is_replaced_if_its_context_is_broken_and_not_for_an_error_alone(
    run_torch, arguments
):
    finished = run_torch(BREAK, *arguments)

    rerun = {"rerun": 2} if "--reruns=1" in arguments else {}
    assert finished.outcomes == {"failed": 2, "passed": 4} | rerun, finished.output
    assert "replaced workers" in finished.section
    assert "after test_it.py::test_1_breaks: CUDA error: device-side assert" in finished.section
    assert "after test_it.py::test_0_passes" not in finished.section


@pytest.mark.newest  # older versions of torch cannot tell the fraction
def test_a_memory_fraction_holds_and_is_set_again(run_torch):
    source = """
def test_first():
    with pytest.raises(torch.OutOfMemoryError):
        take(1500 * 1024)
def test_greedy(): torch.cuda.set_per_process_memory_fraction(1.0)
def test_after(): assert torch.cuda.get_per_process_memory_fraction() == 0.25
"""
    finished = run_torch(source, "--gpumem-fraction=0.25")

    assert finished.outcomes == {"passed": 3}, finished.output
    assert (
        "test_it.py::test_greedy changed the memory fraction to 1; it was set to 0.25 again"
        in finished.section
    )


@pytest.mark.newest  # older versions of torch cannot tell the fraction
def test_an_even_fraction_leaves_room_for_the_contexts(run_torch):
    source = """
def test_first():
    import torch  # of one worker alone; it takes two seconds

def test_a():
    import torch

    torch.zeros(1, device="cuda")
    print(torch.cuda.get_per_process_memory_fraction())
"""
    finished = run_torch(source, "--gpumem-fraction=auto", *BY_FILE, "-rP", head="")

    assert "0.39337" in finished.output, finished.output

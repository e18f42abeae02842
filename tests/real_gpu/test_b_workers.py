"""Several workers on one real card, of which another program holds all but a few GiB."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from pytest_gpumem.devices import driver_reading, find_cards
from pytest_gpumem.units import format_bytes, parse_bytes

LEFT = parse_bytes("3.81GiB")
"""What the other program leaves of the card."""

HOG = """
import sys, torch
left, context = int(sys.argv[1]), torch.ones(1, device="cuda")
kept = []
while (free := torch.cuda.mem_get_info()[0]) > left + 2**21:
    kept.append(torch.empty(min(2**30, free - left), dtype=torch.uint8, device="cuda"))
print("ready", flush=True)
sys.stdin.read()
"""

# Four test modules with a model each, tests of 200 to 1,000 MiB, and tests that use no card.
SUITE = """
import time
import pytest, torch

@pytest.fixture(scope="module")
def model():
    return torch.ones(300, 1024, 1024, dtype=torch.uint8, device="cuda")

@pytest.mark.parametrize("mib", [200, 1000, 400, 800, 600])
def test_card(model, mib):
    work = torch.ones(mib, 1024, 1024, dtype=torch.uint8, device="cuda")
    time.sleep(0.2)
    assert int(work[0, 0, 0]) == 1

@pytest.mark.parametrize("i", range(15))
def test_without_card(i):
    time.sleep(0.05)
"""


@pytest.fixture
def small_card(rehearsal, environment):
    """Leave LEFT bytes of the card free while the test runs."""
    pytest.importorskip("xdist")
    if rehearsal:
        yield
        return
    hog = subprocess.Popen(
        [sys.executable, "-c", HOG, str(LEFT)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert hog.stdout.readline() == "ready\n"
    yield
    hog.communicate()


def outcomes(run):
    return {name: sum(test.outcome == name for test in run.tests) for name in ("passed", "failed")}


def ooms(run):
    return sum(usage.ooms for test in run.tests for usage in test.cards)


def test_no_test_runs_out_of_memory_where_some_do_without_sharing(
    run_suite, small_card, tmp_path, figure
):
    for name in "bcd":
        (tmp_path / f"test_{name}.py").write_text(SUITE)
    workers = ["-p", "xdist", "-n4", "--gpumem-context=640MiB"]

    plain = run_suite(SUITE, *workers, "--gpumem=track")
    first = run_suite(SUITE, *workers)
    second = run_suite(SUITE, *workers)

    for text, run in (("xdist alone", plain), ("first run", first), ("second run", second)):
        took = max(test.start + test.duration for test in run.tests) - min(
            test.start for test in run.tests
        )
        contexts = {test.worker for test in run.tests if test.cards}
        figure(
            f"4 workers, {format_bytes(LEFT)} free, 20 tests on the card: {text}",
            f"{outcomes(run)['failed']} failed, {ooms(run)} OOMs, {len(contexts)} workers used "
            f"the card, {took:.1f} s",
        )
    assert outcomes(first) == outcomes(second) == {"passed": 80, "failed": 0}
    assert ooms(second) == 0


def test_worker_with_a_lost_context_is_replaced(run_suite, tmp_path, figure, rehearsal):
    if rehearsal:
        pytest.skip("the simulated card loses no context")
    run = run_suite(
        """
        import pytest, torch

        def test_asserts():
            torch.zeros(3, device="cuda")[torch.tensor([10], device="cuda")]
            torch.cuda.synchronize()

        @pytest.mark.parametrize("i", range(40))
        def test_after(i):
            assert float(torch.ones(3, device="cuda").sum()) == 3
        """,
        *["-p", "xdist", "-n2"],
    )

    figure("failed device assertion, then 40 tests", str(outcomes(run)))
    assert outcomes(run) == {"passed": 40, "failed": 1}


def test_lease_of_a_killed_process_goes_to_the_next(rehearsal, environment, figure):
    if rehearsal:
        pytest.skip("the simulated card is that of a run of pytest")
    hold = """
import sys, time, torch, pytest_gpumem
with pytest_gpumem.gpu_lease(exclusive=True):
    torch.ones(1, device="cuda")
    print(time.time(), flush=True)
    time.sleep(float(sys.argv[1]))
"""
    command = [sys.executable, "-c", hold]
    pipes = {"env": environment, "stdout": subprocess.PIPE, "text": True}
    holder = subprocess.Popen([*command, "600"], **pipes)
    assert holder.stdout.readline()
    waiter = subprocess.Popen([*command, "0"], **pipes)
    with contextlib.suppress(subprocess.TimeoutExpired):
        waiter.wait(3)
    assert waiter.poll() is None
    os.kill(holder.pid, signal.SIGKILL)
    killed = time.time()

    granted = float(waiter.communicate(timeout=60)[0])
    holder.communicate()

    figure("SIGKILL of the holder to the next one's work on the card", f"{granted - killed:.3f} s")
    assert granted > killed


def test_fraction_caps_a_process_and_is_set_again(run_suite, figure):
    run = run_suite(
        """
        import torch

        def test_over():
            total = torch.cuda.get_device_properties(0).total_memory
            torch.empty(total // 20, dtype=torch.uint8, device="cuda")

        def test_changes():
            torch.cuda.set_per_process_memory_fraction(1.0)

        def test_over_again():
            total = torch.cuda.get_device_properties(0).total_memory
            torch.empty(total // 20, dtype=torch.uint8, device="cuda")
        """,
        *["--gpumem-fraction=0.02", "--gpumem-oom=fail"],
    )

    figure("OOM under a fraction", run.tests[0].oom)
    assert [test.outcome for test in run.tests] == ["failed", "passed", "failed"]


def test_auto_counts_workers_by_the_card(small_card, run_suite, tmp_path, figure, capfd):
    run = run_suite(SUITE, "-p", "xdist", "-n", "auto")

    assert outcomes(run) == {"passed": 20, "failed": 0}
    shown = capfd.readouterr().out
    line = re.search("gpumem: .*workers.*", shown)
    figure("-n auto", line[0] if line else "as many as xdist starts")


def test_driver_tells_what_others_hold(small_card, figure, rehearsal):
    if rehearsal:
        pytest.skip("reads the driver of the real card")
    reading = driver_reading(find_cards().cards[0])

    figure("free beside the other program", format_bytes(reading.free))
    assert reading.free < LEFT + 2**28

"""No failure is lost and none is made up, whoever runs the tests."""

from __future__ import annotations

import json

import pytest
from outcomes import Case, difference

FORKING = """
import json, os
import pytest
from _pytest.runner import runtestprotocol

RAN = []

# As pytest-forked and pytest-isolate run a test: in a child, whose reports are published here.
@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    if "once" in item.name and item.name in RAN:
        return True
    RAN.append(item.name)
    hook = item.ihook
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    ours, childs = os.pipe()
    if os.fork() == 0:
        reports = [
            item.config.hook.pytest_report_to_serializable(config=item.config, report=report)
            for report in runtestprotocol(item, log=False)
        ]
        os.write(childs, json.dumps(reports).encode())
        os._exit(0)
    os.close(childs)
    with os.fdopen(ours) as file:
        plains = json.load(file)
    os.wait()
    for plain in plains:
        hook.pytest_runtest_logreport(
            report=item.config.hook.pytest_report_from_serializable(config=item.config, data=plain)
        )
    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True
"""
HEAD = """
import pytest
from without_torch import ALLOCATOR

@pytest.fixture
def gpu_device(request):
    return "cpu" if ("gpumem_step", "cpu") in request.node.user_properties else "cuda"
"""
SUITE = (
    HEAD
    + """
def test_runs_out(): ALLOCATOR.take(2**32)

@pytest.mark.gpu(fallback="cpu")
def test_falls_back(gpu_device):
    if gpu_device == "cuda": ALLOCATOR.take(2**32)

@pytest.mark.gpu(fallback="cpu")
def test_once(gpu_device): ALLOCATOR.take(2**32)

def test_passes(): pass
"""
)


def last_failed(finished):
    cache = finished.directory.with_name(f"{finished.directory.name}-cache")
    return set(json.loads((cache / "v" / "cache" / "lastfailed").read_text()))


def attempts(finished):
    made: dict[str, list[tuple[str, str]]] = {}
    for test in finished.record.tests:
        made.setdefault(test.nodeid.rpartition("::")[2], []).append((test.outcome, test.step))
    return made


@pytest.mark.parametrize("arguments", [(), ("-n", "2")], ids=["plain", "n2"])
def test_no_attempt_is_a_rerun_unless_another_one_follows(run_without_torch, arguments):
    finished = run_without_torch(SUITE, *arguments, conftest=FORKING)

    assert attempts(finished) == {
        "test_runs_out": [("failed", "")],
        "test_falls_back": [("rerun", ""), ("passed", "cpu")],
        "test_once": [("failed", "")],
        "test_passes": [("passed", "")],
    }, finished.output
    assert finished.outcomes == {"passed": 2, "failed": 2, "rerun": 2}, finished.output
    assert finished.status == pytest.ExitCode.TESTS_FAILED
    assert last_failed(finished) == {"test_it.py::test_runs_out", "test_it.py::test_once"}


def test_an_interrupt_before_the_next_attempt_has_ended_leaves_the_failure(run_without_torch):
    source = SUITE.replace("(gpu_device):\n", "(gpu_device):\n    STOP(gpu_device)\n", 1)
    source += "\ndef STOP(device):\n    if device == 'cpu': raise KeyboardInterrupt\n"
    finished = run_without_torch(source, "--junitxml=junit.xml", "-k", "falls_back")

    assert finished.status == pytest.ExitCode.INTERRUPTED
    assert attempts(finished) == {"test_falls_back": [("failed", "")]}
    assert last_failed(finished) == {"test_it.py::test_falls_back"}
    assert (finished.directory / "junit.xml").read_text().count("<failure") == 1


HTML = "-Wdefault -pmetadata -phtml --html=report.html"
LOOKING = """
from pathlib import Path

def pytest_runtest_logreport(report):
    if report.when == "call":
        with Path(__file__).with_name("seen").open("a") as file: print(report.outcome, file=file)
"""


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("option", ["-x", "--stepwise", HTML])
def test_who_counts_failures_counts_the_last_attempts(run_without_torch, option, fails):
    source = (
        HEAD
        + """
@pytest.mark.gpu(fallback="cpu")
def test_falls_back(gpu_device):
    if gpu_device == "cuda": ALLOCATOR.take(2**32)
"""
    )
    source += "    assert 0\n" if fails else ""
    source += "\ndef test_after(): pass\n"
    finished = run_without_torch(source, *option.split(), conftest=LOOKING)

    stops = fails and option in ("-x", "--stepwise")
    assert attempts(finished) == {
        "test_falls_back": [("rerun", ""), ("failed" if fails else "passed", "cpu")],
    } | ({} if stops else {"test_after": [("passed", "")]}), finished.output
    seen = (finished.directory / "seen").read_text().split()
    assert seen == ["rerun", "failed" if fails else "passed"] + ([] if stops else ["passed"])
    if fails:
        assert last_failed(finished) == {"test_it.py::test_falls_back"}
    else:
        assert finished.status == 0


CASES = [
    Case(("is too large",)),
    Case(("is far too large", "exits"), skip=True),
    Case(("runs out", "is killed", "runs out unmarked"), workers=4),
    Case(("is too large", "fails"), 2, ("-x",)),
    Case(("runs out", "passes"), 1, ("-k", "nothing")),
]


@pytest.mark.parametrize("case", CASES, ids=map(str, range(len(CASES))))
def test_a_suite_of_few_tests_ends_as_under_plain_xdist(tmp_path, case):
    assert difference(tmp_path, case) == ""

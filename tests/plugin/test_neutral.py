"""Suites of every habit end as they would without the plugin, on the simulated card."""

from __future__ import annotations

import pytest
from harness import SIMULATE, TAKE, run_pytest, write_suite


def leaks(finished, story="it"):
    return {
        each.nodeid.split("::")[-1]: sum(card.leaked for card in each.cards)
        for each in finished.record.tests
        if f"_{story}.py::" in each.nodeid
        if any(card.leaked for card in each.cards) or any(f.leaked for f in each.fixtures)
    }


STORIES = {
    "test_0_failed_set_up": """
@pytest.fixture(scope="module")
def model():
    weights = take(2048)
    raise ValueError(weights.numel())

def test_a(model): pass
def test_b(model): pass
def test_c(): assert torch.cuda.memory_allocated() == 0
""",
    "test_1_closure": """
def test_a():
    weights = take()
    def loss(): raise ValueError(weights.numel())
    loss()

def test_b(): assert torch.cuda.memory_allocated() == 0
""",
    "test_2_hypothesis": """
from hypothesis import given, settings, strategies

@settings(max_examples=20, database=None)
@given(strategies.integers(0, 100))
def test_a(number):
    held = take(number + 1)
    assert number < 50
""",
    "test_3_wrapped": """
def test_wrapped():
    try:
        take(10**9)
    except torch.cuda.OutOfMemoryError as error:
        raise RuntimeError("could not load") from error

def test_talks_about_it():
    raise ValueError("the handler for CUDA out of memory is missing")
""",
    "test_4_carries": """
def test_carries(): raise ValueError(take())
def test_after(): pass
""",
    "test_5_stores": """
STORED = []

def test_stores():
    local = take()
    try:
        raise ValueError
    except ValueError as error:
        STORED.append(error)
""",
    "test_6_forks": """
import gc, os

def test_fork():
    take()
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.cuda._is_in_bad_fork() else 1)
    assert os.waitpid(child, 0)[1] == 0

def test_frozen():
    gc.freeze()
    node = [take()]
    node.append(node)
    del node
    gc.unfreeze()

def test_disabled():
    gc.disable()
    node = [take()]
    node.append(node)

def test_still_disabled():
    assert not gc.isenabled()
    gc.enable()
""",
    "test_7_replaces": """
from unittest import mock

def test_first(): take()

def test_functions(monkeypatch):
    for name in ("memory_stats", "reset_peak_memory_stats", "is_initialized", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    take()

@mock.patch("torch.cuda")
def test_module(cuda): take()

def test_last(): take()
""",
    "test_8_params": """
@pytest.fixture(scope="session", params=[1, 2])
def model(request): return take(64 * request.param)

@pytest.fixture
def batch(model): return take()

def test_a(model, batch, tmp_path): assert model.numel() and batch.numel()
def test_b(batch, model): assert model.numel() and batch.numel()
""",
    "test_9_wide": """
@pytest.fixture(scope="session")
def registry(): return {}

@pytest.fixture(scope="module")
def pool():
    kept = []
    class Pool: add = staticmethod(lambda each: kept.append(each))
    yield Pool

def test_registry(registry): registry["a"] = take()
def test_pool(pool): pool.add(take())
""",
}
"""Those first that look at what is allocated at all; fixtures of the session stay to the end."""


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """Run suites that do not mind one another in one process: torch takes seconds to start."""
    directory = tmp_path_factory.mktemp("stories")
    write_suite(directory, **{name: TAKE + source for name, source in STORIES.items()})
    return run_pytest(directory, *SIMULATE, "--gpumem-json=run.json", beside=["hypothesispytest"])


def outcomes(finished, story):
    return [each.outcome for each in finished.record.tests if f"_{story}.py::" in each.nodeid]


@pytest.mark.parametrize(
    ("story", "ends"),
    [
        ("failed_set_up", ["error", "error", "passed"]),
        ("closure", ["failed", "passed"]),
        ("hypothesis", ["failed"]),
        ("wrapped", ["failed", "failed"]),
        ("carries", ["failed", "passed"]),
        ("forks", ["passed"] * 4),
        ("replaces", ["passed"] * 4),
        ("params", ["passed"] * 4),
        ("wide", ["passed"] * 2),
    ],
)
def test_a_habit_ends_as_without_the_plugin_and_is_no_leak(stories, story, ends):
    assert outcomes(stories, story) == ends, stories.output
    assert leaks(stories, story) == {}


def test_what_was_replaced_does_not_cost_the_next_test_its_figures(stories):
    card = stories.card("test_last")
    assert card.peak - card.baseline == 64 * 1024


def test_who_holds_what_is_no_leak_is_named(stories):
    assert "fixture 'registry' (session)" in stories.card("test_registry").note
    assert "sys.last_value" in stories.card("test_carries").note


def test_a_wrapped_out_of_memory_error_is_told_and_other_texts_are_not(stories):
    assert stories.test("test_wrapped").oom.startswith("CUDA out of memory. Tried to allocate")
    assert stories.test("test_talks_about_it").oom == ""


def test_exceptions_that_the_suite_stores_are_told_as_holders(stories):
    assert leaks(stories, "stores") == {"test_stores": 64 * 1024}


def test_other_plugins_read_fixture_values_when_the_teardown_is_reported(run):
    conftest = """
import pytest

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "teardown":
        assert item.funcargs["page"] == {"url": "about:blank"}
        assert "model" in item.funcargs
        assert item.funcargs["request"].node is item
        assert item.funcargs["capsys"] is not None
    return report
"""
    source = """
@pytest.fixture
def page(): return {"url": "about:blank"}

@pytest.fixture
def model(): return {"weights": [take()]}

def test_a(page, model, request, capsys): take()
"""
    finished = run(source, conftest=conftest)

    assert finished.outcomes == {"passed": 1}, finished.output
    assert leaks(finished) == {}


@pytest.mark.parametrize(
    "arguments",
    [
        ("-p", "no:debugging"),
        ("--setup-show",),
        ("--stepwise",),
        ("--import-mode=importlib", "-o", "pythonpath=."),
        ("-p", "no:junitxml", "-p", "no:unittest"),
    ],
)
def test_pytests_own_options_make_no_difference(run_without_torch, arguments):
    finished = run_without_torch("def test_a(): take()", *arguments)

    assert finished.status == 0, finished.output
    assert finished.card("test_a").peak == 64 * 1024


@pytest.mark.parametrize("arguments", [("--collect-only",), ("--setup-only",), ("--setup-plan",)])
def test_what_runs_no_test_measures_none(run_without_torch, arguments):
    finished = run_without_torch("def test_a(): take()", *arguments)

    assert finished.status == 0, finished.output
    assert all(not each.cards for each in finished.record.tests)


@pytest.mark.parametrize("arguments", [(), ("-n", "1")])
def test_a_plan_of_set_ups_asks_for_no_room(run_without_torch, arguments):
    source = "@pytest.mark.gpu(vram='5GiB')\ndef test_larger_than_the_card(): pass"
    finished = run_without_torch(source, "--setup-plan", *arguments)

    assert finished.status == 0, finished.output


def test_an_interrupt_leaves_the_record_of_what_ran(run_without_torch):
    finished = run_without_torch("def test_a(): take()\ndef test_b(): raise KeyboardInterrupt")

    assert finished.status == pytest.ExitCode.INTERRUPTED
    assert finished.card("test_a").peak == 64 * 1024


def test_a_gpu_mark_of_the_suites_own_does_not_stop_a_run_that_did_not_ask_for_us(tmp_path):
    source = """
import pytest

@pytest.mark.gpu(num_gpus=2, reason="slow")
def test_a(): pass
"""
    write_suite(tmp_path, test_it=source)

    assert run_pytest(tmp_path).outcomes == {"passed": 1}
    assert "num_gpus" in run_pytest(tmp_path, *SIMULATE).output


def test_a_suite_that_has_only_a_mock_of_torch_runs(tmp_path):
    write_suite(
        tmp_path,
        conftest="""
import sys
from unittest import mock

sys.modules["torch"] = mock.MagicMock()
""",
        test_mocked="def test_nothing(): pass",
    )
    run = run_pytest(tmp_path, "-p", "gpumem")

    assert run.status == 0, run.output


CLOCKS = """
import threading, time
from unittest import mock
import pytest
from pytest_gpumem import LeaseTimeout, gpu_lease

@pytest.fixture(scope="module")
def answers():
    ticks = mock.patch("time.monotonic", side_effect=[1.0, 2.0, 3.0])
    naps = mock.patch("time.sleep", side_effect=AssertionError("slept"))
    with ticks, naps: yield

def took():
    start = time.monotonic()
    return time.monotonic() - start

def test_first(answers): assert took() == 1.0
def test_uses_the_card(answers): take()
def test_fails(answers): assert time.monotonic() == 4.0
def test_asks_too_often(answers): took()

def test_a_deadline_holds_while_the_clock_stands():
    said = []
    def ask():
        try: gpu_lease("1GiB", timeout=0.1).__enter__()
        except LeaseTimeout: said.append("no lease")
    with gpu_lease("3GiB"), mock.patch("time.monotonic", return_value=1.0):
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(10)
        assert said
"""


@pytest.mark.parametrize("arguments", [(), ("-n", "1")])
def test_clocks_of_the_suites_own_are_neither_asked_nor_waited_by(run_without_torch, arguments):
    finished = run_without_torch(CLOCKS, *arguments)

    assert finished.outcomes == {"passed": 3, "failed": 2}, finished.output


QUESTIONS = """
import os, resource, threading, time
from unittest import mock
import pytest

@pytest.fixture(scope="module", params=[
    "os.listdir", "os.pread", "os.waitid", "resource.getrusage", "threading.current_thread",
    "time.clock_gettime", "time.thread_time", "os.path.exists", "os.utime",
])
def silent(request):
    with mock.patch(request.param, side_effect=AssertionError("asked")) as replaced: yield replaced

@pytest.fixture
def more(silent): return 1

def test_nobody_asks(silent, more): assert not silent.mock_calls
def test_fails(silent): assert silent is None
"""


@pytest.mark.parametrize("arguments", [(), ("-n", "1")])
def test_nobody_else_asks_the_system_while_a_suite_answers_for_it(run_without_torch, arguments):
    finished = run_without_torch(QUESTIONS, *arguments)

    assert finished.outcomes == {"passed": 9, "failed": 9}, finished.output

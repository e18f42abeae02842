"""Suites of every habit end as they would without the plugin, on the simulated card."""

from __future__ import annotations

import pytest
from harness import SIMULATE, run_pytest, write_suite


def leaks(finished):
    return {
        each.nodeid.split("::")[-1]: sum(card.leaked for card in each.cards)
        for each in finished.record.tests
        if any(card.leaked for card in each.cards) or any(f.leaked for f in each.fixtures)
    }


def test_a_parametrised_wide_fixture_changes_between_two_tests(run):
    source = """
@pytest.fixture(scope="session", params=[1, 2])
def model(request): return take(64 * request.param)

@pytest.fixture
def batch(model): return take()

def test_a(model, batch, tmp_path): assert model.numel() and batch.numel()
def test_b(batch, model): assert model.numel() and batch.numel()
"""
    finished = run(source)

    assert finished.outcomes == {"passed": 4}, finished.output
    assert leaks(finished) == {}


def test_other_plugins_read_fixture_values_when_the_teardown_is_reported(run):
    conftest = """
import pytest

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "teardown":
        assert item.funcargs["page"] == {"url": "about:blank"}
        assert "model" in item.funcargs
    return report
"""
    source = """
@pytest.fixture
def page(): return {"url": "about:blank"}

@pytest.fixture
def model(): return {"weights": [take()]}

def test_a(page, model): take()
"""
    finished = run(source, conftest=conftest)

    assert finished.outcomes == {"passed": 1}, finished.output
    assert leaks(finished) == {}


def test_tests_may_replace_torchs_functions_and_torch_cuda_itself(run):
    source = """
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
"""
    finished = run(source)

    assert finished.outcomes == {"passed": 4}, finished.output
    assert finished.card("test_last").peak == 64 * 1024


def test_what_a_wide_fixture_holds_by_whatever_means_is_no_leak(run):
    source = """
@pytest.fixture(scope="session")
def registry(): return {}

@pytest.fixture(scope="module")
def pool():
    kept = []
    class Pool: add = staticmethod(lambda each: kept.append(each))
    yield Pool

def test_registry(registry): registry["a"] = take()
def test_pool(pool): pool.add(take())
"""
    finished = run(source)

    assert leaks(finished) == {}
    assert "fixture 'registry' (session)" in finished.card("test_registry").note


def test_a_failed_set_up_of_a_wide_fixture_pins_nothing(run):
    source = """
@pytest.fixture(scope="module")
def model():
    weights = take(2048)
    raise ValueError(weights.numel())

def test_a(model): pass
def test_b(model): pass
def test_c(): assert torch.cuda.memory_allocated() == 0
"""
    finished = run(source)

    assert finished.outcomes == {"passed": 1, "error": 2}, finished.output
    assert leaks(finished) == {}


def test_a_wrapped_out_of_memory_error_is_told_and_other_texts_are_not(run):
    source = """
def test_wrapped():
    try:
        take(10**9)
    except torch.cuda.OutOfMemoryError as error:
        raise RuntimeError("could not load") from error

def test_talks_about_it():
    raise ValueError("the handler for CUDA out of memory is missing")
"""
    finished = run(source)

    assert finished.test("test_wrapped").oom.startswith("CUDA out of memory. Tried to allocate")
    assert finished.test("test_talks_about_it").oom == ""


def test_an_exception_that_carries_a_tensor_is_no_leak(run):
    source = """
def test_a(): raise ValueError(take())
def test_b(): pass
"""
    finished = run(source)

    assert leaks(finished) == {}
    assert "sys.last_value" in finished.card("test_a").note


def test_the_failing_examples_of_hypothesis_pin_nothing(run):
    source = """
from hypothesis import given, settings, strategies

@settings(max_examples=20, database=None)
@given(strategies.integers(0, 100))
def test_a(number):
    held = take(number + 1)
    assert number < 50
"""
    finished = run(source)

    assert finished.outcomes == {"failed": 1}
    assert leaks(finished) == {}


def test_a_failed_closure_over_a_tensor_pins_nothing(run):
    source = """
def test_a():
    weights = take()
    def loss(): raise ValueError(weights.numel())
    loss()

def test_b(): assert torch.cuda.memory_allocated() == 0
"""
    finished = run(source, "-p", "no:rerunfailures")  # which keeps tracebacks of its own

    assert finished.outcomes == {"passed": 1, "failed": 1}, finished.output
    assert leaks(finished) == {}


def test_exceptions_that_the_suite_stores_are_told_as_holders(run):
    source = """
STORED = []

def test_a():
    local = take()
    try:
        raise ValueError
    except ValueError as error:
        STORED.append(error)
"""
    finished = run(source)

    assert leaks(finished) == {"test_a": 64 * 1024}


@pytest.mark.parametrize(
    "arguments",
    [
        ("-p", "no:debugging"),
        ("--setup-show",),
        ("--stepwise",),
        ("--import-mode=importlib",),
        ("-p", "no:junitxml", "-p", "no:unittest"),
    ],
)
def test_pytests_own_options_make_no_difference(run, arguments):
    finished = run("def test_a(): take()", *arguments)

    assert finished.status == 0, finished.output
    assert finished.card("test_a").peak == 64 * 1024


@pytest.mark.parametrize("arguments", [("--collect-only",), ("--setup-only",), ("--setup-plan",)])
def test_what_runs_no_test_measures_none(run, arguments):
    finished = run("def test_a(): take()", *arguments)

    assert finished.status == 0, finished.output
    assert all(not each.cards for each in finished.record.tests)


def test_an_interrupt_leaves_the_record_of_what_ran(run):
    finished = run("def test_a(): take()\ndef test_b(): raise KeyboardInterrupt")

    assert finished.status == pytest.ExitCode.INTERRUPTED
    assert finished.card("test_a").peak == 64 * 1024


def test_forks_and_frozen_heaps_are_left_alone(run):
    source = """
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
"""
    finished = run(source)

    assert finished.outcomes == {"passed": 4}, finished.output
    assert leaks(finished) == {}


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

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

from pytest_gpumem.devices import process_state
from pytest_gpumem.tracking.process_changes import ProcessChanges


@pytest.mark.parametrize(
    ("steps", "left"),
    [
        # Whose step it is, and what is set after it.
        ([("test", {"x": 1})], [("x", "0", "1")]),
        ([("test", {"x": 1}), ("test", {"x": 0})], []),
        ([("nobody", {"x": 1}), ("test", {"x": 1})], []),
        # A wider fixture has the last word, and what a test does after it is the test's.
        ([("test", {"x": 1}), ("nobody", {"x": 2})], []),
        ([("test", {"x": 1}), ("nobody", {"x": 2}), ("test", {"x": 3})], [("x", "2", "3")]),
        ([("nobody", {"x": 2}), ("test", {"x": 0})], [("x", "2", "0")]),
        # What torch did not have yet has its default.
        ([("test", {"x": 0, "gradients": True})], []),
        ([("test", {"x": 0, "gradients": False})], [("gradients", "True", "False")]),
        (
            [("test", {"memory fraction of cuda:1": 0.5})],
            [("memory fraction of cuda:1", "1", "0.5")],
        ),
        ([("nobody", {"x": 0, "gradients": False}), ("test", {"x": 0})], []),
    ],
)
def test_who_left_what(
    monkeypatch: pytest.MonkeyPatch,
    steps: list[tuple[str, dict[str, object]]],
    left: list[tuple[str, str, str]],
) -> None:
    now: dict[str, object] = {"x": 0}
    monkeypatch.setattr(process_state, "variables", lambda: tuple(now.items()))
    monkeypatch.setattr(process_state, "read", lambda variables, fractions: (variables, (), ()))
    monkeypatch.setattr(process_state, "named", lambda values: dict(values[0]))
    watch = ProcessChanges()
    watch.look(by_test=False)
    for who, after in steps:
        now = after
        watch.look(by_test=who == "test")
    assert [each[:3] for each in watch.settle()] == left
    watch.look(by_test=False)
    assert watch.settle() == ()


def settings() -> process_state.Settings:
    return process_state.named(process_state.read(process_state.variables()))


def test_looking_makes_no_context_and_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    torch.set_default_device("meta")
    monkeypatch.setattr(torch, "tensor", lambda *_: pytest.fail("a tensor was made"))
    try:
        assert settings()["default device"] == "meta"
    finally:
        torch.set_default_device(None)
    assert not torch.cuda.is_initialized()


def test_a_mock_of_torch_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    assert set(settings()) == set(process_state.VARIABLES)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_variable_that_a_test_sets_is_told(
    monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    if replaced:  # as suites do that test what reads it
        monkeypatch.setattr(os, "environ", {})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    watch = ProcessChanges()
    watch.look(by_test=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    watch.look(by_test=True)
    assert [each[:3] for each in watch.settle()] == [("CUDA_VISIBLE_DEVICES", "unset", "1")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    watch.look(by_test=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    watch.look(by_test=True)
    assert [each[:3] for each in watch.settle()] == [("CUDA_VISIBLE_DEVICES", "", "0,1")]

"""Waiting for an import without doing it."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import sys

import pytest

from pytest_gpumem.on_import import collecting_later, find_own_modules, when_imported


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module ``awaited_module`` that can be imported and forgotten."""
    path = tmp_path / "awaited_module.py"
    path.write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield path
    sys.modules.pop("awaited_module", None)


@pytest.fixture
def calls(module):
    """What the callback found; it waits for ``awaited_module``."""
    found: list[int] = []
    when_imported("awaited_module", lambda: found.append(sys.modules["awaited_module"].VALUE))
    return found


def test_the_callback_runs_once_after_the_import(calls):
    assert calls == []
    importlib.import_module("awaited_module")
    assert calls == [1]
    importlib.import_module("awaited_module")
    assert calls == [1]


def test_the_callback_runs_at_once_for_an_imported_module(module):
    importlib.import_module("awaited_module")
    found: list[int] = []
    when_imported("awaited_module", lambda: found.append(1))
    assert found == [1]


def test_nothing_of_the_wait_stays_on_the_module(calls):
    finders = [finder for finder in sys.meta_path if type(finder).__name__ != "_Watcher"]
    imported = importlib.import_module("awaited_module")
    assert "on_import" not in type(imported.__loader__).__module__
    assert imported.__loader__ is imported.__spec__.loader
    assert sys.meta_path == finders


def test_looking_the_module_up_neither_imports_nor_ends_the_wait(calls):
    spec = importlib.util.find_spec("awaited_module")
    assert spec.loader.get_source("awaited_module") == "VALUE = 1\n"
    assert calls == []
    importlib.import_module("awaited_module")
    assert calls == [1]


def test_a_reload_does_not_call_again(calls):
    imported = importlib.import_module("awaited_module")
    importlib.reload(imported)
    assert calls == [1]


def test_a_failed_import_leaves_the_callback_waiting(calls, module):
    module.write_text("raise RuntimeError('not yet')\n")
    with pytest.raises(RuntimeError, match="not yet"):
        importlib.import_module("awaited_module")
    assert calls == []
    module.write_text("VALUE = 200\n")
    importlib.invalidate_caches()
    importlib.import_module("awaited_module")
    assert calls == [200]


def test_a_module_that_does_not_exist_stays_missing(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    when_imported("no_such_module", lambda: None)
    assert importlib.util.find_spec("no_such_module") is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_module")


def test_two_may_wait_for_one_module(calls):
    found: list[str] = []
    when_imported("awaited_module", lambda: found.append("second"))
    importlib.import_module("awaited_module")
    assert (calls, found) == ([1], ["second"])


def test_a_submodule_can_be_awaited(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, "xml.sax.saxutils", raising=False)
    found: list[bool] = []
    when_imported("xml.sax.saxutils", lambda: found.append(True))
    importlib.import_module("xml.sax.saxutils")
    assert found == [True]


def test_no_other_finder_is_asked_for_modules_of_the_package(monkeypatch):
    asked: list[str] = []

    class Finder:
        def find_spec(self, name: str, *_: object) -> None:
            asked.append(name)

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path[-1:]])
    find_own_modules()
    find_own_modules()
    assert len(sys.meta_path) == 3
    monkeypatch.delitem(sys.modules, "pytest_gpumem.slots", raising=False)
    spec = importlib.util.find_spec("pytest_gpumem.slots")
    assert spec is not None
    assert asked == []
    assert importlib.util.find_spec("pytest_gpumem_of_another") is None
    assert importlib.util.find_spec("pytest_gpumem.nowhere") is None
    assert asked == ["pytest_gpumem_of_another", "pytest_gpumem.nowhere"]


@pytest.mark.parametrize("collects", [True, False])
def test_collections_wait_and_are_afterwards_as_before(collects):
    (gc.enable if collects else gc.disable)()
    try:
        with collecting_later():
            assert not gc.isenabled()
        assert gc.isenabled() is collects
    finally:
        gc.enable()

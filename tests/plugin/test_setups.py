"""Set-ups in the style of xunit and unittest are fixtures to pytest; reports name the functions."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import TestCase

import pytest

from pytest_gpumem.plugin.wide_fixtures import called

SUITE = """
import unittest

KEPT = []

def {module}(): KEPT.append(take(1024))

class TestHelped(unittest.TestCase):
    @classmethod
    def setUpClass(cls): cls.model = take(512)

    def test_helped(self): pass

class TestPlain:
    class TestInner:
        @classmethod
        def setup_class(cls): cls.model = take(128)

        def test_inner(self): pass
"""


@pytest.mark.parametrize("module", ["setUpModule", "setup_module"])
def test_a_run_names_set_ups_as_they_are_written(run_without_torch, module):
    finished = run_without_torch(SUITE.format(module=module), "-v")
    wide = {(each.name, each.scope) for test in finished.record.tests for each in test.fixtures}

    assert wide == {
        (f"test_it.py::{module}", "module"),
        ("test_it.py::TestHelped::setUpClass", "class"),
        ("test_it.py::TestPlain::TestInner::setup_class", "class"),
    }
    assert "  test_it.py::TestHelped::setUpClass (class)\n" in finished.section
    told = finished.output + (finished.directory / "run.json").read_text()
    assert "_xunit_" not in told
    assert "_unittest_" not in told
    # Which fixtures a test needs is asked by pytest's names.
    assert finished.card("test_helped").fixture_bytes >= (1024 + 512) * 1024


def made(*names, base=object):
    return type("Made", (base,), dict.fromkeys(names, lambda *_: None))


@pytest.mark.parametrize(
    ("argname", "module", "cls", "name"),
    [
        ("model", made(), None, "model"),
        ("_private", made(), None, "_private"),
        ("_xunit_setup_module_fixture_m", made("tearDownModule"), None, "tearDownModule"),
        ("_xunit_setup_module_fixture_m", made("teardown_module"), None, "teardown_module"),
        ("_xunit_setup_function_fixture_m", made("setup_function"), None, "setup_function"),
        ("_xunit_setup_function_fixture_m", made("teardown_function"), None, "teardown_function"),
        ("_xunit_setup_class_fixture_C", made(), made("teardown_class"), "teardown_class"),
        ("_xunit_setup_method_fixture_C", made(), made("setup_method"), "setup_method"),
        ("_xunit_setup_method_fixture_C", made(), made("teardown_method"), "teardown_method"),
        ("_unittest_setup_method_fixture_C", made(), made("setup_method"), "setup_method"),
        ("_unittest_setUpClass_fixture_C", made(), made("setUpClass", base=TestCase), "setUpClass"),
        (
            "_unittest_setUpClass_fixture_C",
            made(),
            made("tearDownClass", base=TestCase),
            "tearDownClass",
        ),
        ("_unittest_setUpClass_fixture_C", made(), made(base=TestCase), "setUpClass"),
    ],
)
def test_the_name_is_that_of_the_function_that_a_suite_has(argname, module, cls, name):
    fixture = SimpleNamespace(argname=argname, baseid="test_a.py::C")
    request = SimpleNamespace(module=module, cls=cls)

    expected = name if argname in ("model", "_private") else f"test_a.py::C::{name}"
    assert called(fixture, request) == expected

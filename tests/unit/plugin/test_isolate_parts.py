"""What fresh processes are told and tell, and how their ends are worded."""

from __future__ import annotations

import signal
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies

from pytest_gpumem.plugin.isolate.plain import plain, read_warning, told_warning
from pytest_gpumem.plugin.isolate.process import how_ended

ATOMS = (
    strategies.none()
    | strategies.booleans()
    | strategies.integers()
    | strategies.floats(allow_nan=False)
    | strategies.text()
    | strategies.binary()
)
BUILTIN = strategies.recursive(
    ATOMS,
    lambda inner: (
        strategies.lists(inner)
        | strategies.lists(inner).map(tuple)
        | strategies.dictionaries(strategies.text(), inner)
    ),
)


@settings(max_examples=40, deadline=None)
@given(BUILTIN)
def test_builtin_values_stay_what_they_are(value):
    told = plain(value)

    assert told == value
    assert type(told) is type(value)


class Loud(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (Path("a/b"), "a/b"),
        (signal.SIGKILL, str(signal.SIGKILL)),
        ({"x": [object]}, {"x": ["<class 'object'>"]}),
        (Loud("a"), "a"),
        ({1}, "{1}"),
    ],
)
def test_whatever_else_a_report_carries_becomes_text(value, told):
    found = plain(value)

    assert found == told
    assert type(found) is type(told)


@pytest.mark.parametrize(
    ("status", "killed", "text"),
    [
        (0, False, "exit status 0"),
        (3, True, "exit status 3"),
        (-11, False, "signal 11 (SIGSEGV)"),
        (-11, True, "signal 11 (SIGSEGV)"),
        (-9, False, "signal 9 (SIGKILL)"),
        (
            -9,
            True,
            "signal 9 (SIGKILL), probably by the kernel, which killed a process for want of memory",
        ),
        (-40, False, "signal 40"),
    ],
)
def test_the_end_of_a_process_in_words(status, killed, text):
    assert how_ended(status, killed=killed) == text


class OurWarning(UserWarning):
    pass


@pytest.mark.parametrize("kind", [DeprecationWarning, OurWarning])
def test_a_warning_is_the_one_that_was_told_of(kind):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn("mind this", kind, stacklevel=1)
    found = read_warning(told_warning(caught[0]))

    assert found.category is kind
    assert (str(found.message), found.filename, found.lineno) == (
        "mind this",
        caught[0].filename,
        caught[0].lineno,
    )


def test_a_warning_whose_class_is_not_here_keeps_its_name():
    class Local(Warning):
        pass

    told = told_warning(warnings.WarningMessage("x", Local, "f.py", 7))
    found = read_warning(told)

    assert found.category.__name__ == "Local"
    assert issubclass(found.category, Warning)

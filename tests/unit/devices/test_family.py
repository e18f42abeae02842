"""Who descends from whom, by the tree of processes and by the environment."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pytest_gpumem.devices import family
from pytest_gpumem.devices.family import Link


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ("3|/x/12:5.00-ab|test_a", [Link(3, "/x/12:5.00-ab", "test_a")]),
        (
            "1|/o/1:2.00-a|t|[|]\n2|/i/3:4.00-b|u",
            [Link(1, "/o/1:2.00-a", "t|[|]"), Link(2, "/i/3:4.00-b", "u")],
        ),
        ("nonsense\n||\nx|/y|z\n²|/y|z", []),
    ],
)
def test_the_variable_is_read_line_by_line(text, found):
    assert family.links(text) == found


@pytest.mark.parametrize("name", ["plain", "two\nlines", "a" * 5000, "nul\0"])
def test_a_name_never_spoils_the_variable(name):
    line = str(Link(1, "/x/2:3.00-c", name))
    assert len(line) < 1100
    (link,) = family.links(line)
    assert (link.owner, link.root) == (1, "2:3.00")
    assert "\0" not in line


def test_a_child_descends_from_its_parent_and_from_whom_its_environment_names():
    text = str(Link(4, "/x/1:1.00-a", "test_q"))
    code = "import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, family.VARIABLE: text},
    ) as child:
        child.stdout.readline()
        line = family.lineage(child.pid)
        assert line[:2] == (family.identity(child.pid), family.identity(os.getpid()))
        assert line[-1] == "1:1.00"
        assert family.started_by(child.pid) == [Link(4, "/x/1:1.00-a", "test_q")]
        assert not family.is_ending(child.pid)
        child.kill()
        child.wait()
    assert family.lineage(child.pid) == ()
    assert family.is_ending(child.pid)


def test_a_zombie_has_ended():
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert family.identity(child.pid) == ""
    child.wait()

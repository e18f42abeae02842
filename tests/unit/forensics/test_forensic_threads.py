"""Machine output as people pasted it into public threads, with what a person sees in it.

``threads/expected.tsv`` names each case's thread and its events: ``none``, or for each event, in
order, whose memory ran out (``card``, ``host``, ``card?`` where it may be either), the size that
was asked for and the test, ``-`` where it is not told. ``a file`` is one of a public repository
that was found without its name, ``own words`` source code or a document written in the manner of
public ones. Names, hosts and figures are changed.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from pytest_gpumem.forensics import analysis
from pytest_gpumem.forensics.causes import HOST

THREADS = Path(__file__).parent / "threads"
UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def cases():
    with (THREADS / "expected.tsv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


CASES = cases()


def size(text):
    digits = text.rstrip("KMGiB")
    return float(digits) * UNITS[text[len(digits) :]]


def told(event, expected):
    """Return the event as the table writes it, as far as the table says."""
    memory, tried, nodeid = (*expected.split(" ", 2), "-", "-")[:3]
    own = "host" if event.backend in HOST else "card"
    near = tried == "-" or (
        event.tried_bytes is not None and event.tried_bytes == pytest.approx(size(tried), rel=0.01)
    )
    return " ".join([
        memory if memory == "card?" else own,
        tried if near else str(event.tried_bytes),
        "-" if nodeid == "-" else str(event.nodeid),
    ])  # fmt: skip


def test_each_case_names_its_thread():
    assert len(CASES) >= 2_600
    assert {f"{each['case']}.log" for each in CASES} == {
        path.name for path in THREADS.glob("*.log")
    }
    assert [
        each["case"]
        for each in CASES
        if "#" not in each["thread"] and each["thread"] not in {"a file", "own words"}
    ] == []


@pytest.mark.parametrize("each", CASES, ids=lambda each: each["case"])
def test_a_thread_tells_what_a_person_sees(each):
    expected = [] if each["expected"] == "none" else each["expected"].split(" ; ")
    filled = [" ".join((*one.split(" ", 2), "-", "-")[:3]) for one in expected]

    found = analysis.analyse([str(THREADS / f"{each['case']}.log")]).events

    assert [told(*pair) for pair in zip(found, filled, strict=False)] == filled[: len(found)]
    assert len(found) == len(filled), found

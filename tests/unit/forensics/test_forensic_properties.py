from __future__ import annotations

import contextlib
import io
import json
import pickle

import pytest
from forensic_corpus import CASES, LOG
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pytest_gpumem.forensics import analysis, lines, readers
from pytest_gpumem.forensics.grammars.language import size
from pytest_gpumem.forensics.sequence import Follower

TEXTS = [each.data for each in CASES if each.suffix == ".log"]
PIECES = [
    *(line for text in TEXTS for line in text.splitlines(keepends=True)),
    b"\n", b"\r", b"\x1b[31m", b"\0", b"\xff", b"=" * 9, b"_" * 9, b"E   ", b"[gw1] ", b" " * 300,
]  # fmt: skip
NOISE = st.lists(st.sampled_from(PIECES) | st.binary(max_size=20), max_size=40).map(b"".join)


def events(chunks):
    runs = Follower().follow(lines.scan(chunks))
    return analysis.findings([("log", runs)])


@settings(deadline=None)
@given(st.binary() | NOISE)
def test_any_bytes_are_read_to_the_end(data):
    # Bytes that are no text are refused in a sentence.
    with contextlib.suppress(ValueError):
        readers.read_stream(io.BytesIO(b"x" + data))


@settings(deadline=None)
@given(st.sampled_from(CASES), st.data())
def test_any_input_may_be_cut_or_damaged(case, data):
    at = data.draw(st.integers(0, len(case.data)))
    damaged = case.data[:at] + data.draw(st.just(b"") | st.binary(max_size=9))
    # What cannot be read is said in a sentence; nothing else may come out.
    with contextlib.suppress(ValueError):
        readings = readers.read_stream(io.BytesIO(damaged))
        analysis.findings([(each.path, each.runs) for each in readings])


@settings(deadline=None)
@given(NOISE | st.sampled_from(TEXTS), st.lists(st.integers(1, 3000), min_size=1, max_size=20))
@example(LOG.encode() * 20, [4096])
@example(b"PASSED x" * 9000 + LOG.encode() * 3, [999, 5000])
def test_events_do_not_depend_on_how_the_bytes_arrive(data, sizes):
    whole = events([data])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_REGION", 1)
        pieces, at, turn = [], 0, 0
        while at < len(data):
            pieces.append(data[at : at + sizes[turn % len(sizes)]])
            at += len(pieces[-1])
            turn += 1
        assert events(pieces) == whole


def test_an_anchor_may_go_on_in_the_next_region(monkeypatch):
    monkeypatch.setattr(lines, "_REGION", 1)
    monkeypatch.setattr(lines, "WINDOW", 20)
    log = b"step 1\n" * 5 + b"the card is out of\nmemory\n" + b"step 2\n" * 2
    first = next(lines._regions([log]))
    assert log[: first.limit].endswith(b"out of\n")

    (found,) = lines.scan([log, b"end\n"])

    assert found.raw == b"the card is out of"


def test_what_is_there_is_told_before_more_is_waited_for():
    told = []

    def pipe():
        yield b"CUDA error: out of memory\n"
        yield b""
        told.append("asked for more")
        yield b"Killed\n"

    for line in lines.scan(pipe()):
        told.append(line.raw.decode())

    assert told == ["CUDA error: out of memory", "asked for more", "Killed"]


@settings(deadline=None)
@given(NOISE)
def test_what_stands_before_a_run_does_not_hide_it(noise):
    before = b"".join(b"#" + line for line in noise.splitlines(keepends=True))
    found = events([before + b"\n" + LOG.encode()]).events

    assert [event.nodeid for event in found if event.position == 3]


@given(st.integers(0, 2**60), st.sampled_from(["bytes", "KiB", "MiB", "GiB", "B", "kB", "GB"]))
def test_a_printed_size_is_its_bytes(number, unit):
    shift = {"b": 0, "B": 0, "k": 10, "K": 10, "M": 20, "G": 30}[unit[0]]

    assert size(f"{number} {unit}") == number << shift
    assert size(f"{number:,}{unit}") == number << shift


@pytest.mark.parametrize("text", ["", "GiB", "1.2.3 GiB", "one GiB", "1 XiB", "-1 GiB"])
def test_what_is_no_size_is_none(text):
    assert size(text) is None


CARRIERS = {
    "kubectl": "[pod/tests-x7k2/main] {line}",
    "containerd": "2025-11-07T16:05:{second:02}.123456789Z stdout F {line}",
    "airflow": "[2025-11-07, 16:05:{second:02} UTC] {{subprocess.py:106}} INFO - {line}",
    "teamcity": "[16:05:{second:02}] :\t [Step 1/2] {line}",
    "jenkins": "16:05:{second:02}  {line}",
    "docker build": "#12 {second}.110 {line}",
    "dagger": "12: [{second}.1s] {line}",
    "numbered": "{number:>6}\t{line}",
    "indented": "    {line}",
    "nobody's": "<{number}!> ~ {line}",
}


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("carrier", CARRIERS.values(), ids=CARRIERS)
def test_what_a_carrier_puts_before_each_line_is_learned(carrier, quiet):
    log = LOG[LOG.index("\n") + 1 :] if quiet else LOG
    carried = [
        carrier.format(line=line, number=number, second=number % 60)
        for number, line in enumerate(log.splitlines())
    ]

    found = events(["\n".join(carried).encode()])

    assert found.events
    assert found == events([log.encode()])


def test_lines_of_json_are_read_as_what_they_carry():
    carried = [json.dumps({"log": f"{line}\n", "stream": "stdout"}) for line in LOG.splitlines()]

    assert events(["\n".join(carried).encode()]) == events([LOG.encode()])


@pytest.mark.parametrize("width", [60, 80, 100, 132])
def test_a_log_wrapped_at_a_width_tells_the_same_figures(width):
    wrapped = [
        line[at : at + width]
        for line in LOG.splitlines()
        for at in range(0, max(1, len(line)), width)
    ]
    figures = [
        [(event.nodeid, event.tried_bytes, event.free_bytes, event.allocated_bytes,
          event.reserved_unallocated_bytes, event.processes) for event in events([log]).events]
        for log in ("\n".join(wrapped).encode(), LOG.encode())
    ]  # fmt: skip

    assert figures[0] == figures[1]


HOSTILE = [
    b"E   " + b"Error" * 200_000,
    b"a.b::" * 200_000 + b" out of memory",
    b"tests/a.py::" * 100_000,
    b"PASSED (" * 100_000,
    b"FAILED tests/a.py::t[" + b"] - [" * 100_000,
    b"=" * 1_000_000,
    (b"_" * 500 + b" ") * 2_000 + b"_\n",
    b"OOM when allocating shape" + b"dim { size: 1 } " * 50_000,
    b"Process 1 has 1 MiB memory in use. " * 30_000 + b"CUDA out of memory",
    b"[" * 500_000 + b"gw1] out of memory",
    b"out\n of\n memory\n" * 5_000,
    b"CUDA out of memory. Tried to allocate 1.00 GiB\n" * 20_000,
]


@pytest.mark.parametrize("data", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_read_to_the_end(data):
    # A regular expression that backtracks would not come back within a session.
    events([data])


class Evil:
    def __reduce__(self):
        return print, ("ran",)


def test_a_pickle_runs_nothing(capsys):
    with pytest.raises(ValueError, match=r"holds builtins\.print, which is not read"):
        readers.read_stream(io.BytesIO(pickle.dumps({"segments": [Evil()], "device_traces": []})))
    assert capsys.readouterr().out == ""


def test_a_test_that_xdist_names_twice_is_one():
    log = (
        "=== test session starts ===\n"
        "a.py::test_x \nb.py::test_y \n"
        "[gw1] [ 50%] PASSED b.py::test_y \nb.py::test_z \n"
        "[gw0] [ 75%] PASSED a.py::test_x \n"
        "[gw1] [100%] FAILED b.py::test_z \n"
        "=== 1 failed, 2 passed in 1.00s ===\n"
    )
    (run,) = Follower().follow(lines.scan([log.encode()]))

    assert [(test.nodeid, test.worker, test.position) for test in run.order] == [
        ("a.py::test_x", "gw0", 1), ("b.py::test_y", "gw1", 1), ("b.py::test_z", "gw1", 2),
    ]  # fmt: skip
    assert sum(place.tests for place in analysis.findings([("log", [run])]).by_file) == 3

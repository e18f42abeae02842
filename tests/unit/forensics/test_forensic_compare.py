"""What ``gpumem compare`` and the options of ``gpumem forensics`` tell."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time

import pytest
from forensic_corpus import LOG, NODE, RECORD, torch

from pytest_gpumem.cli import main as cli

MIB = 2**20


def record(*tests):
    """Return a run of tests, each with its baseline, peak, leak and what it keeps in MiB."""
    made = []
    for nodeid, outcome, baseline, peak, leaked, *kept in tests:
        each = copy.deepcopy(RECORD["tests"][0])
        each |= {"nodeid": nodeid, "outcome": outcome, "oom": "", "fixtures": []}
        each["cards"][0] |= {"baseline": baseline * MIB, "peak": peak * MIB, "leaked": leaked * MIB}
        each["cards"][0]["leftover"] = sum(kept, leaked) * MIB
        made.append(each)
    return RECORD | {"tests": made}


@pytest.fixture
def compare(tmp_path, capsys):
    def run(before, after, *options):
        for name, side in (("before", before), ("after", after)):
            text = side if isinstance(side, str) else json.dumps(side)
            (tmp_path / name).write_text(text)
        status = cli.main(
            [
                "compare",
                str(tmp_path / "before"),
                str(tmp_path / "after"),
                *options,
                "--format=json",
            ]
        )
        return status, json.loads(capsys.readouterr().out)

    return run


A = ("t.py::test_a", "passed", 0, 300, 0)
B = ("t.py::test_b", "passed", 200, 300, 0)


def test_another_order_is_no_growth(compare):
    # Whoever runs first loads the session's model: the other begins above it.
    shuffled = (("t.py::test_b", "passed", 0, 100, 0), ("t.py::test_a", "passed", 100, 400, 0))

    status, told = compare(record(A, B), record(*shuffled), "--max-peak-growth", "0%")

    assert (status, told["peaks"], told["verdict"]) == (
        0, [], "the threshold is kept; nothing changed",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("taken", "peaks"),
    [
        (300, []),
        (330, []),  # for a moment it was there twice
        (640, ["t.py::test_b", "t.py::test_a"]),
    ],
)
def test_who_loads_what_the_process_keeps_has_not_grown(compare, taken, peaks):
    before = (("t.py::test_a", "passed", 0, taken, 0, 290), ("t.py::test_b", "passed", 290, 300, 0))
    after = (("t.py::test_b", "passed", 0, taken, 0, 290), ("t.py::test_a", "passed", 290, 300, 0))

    status, told = compare(record(*before), record(*after), "--max-peak-growth", "64MiB")

    assert (status, [each["name"] for each in told["peaks"]]) == (bool(peaks), peaks)


def test_own_growth_is_missed(compare):
    status, told = compare(
        record(A, B), record(A, ("t.py::test_b", "passed", 200, 350, 0)), "--max-peak-growth", "40%"
    )

    assert (status, told["missed"]) == (
        1, ["t.py::test_b grew from 100.00 MiB to 150.00 MiB, allowed is 40%"],
    )  # fmt: skip


def test_leaks_skipped_missing_and_renamed_have_rows_of_their_own(compare):
    before = record(
        A, B, ("t.py::test_c", "passed", 0, 9, 0), ("t.py::test_d[x]", "passed", 0, 9, 0)
    )
    after = record(
        ("t.py::test_a", "passed", 0, 300, 4), ("t.py::test_b", "skipped", 200, 300, 0),
        ("t.py::test_d[y]", "passed", 0, 9, 0),
    )  # fmt: skip

    status, told = compare(before, after, "--max-leaks", "0")

    assert status == 1
    assert told["leaks"] == [{"name": "t.py::test_a", "before": "0 B", "after": "4.00 MiB"}]
    assert [each["name"] for each in told["skipped"]] == ["t.py::test_b"]
    assert [each["name"] for each in told["missing"]] == ["t.py::test_c"]
    assert (told["new"], told["better"], told["worse"]) == ([], [], [])
    assert told["missed"] == ["1 test leaves 4.00 MiB behind, allowed are 0"]
    assert told["verdict"] == "a threshold is missed; 1 missing, 1 skipped"


def test_without_a_threshold_the_verdict_says_so(compare):
    assert compare(LOG, LOG)[1]["verdict"] == "no threshold given; nothing changed"


def lasting(seconds, *, whole=True):
    """Return a log of a run that took that long."""
    return LOG.replace("in 9.10s", f"in {seconds}s") if whole else LOG.rpartition("===")[0][:-400]


@pytest.mark.parametrize(
    ("before", "after", "time"),
    [
        ("291.02", "1305.40", ("4 min 51 s", "21 min 45 s")),
        ("1305.40", "291.02", ("21 min 45 s", "4 min 51 s")),
        ("21.00", "33.00", ("21.00 s", "33.00 s")),
        ("1000.00", "1400.00", None),  # as machines vary
        ("2.00", "11.00", None),  # as starts vary
    ],
)
def test_a_run_that_takes_longer_is_told_of(compare, before, after, time):
    _, told = compare(lasting(before), lasting(after))

    expected = time and {"name": "time", "before": time[0], "after": time[1]}
    but = " but the time" if time else ""
    assert told["time"] == expected
    assert told["verdict"] == f"no threshold given; nothing changed{but}"


def test_a_slower_run_misses_no_threshold_and_is_on_the_first_screen(tmp_path, capsys):
    for name, seconds in (("before", "291.02"), ("after", "1305.40")):
        (tmp_path / name).write_text(lasting(seconds))
    paths = [str(tmp_path / name) for name in ("before", "after")]

    status = cli.main(["compare", *paths, "--max-oom", "1"])

    assert status == 0
    assert "  time: 4 min 51 s -> 21 min 45 s" in capsys.readouterr().out.splitlines()[:5]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # A run.json has the sum of its tests, whatever the number of workers.
        (lasting("2000.00"), record(("t.py::test_a", "passed", 0, 300, 0))),
        (lasting("2000.00"), lasting("1.00", whole=False)),
    ],
    ids=["log and run.json", "cut off"],
)
def test_times_that_cannot_be_compared_are_not(compare, before, after):
    _, told = compare(before, after, "--allow-incomplete")

    assert told["time"] is None


def test_a_failure_that_is_not_named_is_no_passed_test(compare):
    begun = f"{' test session starts ':=^80}\ncollected 3 items\n\nt.py .F.    [100%]\n"
    ends = (
        f"{' short test summary info ':=^80}\n"
        "FAILED t.py::test_b - torch.OutOfMemoryError: CUDA out of memory.\n"
        f"{' 1 failed, 2 passed in 9.10s ':=^80}\n"
    )

    _, told = compare(begun + ends, begun, "--allow-incomplete")

    assert told["better"] == []


def shared(tmp_path):
    """Write a log in which a fixture's failure felled three tests, and another test failed."""
    names = [f"tests/t.py::test_{number}" for number in range(3)]
    sections = "".join(
        f"___ ERROR at setup of test_{number} ___\n\nE   torch.OutOfMemoryError: {torch()}\n\n"
        "tests/conftest.py:5: OutOfMemoryError\n"
        for number in range(3)
    )
    path = tmp_path / "run.log"
    path.write_text(
        "=== test session starts ===\n"
        + "".join(f"{name} ERROR [ 33%]\n" for name in names)
        + f"=== ERRORS ===\n{sections}=== short test summary info ===\n"
        + "".join(f"ERROR {name} - torch.OutOfMemoryError: CUDA out of mem...\n" for name in names)
        + "=== 3 errors in 4.00s ===\n"
    )
    return path, names


def test_the_tests_of_a_cause_can_be_run_again(tmp_path, capsys):
    path, names = shared(tmp_path)

    assert cli.main(["forensics", str(path), "--cause", "fragmentation"]) == 0
    assert capsys.readouterr().out.splitlines() == names
    assert cli.main(["forensics", str(path), "--felled"]) == 0
    assert capsys.readouterr().out.splitlines() == names
    assert cli.main(["forensics", str(path), "--cause", "driver"]) == 1
    assert capsys.readouterr().out == ""


def test_the_first_screen_ranks_causes_by_the_tests_that_they_felled(tmp_path, capsys):
    path, names = shared(tmp_path)
    (tmp_path / "other.log").write_text(LOG.replace("46.00 MiB", "460.00 MiB"))

    assert cli.main(["forensics", str(path), str(tmp_path / "other.log")]) == 0

    out = capsys.readouterr().out
    titles = [line for line in out.splitlines() if line.endswith(")") and line[:1].isdigit()]
    assert [title.rpartition(" (")[0].partition(": ")[0] for title in titles] == [
        "3 tests",
        "1 test",
    ]
    assert "3 tests felled by 1 shared failure; --felled lists them" in out
    assert f"3 by the failure of {names[0]}" in out
    assert NODE in out
    assert len(out.splitlines()) < 40


def test_control_characters_reach_no_terminal(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(record(("t.py::test_\x1b]0;x\x07[a]", "passed", 0, 300, 4))))

    for arguments in (["report", path], ["forensics", path], ["compare", path, path]):
        assert cli.main([str(each) for each in arguments]) == 0
        assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "is nested too deeply"),
        ('{"schema": 1, "tests": [1]}', "1 is no RecordedTest"),
        (
            json.dumps(RECORD).replace('"peak": ', '"peak": ' + "9" * 400, 1),
            "is too large a number",
        ),
        (
            json.dumps(RECORD).replace('"peak": ', '"peak": ' + "9" * 9000, 1),
            "is too large a number",
        ),
        (json.dumps(RECORD).replace('"duration": ', '"duration": 1e999, "x": ', 1), "too large"),
    ],
    ids=range(5),
)
@pytest.mark.parametrize("command", ["report", "forensics"])
def test_a_hostile_record_is_one_sentence(tmp_path, capsys, command, text, said):
    path = tmp_path / "run.json"
    path.write_text(text)

    assert cli.main([command, str(path)]) == 2

    error = capsys.readouterr().err
    assert error.count("\n") == 1
    if command == "report" or text.startswith("{"):
        assert said in error


def test_a_log_that_is_still_written_is_told_as_it_comes():
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "pytest_gpumem.cli.main", "forensics", "-"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True,
    ) as reader:  # fmt: skip
        assert reader.stdin is not None
        assert reader.stdout is not None
        reader.stdin.write(f"starting\nRuntimeError: {torch()}\n")
        reader.stdin.flush()
        # It is still open: what is read now was told before the end.
        assert reader.stdout.readline().startswith("line 2: RuntimeError: CUDA out of memory")
        reader.stdin.close()
        assert "1 test or process ran out of memory" in reader.stdout.read()


def test_the_time_for_many_events_is_linear():
    from pytest_gpumem.forensics import analysis, lines
    from pytest_gpumem.forensics.sequence import Follower

    def took(number):
        text = "".join(
            f"___ test_x ___\nE   {torch(f'{at % 97}.00 MiB')}\n\ntests/d{at}/test_a.py:5: Error\n"
            for at in range(number)
        )
        text += "=== short test summary info ===\n" + "".join(
            f"FAILED tests/d{at}/test_a.py::test_x - torch.OutOfMemoryError: CUDA out of mem...\n"
            for at in range(number)
        )
        log = f"=== FAILURES ===\n{text}=== {number} failed in 9.00s ===\n".encode()
        began = time.process_time()
        found = analysis.findings([("log", Follower().follow(lines.scan([log])))])
        assert len(found.events) == number
        return time.process_time() - began

    took(10)
    assert took(3200) < 8 * took(800)


def test_a_configuration_that_is_nested_too_deeply_is_one_sentence(tmp_path, capsys):
    path = tmp_path / "deep.toml"
    path.write_text(f"a = {'[' * 100_000}")

    assert cli.main(["groups", "--config", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def with_lines(**lines):
    """Return a run whose test had these MiB alive by line at its peak; names are lines' keys."""
    made = record(A)
    groups = [
        {"size": size * MIB, "owner": "this test", "kind": "unknown", "where": where}
        for where, size in lines.items()
    ]
    alive = {"card": "GPU-1", "moment": "peak", "size": sum(lines.values()) * MIB}
    made["tests"][0]["alive"] = [alive | {"groups": groups, "recorded": True}]
    return made


@pytest.mark.parametrize(
    ("before", "after", "changes"),
    [
        # What grew, what is new and what is gone, the most grown first.
        (
            {"i.py:88 build": 10, "i.py:9 load": 5, "in torch": 1},
            {"i.py:88 build": 369, "i.py:70 keep": 2, "in torch": 1},
            [("i.py:88 build", 10, 369), ("i.py:70 keep", 0, 2), ("i.py:9 load", 5, 0)],
        ),
        # Lines that moved by what was written above them are the same lines.
        ({"i.py:10 f": 1, "i.py:11 f": 2, "i.py:12 f": 3}, {"i.py:11 f": 1, "i.py:12 f": 2,
          "i.py:13 f": 3}, []),
        ({"i.py:10 f": 1, "i.py:11 f": 2}, {"i.py:12 f": 1, "i.py:13 f": 9}, [("i.py:13 f", 2, 9)]),
        # A line was put between them.
        (
            {"i.py:10 f": 1, "i.py:11 f": 2, "i.py:14 f": 4},
            {"i.py:10 f": 1, "i.py:11 f": 2, "i.py:15 f": 5, "i.py:16 f": 7},
            [("i.py:16 f", 0, 7), ("i.py:15 f", 4, 5)],
        ),
        # Another function of that name, in another file, is another line.
        ({"i.py:10 f": 1}, {"j.py:10 f": 1}, [("j.py:10 f", 0, 1), ("i.py:10 f", 1, 0)]),
        ({"C:/a.py:10 <lambda>": 1}, {"C:/a.py:11 <lambda>": 3}, [("C:/a.py:11 <lambda>", 1, 3)]),
        # What was not recorded has no lines.
        ({}, {"i.py:10 f": 1}, []),
    ],
)  # fmt: skip
def test_lines_at_the_peak_are_compared(compare, before, after, changes):
    sides = [with_lines(**each) if each else record(A) for each in (before, after)]
    _, told = compare(*sides)
    found = [(each["where"], each["before"] / MIB, each["after"] / MIB) for each in told["lines"]]
    assert found == changes
    assert {each["test"] for each in told["lines"]} <= {"t.py::test_a"}


def test_the_terminal_shows_by_how_much_a_line_grew(tmp_path, capsys):
    for name, size in (("before", 10), ("after", 369)):
        (tmp_path / name).write_text(json.dumps(with_lines(**{"index.py:88 build_table": size})))
    cli.main(["compare", str(tmp_path / "before"), str(tmp_path / "after")])
    row = next(line for line in capsys.readouterr().out.splitlines() if "index.py:88" in line)
    assert row.split() == [
        *("index.py:88", "build_table", "+359.00", "MiB", "10.00", "MiB", "369.00", "MiB"),
        "t.py::test_a",
    ]

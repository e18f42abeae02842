from __future__ import annotations

import io
import re
import sys

import pytest

from pytest_gpumem import devices, records
from pytest_gpumem.cli import main as cli
from pytest_gpumem.records import Card, CardUsage, Left, RecordedTest, RunRecord

USAGE = CardUsage("GPU-1", 2**20, 3 * 2**20, 0, 2**21, 2**22, 0, 0, None)
RUN = RunRecord(
    schema=records.SCHEMA,
    mode="on",
    cards=(Card("GPU-1", "A card", 2**32),),
    simulated=False,
    workers=0,
    tests=(
        RecordedTest("test_x.py::test_a", "passed", 0.5, "", (USAGE,)),
        RecordedTest("test_x.py::test_b", "passed", 0.5, ""),
    ),
)


def test_report_shows_the_section_of_a_finished_run(tmp_path, capsys):
    records.save(RUN, tmp_path / "run.json")

    assert cli.main(["report", str(tmp_path / "run.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "1 of 2 tests used VRAM, highest own peak 2.00 MiB, 0 leaks, 0 failures out of memory"
    )
    assert re.split(r"  +", lines[-1].strip()) == [
        "2.00 MiB",
        "<1%",
        "3.00 MiB",
        "0 B",
        "test_x.py::test_a",
    ]


def test_a_terminal_has_lines_of_its_width(tmp_path, capsys, monkeypatch):
    records.save(RUN, tmp_path / "run.json")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)

    assert cli.main(["report", str(tmp_path / "run.json")]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "   2.00 MiB      <1%    3.00 MiB         0 B",
        "    test_x.py::test_a",
    ]


@pytest.mark.parametrize("arguments", [["report"], ["plan"], ["compare"], ["forensics"], []])
def test_help_fits_a_terminal_of_80_columns(arguments, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main([*arguments, "-h"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_a_test_that_ran_again_twice_is_one_test(tmp_path, capsys):
    left = (Left("CUDA_VISIBLE_DEVICES", "unset", "", False),)
    last = RUN.tests[0]._replace(step="alone", left=left)
    first = last._replace(outcome="rerun", oom="CUDA out of memory", step="")
    again = first._replace(step="alone")
    # rerunfailures made this one again, beside whom it was before.
    other = first._replace(nodeid="test_x.py::test_other")
    tests = (first, again, last, other, other._replace(outcome="failed"))
    records.save(RUN._replace(workers=2, tests=tests), tmp_path / "run.json")

    assert cli.main(["report", str(tmp_path / "run.json")]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("2 of 2 tests used VRAM")
    _, told = shown.split(
        "  1 test ran out of memory beside others and ran again with no other test on the card\n"
    )
    assert told.startswith("      test_x.py::test_a\n\nrouting\n")
    assert shown.count("  test_x.py::test_a: CUDA_VISIBLE_DEVICES is empty, was unset\n") == 1


@pytest.mark.parametrize(
    ("workers", "said"), [(2, "2 workers, idle"), (4, "2 of 4 workers ran tests, idle")]
)
def test_workers_that_ran_no_test_are_told(tmp_path, capsys, workers, said):
    tests = tuple(RUN.tests[0]._replace(worker=worker) for worker in ("gw0", "gw1"))
    records.save(RUN._replace(workers=workers, tests=tests), tmp_path / "run.json")

    assert cli.main(["report", str(tmp_path / "run.json")]) == 0
    assert f"  {said} for " in capsys.readouterr().out


def test_a_run_that_touched_no_card_says_so(tmp_path, capsys):
    records.save(RUN._replace(tests=()), tmp_path / "run.json")

    assert cli.main(["report", str(tmp_path / "run.json")]) == 0
    assert capsys.readouterr().out == "no test touched a card\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "gpumem report: error: '{path}': No such file or directory\n"),
        ("{}", "gpumem report: error: '{path}' is not a run of schema 1 (--gpumem-json)\n"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, capsys, text, sentence):
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)

    assert cli.main(["report", str(path)]) == 2
    assert capsys.readouterr().err == sentence.format(path=path)


def test_shards_are_joined_and_teach(tmp_path, capsys):
    learned = USAGE._replace(extra=2**21)
    for shard, nodeid in (("one", "test_x.py::test_a"), ("two", "test_y.py::test_b")):
        tests = (RecordedTest(nodeid, "passed", 0.5, "gw0", (learned,), start=10.0),)
        records.save(RUN._replace(tests=tests, workers=1), tmp_path / f"{shard}.json")
    shards = [str(tmp_path / "one.json"), str(tmp_path / "two.json")]
    history = tmp_path / "history.json"
    arguments = ["merge", *shards, "--output", str(tmp_path / "all.json")]

    assert cli.main(["report", *arguments, "--history", str(history)]) == 0
    assert "2 of 2 tests used VRAM" in capsys.readouterr().out
    run = records.load_run(tmp_path / "all.json")
    assert [(test.host, test.worker) for test in run.tests] == [("one", "gw0"), ("two", "gw0")]
    assert [card.host for card in run.cards] == ["one", "two"]
    assert run.workers == 2

    assert cli.main(["report", "--history", str(history)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[1].split() == ["2.2", "0.0", "0.50", "1", "test_x.py::test_a"]
    assert cli.main(["report", "--history", str(history), "--json"]) == 0
    assert capsys.readouterr().out == history.read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "0 runs given; allowed are one, merge and several, or --history"),
        (["merge"], "merge: no run given; allowed are one or more RUN.json"),
        (["--history", "no.json"], "there is no history 'no.json'"),
        (["a.json", "b.json"], "2 runs given"),
    ],
)
def test_reports_of_nothing_are_one_sentence(arguments, sentence, capsys):
    assert cli.main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"gpumem report: error: {sentence}")
    assert error.count("\n") == 1


def test_doctor_names_the_versions_and_why_there_is_no_card(capsys, monkeypatch):
    monkeypatch.setattr(
        devices, "find_cards", lambda: devices.CardsFound((), "nothing is plugged in")
    )

    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "card          none: nothing is plugged in" in lines
    assert any(line.startswith("pytest-gpumem 0.1.0") for line in lines)


def test_what_the_terminal_has_no_letters_for_is_written_out(tmp_path, monkeypatch):
    named = RUN.tests[0]._replace(nodeid="test_x.py::test_é[😀]")
    records.save(RUN._replace(tests=(named,)), tmp_path / "run.json")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))

    assert cli.main(["report", str(tmp_path / "run.json")]) == 0
    sys.stdout.flush()
    assert rb"test_x.py::test_\xe9[\U0001f600]" in written.getvalue()

from __future__ import annotations

import pytest

from pytest_gpumem import cli, records
from pytest_gpumem.records import Card, CardUsage, RecordedTest, RunRecord

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
        "1 test of 2 used VRAM, highest peak 3.00 MiB, 0 leaks, 0 failures out of memory"
    )
    assert lines[-1].split() == ["3.0", "2.0", "0.0", "test_x.py::test_a"]


def test_a_run_that_touched_no_card_says_so(tmp_path, capsys):
    records.save(RUN._replace(tests=()), tmp_path / "run.json")

    assert cli.main(["report", str(tmp_path / "run.json")]) == 0
    assert capsys.readouterr().out == "no test touched a card\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "gpumem report: error: cannot read '{path}': No such file or directory\n"),
        ("{}", "gpumem report: error: '{path}' is not a run of schema 1 (--gpumem-json)\n"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, capsys, text, sentence):
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)

    assert cli.main(["report", str(path)]) == 2
    assert capsys.readouterr().err == sentence.format(path=path)


def test_doctor_names_the_versions_and_why_there_is_no_card(capsys, monkeypatch):
    monkeypatch.setattr(
        cli.devices, "find_cards", lambda: cli.devices.CardsFound((), "nothing is plugged in")
    )

    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "card          none: nothing is plugged in" in lines
    assert any(line.startswith("pytest-gpumem 0.1.0") for line in lines)

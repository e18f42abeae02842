from __future__ import annotations

import json

import pytest

from pytest_gpumem import files, records
from pytest_gpumem.records import Card, CardUsage, FixtureUsage, Holder, RecordedTest, RunRecord

HOLDER = Holder("test_x.py: module global CACHE[3]", (2, 3), "float32", 24, 1, ("a.py:1 f",))
USAGE = CardUsage("GPU-1", 1, 9, 4, 20, 20, 0, 1, None, leaked=4, holders=(HOLDER,))
RUN = RunRecord(
    schema=records.SCHEMA,
    mode="on",
    cards=(Card("GPU-1", "A card", 2**32),),
    simulated=True,
    workers=2,
    tests=(
        RecordedTest("test_x.py::test_a", "passed", 0.5, "gw0", (USAGE,)),
        RecordedTest(
            "test_x.py::test_b",
            "failed",
            0.1,
            "gw1",
            fixtures=(FixtureUsage("model", "session", "GPU-1", 100, 120),),
            oom="CUDA out of memory",
        ),
    ),
    notes=("a note",),
)


def test_a_run_survives_its_json_file(tmp_path):
    path = tmp_path / "run.json"
    records.save(RUN, path)

    assert records.load_run(path) == RUN
    assert [each.name for each in tmp_path.iterdir()] == ["run.json"]


def test_records_of_a_newer_writer_are_read():
    plain = records.to_plain(USAGE) | {"later": 1}

    assert records.from_plain(CardUsage, plain) == USAGE


def test_a_missing_key_is_named():
    with pytest.raises(ValueError, match=r"not a Card: .*'total'"):
        records.from_plain(Card, {"uuid": "GPU-1", "name": "A card"})


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"schema": 99})])
def test_other_files_are_refused_by_name(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"run\.json' is not"):
        records.load_run(path)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    path.write_text("before")
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        records.save(RUN, path)

    assert path.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["run.json"]

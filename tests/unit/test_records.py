from __future__ import annotations

import json

import pytest

from pytest_gpumem import files, records
from pytest_gpumem.records import (
    Alive,
    AliveGroup,
    Card,
    CardUsage,
    ChildUsage,
    FixtureUsage,
    Holder,
    LeaseUsage,
    Left,
    Process,
    Proof,
    RamUsage,
    RecordedTest,
    Refusal,
    Route,
    RunRecord,
    ScopeUsage,
    properties,
)

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
    with pytest.raises(ValueError, match="a Card lacks total"):
        records.from_plain(Card, {"uuid": "GPU-1", "name": "A card"})


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"schema": 99})])
def test_other_files_are_refused_by_name(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"run\.json' is not"):
        records.load_run(path)


TOLD = properties.OwnProperties(
    (USAGE, USAGE._replace(card="GPU-2", peak=5)),
    (FixtureUsage("model", "session", "GPU-1", 100, 120),),
    "CUDA out of memory",
    LeaseUsage(("GPU-1",), 7, alone=True, waited=0.5),
    (Left("default device", "cpu", "cuda:0"),),
    (ChildUsage(7, "python", "GPU-1", "test_x.py::test_a"),),
    (Process(7, "python", None),),
    (ScopeUsage("module", "test_x.py", "GPU-1", 5),),
    (Route("encode", 5, "cpu", "the card is full"), Route("encode", 5, "cuda", "there is room")),
    "alone",
    alive=(
        Alive(
            "GPU-1", "out of memory", 9, (AliveGroup(9, "this test", "gradient", "a.py:1 f"),), True
        ),
    ),
    ram=RamUsage(7, 5, 3, 1),
    proof=Proof(3, (Refusal(1, "recovered"),)),
)


def tell(told):
    found = [("somebody_elses", 1)]
    elsewhere = {"routes": (), "step": "", "ram": None, "proof": None}
    properties.tell_usage(found, told._replace(**elsewhere))
    if told.ram is not None:
        properties.tell_ram(found, told.ram)
    if told.proof is not None:
        properties.tell_proof(found, told.proof)
    properties.tell_routes(found, told.routes)
    properties.tell_step(found, told.step)
    return found


@pytest.mark.parametrize("field", properties.OwnProperties._fields)
def test_what_a_test_told_is_read_whether_it_told_one_thing_or_all(field):
    alone = properties.OwnProperties(**{field: getattr(TOLD, field)})

    assert properties.read(tell(alone)) == alone
    assert properties.read(tell(TOLD)) == TOLD
    assert properties.read([]) == properties.OwnProperties()


def test_a_further_attempt_takes_the_place_of_the_one_before():
    found = tell(TOLD._replace(ram=None, proof=None))
    properties.tell_consolidated(found, "3 MiB")
    properties.tell_usage(found, properties.OwnProperties())
    properties.tell_routes(found, ())
    properties.tell_step(found, "cpu")

    assert found == [
        ("somebody_elses", 1),
        ("gpumem_consolidated", "3 MiB"),
        ("gpumem_step", "cpu"),
    ]


def test_what_junit_shows_are_sums_over_all_cards():
    told = dict(tell(TOLD))

    assert (told["gpumem_peak"], told["gpumem_leftover"], told["gpumem_leaked"]) == (14, 8, 8)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    path.write_text("before")
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        records.save(RUN, path)

    assert path.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["run.json"]

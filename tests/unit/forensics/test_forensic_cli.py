from __future__ import annotations

import html
import io
import json
import subprocess
import sys

import pytest
from forensic_corpus import LOG, NODE, RECORD

import pytest_gpumem
from pytest_gpumem.cli import forensics as command
from pytest_gpumem.cli import main as cli
from pytest_gpumem.forensics import readers


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "run.log"
    path.write_text(LOG)
    return path


def run(capsys, *arguments):
    status = cli.main([str(each) for each in arguments])
    return status, capsys.readouterr().out


def test_the_terminal_names_test_cause_and_advice(log, capsys):
    status, out = run(capsys, "forensics", log)

    assert status == 0
    assert "3 tests in 1 run: 2 passed, 1 failed, pass rate 66.7 %, 9.10 s" in out
    assert NODE in out
    assert "1 test: free memory is in pieces (fragmentation)" in out
    assert "export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" in out


def test_json_is_versioned_and_holds_bytes_and_what_was_printed(log, capsys):
    status, out = run(capsys, "forensics", log, "--format", "json")
    told = json.loads(out)

    assert (status, told["schema"], told["totals"]["oom"]) == (0, 1, 1)
    (event,) = told["events"]
    promised = (
        "nodeid worker position backend device tried_bytes total_bytes free_bytes allocated_bytes "
        "reserved_unallocated_bytes processes cause confirmed line"
    )
    assert set(promised.split()) <= set(event)
    assert event["tried_bytes"] == 46 << 20
    assert event["printed"]["tried"] == "46.00 MiB"
    assert LOG.splitlines()[event["line"] - 1].startswith("E       torch.OutOfMemoryError")


@pytest.mark.parametrize(("form", "escaped"), [("html", "&lt;b&gt;"), ("markdown", "\\<b\\>")])
def test_ids_are_escaped(tmp_path, capsys, form, escaped):
    path = tmp_path / "run.log"
    path.write_text(LOG.replace("fp16-8", "<b>x|y</b>"))

    status, out = run(capsys, "forensics", path, "--format", form)

    assert status == 0
    assert escaped in out
    assert "test_forward[<b>x" not in out.replace("gpumem", "").split("```")[0]


def test_the_output_may_be_a_file(log, tmp_path, capsys):
    target = tmp_path / "page.html"

    assert run(capsys, "forensics", log, "--format", "html", "--output", target) == (0, "")
    assert html.escape(NODE) in target.read_text()
    assert list(tmp_path.glob(".*")) == []


def test_a_directory_is_walked_and_says_what_it_could_not_read(tmp_path, capsys):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "run.log").write_text(LOG)
    (tmp_path / "bad.pickle").write_bytes(b"\x80\x04garbage")

    status, out = run(capsys, "forensics", tmp_path, "--format", "json")
    told = json.loads(out)

    assert (status, len(told["events"]), len(told["notes"])) == (0, 1, 1)


def test_what_takes_long_is_told_while_it_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "_SILENCE", (0.0, 3600.0))
    for name in "ab":
        (tmp_path / f"{name}.log").write_text(LOG)

    assert cli.main(["forensics", str(tmp_path), "--format", "json"]) == 0
    assert capsys.readouterr().err == (
        f"gpumem forensics: read 1 file, 0 MB so far, now '{tmp_path}/a.log'\n"
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["forensics", "{0}"], "gpumem forensics: ended by Ctrl-C after 2 files, 0 MB\n"),
        (["compare", "{0}/a.log", "{0}"], "gpumem compare: ended by Ctrl-C after 2 files, 0 MB\n"),
        (["forensics", "-"], "gpumem forensics: ended by Ctrl-C\n"),
    ],
)
def test_ctrl_c_ends_it_in_one_sentence(tmp_path, capsys, monkeypatch, arguments, sentence):
    class Stopped(io.BytesIO):
        def read(self, size=-1):
            raise KeyboardInterrupt

    def refuse(head):
        if head.startswith(b"stop"):
            raise KeyboardInterrupt

    (tmp_path / "a.log").write_text(LOG)
    (tmp_path / "b.log").write_text("stop\n")
    monkeypatch.setattr(readers, "_refuse_binary", refuse)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(Stopped()))

    assert cli.main([each.format(tmp_path) for each in arguments]) == 130
    assert capsys.readouterr().err == sentence


def test_standard_input_is_read(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(LOG.encode())))

    assert json.loads(run(capsys, "forensics", "-", "--format", "json")[1])["totals"]["oom"] == 1


def test_a_worker_s_death_is_explained_by_another_file(tmp_path, capsys):
    (tmp_path / "run.log").write_text("worker 'gw2' crashed while running 'tests/t.py::test_x'\n")
    (tmp_path / "dmesg").write_text("Out of memory: Killed process 11 (python) anon-rss:1kB\n")

    _, out = run(
        capsys, "forensics", tmp_path / "run.log", tmp_path / "dmesg", "--format", "json"
    )  # fmt: skip
    (event,) = json.loads(out)["events"]

    assert (event["nodeid"], event["confirmed"]) == ("tests/t.py::test_x", True)
    assert event["cause"] == "host_ram"


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("none", None, "'{path}': No such file or directory"),
        ("x.json", b'{"schema": 99, "tests": []}', "'{path}' is not a run of schema 1"),
        ("x.pickle", b"\x80\x04garbage", "'{path}' is no memory snapshot"),
        ("x.html", b'<html><p data-jsonblob="{}">', "'{path}' is a damaged report of pytest-html"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, capsys, name, data, sentence):
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)

    assert cli.main(["forensics", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"gpumem forensics: error: {sentence.format(path=path)}")
    assert error.count("\n") == 1


def test_a_reader_that_leaves_ends_the_output_quietly(log):
    command = (
        f"'{sys.executable}' -m pytest_gpumem.cli.main forensics '{log}' --format json | head -1"
    )
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False)

    assert (done.stdout, done.stderr) == ("{\n", "")


def test_the_sequence_is_importable_and_typed(log):
    told = pytest_gpumem.analyze_oom_sequence(log)
    oom_tests, sequence = told

    assert [(event.nodeid, event.position) for event in oom_tests] == [(NODE, 3)]
    assert [(test.position, test.outcome) for test in sequence] == [
        (1, "PASSED"), (2, "PASSED"), (3, "FAILED"),
    ]  # fmt: skip
    assert "analyze_oom_sequence" in dir(pytest_gpumem)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = pytest_gpumem.nothing


def test_errors_of_one_kind_are_told_together(tmp_path, capsys):
    names = ("OrchestratorAgent", "CodeAgent", "CodeAgent")
    lines = [
        f"FAILED tests/t.py::test_{number} - AttributeError: '{name}' object has no attribute "
        "'_embedding_model'"
        for number, name in enumerate(names)
    ]
    path = tmp_path / "run.log"
    path.write_text("\n".join(lines) + "\n3 failed in 1.00s\n")

    told = json.loads(run(capsys, "forensics", path, "--format", "json")[1])

    (signature,) = told["signatures"]
    assert signature["signature"] == (
        "AttributeError: 'X' object has no attribute '_embedding_model'"
    )
    assert (signature["times"], signature["subjects"]) == (3, ["CodeAgent", "OrchestratorAgent"])


def test_a_comparison_without_missed_thresholds_is_0(log, tmp_path, capsys):
    better = tmp_path / "better.log"
    better.write_text(
        "tests/unit/test_model.py::TestEncoder::test_forward[fp16-8] PASSED [100%]\n"
        "1 passed in 1.00s\n"
    )

    status, out = run(capsys, "compare", log, better, "--max-oom", 0, "--min-pass-rate", "98%")

    assert status == 0
    assert "all thresholds are kept; 1 better, 2 missing" in out
    assert "Better" in out


@pytest.mark.parametrize(
    ("option", "value", "missed"),
    [
        ("--max-oom", "0", "1 test out of memory, allowed are 0"),
        ("--min-pass-rate", "98", "the pass rate is 66.67 %, at least 98 % is asked for"),
    ],
)
def test_a_missed_threshold_is_1_and_named(log, capsys, option, value, missed):
    status, out = run(capsys, "compare", log, log, option, value)

    assert status == 1
    assert missed in out


@pytest.mark.parametrize(("limit", "status"), [("10%", 1), ("60%", 0), ("1GiB", 1), ("2GiB", 0)])
def test_a_grown_peak_fails_the_build(tmp_path, capsys, limit, status):
    first = RECORD | {"tests": RECORD["tests"][:1]}
    grown = json.loads(json.dumps(first))
    grown["tests"][0]["cards"][0]["peak"] = int(4.5 * 2**30)
    for name, record in (("a.json", first), ("b.json", grown)):
        (tmp_path / name).write_text(json.dumps(record))

    found, out = run(
        capsys, "compare", tmp_path / "a.json", tmp_path / "b.json", "--max-peak-growth", limit
    )  # fmt: skip

    assert found == status
    assert "3.00 GiB" in out
    assert ("missed" in out.partition("before")[0].replace("is missed", "")) == bool(status)


def test_a_bad_threshold_is_one_sentence(log, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", str(log), str(log), "--max-peak-growth", "lots"])

    assert stopped.value.code == 2
    assert "'lots' is not a growth; allowed is a percentage like 10%" in capsys.readouterr().err


def test_every_field_and_cause_is_in_the_document():
    from pathlib import Path

    from pytest_gpumem.forensics import grammars
    from pytest_gpumem.records import findings

    document = (Path(__file__).parents[3] / "docs" / "forensics.md").read_text()
    kinds = (
        findings.OomEvent, findings.Findings, findings.Totals, findings.Signature, findings.Place,
        findings.GpuProcess, findings.Source, findings.Death,
    )  # fmt: skip
    names = {name for kind in kinds for name in kind._fields}
    names |= set(findings.CAUSES) | {grammar.backend for grammar in grammars.GRAMMARS}
    missing = sorted(name for name in names if f"`{name}`" not in document)
    assert missing == [], "each belongs into docs/forensics.md"

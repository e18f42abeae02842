from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pytest_gpumem import records
from pytest_gpumem.cli import groups
from pytest_gpumem.cli import main as cli

SUITE = """
import os
import pytest, torch

KEPT = []

@pytest.mark.parametrize("number", range(2))
def test_keeps(number):
    KEPT.append(torch.zeros(64 << 20, dtype=torch.uint8, device="cuda"))

def test_too_much():
    torch.zeros(5 << 30, dtype=torch.uint8, device="cuda")

@pytest.mark.gpu(fallback="cpu")
def test_may_fall_back(gpu_device):
    if gpu_device == "cuda":
        torch.zeros(5 << 30, dtype=torch.uint8, device="cuda")
"""
CONFIG = """
[tool.gpumem.groups.together]
paths = ["test_it.py"]
args = ["--gpumem-simulate=3.81GiB", "--gpumem-oom=cpu"]

[tool.gpumem.groups.apart]
paths = ["test_cpu.py"]
args = ["--gpumem-simulate=3.81GiB"]
mode = "isolated"

[tool.gpumem.groups.both]
paths = ["test_cpu.py"]
args = ["--gpumem-simulate=3.81GiB"]
mode = "parallel"
workers = 2

[tool.gpumem.groups.cpu]
paths = ["test_cpu.py"]
"""


@pytest.fixture
def suite(tmp_path):
    (tmp_path / "test_it.py").write_text(SUITE)
    (tmp_path / "test_cpu.py").write_text("def test_a(): ...\ndef test_b(): ...\n")
    (tmp_path / "pyproject.toml").write_text(CONFIG)
    return tmp_path


def gpumem(directory, *arguments):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("GPUMEM", "PYTEST_"))}
    return subprocess.run(
        [sys.executable, "-m", "pytest_gpumem.cli.main", *arguments],
        cwd=directory, env=clean, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_every_mode_runs_and_is_kept_for_compare(suite):
    done = gpumem(suite, "groups", "together", "apart", "both", "--output", "kept")
    rows = {row[0]: row[1:] for row in map(str.split, done.stdout.splitlines()) if row}

    assert done.returncode == 1, done.stderr  # a test failed
    # mode, tests, failed, OOMs, fallbacks, peak, growth, processes
    assert rows["together"][:8] == ["sequential", "4", "1", "1", "1", "128.0", "128.0", "1"]
    assert rows["apart"][:8] == ["isolated", "2", "0", "0", "0", "0.0", "0.0", "0"]
    assert rows["both"][:4] == ["parallel", "2", "0", "0"]
    assert "together: pytest ended with 1, see kept/together.log" in done.stdout
    run = records.load_run(suite / "kept" / "apart.json")
    assert "--gpumem-isolate=all" in run.command


def test_what_an_earlier_run_left_is_kept_for_compare(suite):
    kept = suite / "kept"
    for expected in (0, 1):
        (suite / "test_cpu.py").write_text(f"def test_cpu(): assert {expected} == 0")
        assert gpumem(suite, "groups", "cpu", "--output", "kept").returncode == expected

    done = gpumem(suite, "compare", kept / "cpu.before.json", kept / "cpu.json",
                  "--min-pass-rate", "98")  # fmt: skip

    assert done.returncode == 1
    assert "the pass rate is 0.00 %, at least 98 % is asked for" in done.stdout


def test_groups_are_listed(suite, capsys):
    assert cli.main(["groups", "--list", "--config", str(suite / "pyproject.toml")]) == 0
    assert capsys.readouterr().out.splitlines()[1] == (
        "apart: isolated, test_cpu.py --gpumem-simulate=3.81GiB"
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no [tool.gpumem.groups.NAME]"),
        ("[tool.gpumem]\ngroups = 3", "has no [tool.gpumem.groups.NAME]"),
        ("[[", "is not TOML: "),
        ("[tool.gpumem.groups.x]\nmode = 'fast'", "mode = 'fast'; allowed are isolated, sequ"),
        ("[tool.gpumem.groups.x]\npath = 'a'", "'path' is unknown; allowed are paths, args, mode"),
        ("[tool.gpumem.groups.x]\npaths = 'a'", "paths = 'a'; allowed is a list of texts"),
        ("[tool.gpumem.groups.x]\nworkers = true", "workers = True; allowed are 'auto' and"),
        ("[tool.gpumem.groups]\nx = 1", "[tool.gpumem.groups.x] is not a table"),
        ("[tool.gpumem.groups.'../x']\n", "allowed in a name are letters, digits"),
    ],
)
def test_bad_groups_are_one_sentence(tmp_path, capsys, text, sentence):
    path = tmp_path / "pyproject.toml"
    path.write_text(text)

    assert cli.main(["groups", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gpumem groups: error: ")
    assert sentence in error
    assert error.count("\n") == 1


def test_an_unknown_group_is_named_with_those_there_are(suite, capsys):
    path = str(suite / "pyproject.toml")

    assert cli.main(["groups", "none", "--config", path]) == 2
    assert "no group 'none'; there are together, apart, both, cpu" in capsys.readouterr().err


def test_processes_count_while_they_overlap():
    from pytest_gpumem.forensics import analysis

    usage = records.CardUsage("GPU-1", 0, 1, 0, 1, 1, 0, 0, None)

    def test(worker, start, duration):
        return records.RecordedTest("t", "passed", duration, worker, (usage,), start=start)

    tests = (test("gw0", 1, 1), test("gw1", 3, 1), test("gw2", 3.5, 1), test("gw0", 1.5, 1))
    run = records.RunRecord(records.SCHEMA, "on", (), True, 3, tests)
    group = groups.Group("x", (), (), "parallel", "3")

    assert groups.Result(group, run, analysis.of_record(run), 0.0, 0).processes == 2


def test_a_fallback_is_what_was_worth_a_card_and_ended_on_the_cpu():
    to_card = records.Route("embedding", 1, "cuda", "there is room")
    full = records.Route("embedding", 1, "cpu", "91% of the card are in use", fell_back=True)
    never = records.Route("parse", 0, "cpu", "'parse' is not worth a card")

    def test(*routes, step=""):
        return records.RecordedTest("t", "passed", 1.0, "", routes=routes, step=step)

    assert [test(full).fell_back, test(full, to_card).fell_back, test(to_card, full).fell_back,
            test(never, to_card).fell_back, test(step="cpu").fell_back, test().fell_back,
            ] == [True, False, True, False, True, False]  # fmt: skip

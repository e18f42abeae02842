"""Bad input is one sentence and costs nothing else; no traceback, no INTERNALERROR."""

from __future__ import annotations

import os

import pytest
from harness import MODES, SIMULATE, run_pytest, write_suite

SUITE = "import pytest\n\ndef test_a(): pass\n"


def error_of(finished):
    assert "Traceback" not in finished.output
    assert "INTERNALERROR" not in finished.output
    assert finished.status == pytest.ExitCode.USAGE_ERROR, finished.output
    lines = [line for line in finished.output.splitlines() if line.startswith("ERROR: ")]
    assert len(lines) == 1, finished.output
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpumem=perhaps"], "--gpumem: 'perhaps' is not a mode; allowed are off, track, on"),
        (["--gpumem-simulate=0B"], "--gpumem-simulate: '0B' is an empty card"),
        (["--gpumem-simulate=-1GiB"], "--gpumem-simulate: '-1GiB' is not a size"),
        (["--gpumem-simulate=900TiB"], "is more than this machine's memory of"),
        (["--gpumem-simulate=100MiB"], "has no room for a context of 384.00 MiB"),
        (["--gpumem-simulate-card=nowhere"], "--gpumem-simulate-card: "),
        (["--gpumem-json=no/such/run.json"], "no/such/run.json': there is no directory"),
        (["--gpumem-json=."], "' is a directory"),
        (["--gpumem-trace=no/such/trace.json"], "--gpumem-trace: cannot write"),
        (["--gpumem-history=test_it.py"], "test_it.py' are ignored: it is not JSON"),
        (["--gpumem-schedule=fast"], "allowed are on, off"),
        (["--gpumem-too-large=run"], "'run' is not an outcome; allowed are fail, skip"),
        (["--gpumem-oom=ignore"], "'ignore' is not an answer; allowed are fail, retry"),
        (["--gpumem-lease-timeout=soon"], "'soon' is not a number of seconds"),
        (["--gpumem-fraction=0"], "'0' is not a part of a card; allowed are auto and numbers"),
        (["--gpumem-fraction=-0.1"], "'-0.1' is not a part of a card"),
        (["--gpumem-top=many"], "--gpumem-top: 'many' is not a number"),
        (["--gpumem-budget=none.toml"], "none.toml'; --gpumem-budget-update writes it"),
        (["--gpumem-budget=no/b.toml", "--gpumem-budget-update"], "there is no directory"),
        (["--gpumem-budget-update"], "which file? --gpumem-budget names it"),
        (["--gpumem-budget-tolerance=-1%"], "'-1%' is not a tolerance; allowed are"),
        (["--gpumem-vram-limit=2 potatoes"], "--gpumem-vram-limit: '2 potatoes' is not a size"),
    ],
)
def test_a_bad_option_is_one_sentence(tmp_path, arguments, sentence):
    write_suite(tmp_path, test_it=SUITE)
    assert sentence in error_of(run_pytest(tmp_path, "-p", "gpumem", *arguments))


@pytest.mark.parametrize("workers", [(), ("-n", "2")])
def test_budgets_that_git_could_not_merge_are_one_sentence(tmp_path, workers):
    write_suite(tmp_path, test_it=SUITE)
    line = '"test_it.py::test_a" = {"A card" = 1}\n'
    (tmp_path / "b.toml").write_text(f"[peaks]\n<<<<<<< HEAD\n{line}=======\n>>>>>>> main\n")
    error = error_of(run_pytest(tmp_path, "-p", "gpumem", "--gpumem-budget=b.toml", *workers))

    assert "b.toml' has a conflict of git at line 2: keep one line for each test" in error


def test_a_bad_ini_value_names_the_ini_file(tmp_path):
    write_suite(tmp_path, test_it=SUITE)
    ini = tmp_path / "pytest.ini"
    ini.write_text(ini.read_text() + "gpumem_vram_limit = much\n")

    assert "gpumem_vram_limit in the ini file: 'much'" in error_of(
        run_pytest(tmp_path, "-p", "gpumem")
    )


def test_a_bad_variable_names_the_environment(tmp_path):
    write_suite(tmp_path, test_it=SUITE)
    finished = run_pytest(tmp_path, "-p", "gpumem", env={"GPUMEM_SIMULATE": "big"})

    assert "GPUMEM_SIMULATE in the environment: 'big'" in error_of(finished)


@pytest.mark.parametrize(
    ("mark", "sentence", "mode"),
    [
        *(('vram_limit("2 potatoes")', "'2 potatoes' is not a size", mode) for mode in MODES),
        ("vram_limit(-1)", "-1 is negative", "plain"),
        ("vram_limit()", "missing a required argument", "plain"),
        ('gpu(memory="2GiB")', "unexpected keyword argument 'memory'", "plain"),
        ('gpu(vram="2 potatoes")', "'2 potatoes' is not a size", "n2"),
        ("gpu(count=0)", "count=0 is not a number of cards", "plain"),
    ],
)
def test_a_bad_mark_is_one_sentence_with_file_and_line(tmp_path, mark, sentence, mode):
    write_suite(tmp_path, test_it=f"{SUITE}\n@pytest.mark.{mark}\ndef test_bad(): pass\n")
    error = error_of(run_pytest(tmp_path, "-p", "gpumem", *MODES[mode]))

    assert error.startswith("ERROR: test_it.py:5: test_it.py::test_bad: mark ")
    assert sentence in error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_json_file_in_a_directory_without_permission_is_refused_at_the_start(tmp_path):
    write_suite(tmp_path, test_it=SUITE)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)

    assert "is not writable" in error_of(
        run_pytest(tmp_path, "-p", "gpumem", f"--gpumem-json={locked}/run.json")
    )


def test_a_json_file_that_cannot_be_written_at_the_end_loses_nothing_else(tmp_path):
    suite = "import shutil\n\ndef test_a(): shutil.rmtree('out')\n"
    write_suite(tmp_path, test_it=suite)
    (tmp_path / "out").mkdir()
    finished = run_pytest(tmp_path, "-p", "gpumem", "--gpumem-json=out/run.json")

    assert "1 passed" in finished.output
    assert "--gpumem-json: cannot write" in finished.output
    assert finished.status != 0
    assert "INTERNALERROR" not in finished.output


def test_a_typo_in_a_mark_does_not_cost_the_simulated_card(tmp_path):
    write_suite(tmp_path, test_it=SUITE)

    assert run_pytest(tmp_path, *SIMULATE, "--gpumem-simulate-context=1MiB").status == 0

"""Budgets in a run: written once, and held in every mode."""

from __future__ import annotations

import pytest
from harness import MODES, ON_WORKERS, SIMULATE, TAKE, run_pytest, write_suite

CARD = "Simulated CUDA card"
BUDGET = ("--gpumem-budget", "budgets.toml")
SUITE = """
GROWN = float(os.environ.get("GROWN", "1"))

@pytest.fixture(scope="module")
def model():
    return take(50 * 1024)

def cached():
    if not KEPT:
        KEPT.append(take(30 * 1024))
    return KEPT[0]

def test_first_of_the_cache():
    cached(), take(1024)

def test_grown():
    take(int(20 * 1024 * GROWN))

def test_beside_a_fixture(model):
    take(3 * 1024)

def test_second_of_the_cache():
    cached(), take(2 * 1024)

@pytest.mark.parametrize("n", [1, 2])
def test_many(n, model):
    # Of what was cached before, up to a MiB more is given out than is asked for.
    parts = [take(1100) for _ in range(10 * n)]

@pytest.mark.xfail
def test_fails():
    take(1024)
    raise AssertionError

def test_asks_late(request):
    take(5 * 1024)
    request.getfixturevalue("model")
"""
CHANGED = (
    SUITE.replace("test_beside_a_fixture", "test_beside_the_model")
    + """
def test_fresh():
    take(4 * 1024)
"""
)
REVERSED = "def pytest_collection_modifyitems(items): items.reverse()\n"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return the file that the suite's first run wrote, and that run."""
    directory = write_suite(tmp_path_factory.mktemp("written"), test_it=TAKE + SUITE)
    arguments = (*SIMULATE, *BUDGET, "--gpumem-budget-update", "--gpumem-json=run.json")
    finished = run_pytest(directory, *arguments)
    return (directory / "budgets.toml").read_text(), finished


def test_an_update_writes_own_peaks(written):
    text, finished = written

    assert finished.status == 0, finished.output
    assert "  7 new\n" in finished.section
    assert "  written: 7 new, 0 lowered, 0 taken out" in finished.section
    assert [line.partition("::")[2] for line in text.splitlines()[2:]] == [
        f'test_asks_late" = {{"{CARD}" = 5_242_880}}',
        f'test_beside_a_fixture" = {{"{CARD}" = 3_145_728}}',
        f'test_first_of_the_cache" = {{"{CARD}" = {{peak = 32_505_856, left = 31_457_280}}}}',
        f'test_grown" = {{"{CARD}" = 20_971_520}}',
        f'test_many[1]" = {{"{CARD}" = 11_264_000}}',
        f'test_many[2]" = {{"{CARD}" = 22_528_000}}',
        f'test_second_of_the_cache" = {{"{CARD}" = 2_097_152}}',
    ]


@pytest.mark.parametrize("mode", ON_WORKERS)
def test_growth_is_found_in_every_mode_and_no_order_is_growth(tmp_path, written, mode):
    write_suite(tmp_path, test_it=TAKE + CHANGED, conftest=REVERSED)
    (tmp_path / "budgets.toml").write_text(written[0])
    arguments = (*SIMULATE, *BUDGET, "--gpumem-json=run.json", *MODES[mode])
    finished = run_pytest(tmp_path, *arguments, env={"GROWN": "1.031"})

    (error,) = [line for line in finished.output.splitlines() if line.startswith("took ")]
    assert error == (
        f"took 20.62 MiB of {CARD}, 634.00 KiB (3.1%) more than its budget of 20.00 MiB in "
        "budgets.toml; if that is meant, raise it there"
    )
    assert finished.outcomes == {"passed": 8, "xfailed": 1, "error": 1}, finished.output
    found = {each.nodeid.partition("::")[2]: each for each in finished.record.budgets}
    assert {name: each.verdict for name, each in found.items() if each.verdict != "within"} == {
        "test_grown": "above",
        "test_fresh": "new",
        "test_beside_the_model": "renamed",
    } | {name: "left" for name in found if name == "test_second_of_the_cache"}
    assert found["test_beside_the_model"].before == "test_it.py::test_beside_a_fixture"
    assert (tmp_path / "budgets.toml").read_text() == written[0]


def test_a_part_of_the_suite_updates_its_own_lines(tmp_path, written):
    write_suite(tmp_path, test_it=TAKE + CHANGED)
    (tmp_path / "budgets.toml").write_text(written[0])
    arguments = (*SIMULATE, *BUDGET, "--gpumem-budget-update", "-k", "grown or fresh or asks")
    finished = run_pytest(tmp_path, *arguments, env={"GROWN": "0.5"})

    assert "  written: 1 new, 1 lowered, 0 taken out" in finished.section
    before, after = written[0].splitlines(), (tmp_path / "budgets.toml").read_text().splitlines()
    (fresh,) = [line for line in after if "test_fresh" in line]
    assert after == sorted(
        [*(line.replace("20_971_520", "10_485_760") for line in before), fresh],
        key=lambda line: (not line.startswith("#"), not line.startswith("["), line),
    )


@pytest.mark.parametrize("workers", [(), ("-n", "1")])
def test_without_a_card_the_report_says_that_nothing_was_compared(tmp_path, workers):
    write_suite(tmp_path, test_it="def test_a(): pass")
    (tmp_path / "budgets.toml").write_text("[peaks]\n")
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    finished = run_pytest(tmp_path, "-p", "gpumem", *BUDGET, *workers, env=hidden)

    assert finished.outcomes == {"passed": 1}
    assert "  there is no card: no test was held to its budget" in finished.section


def test_the_file_of_the_ini_lies_beside_it(tmp_path, written):
    write_suite(tmp_path, test_it=TAKE + SUITE)
    (tmp_path / "budgets.toml").write_text(written[0].replace("20_971_520", "5"))
    ini = tmp_path / "pytest.ini"
    ini.write_text(ini.read_text() + "gpumem_budget = budgets.toml\n")
    (tmp_path / "below").mkdir()
    finished = run_pytest(tmp_path / "below", *SIMULATE, "../test_it.py::test_grown")

    assert finished.outcomes == {"passed": 1, "error": 1}, finished.output
    assert "gone" not in finished.section

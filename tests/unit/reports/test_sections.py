"""The forensic report in each of its forms, from one log that has something of everything."""

from __future__ import annotations

import re

import pytest

from pytest_gpumem.forensics import analysis, compare
from pytest_gpumem.reports import forensics, html, sections

OOM = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 3.81 GiB of "
    "which 1.00 GiB is free. Process 77 has 2.50 GiB memory in use."
)
LOG = f"""============================= test session starts ==============================
collected 4 items
tests/a/test_x.py::test_a PASSED
tests/a/test_x.py::test_b FAILED
tests/b/test_<y>.py::test_c FAILED
tests/b/test_<y>.py::test_d ERROR
=================================== FAILURES ===================================
____________________________________ test_b ____________________________________
E   torch.OutOfMemoryError: {OOM}
____________________________________ test_c ____________________________________
E   ValueError: 'Thing' is not supported
=========================== short test summary info ============================
FAILED tests/a/test_x.py::test_b - torch.OutOfMemoryError: {OOM}
FAILED tests/b/test_<y>.py::test_c - ValueError: 'Thing' is not supported
==================== 2 failed, 1 passed, 1 error in 62.50s =====================
"""


@pytest.fixture
def found(tmp_path):
    path = tmp_path / "run.log"
    path.write_text(LOG)
    return analysis.analyse([str(path)])


def test_every_form_has_every_title_cause_and_row(found):
    told = list(forensics.sections(found, 20))
    text = "\n".join(sections.text(told))
    markdown = "\n".join(sections.markdown(told))
    page = "\n".join(html.page(told, "What <happened>"))

    assert "4 tests in 1 run: 1 passed, 2 failed, 1 error, pass rate 25.0 %, 1 min 2 s" in text
    for form in (text, markdown, page):
        assert "First out of memory" in form
        assert "tried 2.00 GiB" in form
        assert "2.50 GiB" in form
    for title in ("Out of memory", "Other errors", "Files", "Directories"):
        assert title in text
        assert f"## {title}" in markdown
        assert f"<h2>{title}</h2>" in page
    assert "<title>What &lt;happened&gt;</title>" in page
    assert "test_<y>" not in page
    assert "test\\_\\<y\\>.py" in markdown


def test_a_table_that_was_cut_says_by_how_much(found):
    (cut,) = [each for each in forensics.sections(found, 1) if each.title == "Files"]

    assert cut.sentences == ("1 more; --top 2 shows all",)
    assert len(cut.rows) == 1


def test_the_first_screen_says_what_it_leaves_out(found):
    assert "--top 20 shows" in "\n".join(sections.text(forensics.sections(found)))


def test_a_comparison_shows_what_got_worse(found, tmp_path):
    passing = "\n".join(line for line in LOG.splitlines() if not line.startswith(("E ", "_", "F")))
    passing = passing.replace("test_b FAILED", "test_b PASSED")
    passing = passing.replace("2 failed, 1", "1 failed, 2")
    (tmp_path / "before.log").write_text(passing)
    before = analysis.analyse([str(tmp_path / "before.log")])
    told = compare.compare(before, found, compare.Limits())
    shown = "\n".join(sections.text(forensics.compared(told, 20)))

    assert "Comparison" in shown
    assert "pass rate" in shown
    assert "\nWorse\n" in shown
    assert "tests/a/test_x.py::test_b" in shown


def test_no_form_passes_on_what_a_terminal_obeys():
    told = [sections.Section("a\x1b[2J", ("b\x9b31m",), code=("pytest 'c\x07\nd'",))]

    assert list(sections.markdown(told)) == [
        "# a\\x1b[2J", "", "- b\\\\x9b31m", "", "```", "pytest 'c\\x07 d'", "```", "",
    ]  # fmt: skip


LONG, SHORT = "tests/test_search.py::test_batches[a b]", "tests/test_a.py::test_b"
OUT = sections.Section(
    "Out of memory",
    (f"ran before it: {LONG}, {SHORT}",),
    ("test", "worker", ">tried"),
    ((LONG, "gw0", "44.00 MiB"), (SHORT, "gw1", "7.00 MiB")),
    (f"pytest -p gpumem {LONG}",),
)
BESIDE = [
    " test                                     worker      tried",
    f" {LONG}  gw0     44.00 MiB",
    f" {SHORT}                  gw1      7.00 MiB",
]
BELOW = [
    " worker      tried  test", " gw0     44.00 MiB", f"    {LONG}",
    f" gw1      7.00 MiB  {SHORT}",
]  # fmt: skip


@pytest.mark.parametrize(
    ("width", "sentence", "rows"),
    [
        (50, ["  ran before it:", f"      {LONG},", f"      {SHORT}"], BELOW),
        (60, [f"  ran before it: {LONG},", f"      {SHORT}"], BESIDE),
        (120, [f"  ran before it: {LONG}, {SHORT}"], BESIDE),
    ],
)
def test_a_terminal_shows_names_in_one_piece(monkeypatch, capsys, width, sentence, rows):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as a terminal has it
    monkeypatch.setenv("COLUMNS", str(width))
    sections.show([OUT])

    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert shown.splitlines() == (
        ["", "Out of memory", *sentence, *rows, f"    pytest -p gpumem {LONG}"]
    )


def test_a_file_has_a_row_in_a_line(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    sections.show([OUT])

    assert capsys.readouterr().out.splitlines()[3:6] == BESIDE
    assert list(sections.text([OUT]))[3:6] == BESIDE

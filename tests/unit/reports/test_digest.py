"""A run as Markdown: read by a Markdown parser, as a reader would see it."""

from __future__ import annotations

import re

from markdown_it import MarkdownIt

from pytest_gpumem import records
from pytest_gpumem.cli import main as cli
from pytest_gpumem.records import (
    Card,
    CardUsage,
    ChildUsage,
    Holder,
    RecordedTest,
    RunRecord,
    ScopeUsage,
)

MIB = 2**20
HOSTILE = "test_a.py::test_x[a|b*c*`d`<script>&amp;_e_\n# no heading]"


def usage(peak: int, leaked: int = 0, where: str = "") -> CardUsage:
    holders = (Holder(where, (4,), "float32", leaked),) if where else ()
    return CardUsage(
        "GPU-1", 0, peak * MIB, leaked * MIB, 0, 0, 0, 0, None, leaked * MIB, holders
    )  # fmt: skip


def run(*tests: RecordedTest, commit: str = "") -> RunRecord:
    card = Card("GPU-1", "A card", 1000 * MIB)
    return RunRecord(
        records.SCHEMA, "on", (card,), False, 2, tests, command="pytest -n 2", commit=commit
    )


def rendered(tmp_path, capsys, after: RunRecord, *arguments: str) -> str:
    records.save(after, tmp_path / "run.json")
    command = ["report", str(tmp_path / "run.json"), "--format", "markdown", *arguments]
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    return str(MarkdownIt("gfm-like", {"linkify": False}).render(text))


def cells(page: str, title: str) -> list[list[str]]:
    """Return the body of the table below a heading."""
    table = page.partition(f"<h2>{title}</h2>")[2].partition("</table>")[0]
    rows = table.replace("\N{NO-BREAK SPACE}", " ").split("<tr>")[2:]
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]


def test_what_names_of_tests_contain_stays_text(tmp_path, capsys):
    test = RecordedTest(HOSTILE, "passed", 0.5, "", (usage(3, 3, "a.py: CACHE['|']"),))
    page = rendered(tmp_path, capsys, run(test))

    shown = "test_a.py::test_x[a|b*c*`d`&lt;script&gt;&amp;amp;_e_ # no heading]"
    assert cells(page, "Own peaks") == [["3.00 MiB", "&lt;1%", "3.00 MiB", "3.00 MiB", shown]]
    assert cells(page, "Leaks") == [["3.00 MiB", shown, "a.py: CACHE['|']", ""]]


def test_what_holds_a_leak_is_told_with_the_processes_that_hold_the_rest(tmp_path, capsys):
    child = ChildUsage(71, "serve", "GPU-1", "t.py::t", 2 * MIB, leaked=2 * MIB, start=1.0)
    test = RecordedTest(
        "t.py::t", "passed", 0.5, "", (usage(5, 5, "t.py: KEPT"),), children=(child,)
    )
    page = rendered(tmp_path, capsys, run(test))

    held = "t.py: KEPT; process 71 (serve) held 2.00 MiB, still runs"
    assert cells(page, "Leaks") == [["5.00 MiB", "t.py::t", held, ""]]


def test_leaks_of_one_kind_are_one_row_with_what_the_others_sum_to(tmp_path, capsys):
    kept = [
        RecordedTest(f"t.py::t{at}", "passed", 0.5, "", (usage(at, at, f"t.py: KEPT[{at}]"),))
        for at in (1, 2, 3)
    ]
    page = rendered(tmp_path, capsys, run(*kept))

    row = ["3.00 MiB", "t.py::t3", "t.py: KEPT[3]", "3.00 MiB in 2 leaks"]
    assert cells(page, "Leaks") == [row]


def test_nobody_is_called_by_a_comment(tmp_path, capsys):
    test = RecordedTest("t.py::t[@octocat-#12-a@b.c-# x]", "passed", 0.5, "", (usage(3),))
    page = rendered(tmp_path, capsys, run(test))

    # GitHub looks for persons and issues in the text between two tags of the page.
    assert "[@<!-- -->octocat-#<!-- -->12-a@<!-- -->b.c-# x]" in page


def test_a_dollar_begins_no_formula(tmp_path, capsys):
    test = RecordedTest("t.py::t[$x$-$1]", "passed", 0.5, "", (usage(3),))
    page = rendered(tmp_path, capsys, run(test))

    assert "[<span>$</span>x<span>$</span>-<span>$</span>1]" in page


def test_numbers_stay_with_their_units(tmp_path, capsys):
    records.save(run(RecordedTest("t", "passed", 0.5, "", (usage(3),))), tmp_path / "run.json")
    assert cli.main(["report", str(tmp_path / "run.json"), "--format", "markdown"]) == 0
    assert "| 3.00\N{NO-BREAK SPACE}MiB | <1% | ".replace("<", "\\<") in capsys.readouterr().out


def test_what_one_module_left_is_told_once(tmp_path, capsys):
    holder = Holder("t.py: module global KEPT", (4,), "float32", 3 * MIB)
    scopes = tuple(
        ScopeUsage(scope, name, "GPU-1", 3 * MIB, (holder,))
        for scope, name in (("module", "t.py"), ("session", ""))
    )
    test = RecordedTest("t.py::t", "passed", 0.5, "", (usage(5),), scopes=scopes)
    page = rendered(tmp_path, capsys, run(test))

    assert cells(page, "Left by module") == [["3.00 MiB", "t.py", "module global KEPT"]]


def test_what_a_test_needs_is_set_against_the_card(tmp_path, capsys):
    leaks = RecordedTest("t.py::leaks", "passed", 0.5, "", (usage(5, 5, "t.py: KEPT"),))
    took = usage(905)._replace(baseline=5 * MIB)
    fails = RecordedTest(
        "t.py::fails", "failed", 0.5, "", (took,),
        oom="CUDA out of memory. Tried to allocate 200.00 MiB",
    )  # fmt: skip
    page = rendered(tmp_path, capsys, run(leaks, fails))

    assert "<h2>1 test: no cause found (unknown)</h2>" in page
    assert "1.08 GiB was needed on a card of 1000.00 MiB, 5.00 MiB of it left by others" in page


def test_tables_are_bounded_and_say_by_how_much(tmp_path, capsys):
    page = rendered(
        tmp_path,
        capsys,
        run(*(RecordedTest(f"t{n}", "passed", 0.5, "", (usage(n + 1),)) for n in range(30))),
        "--top=4",
    )
    assert len(cells(page, "Own peaks")) == 4
    assert "<li>4 of 30</li>" in page


def test_what_ran_out_is_told_by_cause_and_changes_against_the_base(tmp_path, capsys):
    oom = "CUDA out of memory. Tried to allocate 5.00 GiB"
    felled = RecordedTest("t", "failed", 0.5, "", (usage(20),), oom=oom)
    before = (RecordedTest("t", "passed", 0.5, "", (usage(2),)),)
    records.save(run(*before, commit="abc"), tmp_path / "base.json")
    page = rendered(tmp_path, capsys, run(felled), "--base", str(tmp_path / "base.json"))

    assert "<h2>1 test: one request larger than the card (larger_than_card)</h2>" in page
    assert ["oom", "0", "1", "+1"] in cells(page, "Against commit abc")
    assert cells(page, "Worse") == [["t", "passed", "out of memory"]]
    assert cells(page, "Own peaks that changed") == [["t", "2.00 MiB", "20.00 MiB"]]


def test_a_test_that_needs_more_than_the_card_by_itself_is_told_so(tmp_path, capsys):
    oom = "CUDA out of memory. Tried to allocate 500.00 MiB"
    page = rendered(
        tmp_path, capsys, run(RecordedTest("t", "failed", 0.5, "", (usage(600),), oom=oom))
    )
    assert "<li>1.07 GiB was needed on a card of 1000.00 MiB</li>" in page


def test_a_base_without_markdown_is_refused(tmp_path, capsys):
    records.save(run(), tmp_path / "run.json")
    path = str(tmp_path / "run.json")

    assert cli.main(["report", path, "--base", path]) == 2
    assert "--base: only --format markdown shows it" in capsys.readouterr().err
